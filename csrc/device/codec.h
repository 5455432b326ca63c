// Conversions between elements of a stored type and scalars to compute with. They round as those of cpu/codec.h do. A
// device has instructions for them, which give the same bits except for the payload of a NaN.
#pragma once

#include "../dtype.h"
#include "../update.h"

#if defined(__CUDA_ARCH__)
#define NPP_UNROLL _Pragma("unroll")
#define NPP_ROLLED _Pragma("unroll 1")
#else
#define NPP_UNROLL
#define NPP_ROLLED
#endif

namespace nesterov_pp::device {

constexpr int kVectorBytes = 16;  // loaded or stored by a thread at once

template <class To, class From>
NPP_HD To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

NPP_HD float widened(float x) { return x; }
NPP_HD double widened(double x) { return x; }
NPP_HD float widened(BFloat16 x) { return bits_of<float>(static_cast<unsigned int>(x.bits) << 16); }
NPP_HD float widened(Half x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#endif
  const unsigned int magnitude = x.bits & 0x7fffU, sign = (x.bits & 0x8000U) << 16;
  if (magnitude < 0x400U) return bits_of<float>(bits_of<unsigned int>(magnitude * 5.9604644775390625e-8f) | sign);
  const unsigned int exponent = magnitude >= 0x7c00U ? 0x7f800000U : 112U << 23;
  return bits_of<float>((magnitude >= 0x7c00U ? (magnitude << 13) | exponent : (magnitude << 13) + exponent) | sign);
}

template <class S>
struct Narrow;
template <>
struct Narrow<float> {
  static NPP_HD float nearest(float x) { return x; }
};
template <>
struct Narrow<double> {
  static NPP_HD double nearest(double x) { return x; }
};
template <>
struct Narrow<BFloat16> {
  static NPP_HD BFloat16 nearest(float x) {
    const auto u = bits_of<unsigned int>(x);
    return rounded(u, 0x7fffU + ((u >> 16) & 1U));
  }
  // Rounds a number that is `roundable` up with the probability that makes the result correct on average, given 16
  // random bits. Only a host calls this; a NaN that is not roundable is what a device makes of it.
  static NPP_HD BFloat16 stochastic(float x, unsigned int noise) {
    unsigned int u = bits_of<unsigned int>(x);
    if (x != x && u != 0x7fc00000U) u = 0x7fffffffU;
    return {static_cast<unsigned short>((u + noise) >> 16)};
  }

  static NPP_HD BFloat16 rounded(unsigned int u, unsigned int increment) {
    if ((u & 0x7fffffffU) > 0x7f800000U) return {0x7fc0};
    return {static_cast<unsigned short>((u + increment) >> 16)};
  }
};
template <>
struct Narrow<Half> {
  static NPP_HD Half nearest(float x) {
    const auto u = bits_of<unsigned int>(x);
    const unsigned int magnitude = u & 0x7fffffffU;
    unsigned int bits = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
    // The addition rounds to a multiple of 2^-24.
    if (magnitude < 0x38800000U) bits = bits_of<unsigned int>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000U;
    if (magnitude >= 0x477ff000U) bits = 0x7c00U;
    if (magnitude > 0x7f800000U) bits = 0x7e00U;
    return {static_cast<unsigned short>(bits | ((u >> 16) & 0x8000U))};
  }
};

// N elements that are loaded and stored at once, in parts of kVectorBytes if they are larger than that.
template <class S, int N>
struct alignas(sizeof(S) * N < kVectorBytes ? sizeof(S) * N : kVectorBytes) Pack {
  S values[N];
};

// 16 random bits: one half of a word.
struct Noise16 {
  unsigned int word;
  bool upper;

  NPP_HD unsigned int bits() const { return upper ? word >> 16 : word & 0xffffU; }
};

// Returns the value, with another NaN in place of 0x7fffffff, the NaN that a device computes: added noise would turn it
// into -0.
NPP_HD double roundable(double value) { return value; }
NPP_HD float roundable(float value) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(min(__float_as_int(value), 0x7fc00000));
#else
  return value == value ? value : bits_of<float>(0x7fc00000U);
#endif
}

#if defined(__CUDA_ARCH__)
// Rounds two values to the nearest elements and packs them into a word, the first in its lower half.
template <class S>
__device__ __forceinline__ unsigned int nearest_pair(float first, float second) {
  unsigned int pair;
  if constexpr (kSame<S, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Returns the bits of `value` plus the lower or the upper half of the noise word.
__device__ __forceinline__ unsigned int noisy(float value, Noise16 noise) {
  if (noise.upper) return (noise.word >> 16) + __float_as_uint(value);
  return __dp2a_lo(noise.word, 0x0001U, __float_as_uint(value));
}
#endif

// Writes numbers, rounded to nearest, to the elements `begin` to `begin + L` of a pack. L is 1 or even.
template <int L, class T, class S, int N>
NPP_HD void put_nearest(Pack<S, N>& pack, int begin, const T (&values)[L]) {
  NPP_UNROLL
  for (int j = 0; j < L; ++j) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(S) == 2) {
      if (j % 2 != 0) continue;
      const unsigned int pair = nearest_pair<S>(values[j], L == 1 ? 0 : values[j + 1]);
      __builtin_memcpy(&pack.values[begin + j], &pair, L == 1 ? sizeof(S) : sizeof(pair));
      continue;
    }
#endif
    pack.values[begin + j] = Narrow<S>::nearest(values[j]);
  }
}

// Like put_nearest, but rounds BFloat16 stochastically, with 16 random bits for each element.
template <int L, class T, class S, int N>
NPP_HD void put_stochastic(Pack<S, N>& pack, int begin, const T (&values)[L], const Noise16 (&noise)[L]) {
  if constexpr (!kSame<S, BFloat16>) {
    put_nearest(pack, begin, values);
  } else {
    NPP_UNROLL
    for (int j = 0; j < L; ++j) {
#if defined(__CUDA_ARCH__)
      if (j % 2 != 0) continue;
      const unsigned int first = noisy(values[j], noise[j]), second = L == 1 ? 0 : noisy(values[j + 1], noise[j + 1]);
      const unsigned int pair = __byte_perm(first, second, 0x7632);
      __builtin_memcpy(&pack.values[begin + j], &pair, L == 1 ? sizeof(S) : sizeof(pair));
#else
      pack.values[begin + j] = Narrow<BFloat16>::stochastic(values[j], noise[j].bits());
#endif
    }
  }
}

// Reads the elements `begin` to `begin + L` of a pack as numbers.
template <int L, class T, class S, int N>
NPP_HD void get(const Pack<S, N>& pack, int begin, T (&values)[L]) {
  NPP_UNROLL
  for (int j = 0; j < L; ++j) {
#if defined(__CUDA_ARCH__)
    if constexpr (kSame<S, BFloat16> && L % 2 == 0) {  // each is half a word: a shift or a mask
      unsigned int pair;
      __builtin_memcpy(&pair, &pack.values[begin + j / 2 * 2], sizeof(pair));
      values[j] = __uint_as_float(j % 2 == 0 ? pair << 16 : pair & 0xffff0000U);
      continue;
    }
#endif
    values[j] = T(widened(pack.values[begin + j]));
  }
}

}  // namespace nesterov_pp::device
