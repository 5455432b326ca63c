// The body of every CPU pass, included by the file of each instruction set. No torch and no standard-library templates
// here: the linker could choose a weak symbol compiled for AVX-512 for every caller, which would crash on older
// processors.
#pragma once

#include "groups.h"
#include "run.h"

namespace nesterov_pp::cpu {
namespace {

// True if a pass takes elements in pairs, two in each lane: everything is bfloat16, and nothing is corrected.
template <class P>
constexpr bool kPairs =
    kSame<typename P::W, BFloat16> && kSame<typename P::G, BFloat16> && kSame<typename P::M, BFloat16> && !P::kCorrects;

// Steps 2 N elements of bfloat16; each lane holds an even and an odd element.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void block_of_pairs(const Pointers<P>& p, long long i, const Constants<T>& k) {
  using Pairs = BFloat16Pairs<N>;
  typename Pairs::Stored ws, gs, ms, vs{};
  __builtin_memcpy(&ws, p.w, sizeof(ws));
  __builtin_memcpy(&gs, p.grad, sizeof(gs));
  __builtin_memcpy(&ms, p.m, sizeof(ms));
  if constexpr (P::kMayHaveSecond) __builtin_memcpy(&vs, p.v, sizeof(vs));
  auto m1 = Pairs::first(ms), m2 = Pairs::second(ms), v1 = Pairs::first(vs), v2 = Pairs::second(vs);
  Late<typename Pairs::Value> none{};
  const auto next1 = update<P>(k.rule, k.c, k.x, Pairs::first(ws), Pairs::first(gs), m1, v1, none);
  const auto next2 = update<P>(k.rule, k.c, k.x, Pairs::second(ws), Pairs::second(gs), m2, v2, none);
  if constexpr (P::kStochastic) {
    const auto words = random_words<N>(k.noise, i, counting<N>(1));
    ws = Pairs::join(next1, next2, words.a & 0xffffU, words.c & 0xffffU);
    ms = Pairs::join(m1, m2, words.a >> 16, words.c >> 16);
    if constexpr (P::kMayHaveSecond) vs = Pairs::join(v1, v2, words.b & 0xffffU, words.d & 0xffffU);
  } else {
    ws = Pairs::join(next1, next2);
    ms = Pairs::join(m1, m2);
    if constexpr (P::kMayHaveSecond) vs = Pairs::join(v1, v2);
  }
  __builtin_memcpy(p.m, &ms, sizeof(ms));
  if constexpr (P::kMayHaveSecond) __builtin_memcpy(p.v, &vs, sizeof(vs));
  store_next<kStreaming>(p.out, ws);
}

// Returns the weights minus those that the gradient was computed with. Master weights are first rounded to the
// gradient's dtype, so that the difference is 0 if there was no step in between.
template <class P, int N, class V>
NPP_INLINE V apart(const Pointers<P>& p, const V& w) {
  using G = typename P::G;
  V seen = w;
  if constexpr (P::kCopies) seen = Element<G, N>::widen(Element<G, N>::narrow(w));
  return difference(seen, load<G, N>(p.late));
}

template <class P, bool kStreaming, int N, class T>
NPP_INLINE void block_of_lanes(const Pointers<P>& p, long long i, const Constants<T>& k) {
  using G = typename P::G;
  using M = typename P::M;
  using U = typename Lanes<N>::U;
  using V = decltype(load_weights<P, N>(p));
  const V w = load_weights<P, N>(p);
  V m = load<M, N>(p.m), v{};
  if (P::has_second(k.rule)) v = load<M, N>(p.v);
  Late<V> late{};
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) late.mean = load<M, N>(p.mean);
    if (compares(k.rule.kind)) late.apart = apart<P, N>(p, w);
  }
  const V next = update<P>(k.rule, k.c, k.x, w, load<G, N>(p.grad), m, v, late);
  U weight_noise{}, m_noise{}, v_noise{}, mean_noise{};
  if constexpr (P::kStochastic) {
    const auto words = random_words<N>(k.noise, i, counting<N>(2));
    const U odd = -(counting<N>(1) & 1U);
    const U first = choose_lanes(odd, words.c, words.a), second = choose_lanes(odd, words.d, words.b);
    weight_noise = first & 0xffffU;
    m_noise = first >> 16;
    v_noise = second & 0xffffU;
    mean_noise = second >> 16;
  }
  store<M, N, P::kStochastic>(p.m, m, m_noise);
  if (P::has_second(k.rule)) store<M, N, P::kStochastic>(p.v, v, v_noise);
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) store<M, N, P::kStochastic>(p.mean, late.mean, mean_noise);
    if (p.ahead != nullptr) store<G, N>(p.ahead, late.ahead);
  }
  store_weights<P, kStreaming, N>(p, next, weight_noise);
}

// The number of elements that are stepped together.
template <class P, int N>
constexpr int kBlock = P::kCodes   ? kGroups * kGroup
                       : kPairs<P> ? 2 * N
                                   : N;

// Steps the elements of a block, from element i of the run on.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void block(const Pointers<P>& p, long long i, const Constants<T>& k) {
  if constexpr (kPairs<P>)
    block_of_pairs<P, kStreaming, N>(p, i, k);
  else
    block_of_lanes<P, kStreaming, N>(p, i, k);
}

// Steps as many whole blocks as there are in `count` elements.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void blocks(const Pointers<P>& p, long long count, const Constants<T>& k) {
  constexpr int kElements = kBlock<P, N>;
  if constexpr (P::kCodes) {
    for (long long i = 0; i + kElements <= count; i += kElements)
      block_of_groups<P, kStreaming, N>(p.at(i), i, kGroups, i + 2 * kElements <= count, k);
  } else {
    for (long long i = 0; i + kElements <= count; i += kElements) block<P, kStreaming, N>(p.at(i), i, k);
  }
}

// Like `blocks`, with a separate loop for each of the usual cases, so that there are no branches on scalars between
// vectors. Groups have enough other work beside them.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void usual_blocks(const Pointers<P>& p, long long count, const Constants<T>& k) {
  if constexpr (P::kMayHaveSecond && !P::kStochastic && !P::kCorrects && !P::kCodes) {
    if (!k.c.has_l2 && k.c.first.is_small) {
      Constants<T> known = k;
      known.c.has_l2 = false;
      known.c.first.is_small = true;
      if (k.c.has_decay) {
        known.c.has_decay = true;
        blocks<P, kStreaming, N>(p, count, known);
      } else {
        known.c.has_decay = false;
        blocks<P, kStreaming, N>(p, count, known);
      }
      return;
    }
  }
  blocks<P, kStreaming, N>(p, count, k);
}

template <class S>
NPP_INLINE void copy(S* to, const S* from, long long count) {
  if (to != nullptr && from != nullptr) __builtin_memcpy(to, from, static_cast<unsigned long>(count) * sizeof(S));
}

// Elements of a run that do not fill a block, copied and filled up with zeros.
template <class P, int kElements>
struct Filled {
  static constexpr int kScales = (kElements + kGroup - 1) / kGroup;
  using W = typename P::W;
  using G = typename P::G;
  using M = typename P::M;
  W w[kElements] = {};
  G grad[kElements] = {}, late[kElements] = {}, copied[kElements] = {}, ahead[kElements] = {};
  M m[kElements] = {}, v[kElements] = {}, mean[kElements] = {};
  signed char residual[kElements] = {};
  unsigned short m_scale[kScales] = {}, v_scale[kScales] = {};

  NPP_INLINE_METHOD Pointers<P> pointers() {
    return {w, w, grad, late, m, v, mean, copied, ahead, residual, m_scale, v_scale};
  }

  NPP_INLINE_METHOD void take(const Pointers<P>& from, long long count) {
    copy<W>(w, from.w, count);
    copy<G>(grad, from.grad, count);
    copy<M>(m, from.m, count);
    if constexpr (P::kMayHaveSecond) copy<M>(v, from.v, count);
    if constexpr (P::kCorrects) {
      copy<G>(late, from.late, count);
      copy<M>(mean, from.mean, count);
    }
    if constexpr (P::kSplit) copy<signed char>(residual, from.residual, count);
    if constexpr (P::kCodes) {
      copy<unsigned short>(m_scale, from.m_scale, kScales);
      copy<unsigned short>(v_scale, from.v_scale, kScales);
    }
  }

  NPP_INLINE_METHOD void give(const Pointers<P>& to, long long count) const {
    copy<W>(to.out, w, count);
    copy<M>(to.m, m, count);
    if constexpr (P::kMayHaveSecond) copy<M>(to.v, v, count);
    if constexpr (P::kCopies) copy<G>(to.copy, copied, count);
    if constexpr (P::kCorrects) {
      copy<M>(to.mean, mean, count);
      copy<G>(to.ahead, ahead, count);
    }
    if constexpr (P::kSplit) copy<signed char>(to.residual, residual, count);
    if constexpr (P::kCodes) {
      copy<unsigned short>(to.m_scale, m_scale, kScales);
      copy<unsigned short>(to.v_scale, v_scale, kScales);
    }
  }
};

// Steps the elements left after the whole blocks, from element i on.
template <class P, int N, class T>
NPP_INLINE void rest(const Pointers<P>& from, long long i, long long count, const Constants<T>& k) {
  if constexpr (P::kCodes) {
    // Whole groups where they lie, then the others in a copy; by one loop, so that there is one piece of code for both.
    const long long whole = count - count % kGroup, left = count - whole;
    const Pointers<P> last = from.at(whole);
    Filled<P, kGroup> filled;
    if (left > 0) filled.take(last, left);
#pragma GCC unroll 1
    for (long long begin = 0; begin < count; begin += begin < whole ? whole : kGroup) {
      const bool here = begin < whole;
      block_of_groups<P, false, N>(here ? from : filled.pointers(), i + begin,
                                   here ? static_cast<int>(whole / kGroup) : 1, false, k);
    }
    if (left > 0) filled.give(last, left);
  } else {
    Filled<P, kBlock<P, N>> filled;
    filled.take(from, count);
    block<P, false, N>(filled.pointers(), i, k);
    filled.give(from, count);
  }
}

// Steps a run with vectors of kBytes.
template <class P, int kBytes>
NPP_INLINE void pass(const Run& r, const StepRow& row, [[maybe_unused]] bool streaming) {
  using T = typename P::T;
  using W = typename P::W;
  using G = typename P::G;
  using M = typename P::M;
  constexpr int N = kBytes / static_cast<int>(sizeof(T));
  Constants<T> k{row.coefficients.as<T>(), {}, r.rule, r.noise, 1};
  if constexpr (P::kCodes && P::kMayHaveSecond)
    k.to_root = static_cast<float>(1 / square_root(row.coefficients.inv_bias2));
  if constexpr (P::kCorrects) k.x = row.correction.as<T>();
  const Pointers<P> p{static_cast<const W*>(r.weight),
                      static_cast<W*>(r.weight_out),
                      static_cast<const G*>(r.grad),
                      static_cast<const G*>(r.late),
                      static_cast<M*>(r.exp_avg),
                      static_cast<M*>(r.exp_avg_sq),
                      static_cast<M*>(r.mean),
                      static_cast<G*>(r.copy),
                      static_cast<G*>(r.ahead),
                      static_cast<signed char*>(r.residual),
                      static_cast<unsigned short*>(r.exp_avg_scale),
                      static_cast<unsigned short*>(r.exp_avg_sq_scale)};
  const long long whole = r.count - r.count % kBlock<P, N>;
#if NPP_X86
  const void* next = P::kCopies ? r.copy : r.weight_out;
  if (!P::kCorrects && streaming && reinterpret_cast<unsigned long>(next) % 16 == 0) {
    usual_blocks<P, true, N>(p, whole, k);
    _mm_sfence();  // streamed stores are weakly ordered: publish them before the thread joins
  } else {
    usual_blocks<P, false, N>(p, whole, k);
  }
#else
  usual_blocks<P, false, N>(p, whole, k);
#endif
  if (whole < r.count) rest<P, N>(p.at(whole), whole, r.count - whole, k);
}

// Adds the squares of a vector of elements to each of the sums.
template <class S, int N, int vectors>
NPP_INLINE void add_squares(typename Element<S, N>::Value (&sums)[vectors], const S* from) {
  for (int j = 0; j < vectors; ++j) {
    const auto value = load<S, N>(from + j * N);
    sums[j] += value * value;
  }
}

// Returns the sum of squares from 32 partial sums for every width of vectors, so that the order of additions does not
// depend on the width. There are at least two vectors of sums because an addition that waited for the previous one
// would take longer than the values take to arrive.
template <class S, int kBytes>
NPP_INLINE double sum_of_squares(const void* values, long long count) {
  constexpr int N = kBytes / static_cast<int>(sizeof(typename Compute<S>::type));
  constexpr int kSums = 32, kVectors = kSums / N;
  using V = typename Element<S, N>::Value;
  const auto* x = static_cast<const S*>(values);
  double total = 0;
  for (long long begin = 0; begin < count; begin += kSquaresRun) {
    const long long end = count - begin < kSquaresRun ? count : begin + kSquaresRun;
    V sums[kVectors]{};
    long long i = begin;
    for (; i + kSums <= end; i += kSums) add_squares<S, N>(sums, x + i);
    if (i < end) {
      S left[kSums] = {};
      __builtin_memcpy(left, x + i, static_cast<unsigned long>(end - i) * sizeof(S));
      add_squares<S, N>(sums, left);
    }
    for (int j = 0; j < kVectors / 2; ++j) {
      const V pairs = sums[j] + sums[j + kVectors / 2];
      for (int k = 0; k < N; ++k) total += static_cast<double>(pairs[k]);
    }
  }
  return total;
}

// Returns the sum of squares of a dtype; `of` instantiates the template of one instruction set.
template <class Of>
NPP_INLINE Squares squares_of(Dtype dtype, Of of) {
  switch (dtype) {
    case Dtype::kDouble:
      return of(double{});
    case Dtype::kBFloat16:
      return of(BFloat16{});
    case Dtype::kHalf:
      return of(Half{});
    default:
      return of(float{});
  }
}

}  // namespace
}  // namespace nesterov_pp::cpu
