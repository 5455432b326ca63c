// Single-threaded passes over contiguous elements, one per (dtypes, rule, instruction set).
#pragma once

#include "../dtype.h"
#include "../random.h"
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
  void* copy;  // takes the new weight in the gradient's dtype, where the two differ; else null
  long long count;
  bool streaming;  // write the new version past the caches: it was not read, and is too large to stay in them
  Noise noise;
  // Of corrected passes alone, each null where it has none: the weights of the gradient, the running mean, and the
  // predicted weights, which may be in the same memory as nothing else but `late`.
  const void* late;
  void* mean;
  void* ahead;
};

using Kernel = void (*)(const Run&, const Coefficients<double>&);

enum class Isa : int { kBaseline = 0, kV3 = 1, kV4 = 2 };

Isa best_isa();             // the widest this processor runs
const char* isa_name(Isa);  // "baseline", "x86-64-v3", "x86-64-v4"

// Null where there is no such pass. Gradients are in the dtype of the weights, or in float16 or bfloat16 beside float32
// master weights. Moments are in the dtype of the weights or, for all but float64, in float32 or bfloat16. Everything
// but float64 is computed in float32. `stochastic` rounds bfloat16 weights and moments by `Run::noise`; there is no
// such pass for float16 weights or moments. The copy of a master weight is always rounded to nearest.
Kernel kernel(Isa, Dtypes, bool adaptive, bool stochastic);

// The pass with a correction. Null where there is none: for float16, for gradients of another dtype than the weights.
// bfloat16 is rounded to nearest.
using CorrectedKernel = void (*)(const Run&, const Coefficients<double>&, const Correction<double>&);
CorrectedKernel corrected_kernel(Isa, Dtypes, bool adaptive, Kind);

// Sum of squares of a contiguous run, in partial sums over at most kSquaresRun elements: the same bits for every
// instruction set.
using Squares = double (*)(const void* values, long long count);
constexpr long long kSquaresRun = 8192;
Squares squares(Isa, Dtype);

// Copies a weight that received no gradient into the next ring slot.
void carry(const void* from, void* to, long long bytes);

}  // namespace nesterov_pp::cpu
