// Several elements of one thread that are computed together: the device's counterpart of the CPU's vectors.
//
// [note: roots and quotients without branches of their own]
// A correctly rounded root or quotient is an estimate by the hardware, corrected by a few fused multiply-adds. This
// fails if an intermediate result overflows or loses bits; such cases need a slower way. CUDA's own root and division
// test for them every time and branch, which takes a third of the instructions of a step.
//
// Lanes are computed the fast way without branches, and carry a flag `sure` that is false if the result may be wrong. A
// step whose result is not sure is computed again, one element at a time, with CUDA's own root and division.
//   root:      sure if its argument is at least 2^-100. A sure root is at least 2^-50. So is every divisor, since
//              divisors are roots or at least 1, possibly plus numbers that are not negative.
//   quotient:  sure if the divisor is at most 2^21 and the magnitude of the dividend is 0 or at least 2^-100; the
//              function `quotient`, for dividends that are rarely 0, is not sure of a 0. The result is then 0 or at
//              least 2^-121, and the remainders of the correction are multiples of 2^-147, so that float32 holds them.
// All other cases (an overflow, an infinite weight, NaN) make the new weight of the fast way infinite or NaN. One test
// of the new weight at the end finds them, so nothing has to test for them before. Both ways give the bits of the CPU.
#pragma once

#include "codec.h"

namespace nesterov_pp::device {

using nesterov_pp::difference;

template <class T, int N>
struct Lanes {
  T x[N];
  bool sure = true;  // whether CUDA's root and division would have given the same values
};

// Returns the lanes f(0) to f(N - 1).
template <int N, class F>
NPP_HD auto each(bool sure, F f) {
  Lanes<decltype(f(0)), N> result;
  NPP_UNROLL
  for (int j = 0; j < N; ++j) result.x[j] = f(j);
  result.sure = sure;
  return result;
}

template <class T, int N>
NPP_HD Lanes<T, N> operator+(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>(a.sure & b.sure, [&](int j) { return a.x[j] + b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator-(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>(a.sure & b.sure, [&](int j) { return a.x[j] - b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator*(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>(a.sure & b.sure, [&](int j) { return a.x[j] * b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<bool, N> operator==(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>(a.sure & b.sure, [&](int j) { return a.x[j] == b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator+(const Lanes<T, N>& a, T b) {
  return each<N>(a.sure, [&](int j) { return a.x[j] + b; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator+(T a, const Lanes<T, N>& b) {
  return each<N>(b.sure, [&](int j) { return a + b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator*(T a, const Lanes<T, N>& b) {
  return each<N>(b.sure, [&](int j) { return a * b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator*(const Lanes<T, N>& a, T b) {
  return each<N>(a.sure, [&](int j) { return a.x[j] * b; });
}
template <class T, int N>
NPP_HD Lanes<bool, N> operator<(const Lanes<T, N>& a, T b) {
  return each<N>(a.sure, [&](int j) { return a.x[j] < b; });
}
template <class T, int N>
NPP_HD Lanes<bool, N> operator>(const Lanes<T, N>& a, T b) {
  return each<N>(a.sure, [&](int j) { return a.x[j] > b; });
}
template <class T, int N>
NPP_HD Lanes<bool, N> operator>=(const Lanes<T, N>& a, T b) {
  return each<N>(a.sure, [&](int j) { return a.x[j] >= b; });
}
template <class T, int N>
NPP_HD Lanes<T, N> choose(const Lanes<bool, N>& mask, const Lanes<T, N>& yes, const Lanes<T, N>& no) {
  return each<N>(mask.sure & yes.sure & no.sure, [&](int j) { return mask.x[j] ? yes.x[j] : no.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> absolute(const Lanes<T, N>& a) {
  return each<N>(a.sure, [&](int j) { return nesterov_pp::absolute(a.x[j]); });
}

#if defined(__CUDA_ARCH__)
NPP_HD float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
NPP_HD float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif

// Returns the correctly rounded root of `square`, given the inverse of the root to two units in the last place.
NPP_HD float corrected_root(float square, float inverse) {
  const float root = square * inverse;
  return fused(fused(-root, root, square), inverse * 0.5f, root);
}

// Returns the correctly rounded quotient a / b, given 1 / b to one unit in the last place. If b is 2 - 2^-23 times a
// power of 2, the inverse has to be the nearest number, as the hardware's is.
NPP_HD float corrected_quotient(float a, float b, float inverse) {
  const float better = fused(fused(-b, inverse, 1.0f), inverse, inverse);
  float quotient = a * better;
  quotient = fused(fused(-b, quotient, a), better, quotient);
  return fused(fused(-b, quotient, a), better, quotient);
}

// The versions for doubles, and for all numbers on a host.
template <class T, int N>
NPP_HD Lanes<T, N> square_root(const Lanes<T, N>& a) {
  return each<N>(a.sure, [&](int j) { return nesterov_pp::square_root(a.x[j]); });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator/(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>(a.sure & b.sure, [&](int j) { return a.x[j] / b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator/(T a, const Lanes<T, N>& b) {
  return each<N>(b.sure, [&](int j) { return a / b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> quotient(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return a / b;
}

template <class T, int N>
NPP_HD bool is_sure(const Lanes<T, N>& a) {
  return a.sure;
}
// Returns whether all lanes are finite and as CUDA's root and division would have made them.
template <int N>
NPP_HD bool is_sure(const Lanes<float, N>& a) {
  bool sure = a.sure;
  NPP_UNROLL
  for (int j = 0; j < N; ++j) sure &= nesterov_pp::absolute(a.x[j]) < __builtin_inff();
  return sure;
}

#if defined(__CUDA_ARCH__)
constexpr float kLeast = 0x1p-100f, kMost = 0x1p21f;

// Returns whether all lanes are at least `least`, for numbers whose sign bit is 0; NaN passes.
template <int N>
__device__ __forceinline__ bool all_from(float least, const Lanes<float, N>& a) {
  unsigned int lowest = __float_as_uint(a.x[0]);
#pragma unroll
  for (int j = 1; j + 1 < N; j += 2)
    lowest = __vimin3_u32(lowest, __float_as_uint(a.x[j]), __float_as_uint(a.x[j + 1]));
  if (N % 2 == 0) lowest = min(lowest, __float_as_uint(a.x[N - 1]));
  return lowest >= __float_as_uint(least);
}
template <int N>
__device__ __forceinline__ bool all_to(float most, const Lanes<float, N>& a) {
  unsigned int highest = __float_as_uint(a.x[0]);
#pragma unroll
  for (int j = 1; j + 1 < N; j += 2)
    highest = __vimax3_u32(highest, __float_as_uint(a.x[j]), __float_as_uint(a.x[j + 1]));
  if (N % 2 == 0) highest = max(highest, __float_as_uint(a.x[N - 1]));
  return highest <= __float_as_uint(most);
}

template <int N>
__device__ __forceinline__ Lanes<float, N> square_root(const Lanes<float, N>& a) {
  return each<N>(a.sure & all_from(kLeast, a), [&](int j) {
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a.x[j]));
    return corrected_root(a.x[j], inverse);
  });
}

template <int N>
__device__ __forceinline__ Lanes<float, N> estimated_quotient(bool sure, const Lanes<float, N>& a,
                                                              const Lanes<float, N>& b) {
  return each<N>(sure & a.sure & b.sure & all_to(kMost, b), [&](int j) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b.x[j]));
    return corrected_quotient(a.x[j], b.x[j], inverse);
  });
}
template <int N>
__device__ __forceinline__ Lanes<float, N> quotient(const Lanes<float, N>& a, const Lanes<float, N>& b) {
  bool sure = true;
#pragma unroll
  for (int j = 0; j < N; ++j) sure &= nesterov_pp::absolute(a.x[j]) >= kLeast;
  return estimated_quotient(sure, a, b);
}
template <int N>
__device__ __forceinline__ Lanes<float, N> operator/(const Lanes<float, N>& a, const Lanes<float, N>& b) {
  bool sure = true;
#pragma unroll
  for (int j = 0; j < N; ++j) sure &= (nesterov_pp::absolute(a.x[j]) >= kLeast) | (a.x[j] == 0);
  const auto estimate = estimated_quotient(sure, a, b);
  return each<N>(estimate.sure, [&](int j) { return a.x[j] == 0 ? a.x[j] : estimate.x[j]; });  // a 0 keeps its sign
}
template <int N>
__device__ __forceinline__ Lanes<float, N> operator/(float a, const Lanes<float, N>& b) {
  Lanes<float, N> all;
#pragma unroll
  for (int j = 0; j < N; ++j) all.x[j] = a;
  return all / b;
}

// The versions below have no case for infinite weights, which make the new weight infinite or NaN (see the note).
template <int N>
__device__ __forceinline__ Lanes<float, N> decay_of(const Scalars<float>& c, const Lanes<float, N>& w) {
  return c.decay * w;
}
template <int N>
__device__ __forceinline__ Lanes<float, N> difference(const Lanes<float, N>& a, const Lanes<float, N>& b) {
  return a - b;
}
template <int N>
__device__ __forceinline__ Lanes<float, N> overflowed(const Lanes<float, N>& v) {
  Lanes<float, N> result = v;
  result.sure = v.sure & all_to(65519.0f, v);
  return result;
}
#endif

}  // namespace nesterov_pp::device
