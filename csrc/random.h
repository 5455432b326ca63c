// Random bits for stochastic rounding: the same for a given (seed, step, tensor, element) whatever the number of
// threads, the width of vectors or the device, so that a rerun gives the same bits.
//
// [note: which bits an element takes]
// Philox-4x32-10 (Salmon et al., SC 2011) turns a 128-bit counter into four words. Elements 2b and 2b + 1 of a tensor
// share the counter (b, b >> 32, tensor, step) with the seed as key: the even one takes the first two words, the odd
// one the others. Of an element's two words the lower half of the first rounds its weight, the upper half its first
// moment, and the lower half of the second its second moment.
#pragma once

#include "update.h"

namespace nesterov_pp {

struct Noise {
  unsigned long long seed;
  unsigned int tensor;  // the parameter's number in its optimizer
  unsigned int step;
  long long first;  // the element a run starts at; even
};

NPP_HD unsigned int multiply_high(unsigned int a, unsigned int b) {
  return static_cast<unsigned int>((static_cast<unsigned long long>(a) * b) >> 32);
}

// Of a vector, lane by lane, which the compiler turns into multiplications of even and odd lanes.
template <class U>
NPP_HD U multiply_high(const U& a, unsigned int b) {
  U high;
  for (unsigned k = 0; k < sizeof(U) / sizeof(a[0]); ++k) high[k] = multiply_high(static_cast<unsigned int>(a[k]), b);
  return high;
}

// Four words of an unsigned int, or of vectors of them.
template <class U>
struct Words {
  U a, b, c, d;
};

template <class U>
NPP_HD Words<U> philox(const Words<U>& counter, unsigned long long seed) {
  Words<U> x = counter;
  auto key0 = static_cast<unsigned int>(seed), key1 = static_cast<unsigned int>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const U high0 = multiply_high(x.a, 0xD2511F53U), low0 = x.a * 0xD2511F53U;
    const U high1 = multiply_high(x.c, 0xCD9E8D57U), low1 = x.c * 0xCD9E8D57U;
    x = {high1 ^ x.b ^ key0, low1, high0 ^ x.d ^ key1, low0};
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  return x;
}

}  // namespace nesterov_pp
