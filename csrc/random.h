// Random bits for stochastic rounding. They depend only on (seed, step, tensor, element), not on the number of threads,
// the width of vectors or the device, so that a rerun gives the same bits.
//
// [note: which bits an element takes]
// Philox-4x32-10 (Salmon et al., SC 2011) turns a key and a counter into four words of 32 bits. The key is the seed.
// Elements 2b and 2b + 1 of a tensor share the counter (b, b >> 32, tensor, step), four words of 32 bits. The even
// element takes the first two of the resulting words, the odd element the last two. Each half of a word rounds one
// number of the element:
//   first word:   lower half the weight, upper half the first moment
//   second word:  lower half the second moment, upper half the running mean of a correction
// The codes of second moments in eight bits (codes.h) take other counters. Groups 4c to 4c + 3 of 32 elements share the
// counter (c, c >> 32 | 2^31, tensor, step) and take one word each. The upper half of the word is the number of the
// group's first element; element k has that number plus k times 40503, the golden ratio, modulo 2^16. So every element
// is rounded with equal probabilities for all numbers, and in each step anew; that the elements of one step are not
// independent of each other does not matter, and costs a 32nd of the Philox.
#pragma once

#include "update.h"

namespace nesterov_pp {

constexpr unsigned int kNoiseStep = 40503;  // from an element of a group to the next

struct Noise {
  unsigned long long seed;
  unsigned int tensor;  // the parameter's number in its optimizer
  unsigned int step;
  long long first;  // the element at which a run starts; even
};

// The two halves of a 64-bit product.
template <class U>
struct Product {
  U high, low;
};

NPP_HD Product<unsigned int> multiply(unsigned int a, unsigned int b) {
  const auto product = static_cast<unsigned long long>(a) * b;
  return {static_cast<unsigned int>(product >> 32), static_cast<unsigned int>(product)};
}

#if !defined(__CUDACC__)
// Multiplies the low halves of a vector's 64-bit lanes. The upper halves of argument and results may hold anything.
template <class W>
NPP_HD Product<W> multiply(const W& a, unsigned int b) {
  W product;
#if defined(__x86_64__)
  // GCC does not use the instruction that multiplies low halves, and other instructions take several times as long.
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

// The keys that the rounds mix in, two words for each round.
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

// Philox for counters that differ only in their first word. That word affects two of the four results of the first
// round and three of the second. Everything in these two rounds that does not depend on it is computed once.
struct PhiloxOfFirst {
  unsigned int key_c, key_a, c, d;

  static NPP_HD PhiloxOfFirst from(const Words<unsigned int>& rest, const RoundKeys& keys) {
    const auto first = mixed<unsigned int>({0, rest.b, rest.c, rest.d}, keys, 0);  // its c and d are not used
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
