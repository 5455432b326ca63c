// Single-threaded passes over contiguous elements, one per (dtype, rule, instruction set).
#pragma once

#include "../update.h"

namespace nesterov_pp::cpu {

// One contiguous run of elements. `weight_out` may be `weight` itself; no other two pointers overlap.
// Non-adaptive rules leave `exp_avg_sq` null.
struct Run {
  const void* weight;
  void* weight_out;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  long long count;
  bool streaming;  // write weight_out past the caches: it was not read, and is too large to stay in them
};

using Kernel = void (*)(const Run&, const Coefficients<double>&);

enum class Isa : int { kBaseline = 0, kV3 = 1, kV4 = 2 };

Isa best_isa();             // the widest this processor runs
const char* isa_name(Isa);  // "baseline", "x86-64-v3", "x86-64-v4"
Kernel kernel(Isa, bool is_double, bool adaptive);

// Sum of squares of a contiguous run, in partial sums of the element type over at most kSquaresRun elements: the same
// bits for every instruction set.
using Squares = double (*)(const void* values, long long count);
constexpr long long kSquaresRun = 4096;
Squares squares(Isa, bool is_double);

// Copies a weight that received no gradient into the next ring slot.
void carry(const void* from, void* to, long long bytes);

}  // namespace nesterov_pp::cpu
