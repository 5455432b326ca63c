// The codes of codes.h in the usual case, four elements at a time. Numbers, scales and weights are finite here, and the
// results have the bits of codes.h.
#pragma once

#include "../codes.h"
#include "../random.h"
#include "lanes.h"

namespace nesterov_pp::device {

constexpr int kCodesAtOnce = 4;  // a word

// Codes as words, the first in the lowest byte.
template <int N>
using CodeWords = Pack<unsigned int, N / kCodesAtOnce>;

// Returns the byte at index j of a word.
NPP_HD unsigned int byte_of(unsigned int word, int j) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, 0x4440U | static_cast<unsigned int>(j));
#else
  return word >> (8 * j) & 0xffU;
#endif
}

// Returns 2^23 plus the byte at index j of a word.
NPP_HD float above_byte(unsigned int word, int j) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(__byte_perm(word, 0x4b000000U, 0x7440U | static_cast<unsigned int>(j)));
#else
  return bits_of<float>(byte_of(word, j) | 0x4b000000U);
#endif
}

// Returns a word of the low bytes of four words.
NPP_HD unsigned int low_bytes(const unsigned int (&x)[4]) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(__byte_perm(x[0], x[1], 0x0040), __byte_perm(x[2], x[3], 0x0040), 0x5410);
#else
  return (x[0] & 0xffU) | (x[1] & 0xffU) << 8 | (x[2] & 0xffU) << 16 | x[3] << 24;
#endif
}

// Returns a word whose low byte is the whole number from -128 to 127 nearest to x, ties to even.
NPP_HD unsigned int nearest_byte(float x) { return bits_of<unsigned int>(x + 12582912.0f); }

// Returns an entry of the table of quotients: a code of a first moment over 254 minus its magnitude.
NPP_HD float quotient_of_code(unsigned char byte) {
  const auto code = static_cast<float>(static_cast<signed char>(byte));
  return code / (254.0f - nesterov_pp::absolute(code));
}

// Returns the nearest quotient a / b, where b is from 2^-24 to 2^18, and the quotient is below 2^126. Where a is below
// 2^-100 the result is merely small.
NPP_HD float code_quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return corrected_quotient(a, b, inverse);
#else
  return a / b;
#endif
}

// Returns x with its magnitude cut to that of `most`, which is at least 0; `most` or less for NaN.
NPP_HD float cut_to(float x, float most) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 860
  float cut;
  asm("min.xorsign.abs.f32 %0, %1, %2;" : "=f"(cut) : "f"(x), "f"(most));
  return cut;
#else
  return fmaxf(fminf(x, most), -most);
#endif
#else
  return x > most ? most : x < -most ? -most : x;
#endif
}

NPP_HD float larger_of(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}

// Returns the larger of numbers of at least 0.
template <int N>
NPP_HD float largest_of(float largest, const Lanes<float, N>& x) {
  unsigned int most = bits_of<unsigned int>(largest);
#if defined(__CUDA_ARCH__)
  static_assert(N % 2 == 0, "two at a time");
#pragma unroll
  for (int j = 0; j < N; j += 2) most = __vimax3_u32(most, __float_as_uint(x.x[j]), __float_as_uint(x.x[j + 1]));
#else
  for (const float value : x.x) most = bits_of<unsigned int>(value) > most ? bits_of<unsigned int>(value) : most;
#endif
  return bits_of<float>(most);
}

// Returns the codes of four first moments; `scale` is 0 only where they are.
NPP_HD unsigned int first_codes(const float* m, float scale) {
  const float base = scale > 0 ? scale : 1.0f;
  unsigned int words[4];
  NPP_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float cut = cut_to(m[j], scale);
    words[j] = nearest_byte(code_quotient(254.0f * cut, base + nesterov_pp::absolute(cut)));
  }
  return low_bytes(words);
}

// Returns a second moment from the byte at index j of a word; `unit` is the scale's 255th part.
NPP_HD float second_of_byte(unsigned int word, int j, float unit) {
  const float root = fused(above_byte(word, j), unit, -0x1p23f * unit);  // exact products, rounded once
  return root * root;
}

// Returns whether roots are finite and above 0. On a device, those that are sure (lanes.h) are.
template <int N>
NPP_HD bool are_usual_roots(const Lanes<float, N>& roots) {
  bool usual = true;
#if !defined(__CUDA_ARCH__)
  for (const float root : roots.x) usual = usual && root > 0 && root <= 0x1p21f;
#endif
  (void)roots;
  return usual;
}

// Returns the codes of four second moments above 0 (codes.h, second_code). `noise` is that of the first element.
NPP_HD unsigned int second_codes(const float* root, float factor, unsigned int noise) {
  unsigned int words[4];
  NPP_UNROLL
  for (int j = 0; j < 4; ++j) {
    const auto half = static_cast<unsigned short>(noise + static_cast<unsigned int>(j) * kNoiseStep);
    float x = fused(static_cast<float>(half), 0x1p-16f, root[j] * factor);
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ < 900
    x = fminf(fmaxf(x, 1.0f), 255.5f);
#endif
    words[j] = __float_as_uint(__fadd_rd(x, 8388608.0f));
#else
    x = x < 1.0f ? 1.0f : x > 255.5f ? 255.5f : x;
    words[j] = static_cast<unsigned int>(x);
#endif
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned int pairs[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const unsigned int pair = __byte_perm(words[2 * j], words[2 * j + 1], 0x5410);
    pairs[j] = __vmaxu2(__vminu2(pair, 0x00ff00ffU), 0x00010001U);
  }
  return __byte_perm(pairs[0], pairs[1], 0x6420);
#else
  return low_bytes(words);
#endif
}

// Returns the nearest scales (codes.h) of numbers of at least 0, the first in the lower half.
NPP_HD unsigned int scales_of(float first, float second) {
#if defined(__CUDA_ARCH__)
  const unsigned int least = (first > 0 ? 1U : 0U) | (second > 0 ? 0x10000U : 0U);
  return __vmaxu2(nearest_pair<Half>(fminf(first, 65504.0f), fminf(second, 65504.0f)), least);
#else
  return codes::scale_of(first) | static_cast<unsigned int>(codes::scale_of(second)) << 16;
#endif
}

// Returns the bits of the exponent of a bfloat16 number, at least those of 2^-111.
NPP_HD unsigned int exponent_bits(float rounded) {
  const unsigned int bits = bits_of<unsigned int>(rounded) & 0x7f800000U, least = 16U << 23;
  return bits > least ? bits : least;
}

// Completes four bfloat16 weights with their residuals.
NPP_HD void join(float (&w)[4], unsigned int residuals) {
  NPP_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float residual = above_byte(residuals ^ 0x80808080U, j) - 8388736.0f;  // 2^23 + 128
    w[j] = w[j] + residual * (bits_of<float>(exponent_bits(w[j])) * (0x1p-8f * static_cast<float>(1.0 / 127.0)));
  }
}

// Returns the residuals of four weights that are rounded to finite bfloat16 numbers.
NPP_HD unsigned int residuals_of(const float (&w)[4], const float (&rounded)[4]) {
  unsigned int words[4];
  NPP_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float per_unit = bits_of<float>((268U << 23 | 0x7e0000U) - exponent_bits(rounded[j]));  // 127 of half a unit
    words[j] = nearest_byte((w[j] - rounded[j]) * per_unit);
  }
  return low_bytes(words);
}

}  // namespace nesterov_pp::device
