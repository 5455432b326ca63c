// Steps with moments in eight bits, which share a scale in groups of 32 elements.
//
// [note: groups and blocks]
// The codes of a group wait for its scale, which waits for the largest of its new moments. So four groups, a block, are
// stepped one after the other and their scales computed at once; and the codes of a block are stored after the next
// block has been stepped (pass.h), so that a processor has other work while it waits.
#pragma once

#include "run.h"

namespace nesterov_pp::cpu {
namespace {

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

}  // namespace
}  // namespace nesterov_pp::cpu
