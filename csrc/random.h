// Random bits for stochastic rounding: the same for a given (seed, step, tensor, element) whatever the number of
// threads, the width of vectors or the device, so that a rerun gives the same bits.
//
// [note: which bits an element takes]
// Philox-4x32-10 (Salmon et al., SC 2011) turns a 128-bit counter into four words. Elements 2b and 2b + 1 of a tensor
// share the counter (b, b >> 32, tensor, step) with the seed as key: the even one takes the first two words, the odd
// one the others. Of an element's two words the lower half of the first rounds its weight, the upper half its first
// moment, the lower half of the second its second moment, and the upper half a correction's running mean.
#pragma once

#include "update.h"

namespace nesterov_pp {

struct Noise {
  unsigned long long seed;
  unsigned int tensor;  // the parameter's number in its optimizer
  unsigned int step;
  long long first;  // the element a run starts at; even
};

// Both halves of a 64-bit product.
template <class U>
struct Product {
  U high, low;
};

NPP_HD Product<unsigned int> multiply(unsigned int a, unsigned int b) {
  const auto product = static_cast<unsigned long long>(a) * b;
  return {static_cast<unsigned int>(product >> 32), static_cast<unsigned int>(product)};
}

#if !defined(__CUDACC__)
// Of the low halves of a vector's 64-bit lanes. What lies in the upper halves of argument and results is of no account.
template <class W>
NPP_HD Product<W> multiply(const W& a, unsigned int b) {
  W product;
#if defined(__x86_64__)
  // GCC makes no use of the instruction that multiplies halves, and others take several times as long.
  const W factor = W{} + b;
  if constexpr (sizeof(W) > 16) {
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(factor));
  } else {
    product = a;
    asm("pmuludq %1, %0" : "+x"(product) : "x"(factor));
  }
#else
  product = (a & 0xffffffffULL) * b;
#endif
  return {product >> 32, product};
}
#endif

// Four words, each an unsigned int or the low halves of a vector's 64-bit lanes.
template <class U>
struct Words {
  U a, b, c, d;
};

template <class U>
NPP_HD Words<U> philox(const Words<U>& counter, unsigned long long seed) {
  Words<U> x = counter;
  auto key0 = static_cast<unsigned int>(seed), key1 = static_cast<unsigned int>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product<U> p = multiply(x.a, 0xD2511F53U), q = multiply(x.c, 0xCD9E8D57U);
    x = {q.high ^ x.b ^ key0, q.low, p.high ^ x.d ^ key1, p.low};
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  return x;
}

}  // namespace nesterov_pp
