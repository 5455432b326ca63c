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

constexpr int kRounds = 10;

// What the rounds mix in, two words each.
struct RoundKeys {
  unsigned int a[kRounds], b[kRounds];

  static NPP_HD RoundKeys from(unsigned long long seed) {
    RoundKeys keys{};
    for (unsigned int k = 0; k < kRounds; ++k) {
      keys.a[k] = static_cast<unsigned int>(seed) + k * 0x9E3779B9U;
      keys.b[k] = static_cast<unsigned int>(seed >> 32) + k * 0xBB67AE85U;
    }
    return keys;
  }
};

template <class U>
NPP_HD Words<U> mixed(const Words<U>& x, const RoundKeys& keys, int round) {
  const Product<U> p = multiply(x.a, 0xD2511F53U), q = multiply(x.c, 0xCD9E8D57U);
  return {q.high ^ x.b ^ keys.a[round], q.low, p.high ^ x.d ^ keys.b[round], p.low};
}

template <class U>
NPP_HD Words<U> philox(const Words<U>& counter, const RoundKeys& keys) {
  Words<U> x = counter;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int k = 0; k < kRounds; ++k) x = mixed(x, keys, k);
  return x;
}

// Philox for counters that differ in their first word alone. In the first round that word reaches two of four, in the
// second three: the rest of both is computed once.
struct PhiloxOfFirst {
  unsigned int key_c, key_a, c, d;

  static NPP_HD PhiloxOfFirst from(const Words<unsigned int>& rest, const RoundKeys& keys) {
    const auto first = mixed<unsigned int>({0, rest.b, rest.c, rest.d}, keys, 0);  // c and d for a first word of 0
    const auto p = multiply(first.a, 0xD2511F53U);
    return {rest.d ^ keys.b[0], first.b ^ keys.a[1], p.high ^ keys.b[1], p.low};
  }

  NPP_HD Words<unsigned int> operator()(unsigned int first, const RoundKeys& keys) const {
    const auto p = multiply(first, 0xD2511F53U);
    const auto q = multiply(p.high ^ key_c, 0xCD9E8D57U);
    Words<unsigned int> x{q.high ^ key_a, q.low, c ^ p.low, d};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int k = 2; k < kRounds; ++k) x = mixed(x, keys, k);
    return x;
  }
};

}  // namespace nesterov_pp
