// The body of every CPU pass, included by the file of each instruction set. No torch and no standard-library templates
// here: the linker could choose a weak symbol compiled for AVX-512 for every caller, which would crash on older
// processors.
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

// True if a pass takes elements in pairs, two in each lane: everything is bfloat16, and nothing is corrected.
template <class P>
constexpr bool kPairs =
    kSame<typename P::W, BFloat16> && kSame<typename P::G, BFloat16> && kSame<typename P::M, BFloat16> && !P::kCorrects;

// Advances a pointer that is null if the pass does not have it, which it knows beforehand unless it corrects.
template <class P, bool has, class S>
NPP_INLINE S* after(S* base, long long i) {
  if constexpr (P::kCorrects) return base == nullptr ? base : base + i;
  return has ? base + i : base;
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
            after < P,
            P::kCodes && P::kMayHaveSecond > (v_scale, i / kGroup)};
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
    store_next<kStreaming>(p.out, __builtin_convertvector(bits >> 16, typename Lanes<N>::H));
  } else if constexpr (P::kCopies) {
    store<typename P::W, N>(p.out, next);
    if (!P::kCorrects || p.copy != nullptr) store_next<kStreaming>(p.copy, Element<G, N>::narrow(next));
  } else {
    store_next<kStreaming>(p.out, narrowed<typename P::W, N, P::kStochastic>(next, noise));
  }
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

// Stores N scales (codes.h), and returns them as numbers.
template <int N>
NPP_INLINE typename Lanes<N>::F store_scales(unsigned short* to, const typename Lanes<N>::F& largest) {
  using F = typename Lanes<N>::F;
  using U = typename Lanes<N>::U;
  using Round = Element<Half, N>;
  const F cut = largest < 65504.0f ? largest : F{} + 65504.0f;
  const U nearest = __builtin_convertvector(Round::narrow(cut), U);
  const U least = bits_of<U>(largest > 0.0f) & 1U;
  U bits = nearest < least ? least : nearest;
  bits = choose_lanes(bits_of<U>(largest < __builtin_inff()), bits, U{} + 0x7e00U);
  const auto scales = __builtin_convertvector(bits, typename Lanes<N>::H);
  __builtin_memcpy(to, &scales, sizeof(scales));
  return Round::widen(scales);
}

// The groups that are stepped together, and share a counter.
constexpr int kGroups = 4;

// Returns the random words of the groups that begin at element i of a run (random.h).
NPP_INLINE Words<unsigned int> words_of_groups(const Noise& noise, long long i) {
  const auto c = static_cast<unsigned long long>(noise.first + i) / (kGroups * kGroup);
  const auto low = static_cast<unsigned int>(c), high = static_cast<unsigned int>(c >> 32) | 0x80000000U;
  return philox<unsigned int>({low, high, noise.tensor, noise.step}, RoundKeys::from(noise.seed));
}

// The new moments of a group whose moments are in eight bits, the second as its root, and the bits of their largest.
// They wait in registers for the group's scales.
template <int N>
struct Moments {
  static constexpr int kVectors = kGroup / N;
  typename Lanes<N>::F m[kVectors], root[kVectors];
  typename Lanes<N>::I m_largest, root_largest;
};

// Steps the weights of a group with the scales of its moments.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void step_group(const Pointers<P>& p, long long i, const Constants<T>& k, float m_scale, float v_scale,
                           Moments<N>& x) {
  using U = typename Lanes<N>::U;
  using I = typename Lanes<N>::I;
  using V = typename Lanes<N>::F;
  x.m_largest = x.root_largest = I{};
#pragma GCC unroll 2
  for (int j = 0; j < Moments<N>::kVectors; ++j) {
    const Pointers<P> q = p.within(j * N);
    V m = codes::first_of(load_signed<N>(q.m), m_scale), v{};
    if constexpr (P::kMayHaveSecond) v = codes::second_of(load_unsigned<N>(q.v), v_scale);
    Late<V> none{};
    const V next = update<P>(k.rule, k.c, k.x, load_weights<P, N>(q), load<typename P::G, N>(q.grad), m, v, none);
    U weight_noise{};
    if constexpr (P::kStochastic) {
      const auto words = random_words<N>(k.noise, i + j * N, counting<N>(2));
      weight_noise = choose_lanes(U(-(counting<N>(1) & 1U)), words.c, words.a) & 0xffffU;
    }
    store_weights<P, kStreaming, N>(q, next, weight_noise);
    x.m[j] = m;
    x.root[j] = v;
    // The bits of numbers of at least 0 are in the order of the numbers, and those of NaN are above.
    const I m_bits = bits_of<I>(m) & 0x7fffffff, root_bits = bits_of<I>(v) & 0x7fffffff;
    x.m_largest = m_bits > x.m_largest ? m_bits : x.m_largest;
    x.root_largest = root_bits > x.root_largest ? root_bits : x.root_largest;
  }
}

// Stores a group's first moments as codes. In a group whose scale is 0 or NaN they are 0.
template <int N>
NPP_INLINE void encode_first(Code* to, const Moments<N>& x, float scale) {
  if (scale > 0) {
#pragma GCC unroll 2
    for (int j = 0; j < Moments<N>::kVectors; ++j)
      store_nearest<N>(to + j * N, codes::first_code_of_finite(x.m[j], scale));
  } else {
    __builtin_memset(to, 0, kGroup);
  }
}

// Likewise the second moments. `word` is the group's random word, and `factor` makes the root that the scale stands for
// 255.
template <int N>
NPP_INLINE void encode_second(Code* to, const Moments<N>& x, unsigned int word, float scale, float factor) {
  using U = typename Lanes<N>::U;
  using I = typename Lanes<N>::I;
  using V = typename Lanes<N>::F;
  if (scale > 0) {
#pragma GCC unroll 2
    for (int j = 0; j < Moments<N>::kVectors; ++j) {
      const U half = ((word >> 16) + (counting<N>(1) + static_cast<unsigned int>(j * N)) * kNoiseStep) & 0xffffU;
      const V u = __builtin_convertvector(bits_of<I>(half), V) * 0x1p-16f;
      const I code = __builtin_convertvector(codes::second_code_of_finite(x.root[j], factor, u), I);
      store_bytes<N>(to + j * N, bits_of<U>(code));
    }
  } else {
    __builtin_memset(to, 0, kGroup);
  }
}

// The groups of a block that have been stepped, and whose moments are still to be stored.
template <int N>
struct Stepped {
  using V = typename Lanes<kGroups>::F;
  Moments<N> moments[kGroups];
  unsigned int words[kGroups];
  V m_scales, v_scales, factors;
};

// Steps the weights of a block of groups, and stores the scales of their moments, which are computed at once.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void step_groups(const Pointers<P>& p, long long i, const Constants<T>& k, Stepped<N>& x) {
  using V = typename Lanes<kGroups>::F;
  const V m_scales = load<Half, kGroups>(reinterpret_cast<const Half*>(p.m_scale));
  V v_scales{};
  if constexpr (P::kMayHaveSecond) v_scales = load<Half, kGroups>(reinterpret_cast<const Half*>(p.v_scale));
  typename Lanes<N>::I lanes[2 * kGroups];
  for (int g = 0; g < kGroups; ++g) {
    step_group<P, kStreaming, N>(p.at(g * kGroup), i + g * kGroup, k, m_scales[g], v_scales[g], x.moments[g]);
    lanes[g] = x.moments[g].m_largest;
    lanes[kGroups + g] = x.moments[g].root_largest;
  }
  alignas(64) int largest[N > 2 * kGroups ? N : 2 * kGroups];
  largest_lanes<N>(lanes, largest);
  V m_largest, root_largest;
  __builtin_memcpy(&m_largest, largest, sizeof(V));
  __builtin_memcpy(&root_largest, largest + kGroups, sizeof(V));
  x.m_scales = store_scales<kGroups>(p.m_scale, m_largest);
  if constexpr (P::kMayHaveSecond) {
    const auto words = words_of_groups(k.noise, i);
    x.words[0] = words.a, x.words[1] = words.b, x.words[2] = words.c, x.words[3] = words.d;
    x.v_scales = store_scales<kGroups>(p.v_scale, root_largest * k.to_root);
    x.factors = 255.0f * k.to_root / x.v_scales;
  }
}

// Stores the moments of a block of groups as codes.
template <class P, int N>
NPP_INLINE void encode_groups(const Pointers<P>& p, const Stepped<N>& x) {
  for (int g = 0; g < kGroups; ++g) {
    encode_first<N>(p.m + g * kGroup, x.moments[g], x.m_scales[g]);
    if constexpr (P::kMayHaveSecond)
      encode_second<N>(p.v + g * kGroup, x.moments[g], x.words[g], x.v_scales[g], x.factors[g]);
  }
}

// The number of elements that a block steps.
template <class P, int N>
constexpr int kBlock = P::kCodes   ? kGroups * kGroup
                       : kPairs<P> ? 2 * N
                                   : N;

// Steps the elements of a block, from element i of the run on.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void block(const Pointers<P>& p, long long i, const Constants<T>& k) {
  if constexpr (P::kCodes) {
    Stepped<N> x;
    step_groups<P, kStreaming, N>(p, i, k, x);
    encode_groups<P, N>(p, x);
  } else if constexpr (kPairs<P>)
    block_of_pairs<P, kStreaming, N>(p, i, k);
  else
    block_of_lanes<P, kStreaming, N>(p, i, k);
}

// Steps as many whole blocks as there are in `count` elements.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void blocks(const Pointers<P>& p, long long count, const Constants<T>& k) {
  constexpr int kElements = kBlock<P, N>;
  if constexpr (P::kCodes) {
    // The codes of a block wait for its scales, so the next block is stepped in the meantime.
    Stepped<N> x[2];
    long long i = 0;
    for (; i + kElements <= count; i += kElements) {
      step_groups<P, kStreaming, N>(p.at(i), i, k, x[i / kElements % 2]);
      if (i > 0) encode_groups<P, N>(p.at(i - kElements), x[(i / kElements + 1) % 2]);
    }
    if (i > 0) encode_groups<P, N>(p.at(i - kElements), x[(i / kElements + 1) % 2]);
  } else {
    for (long long i = 0; i + kElements <= count; i += kElements) block<P, kStreaming, N>(p.at(i), i, k);
  }
}

// Like `blocks`, with a separate loop for each of the usual cases, so that there are no branches on scalars between
// vectors.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void usual_blocks(const Pointers<P>& p, long long count, const Constants<T>& k) {
  if constexpr (P::kMayHaveSecond && !P::kStochastic && !P::kCorrects) {
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

// Steps the elements left after the whole blocks, from element i on, as one block filled up with zeros.
template <class P, int N, class T>
NPP_INLINE void rest(const Pointers<P>& from, long long i, long long count, const Constants<T>& k) {
  constexpr int kElements = kBlock<P, N>;
  constexpr int kScales = kElements / kGroup + 1;
  using W = typename P::W;
  using G = typename P::G;
  using M = typename P::M;
  W w[kElements] = {};
  G grad[kElements] = {}, late[kElements] = {}, copied[kElements] = {}, ahead[kElements] = {};
  M m[kElements] = {}, v[kElements] = {}, mean[kElements] = {};
  signed char residual[kElements] = {};
  unsigned short m_scale[kScales] = {}, v_scale[kScales] = {};
  const long long groups = (count + kGroup - 1) / kGroup;
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
    copy<unsigned short>(m_scale, from.m_scale, groups);
    copy<unsigned short>(v_scale, from.v_scale, groups);
  }
  block<P, false, N>(Pointers<P>{w, w, grad, late, m, v, mean, copied, ahead, residual, m_scale, v_scale}, i, k);
  copy<W>(from.out, w, count);
  copy<M>(from.m, m, count);
  if constexpr (P::kMayHaveSecond) copy<M>(from.v, v, count);
  if constexpr (P::kCopies) copy<G>(from.copy, copied, count);
  if constexpr (P::kCorrects) {
    copy<M>(from.mean, mean, count);
    copy<G>(from.ahead, ahead, count);
  }
  if constexpr (P::kSplit) copy<signed char>(from.residual, residual, count);
  if constexpr (P::kCodes) {
    copy<unsigned short>(from.m_scale, m_scale, groups);
    copy<unsigned short>(from.v_scale, v_scale, groups);
  }
}

// Steps a run with vectors of kBytes.
template <class P, int kBytes>
NPP_INLINE void pass(const Run& r, const StepRow& row, bool streaming) {
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

// Returns the sum of squares from 32 partial sums for every width of vectors, so that the order of additions does not
// depend on the width. There are two vectors of sums because an addition that waited for the previous one would take
// longer than the values take to arrive.
template <class S>
NPP_INLINE double sum_of_squares(const void* values, long long count) {
  constexpr int N = 16;
  using V = typename Element<S, N>::Value;
  const auto* x = static_cast<const S*>(values);
  double total = 0;
  for (long long begin = 0; begin < count; begin += kSquaresRun) {
    const long long end = count - begin < kSquaresRun ? count : begin + kSquaresRun;
    V even{}, odd{};
    long long i = begin;
    for (; i + 2 * N <= end; i += 2 * N) {
      const V first = load<S, N>(x + i), second = load<S, N>(x + i + N);
      even += first * first;
      odd += second * second;
    }
    if (i < end) {
      S left[2 * N] = {};
      __builtin_memcpy(left, x + i, static_cast<unsigned long>(end - i) * sizeof(S));
      const V first = load<S, N>(left), second = load<S, N>(left + N);
      even += first * first;
      odd += second * second;
    }
    const V sums = even + odd;
    for (int k = 0; k < N; ++k) total += static_cast<double>(sums[k]);
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
