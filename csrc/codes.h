// Moments in eight bits and weights in twenty-four, in registers.
//
// [note: moments in eight bits]
// 32 elements in memory order are a group with one float16 scale s for each moment, the largest |m| or sqrt(v) in it:
//   m = s q / (254 - |q|)    q = nearest(254 m / (s + |m|))              in -127 .. 127
//   v = (q s / 255)^2        q = floor(255 sqrt(v) / s + u)              in 0 .. 255, at least 1 where v > 0
// u is random, from 0 to 1: a step with beta2 = 0.999 changes sqrt(v) by less than half a code, which rounding to
// nearest would lose every time. A group with an element that is not finite has a scale of NaN, and every element of it
// is NaN from the next step on. A finite value of more than 65,504 counts as that.
//
// [note: weights in twenty-four bits]
// A weight is a bfloat16 b, its nearest, and a residual r, in 127ths of half a unit in the last place of b. Numbers
// below 2^-111 have the unit of that number, so that no unit is 0.
#pragma once

#include "dtype.h"
#include "update.h"

namespace nesterov_pp {

constexpr int kGroup = 32;

namespace codes {

template <class To, class From>
NPP_HD To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Selects `yes` or `no`, lane by lane, like `choose`. GCC selects these lanes one by one if it is left to it.
template <class Mask, class V>
NPP_HD V pick(const Mask& mask, const V& yes, const V& no) {
  if constexpr (kSame<Mask, bool>)
    return mask ? yes : no;
  else
    return same_bits<V>((mask & same_bits<Mask>(yes)) | (~mask & same_bits<Mask>(no)));
}

// Return a where it is the smaller or the larger one, else b; GCC would compare and select.
template <class V>
NPP_HD V smaller(const V& a, const V& b) {
#if defined(__x86_64__) && !defined(__CUDACC__)
  if constexpr (sizeof(V) > 16) {
    V least;
    asm("vminps %2, %1, %0" : "=v"(least) : "v"(a), "v"(b));
    return least;
  }
#endif
  return pick(a < b, a, b);
}
template <class V>
NPP_HD V larger(const V& a, const V& b) {
#if defined(__x86_64__) && !defined(__CUDACC__)
  if constexpr (sizeof(V) > 16) {
    V most;
    asm("vmaxps %2, %1, %0" : "=v"(most) : "v"(a), "v"(b));
    return most;
  }
#endif
  return pick(a > b, a, b);
}

// Returns the bits of a scale, the nearest float16 number from 2^-24 to 65,504, or 0 or NaN.
NPP_HD unsigned short scale_of(float largest) {
  if (!(largest < __builtin_inff())) return 0x7e00;
  if (largest >= 65504.0f) return 0x7bff;
  const auto u = same_bits<unsigned int>(largest);
  if (u >= 0x38800000U) return static_cast<unsigned short>((u + 0xfffU + ((u >> 13) & 1U) - (112U << 23)) >> 13);
  const unsigned int small = same_bits<unsigned int>(largest + 0.5f) - 0x3f000000U;  // a multiple of 2^-24
  return static_cast<unsigned short>(small == 0 && largest > 0 ? 1 : small);
}

// Returns a scale, a float16 number of at least 0 or NaN.
NPP_HD float scale_from(unsigned short bits) {
  if (bits > 0x7c00U) return __builtin_nanf("");
  if (bits < 0x400U) return static_cast<float>(bits) * 0x1p-24f;
  return same_bits<float>((static_cast<unsigned int>(bits) << 13) + (112U << 23));
}

// The functions below take a number, or a vector of numbers, of type V.

template <class V>
NPP_HD V first_of(const V& code, float scale) {
  return code / (254.0f - absolute(code)) * scale;
}

// Returns a number that is a code once it is rounded to nearest; anything for NaN, and where the scale is 0.
template <class V>
NPP_HD V first_code_of_finite(const V& m, float scale) {
  const V y = 254.0f * m / (scale + absolute(m));
  return larger(smaller(y, V{} + 127.0f), V{} - 127.0f);
}
// Likewise, with 0 for NaN and for a scale of 0.
template <class V>
NPP_HD V first_code(const V& m, float scale) {
  return pick(scale + absolute(m) > 0.0f, first_code_of_finite(m, scale), V{});
}

template <class V>
NPP_HD V second_of(const V& code, float scale) {
  const V root = code * (scale * static_cast<float>(1.0 / 255.0));
  return root * root;
}

// Returns a number that is a code once it is rounded down; anything for NaN. `root` is a multiple of that of v,
// `factor` makes the one that the scale stands for 255, and `u` is from 0 to 1.
template <class V>
NPP_HD V second_code_of_finite(const V& root, float factor, const V& u) {
  const V x = smaller(root * factor, V{} + 255.0f) + u;
  return larger(x, pick(root > 0.0f, V{} + 1.0f, V{}));
}
// Likewise, with 0 for NaN.
template <class V>
NPP_HD V second_code(const V& root, float factor, const V& u) {
  const V x = second_code_of_finite(root, factor, u), t = root * factor;
  return pick(t == t, x, V{});
}

// The exponents of bfloat16 numbers given as floats, within the range for which half a unit is a normal number.
template <class U, class V>
NPP_HD U exponent_of(const V& rounded) {
  const U e = (same_bits<U>(rounded) >> 23) & 0xffU;
  const U least = e > 16U ? e : U{} + 16U;
  return least < 254U ? least : U{} + 254U;
}

template <class U, class V>
NPP_HD V joined(const V& rounded, const V& residual) {
  const V half_unit = same_bits<V>((exponent_of<U>(rounded) - 8U) << 23);
  return rounded + residual * (half_unit * static_cast<float>(1.0 / 127.0));
}

// Returns a number that is the residual once it is rounded to nearest; 0 if it is not finite.
template <class U, class V>
NPP_HD V residual_of(const V& weight, const V& rounded) {
  const V per_half_unit = same_bits<V>((262U - exponent_of<U>(rounded)) << 23);
  const V y = (weight - rounded) * (127.0f * per_half_unit);
  const V zero = y - y;
  return pick(zero == zero, y, V{});
}

}  // namespace codes
}  // namespace nesterov_pp
