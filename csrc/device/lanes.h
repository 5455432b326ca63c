// Several elements of one thread, computed with as one: the device's counterpart of the CPU's vectors.
//
// [note: roots and quotients without branches of their own]
// A correctly rounded root or quotient is an estimate by the hardware and some fused multiply-adds that correct it, if
// nothing on the way overflows or loses bits; for the rest there is a slower way. CUDA's own root and division ask for
// each of them which it is, and branch: a third of the instructions of a step. Lanes are computed with as if all were
// well, and carry along whether that is `sure`; a step whose result is not is computed again, one element at a time,
// with CUDA's. A root is sure from 2^-100 on. So divisors, sums of roots and of what is not negative, are 2^-50 or
// more; a quotient is sure if its divisor is at most 2^21 and its dividend 2^-100 or more, or 0: it is 2^-121 or more
// then, and remainders are multiples of 2^-147. What overflows, infinite weights, and NaN make a new weight that is not
// finite, which is asked for at the end, so that nothing else has to be. The bits are those of the CPU either way.
#pragma once

#include "codec.h"

namespace nesterov_pp::device {

using nesterov_pp::difference;

template <class T, int N>
struct Lanes {
  T x[N];
  bool sure = true;  // whether they are what CUDA's root and division would have made of them
};

// Lane by lane.
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

// The root nearest to that of `square`, given its inverse to two units in the last place.
NPP_HD float corrected_root(float square, float inverse) {
  const float root = square * inverse;
  return fused(fused(-root, root, square), inverse * 0.5f, root);
}

// The quotient nearest to a / b, given 1 / b to one unit in the last place.
NPP_HD float corrected_quotient(float a, float b, float inverse) {
  const float better = fused(fused(-b, inverse, 1.0f), inverse, inverse);
  float quotient = a * better;
  quotient = fused(fused(-b, quotient, a), better, quotient);
  return fused(fused(-b, quotient, a), better, quotient);
}

// Of doubles, and on a host.
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

#if defined(__CUDA_ARCH__)
constexpr float kLeast = 0x1p-100f, kMost = 0x1p21f;

// Whether all are at least `least`, for numbers of which the bits have the sign bit 0; NaN passes.
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
  return each<N>(estimate.sure, [&](int j) { return a.x[j] == 0 ? a.x[j] : estimate.x[j]; });  // with its sign
}
template <int N>
__device__ __forceinline__ Lanes<float, N> operator/(float a, const Lanes<float, N>& b) {
  Lanes<float, N> all;
#pragma unroll
  for (int j = 0; j < N; ++j) all.x[j] = a;
  return all / b;
}

// What is not finite makes the new weight so.
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

// Whether it is finite, and what CUDA's roots and divisions would have made of it.
template <int N>
__device__ __forceinline__ bool is_sure(const Lanes<float, N>& a) {
  bool sure = a.sure;
#pragma unroll
  for (int j = 0; j < N; ++j) sure &= nesterov_pp::absolute(a.x[j]) < __builtin_inff();
  return sure;
}
#endif

}  // namespace nesterov_pp::device
