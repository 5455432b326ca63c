// The elements of a pass in registers: random bits, numbers, and the weights in each of their forms.
#pragma once

#include "launch.h"
#include "small.h"

namespace nesterov_pp::device {

// Random bits for L elements, from element i + begin of a chunk on (random.h). i and begin are even unless L is 1.
template <int L>
struct Bits {
  Noise16 weight[L], m[L], v[L], mean[L];
};

template <int L, class P>
NPP_HD Bits<L> random_bits(const Constants<P>& k, int i, int begin) {
  Bits<L> bits{};
  const unsigned int pair = k.first_pair + static_cast<unsigned int>(i) / 2 + static_cast<unsigned int>(begin) / 2;
  NPP_UNROLL
  for (int j = 0; j < L; j += 2) {
    const auto words = k.philox(pair + static_cast<unsigned int>(j) / 2, k.keys);
    NPP_UNROLL
    for (int half = 0; half < 2 && j + half < L; ++half) {
      const bool odd = L == 1 ? i % 2 != 0 : half != 0;
      const unsigned int one = odd ? words.c : words.a, other = odd ? words.d : words.b;
      bits.weight[j + half] = Noise16{one, false};
      bits.m[j + half] = Noise16{one, true};
      bits.v[j + half] = Noise16{other, false};
      bits.mean[j + half] = Noise16{other, true};
    }
  }
  return bits;
}

// Returns L elements of a pack, from element `begin` on.
template <int L, class T, class S, int N>
NPP_HD Lanes<T, L> lanes_of(const Pack<S, N>& pack, int begin) {
  Lanes<T, L> lanes;
  get<L>(pack, begin, lanes.x);
  return lanes;
}

// Returns weights as they are compared with late weights: master weights are rounded to the gradients' dtype, so that
// the difference is 0 if there was no step in between.
template <class P, class T, int L>
NPP_HD Lanes<T, L> seen(const Lanes<T, L>& w) {
  if constexpr (!P::kCopies) return w;
  Pack<typename P::G, L> rounded;
  put_nearest(rounded, 0, w.x);
  return lanes_of<L, T>(rounded, 0);
}

// Rounds L numbers into a pack, stochastically with `noise` if the pass does so.
template <class P, int L, class T, class S, int N>
NPP_HD void put(Pack<S, N>& pack, int begin, const T (&values)[L], const Noise16 (&noise)[L]) {
  if constexpr (P::kStochastic)
    put_stochastic(pack, begin, values, noise);
  else
    put_nearest(pack, begin, values);
}

// N residuals: one, or words of four.
template <class P, int N>
using Residuals = std::conditional_t<P::kSplit && N != 1, CodeWords<P::kSplit ? N : 4>, Pack<Code, 1>>;

// Loads N codes, one or words of four.
template <int N>
NPP_HD auto load_codes(const Code* codes, int i) {
  if constexpr (N == 1)
    return load<1>(codes, i);
  else
    return load<N / kCodesAtOnce>(reinterpret_cast<const unsigned int*>(element(codes, i)), 0);
}
NPP_HD void store_codes(Code* codes, int i, const Pack<Code, 1>& code) { store(codes, i, code); }
template <int N>
NPP_HD void store_codes(Code* codes, int i, const Pack<unsigned int, N>& words) {
  store(reinterpret_cast<unsigned int*>(element(codes, i)), 0, words);
}

// N weights as they are stored.
template <class P, int N>
struct Weights {
  Pack<Stored<typename P::W>, N> stored;
  Pack<typename P::G, P::kCopies ? N : 1> copy;  // of master weights
  Residuals<P, N> residual;                      // of weights in 24 bits
};

template <class P, int N>
NPP_HD Weights<P, N> load_weights(const Pointers<P>& p, int i) {
  Weights<P, N> w{};
  w.stored = load<N>(p.w, i);
  if constexpr (P::kSplit) w.residual = load_codes<N>(p.residual, i);
  return w;
}

template <class P, int N>
NPP_HD void store_weights(const Pointers<P>& p, int i, const Weights<P, N>& w) {
  store(p.out, i, w.stored);
  if constexpr (P::kCopies) store(p.copy, i, w.copy);
  if constexpr (P::kSplit) store_codes(p.residual, i, w.residual);
}

// Returns L weights as numbers, from element `begin` on. If L is not 1, those in 24 bits are finite; otherwise the
// result is infinite or NaN.
template <int L, class P, int N>
NPP_HD Lanes<typename P::T, L> numbers_of(const Weights<P, N>& w, int begin) {
  auto lanes = lanes_of<L, typename P::T>(w.stored, begin);
  if constexpr (P::kSplit && L == 1)
    lanes.x[0] =
        codes::joined<unsigned int>(lanes.x[0], float(static_cast<signed char>(w.residual.values[begin].bits)));
  else if constexpr (P::kSplit)
    join(lanes.x, w.residual.values[begin / kCodesAtOnce]);
  return lanes;
}

// Rounds L numbers to weights. If L is not 1, weights in 24 bits have to be sure (`are_sure`).
template <class P, int N, int L>
NPP_HD void put_weights(Weights<P, N>& w, int begin, const typename P::T (&values)[L], const Noise16 (&noise)[L]) {
  if constexpr (!P::kSplit) {
    put<P>(w.stored, begin, values, noise);
    if constexpr (P::kCopies) put_nearest(w.copy, begin, values);
  } else {
    put_nearest(w.stored, begin, values);
    const auto rounded = lanes_of<L, float>(w.stored, begin);
    if constexpr (L == 1)
      w.residual.values[begin].bits =
          static_cast<unsigned char>(nearest_byte(codes::residual_of<unsigned int>(values[0], rounded.x[0])));
    else
      w.residual.values[begin / kCodesAtOnce] = residuals_of(values, rounded.x);
  }
}

// Returns whether new weights are finite, also once they are rounded to weights in 24 bits, and as CUDA's root and
// division would have made them.
template <class P, class T, int L>
NPP_HD bool are_sure(const Lanes<T, L>& next) {
  if constexpr (P::kSplit) {
    bool sure = next.sure;
    NPP_UNROLL
    for (int j = 0; j < L; ++j) sure &= nesterov_pp::absolute(next.x[j]) < 0x1.ffp127f;
    return sure;
  } else {
    return is_sure(next);
  }
}

}  // namespace nesterov_pp::device
