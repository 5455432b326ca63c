// Conversions between N elements of a stored type and a vector to compute with. No torch or standard headers.
#pragma once

#include "../dtype.h"
#include "../random.h"

namespace nesterov_pp::cpu {

#if defined(__x86_64__)
#define NPP_X86 1
#define NPP_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#define NPP_TARGET_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif

#define NPP_INLINE static inline __attribute__((always_inline))
#define NPP_INLINE_METHOD inline __attribute__((always_inline))

template <int N>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * N)));
  typedef double D __attribute__((vector_size(8 * N)));
  typedef unsigned int U __attribute__((vector_size(4 * N)));
  typedef unsigned short H __attribute__((vector_size(2 * N)));
  typedef int I __attribute__((vector_size(4 * N)));
  typedef short S __attribute__((vector_size(2 * N)));
  typedef signed char C __attribute__((vector_size(N)));
  typedef unsigned char B __attribute__((vector_size(N)));
  typedef unsigned long long W __attribute__((vector_size(4 * N)));  // N / 2 lanes
};

template <class To, class From>
NPP_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Selects lanes from `yes` or `no`. A lane of `mask` has all bits set or none.
template <class U>
NPP_INLINE U choose_lanes(const U& mask, const U& yes, const U& no) {
  return (mask & yes) | (~mask & no);
}

// Interleaves the low halves of two vectors of N / 2 lanes of 64 bits into N lanes of 32 bits.
template <int N>
NPP_INLINE typename Lanes<N>::U joined(const typename Lanes<N>::W& low, const typename Lanes<N>::W& high) {
  return bits_of<typename Lanes<N>::U>((low & 0xffffffffULL) | (high << 32));
}

// Numbers known when the masks of shuffles are compiled; GCC moves the lanes one by one if a loop fills a mask.
template <int... k>
struct Numbers {};
template <int N, int... k>
struct UpTo : UpTo<N - 1, N - 1, k...> {};
template <int... k>
struct UpTo<0, k...> {
  using All = Numbers<k...>;
};

// Lane k of the result is lane of[k] of a, or lane of[k] - N of b.
template <int N, int... of>
NPP_INLINE typename Lanes<N>::U shuffled(const typename Lanes<N>::U& a, const typename Lanes<N>::U& b, Numbers<of...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, of...);
#else
  return __builtin_shuffle(a, b, typename Lanes<N>::U{of...});
#endif
}

// Lanes in segments of `width`, of which two neighbours become one of half the width, a's before b's: the larger of
// the first and the second half, lane by lane.
template <int N, int width, int... k>
NPP_INLINE typename Lanes<N>::I halved(const typename Lanes<N>::I& a, const typename Lanes<N>::I& b, Numbers<k...>) {
  using U = typename Lanes<N>::U;
  using I = typename Lanes<N>::I;
  constexpr int kHalf = width / 2;
  const U x = bits_of<U>(a), y = bits_of<U>(b);
  const I low = bits_of<I>(shuffled<N>(x, y, Numbers<k / kHalf * width + k % kHalf...>{}));
  const I high = bits_of<I>(shuffled<N>(x, y, Numbers<k / kHalf * width + k % kHalf + kHalf...>{}));
  return low > high ? low : high;
}

// Writes the largest lane of each vector. `to` has room for N numbers, and for as many as there are vectors.
template <int N, int count, int width = N>
NPP_INLINE void largest_lanes(const typename Lanes<N>::I (&x)[count], int* to) {
  if constexpr (width == 1) {
    __builtin_memcpy(to, x, sizeof(x));
  } else {
    constexpr int kLeft = count > 1 ? count / 2 : 1;
    typename Lanes<N>::I larger[kLeft];
    for (int k = 0; k < kLeft; ++k)
      larger[k] = halved<N, width>(x[2 * k % count], x[(2 * k + 1) % count], typename UpTo<N>::All{});
    largest_lanes<N, kLeft, width / 2>(larger, to);
  }
}

// Numbers of 16 bits become numbers of 32 and back. GCC would convert each half of a vector and join them.
template <int N>
NPP_INLINE typename Lanes<N>::U widened(const typename Lanes<N>::H& x) {
#if NPP_X86
  if constexpr (N >= 8) {
    typename Lanes<N>::U words;
    asm("vpmovzxwd %1, %0" : "=v"(words) : "vm"(x));
    return words;
  }
#endif
  return __builtin_convertvector(x, typename Lanes<N>::U);
}
template <int N>
NPP_INLINE typename Lanes<N>::H lower_halves(const typename Lanes<N>::U& x) {
#if NPP_X86
  if constexpr (N == 16) {
    typename Lanes<N>::H halves;
    asm("vpmovdw %1, %0" : "=v"(halves) : "v"(x));
    return halves;
  }
#endif
  return __builtin_convertvector(x, typename Lanes<N>::H);
}

// N bytes in memory, wherever they lie.
template <int N>
struct Bytes {
  unsigned char values[N];
};

// Bytes become numbers, and words bytes. GCC does not use the instructions for it: it converts to twice or half the
// width at a time.
template <int N>
NPP_INLINE typename Lanes<N>::F load_signed(const void* from) {
  typename Lanes<N>::I words;
#if NPP_X86
  if constexpr (N >= 8) {
    asm("vpmovsxbd %1, %0" : "=v"(words) : "m"(*static_cast<const Bytes<N>*>(from)));
    return __builtin_convertvector(words, typename Lanes<N>::F);
  }
#endif
  typename Lanes<N>::C bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  words = __builtin_convertvector(__builtin_convertvector(bytes, typename Lanes<N>::S), typename Lanes<N>::I);
  return __builtin_convertvector(words, typename Lanes<N>::F);
}

template <int N>
NPP_INLINE typename Lanes<N>::F load_unsigned(const void* from) {
  typename Lanes<N>::I words;
#if NPP_X86
  if constexpr (N >= 8) {
    asm("vpmovzxbd %1, %0" : "=v"(words) : "m"(*static_cast<const Bytes<N>*>(from)));
    return __builtin_convertvector(words, typename Lanes<N>::F);
  }
#endif
  typename Lanes<N>::B bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  words = bits_of<typename Lanes<N>::I>(
      __builtin_convertvector(__builtin_convertvector(bytes, typename Lanes<N>::H), typename Lanes<N>::U));
  return __builtin_convertvector(words, typename Lanes<N>::F);
}

// Stores the low bytes of the lanes.
template <int N>
NPP_INLINE void store_bytes(void* to, const typename Lanes<N>::U& x) {
#if NPP_X86
  if constexpr (N == 16) {
    asm("vpmovdb %1, %0" : "=m"(*static_cast<Bytes<N>*>(to)) : "v"(x));
    return;
  }
#endif
  const auto bytes = __builtin_convertvector(__builtin_convertvector(x, typename Lanes<N>::H), typename Lanes<N>::B);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}

// Stores whole numbers from -128 to 127 nearest to x, ties to even: adding this constant leaves them in the low byte.
template <int N>
NPP_INLINE void store_nearest(void* to, const typename Lanes<N>::F& x) {
  store_bytes<N>(to, bits_of<typename Lanes<N>::U>(x + 12582912.0f));
}

template <class S, int N>
struct Element;

template <int N>
struct Element<float, N> {
  using Value = typename Lanes<N>::F;
  using Stored = Value;
  NPP_INLINE Value widen(const Stored& x) { return x; }
  NPP_INLINE Stored narrow(const Value& x) { return x; }
};

template <int N>
struct Element<double, N> {
  using Value = typename Lanes<N>::D;
  using Stored = Value;
  NPP_INLINE Value widen(const Stored& x) { return x; }
  NPP_INLINE Stored narrow(const Value& x) { return x; }
};

// Rounds to nearest, ties to even, as torch does; or, given 16 random bits, rounds up with the probability that makes
// the result correct on average.
template <int N>
struct Element<BFloat16, N> {
  using Value = typename Lanes<N>::F;
  using Stored = typename Lanes<N>::H;
  using U = typename Lanes<N>::U;
  NPP_INLINE Value widen(const Stored& x) { return bits_of<Value>(widened<N>(x) << 16); }
  NPP_INLINE Stored narrow(const Value& x) { return lower_halves<N>(rounded(x) >> 16); }

  NPP_INLINE Stored narrow(const Value& x, const U& noise) { return lower_halves<N>(rounded(x, noise) >> 16); }

  // The upper half of a lane is the result; the lower half is to be discarded.
  NPP_INLINE U rounded(const Value& x) {
    const U u = bits_of<U>(x);
    return unless_nan(x, u + 0x7fffU + ((u >> 16) & 1U));
  }
  NPP_INLINE U rounded(const Value& x, const U& noise) { return unless_nan(x, bits_of<U>(x) + noise); }
  NPP_INLINE U unless_nan(const Value& x, const U& result) { return x == x ? result : U{} + 0x7fc00000U; }
};

// 2 N bfloat16 values as they lie in N lanes of 32 bits. A shift and a mask separate the even and odd ones, since
// changing the width of the lanes would take shuffles across the vector. On big-endian machines, even and odd merely
// change places.
template <int N>
struct BFloat16Pairs {
  using Value = typename Lanes<N>::F;
  using Stored = typename Lanes<N>::U;
  NPP_INLINE Value first(const Stored& x) { return bits_of<Value>(x << 16); }
  NPP_INLINE Value second(const Stored& x) { return bits_of<Value>(x & 0xffff0000U); }
  NPP_INLINE Stored join(const Value& first, const Value& second) {
    using Round = Element<BFloat16, N>;
    return (Round::rounded(first) >> 16) | (Round::rounded(second) & 0xffff0000U);
  }
  NPP_INLINE Stored join(const Value& first, const Value& second, const Stored& noise1, const Stored& noise2) {
    using Round = Element<BFloat16, N>;
    return (Round::rounded(first, noise1) >> 16) | (Round::rounded(second, noise2) & 0xffff0000U);
  }
};

// Depends on neither hardware conversions nor denormal modes, which differ from processor to processor.
template <int N>
struct Element<Half, N> {
  using Value = typename Lanes<N>::F;
  using Stored = typename Lanes<N>::H;
  using U = typename Lanes<N>::U;

  NPP_INLINE Value widen(const Stored& x) {
    const U h = widened<N>(x);
    const U magnitude = h & 0x7fffU;
    const U normal = (magnitude << 13) + (112U << 23);
    const U special = (magnitude << 13) | 0x7f800000U;                                               // infinity, NaN
    const U small = bits_of<U>(__builtin_convertvector(magnitude, Value) * 5.9604644775390625e-8f);  // 2^-24
    U bits = choose_lanes(bits_of<U>(magnitude < 0x400U), small, normal);
    bits = choose_lanes(bits_of<U>(magnitude >= 0x7c00U), special, bits);
    return bits_of<Value>(bits | ((h & 0x8000U) << 16));
  }

  NPP_INLINE Stored narrow(const Value& x) {
    const U u = bits_of<U>(x);
    const U magnitude = u & 0x7fffffffU;
    const U normal = (magnitude + 0xfffU + ((magnitude >> 13) & 1U) - (112U << 23)) >> 13;
    const U small = bits_of<U>(bits_of<Value>(magnitude) + 0.5f) - 0x3f000000U;  // rounds to a multiple of 2^-24
    U bits = choose_lanes(bits_of<U>(magnitude < 0x38800000U), small, normal);
    bits = choose_lanes(bits_of<U>(magnitude >= 0x477ff000U), U{} + 0x7c00U, bits);
    bits = choose_lanes(bits_of<U>(magnitude > 0x7f800000U), U{} + 0x7e00U, bits);
    return lower_halves<N>(bits | ((u >> 16) & 0x8000U));
  }
};

template <class S, int N>
NPP_INLINE typename Element<S, N>::Value load(const S* from) {
  typename Element<S, N>::Stored stored;
  __builtin_memcpy(&stored, from, sizeof(stored));
  return Element<S, N>::widen(stored);
}

}  // namespace nesterov_pp::cpu
