// How one element of a stored type becomes a scalar to compute with, and back. The roundings are those of cpu/lanes.h.
#pragma once

#include "../dtype.h"
#include "../update.h"

namespace nesterov_pp::device {

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
  // Up with the probability that makes the result right on average, given 16 random bits.
  static NPP_HD BFloat16 stochastic(float x, unsigned int noise) { return rounded(bits_of<unsigned int>(x), noise); }

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

}  // namespace nesterov_pp::device
