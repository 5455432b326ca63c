// Steps with moments in eight bits, which share a scale in groups of 32 elements.
//
// [note: groups and blocks]
// The codes of a group wait for its scale, which waits for the largest of its new moments. So a block of groups is
// stepped first, its new moments waiting in the nearest cache; then the scales and the random words of all its groups
// are computed, a group in each lane; then its codes are stored. Meanwhile a processor would not look far enough ahead
// to keep its memory busy: each group asks for the one that is a block further.
#pragma once

#include "run.h"

namespace nesterov_pp::cpu {
namespace {

// The groups of a block, a vector or more of them for every width of vectors. With twice or half as many a step takes
// longer.
constexpr int kGroups = 32;
// The groups that share a counter (random.h).
constexpr int kSharing = 4;

// Stores N scales (codes.h), and returns them as numbers.
template <int N>
NPP_INLINE typename Lanes<N>::F store_scales(unsigned short* to, const typename Lanes<N>::F& largest) {
  using F = typename Lanes<N>::F;
  using U = typename Lanes<N>::U;
  using Round = Element<Half, N>;
  const F cut = largest < 65504.0f ? largest : F{} + 65504.0f;
  const U nearest = widened<N>(Round::narrow(cut));
  const U least = bits_of<U>(largest > 0.0f) & 1U;
  U bits = nearest < least ? least : nearest;
  bits = choose_lanes(bits_of<U>(largest < __builtin_inff()), bits, U{} + 0x7e00U);
  const auto scales = lower_halves<N>(bits);
  __builtin_memcpy(to, &scales, sizeof(scales));
  return Round::widen(scales);
}

// Copies the scales of a block, of which the last one of a tensor has fewer.
NPP_INLINE void copy_scales(unsigned short* to, const unsigned short* from, int groups) {
  if (groups == kGroups)
    __builtin_memcpy(to, from, kGroups * sizeof(*to));
  else
    for (int g = 0; g < groups; ++g) to[g] = from[g];
}

// The scales of one moment in a block, or what is computed from them, as numbers.
struct Scales {
  alignas(64) float values[kGroups];

  template <int N>
  NPP_INLINE_METHOD void put(int g, const typename Lanes<N>::F& scales) {
    __builtin_memcpy(values + g, &scales, sizeof(scales));
  }

  template <int N>
  static NPP_INLINE_METHOD Scales from(const unsigned short* stored, int groups) {
    alignas(64) unsigned short bits[kGroups] = {};
    copy_scales(bits, stored, groups);
    Scales scales;
    for (int g = 0; g < groups; g += N) scales.put<N>(g, load<Half, N>(reinterpret_cast<const Half*>(bits) + g));
    return scales;
  }
};

// A block that has been stepped: its new moments, the second ones as roots, and what their codes depend on; also its
// new weights, if they have residuals. Computing these beside the step would take more registers than there are.
struct Stepped {
  alignas(64) float w[kGroups * kGroup];
  alignas(64) float m[kGroups * kGroup];
  alignas(64) float root[kGroups * kGroup];
  Scales m_scales;
  Scales factors;  // make the root that a group's scale stands for 255; infinite or NaN where the scale is 0 or NaN
  alignas(64) unsigned int words[kGroups + 2 * kSharing];
  int first_word;  // of the first group
};

// Computes the random words of the groups that begin at element i of a run (random.h).
template <int N>
NPP_INLINE void draw_words(const Noise& noise, long long i, int groups, Stepped& x) {
  constexpr int kCounters = N / 2;  // in a vector
  using W = typename Lanes<N>::W;
  const RoundKeys keys = RoundKeys::from(noise.seed);
  const auto group = static_cast<unsigned long long>(noise.first + i) / kGroup;
  x.first_word = static_cast<int>(group % kSharing);
  const int counters = (x.first_word + groups + kSharing - 1) / kSharing;
#pragma GCC unroll 1
  for (int begin = 0; begin < counters; begin += kCounters) {
    W counter = W{} + (group / kSharing + static_cast<unsigned long long>(begin));
    for (int j = 0; j < kCounters; ++j) counter[j] += static_cast<unsigned long long>(j);
    const W high = (counter >> 32) | 0x80000000ULL;
    const Words<W> drawn = philox<W>({counter, high, W{} + noise.tensor, W{} + noise.step}, keys);
    const W ab = (drawn.a & 0xffffffffULL) | (drawn.b << 32), cd = (drawn.c & 0xffffffffULL) | (drawn.d << 32);
    for (int j = 0; j < kCounters && begin + j < counters; ++j) {
      const unsigned long long pairs[2] = {ab[j], cd[j]};
      for (int word = 0; word < kSharing; ++word)
        x.words[(begin + j) * kSharing + word] = static_cast<unsigned int>(pairs[word / 2] >> (word % 2 * 32));
    }
  }
}

// Asks for the memory of a group before it is needed. (GCC drops calls of functions that only prefetch, so these must
// be inlined.)
template <class S>
NPP_INLINE void prefetch_elements(const S* from) {
  constexpr int kLine = 64;
  for (unsigned long byte = 0; byte < kGroup * sizeof(S); byte += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 1);
}
template <class P>
NPP_INLINE void prefetch_group(const Pointers<P>& p) {
  prefetch_elements(p.w);
  prefetch_elements(p.grad);
  prefetch_elements(p.m);
  if constexpr (P::kMayHaveSecond) prefetch_elements(p.v);
  if constexpr (P::kSplit) prefetch_elements(p.residual);
}

// The bits of the largest moments of a group, lane by lane.
template <int N>
struct Largest {
  typename Lanes<N>::I m, root;
};

// Steps the weights of group g of a block, which begins at element i of a run, with the scales of its moments. Its new
// moments are written to x.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE Largest<N> step_group(const Pointers<P>& p, long long i, int g, const Constants<T>& k, float m_scale,
                                 float v_scale, Stepped& x) {
  using U = typename Lanes<N>::U;
  using I = typename Lanes<N>::I;
  using V = typename Lanes<N>::F;
  Largest<N> largest{};
#pragma GCC unroll 2
  for (int j = 0; j < kGroup; j += N) {
    const Pointers<P> q = p.at(g * kGroup).within(j);
    const int at = g * kGroup + j;
    V m = codes::first_of(load_signed<N>(q.m), m_scale), v{};
    if constexpr (P::kMayHaveSecond) v = codes::second_of(load_unsigned<N>(q.v), v_scale);
    Late<V> none{};
    const V next = update<P>(k.rule, k.c, k.x, load_weights<P, N>(q), load<typename P::G, N>(q.grad), m, v, none);
    U weight_noise{};
    if constexpr (P::kStochastic) {
      const auto words = random_words<N>(k.noise, i + at, counting<N>(2));
      weight_noise = choose_lanes(U(-(counting<N>(1) & 1U)), words.c, words.a) & 0xffffU;
    }
    if constexpr (P::kSplit)
      __builtin_memcpy(x.w + at, &next, sizeof(next));
    else
      store_weights<P, kStreaming, N>(q, next, weight_noise);
    __builtin_memcpy(x.m + at, &m, sizeof(m));
    __builtin_memcpy(x.root + at, &v, sizeof(v));
    // The bits of numbers of at least 0 are in the order of the numbers, and those of NaN are above.
    const I m_bits = bits_of<I>(m) & 0x7fffffff, root_bits = bits_of<I>(v) & 0x7fffffff;
    largest.m = m_bits > largest.m ? m_bits : largest.m;
    largest.root = root_bits > largest.root ? root_bits : largest.root;
  }
  return largest;
}

// Steps the weights of a block's groups, and stores the scales of their moments.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void step_groups(const Pointers<P>& p, long long i, int groups, bool followed, const Constants<T>& k,
                            Stepped& x) {
  using V = typename Lanes<N>::F;
  using I = typename Lanes<N>::I;
  const Scales m_scales = Scales::from<N>(p.m_scale, groups);
  Scales v_scales{};
  if constexpr (P::kMayHaveSecond) v_scales = Scales::from<N>(p.v_scale, groups);
  I m_lanes[kGroups], root_lanes[kGroups];
  for (int g = 0; g < groups; ++g) {
    if (followed) prefetch_group(p.at((g + kGroups) * kGroup));
    const auto largest = step_group<P, kStreaming, N>(p, i, g, k, m_scales.values[g], v_scales.values[g], x);
    m_lanes[g] = largest.m;
    root_lanes[g] = largest.root;
  }
  for (int g = groups; g < kGroups; ++g) m_lanes[g] = root_lanes[g] = I{};

  alignas(64) int m_largest[kGroups], root_largest[kGroups];
  alignas(64) unsigned short m_bits[kGroups], v_bits[kGroups];
  largest_lanes<N>(m_lanes, m_largest);
  if constexpr (P::kMayHaveSecond) {
    largest_lanes<N>(root_lanes, root_largest);
    draw_words<N>(k.noise, i, groups, x);
  }
  for (int g = 0; g < groups; g += N) {
    V largest;
    __builtin_memcpy(&largest, m_largest + g, sizeof(largest));
    x.m_scales.put<N>(g, store_scales<N>(m_bits + g, largest));
    if constexpr (P::kMayHaveSecond) {
      __builtin_memcpy(&largest, root_largest + g, sizeof(largest));
      x.factors.put<N>(g, 255.0f * k.to_root / store_scales<N>(v_bits + g, largest * k.to_root));
    }
  }
  copy_scales(p.m_scale, m_bits, groups);
  if constexpr (P::kMayHaveSecond) copy_scales(p.v_scale, v_bits, groups);
}

// Stores a group's first moments as codes. In a group whose scale is 0 or NaN they are 0.
template <int N>
NPP_INLINE void encode_first(Code* to, const float* from, float scale) {
  using V = typename Lanes<N>::F;
  if (scale > 0) {
#pragma GCC unroll 2
    for (int j = 0; j < kGroup; j += N) {
      V m;
      __builtin_memcpy(&m, from + j, sizeof(m));
      store_nearest<N>(to + j, codes::first_code_of_finite(m, scale));
    }
  } else {
    __builtin_memset(to, 0, kGroup);
  }
}

// Likewise the second moments, from their roots. `word` is the group's random word.
template <int N>
NPP_INLINE void encode_second(Code* to, const float* from, unsigned int word, float factor) {
  using U = typename Lanes<N>::U;
  using I = typename Lanes<N>::I;
  using V = typename Lanes<N>::F;
  if (factor < __builtin_inff()) {
#pragma GCC unroll 2
    for (int j = 0; j < kGroup; j += N) {
      V root;
      __builtin_memcpy(&root, from + j, sizeof(root));
      const U half = ((word >> 16) + (counting<N>(1) + static_cast<unsigned int>(j)) * kNoiseStep) & 0xffffU;
      const V u = __builtin_convertvector(bits_of<I>(half), V) * 0x1p-16f;
      const I code = __builtin_convertvector(codes::second_code_of_finite(root, factor, u), I);
      store_bytes<N>(to + j, bits_of<U>(code));
    }
  } else {
    __builtin_memset(to, 0, kGroup);
  }
}

// Stores the moments of a block as codes, and weights with residuals.
template <class P, bool kStreaming, int N>
NPP_INLINE void encode_groups(const Pointers<P>& p, int groups, const Stepped& x) {
  if constexpr (P::kSplit) {
#pragma GCC unroll 2
    for (int i = 0; i < groups * kGroup; i += N) {
      typename Lanes<N>::F next;
      __builtin_memcpy(&next, x.w + i, sizeof(next));
      store_weights<P, kStreaming, N>(p.within(i), next, typename Lanes<N>::U{});
    }
  }
  for (int g = 0; g < groups; ++g) {
    const int at = g * kGroup;
    encode_first<N>(p.m + at, x.m + at, x.m_scales.values[g]);
    if constexpr (P::kMayHaveSecond)
      encode_second<N>(p.v + at, x.root + at, x.words[x.first_word + g], x.factors.values[g]);
  }
}

// Steps a block's groups, from element i of a run on. If it is `followed` by a whole block, the memory of that one is
// asked for.
template <class P, bool kStreaming, int N, class T>
NPP_INLINE void block_of_groups(const Pointers<P>& p, long long i, int groups, bool followed, const Constants<T>& k) {
  Stepped x;
  step_groups<P, kStreaming, N>(p, i, groups, followed, k, x);
  encode_groups<P, kStreaming, N>(p, groups, x);
}

}  // namespace
}  // namespace nesterov_pp::cpu
