// Several elements of one thread, computed with as one: the device's counterpart of the CPU's vectors.
//
// [note: roots and quotients without branches of their own]
// A correctly rounded root or quotient is an estimate by the hardware and some fused multiply-adds that correct it, if
// nothing on the way overflows or loses bits; for the rest there is a slower way. CUDA's own root and division ask for
// each of them which it is, and branch: a third of the instructions of a step. `taken` makes the same estimates and
// corrections for some elements, asks once for all of them, and else has CUDA compute them one by one. With
// 2^-100 <= momentum, square <= 2^20 and eps <= 2^20, root + eps is from 2^-50 to 2^21, the quotient from
// 2^-121 to 2^70, and remainders are multiples of 2^-147, so that every step is exact where it has to be. The bits are
// those of the CPU either way. Weights that are not finite, and second moments that overflow where they are stored, go
// the slow way too, which spares the others a question.
#pragma once

#include "codec.h"

namespace nesterov_pp::device {

template <class T, int N>
struct Lanes {
  T x[N];
};

// Lane by lane.
template <int N, class F>
NPP_HD auto each(F f) {
  Lanes<decltype(f(0)), N> result;
  NPP_UNROLL
  for (int j = 0; j < N; ++j) result.x[j] = f(j);
  return result;
}

template <class T, int N>
NPP_HD Lanes<T, N> operator+(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>([&](int j) { return a.x[j] + b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator-(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>([&](int j) { return a.x[j] - b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator*(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>([&](int j) { return a.x[j] * b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator/(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>([&](int j) { return a.x[j] / b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator+(const Lanes<T, N>& a, T b) {
  return each<N>([&](int j) { return a.x[j] + b; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator+(T a, const Lanes<T, N>& b) {
  return each<N>([&](int j) { return a + b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator*(T a, const Lanes<T, N>& b) {
  return each<N>([&](int j) { return a * b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator*(const Lanes<T, N>& a, T b) {
  return each<N>([&](int j) { return a.x[j] * b; });
}
template <class T, int N>
NPP_HD Lanes<T, N> operator/(T a, const Lanes<T, N>& b) {
  return each<N>([&](int j) { return a / b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<bool, N> operator==(const Lanes<T, N>& a, const Lanes<T, N>& b) {
  return each<N>([&](int j) { return a.x[j] == b.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<bool, N> operator<(const Lanes<T, N>& a, T b) {
  return each<N>([&](int j) { return a.x[j] < b; });
}
template <class T, int N>
NPP_HD Lanes<bool, N> operator>(const Lanes<T, N>& a, T b) {
  return each<N>([&](int j) { return a.x[j] > b; });
}
template <class T, int N>
NPP_HD Lanes<bool, N> operator>=(const Lanes<T, N>& a, T b) {
  return each<N>([&](int j) { return a.x[j] >= b; });
}
template <class T, int N>
NPP_HD Lanes<T, N> choose(const Lanes<bool, N>& mask, const Lanes<T, N>& yes, const Lanes<T, N>& no) {
  return each<N>([&](int j) { return mask.x[j] ? yes.x[j] : no.x[j]; });
}
template <class T, int N>
NPP_HD Lanes<T, N> square_root(const Lanes<T, N>& a) {
  return each<N>([&](int j) { return nesterov_pp::square_root(a.x[j]); });
}
template <class T, int N>
NPP_HD Lanes<T, N> absolute(const Lanes<T, N>& a) {
  return each<N>([&](int j) { return nesterov_pp::absolute(a.x[j]); });
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

#if defined(__CUDA_ARCH__)
constexpr unsigned int kLeast = (127U - 100U) << 23, kMost = (127U + 20U) << 23;  // bits of 2^-100 and 2^20

// `most`: bits of the largest square.
__device__ __forceinline__ bool are_easy(float momentum, float square, unsigned int most) {
  const unsigned int m = __float_as_uint(momentum);
  const bool easy = m + m - 2 * kLeast <= 2 * (kMost - kLeast);
  return easy & (__float_as_uint(square) - kLeast <= most - kLeast);
}

__device__ __forceinline__ float easily_normalised(float momentum, float square, float eps) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(square));
  const float divisor = corrected_root(square, inverse) + eps;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
  return corrected_quotient(momentum, divisor, inverse);
}

template <class P, int N>
__device__ __forceinline__ Lanes<float, N> taken(const Scalars<float>& c, const Lanes<float, N>& w,
                                                 const Lanes<float, N>& momentum, Lanes<float, N>& v) {
  const Lanes<float, N> square = v * c.inv_bias2;
  // The largest float16, as a square: what is above it may overflow.
  const unsigned int most = P::kHalfMoments ? __float_as_uint(fminf(65504.0f * c.inv_bias2, 0x1p20f)) : kMost;
  bool easy = c.eps <= 0x1p20f;
#pragma unroll
  for (int j = 0; j < N; ++j)
    easy &= are_easy(momentum.x[j], square.x[j], most) & (nesterov_pp::absolute(w.x[j]) < __builtin_inff());
  Lanes<float, N> result;
  if (easy) {
    result = each<N>([&](int j) { return easily_normalised(momentum.x[j], square.x[j], c.eps); });
    return c.has_decay ? c.decay * w + result : result;
  }
  // One element at a time, so that the code is there once.
  Lanes<float, N> ws = w, ms = momentum;
#pragma unroll 1
  for (int k = 0; k < N; ++k) {
    float direction = ms.x[0], first = v.x[0];
    if constexpr (P::kHalfMoments) first = overflowed(first);
    // Parameters that have had no gradient yet are not to be slow.
    if (direction != 0 || !(first >= 0) || !(c.eps > 0))
      direction = __fdiv_rn(direction, __fadd_rn(__fsqrt_rn(__fmul_rn(first, c.inv_bias2)), c.eps));
    const float last = c.has_decay ? __fadd_rn(decay_of(c, ws.x[0]), direction) : direction;
#pragma unroll
    for (int j = 0; j + 1 < N; ++j) {
      ws.x[j] = ws.x[j + 1];
      ms.x[j] = ms.x[j + 1];
      v.x[j] = v.x[j + 1];
      result.x[j] = result.x[j + 1];
    }
    v.x[N - 1] = first;
    result.x[N - 1] = last;
  }
  return result;
}
#endif

}  // namespace nesterov_pp::device
