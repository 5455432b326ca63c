// What a run gives to a pass: pointers, scalars and random words, and the loads and stores of its elements. Like
// pass.h, without torch and standard-library templates.
#pragma once

#include "../codes.h"
#include "codec.h"
#include "kernels.h"

#if NPP_X86
#include <emmintrin.h>
#endif

namespace nesterov_pp::cpu {
namespace {

// Returns the value in the stored type. `noise` is used only if bfloat16 is rounded stochastically.
template <class S, int N, bool kStochastic>
NPP_INLINE typename Element<S, N>::Stored narrowed(const typename Element<S, N>::Value& value,
                                                   const typename Lanes<N>::U& noise) {
  if constexpr (kStochastic && kSame<S, BFloat16>) return Element<S, N>::narrow(value, noise);
  return Element<S, N>::narrow(value);
}

template <class S, int N, bool kStochastic>
NPP_INLINE void store(S* to, const typename Element<S, N>::Value& value, const typename Lanes<N>::U& noise) {
  const auto stored = narrowed<S, N, kStochastic>(value, noise);
  __builtin_memcpy(to, &stored, sizeof(stored));
}

template <class S, int N>
NPP_INLINE void store(S* to, const typename Element<S, N>::Value& value) {
  const auto stored = Element<S, N>::narrow(value);
  __builtin_memcpy(to, &stored, sizeof(stored));
}

// Stores past the caches, to an address aligned to 16 bytes. The processor combines the parts of a cache line.
template <class V>
NPP_INLINE void stream(void* to, const V& stored) {
#if NPP_X86
  if constexpr (sizeof(V) % 16 == 0) {
    __m128i parts[sizeof(V) / 16];
    __builtin_memcpy(parts, &stored, sizeof(V));
    for (unsigned k = 0; k < sizeof(V) / 16; ++k) _mm_stream_si128(static_cast<__m128i*>(to) + k, parts[k]);
    return;
  }
#endif
  __builtin_memcpy(to, &stored, sizeof(V));
}

template <bool kStreaming, class Stored>
NPP_INLINE void store_next(void* to, const Stored& stored) {
  if constexpr (kStreaming)
    stream(to, stored);
  else
    __builtin_memcpy(to, &stored, sizeof(stored));
}

// Advances a pointer that is null if the pass does not have it; only one that corrects does not know it beforehand.
template <class P, bool kHas, class S>
NPP_INLINE S* after(S* base, long long i) {
  if constexpr (P::kCorrects) return base == nullptr ? base : base + i;
  return kHas ? base + i : base;
}

// The pointers of a Run, with their types.
template <class P>
struct Pointers {
  const typename P::W* w;
  typename P::W* out;
  const typename P::G* grad;
  const typename P::G* late;
  typename P::M* m;
  typename P::M* v;
  typename P::M* mean;
  typename P::G* copy;
  typename P::G* ahead;
  signed char* residual;
  unsigned short* m_scale;  // of the moments' groups
  unsigned short* v_scale;

  static constexpr bool kHasSecondScale = P::kCodes && P::kMayHaveSecond;

  // Advances all but the scales, within a group.
  NPP_INLINE_METHOD Pointers within(long long i) const {
    Pointers moved = at(i);
    moved.m_scale = m_scale;
    moved.v_scale = v_scale;
    return moved;
  }
  // `i` is a multiple of the size of a group where moments have groups.
  NPP_INLINE_METHOD Pointers at(long long i) const {
    return {w + i,
            out + i,
            grad + i,
            after<P, false>(late, i),
            m + i,
            after<P, P::kMayHaveSecond>(v, i),
            after<P, false>(mean, i),
            after<P, P::kCopies>(copy, i),
            after<P, false>(ahead, i),
            after<P, P::kSplit>(residual, i),
            after<P, P::kCodes>(m_scale, i / kGroup),
            after<P, kHasSecondScale>(v_scale, i / kGroup)};
  }
};

// The scalars and options of a pass, the same for all its elements.
template <class T>
struct Constants {
  Scalars<T> c;
  CorrectionScalars<T> x;
  Rule rule;
  Noise noise;
  float to_root;  // turns sqrt(v inv_bias2) into sqrt(v)
};

// Returns the words of N counters: the counter of element i of a run plus each of the `offsets` (random.h).
template <int N>
NPP_INLINE Words<typename Lanes<N>::U> random_words(const Noise& noise, long long i,
                                                    const typename Lanes<N>::U& offsets) {
  using U = typename Lanes<N>::U;
  using W = typename Lanes<N>::W;
  const auto first = static_cast<unsigned long long>(noise.first + i) / 2;
  const U low = offsets + static_cast<unsigned int>(first);
  const U carry = -bits_of<U>(low < static_cast<unsigned int>(first));
  const W a = bits_of<W>(low), b = bits_of<W>(carry + static_cast<unsigned int>(first >> 32));
  const W tensor = W{} + noise.tensor, step = W{} + noise.step;
  const RoundKeys keys = RoundKeys::from(noise.seed);
  const Words<W> x = philox<W>({a, b, tensor, step}, keys);
  const Words<W> y = philox<W>({a >> 32, b >> 32, tensor, step}, keys);
  return {joined<N>(x.a, y.a), joined<N>(x.b, y.b), joined<N>(x.c, y.c), joined<N>(x.d, y.d)};
}

template <int N>
NPP_INLINE typename Lanes<N>::U counting(unsigned int divisor) {
  typename Lanes<N>::U lanes{};
  for (unsigned int k = 0; k < N; ++k) lanes[k] = k / divisor;
  return lanes;
}

// Returns the weights that the pass computes with.
template <class P, int N>
NPP_INLINE auto load_weights(const Pointers<P>& p) {
  if constexpr (P::kSplit) {
    const typename Lanes<N>::F rounded = load<BFloat16, N>(reinterpret_cast<const BFloat16*>(p.w));
    return codes::joined<typename Lanes<N>::U>(rounded, load_signed<N>(p.residual));
  } else {
    return load<typename P::W, N>(p.w);
  }
}

template <class P, bool kStreaming, int N, class V>
NPP_INLINE void store_weights(const Pointers<P>& p, const V& next, const typename Lanes<N>::U& noise) {
  using G = typename P::G;
  if constexpr (P::kSplit) {
    using Round = Element<BFloat16, N>;
    using U = typename Lanes<N>::U;
    const U bits = Round::rounded(next) & 0xffff0000U;
    store_nearest<N>(p.residual, codes::residual_of<U>(next, bits_of<typename Lanes<N>::F>(bits)));
    store_next<kStreaming>(p.out, lower_halves<N>(bits >> 16));
  } else if constexpr (P::kCopies) {
    store<typename P::W, N>(p.out, next);
    if (!P::kCorrects || p.copy != nullptr) store_next<kStreaming>(p.copy, Element<G, N>::narrow(next));
  } else {
    store_next<kStreaming>(p.out, narrowed<typename P::W, N, P::kStochastic>(next, noise));
  }
}

}  // namespace
}  // namespace nesterov_pp::cpu
