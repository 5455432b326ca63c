// Several elements of one thread, computed with as one: the device's counterpart of the CPU's vectors.
//
// [note: roots and quotients without branches of their own]
// A correctly rounded root or quotient is an estimate by the hardware and some fused multiply-adds that correct it, if
// nothing on the way overflows or loses bits; for the rest there is a slower way. CUDA's own root and division ask for
// each of them which it is, and branch: a third of the instructions of a step. `stepped` makes the same estimates and
// corrections for some elements, asks once for all of them, and else has CUDA compute them one by one. With
// 2^-100 <= momentum, 2^-100 <= square <= 2^20 and eps <= 2^20, root + eps is from 2^-50 to 2^21, the quotient is at
// least 2^-121, and remainders are multiples of 2^-147, so that every step is exact where it has to be, unless
// something overflows: then the new weight is not finite. The bits are those of the CPU either way. Second moments that
// overflow where they are stored go the slow way too; so does NaN, which is made ready for stochastic rounding there.
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

constexpr float kLeast = 0x1p-100f, kMost = 0x1p20f;

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float easily_normalised(float momentum, float square, float eps) {
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(square));
  const float divisor = corrected_root(square, inverse) + eps;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
  return corrected_quotient(momentum, divisor, inverse);
}

template <class P, int N>
__device__ __forceinline__ Lanes<float, N> stepped(const Scalars<float>& c, const Lanes<float, N>& w,
                                                   const Lanes<float, N>& momentum, Lanes<float, N>& m,
                                                   Lanes<float, N>& v) {
  const Lanes<float, N> square = v * c.inv_bias2;
  const float least = c.eps <= kMost ? kLeast : __builtin_inff();
  // The largest float16, as a square: what is above it may overflow.
  const float most = P::kHalfMoments ? fminf(65504.0f * c.inv_bias2, kMost) : kMost;
  // Positive numbers are in the order of their bits, and whatever else there is comes after them.
  unsigned int furthest = 0;
  bool easy = true;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    furthest = __viaddmax_u32(__float_as_uint(square.x[j]), 0U - __float_as_uint(kLeast), furthest);
    easy &= nesterov_pp::absolute(momentum.x[j]) >= least;
  }
  easy &= furthest <= __float_as_uint(most) - __float_as_uint(kLeast);
  const auto direction = each<N>([&](int j) { return easily_normalised(momentum.x[j], square.x[j], c.eps); });
  Lanes<float, N> next = w - (c.has_decay ? c.decay * w + direction : direction);
#pragma unroll
  for (int j = 0; j < N; ++j) easy &= nesterov_pp::absolute(next.x[j]) < __builtin_inff();
  if (easy) return next;
  // One element at a time, so that the code is there once.
  Lanes<float, N> ws = w, directions = momentum;
#pragma unroll 1
  for (int k = 0; k < N; ++k) {
    float weight = ws.x[0], direction = directions.x[0], first = m.x[0], second = v.x[0];
    if constexpr (P::kHalfMoments) second = overflowed(second);
    // Parameters that have had no gradient yet are not to be slow.
    if (direction != 0 || !(second >= 0) || !(c.eps > 0))
      direction = __fdiv_rn(direction, __fadd_rn(__fsqrt_rn(__fmul_rn(second, c.inv_bias2)), c.eps));
    weight = __fsub_rn(weight, c.has_decay ? __fadd_rn(decay_of(c, weight), direction) : direction);
    if constexpr (P::kStochastic) {
      weight = roundable(weight);
      first = roundable(first);
      second = roundable(second);
    }
#pragma unroll
    for (int j = 0; j + 1 < N; ++j) {
      ws.x[j] = ws.x[j + 1];
      directions.x[j] = directions.x[j + 1];
      m.x[j] = m.x[j + 1];
      v.x[j] = v.x[j + 1];
      next.x[j] = next.x[j + 1];
    }
    m.x[N - 1] = first;
    v.x[N - 1] = second;
    next.x[N - 1] = weight;
  }
  return next;
}
#endif

}  // namespace nesterov_pp::device
