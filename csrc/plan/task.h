// One tensor's share of a step, for any device: its memory and its pass. Independent of torch.
#pragma once

#include "../random.h"
#include "../spec.h"

namespace nesterov_pp {

// One contiguous run of elements; a pointer is null if the pass does not have it. `weight_out` may be `weight`. `late`
// may be `weight`, or the one of `weight_out`, `copy` and `ahead` that goes to the ring, whose newest version replaces
// its oldest. That one may also be `grad`: each element is read before it is written. No other pointers overlap.
struct Run {
  const void* weight;
  void* weight_out;
  const void* grad;
  const void* late;  // the weights that the gradient was computed with, in its dtype
  void* exp_avg;
  void* exp_avg_sq;
  void* mean;   // the running mean of a correction, in the moments' dtype
  void* copy;   // receives the new weight in the gradient's dtype, if the two dtypes differ
  void* ahead;  // receives the predicted weight in the gradient's dtype
  long long count;
  Rule rule;
  Noise noise;
  void* exp_avg_scale = nullptr;     // of moments in eight bits: one float16 number for 32 elements
  void* exp_avg_sq_scale = nullptr;  // likewise
  void* residual = nullptr;          // of weights in 24 bits
};

// The row of a weight that is carried to the next slot unchanged.
constexpr long long kCarried = -1;

struct Task {
  Run run;
  Spec spec;
  long long row;  // index into the step's rows of scalars, or kCarried
};

// The scalars of a step; only passes that correct read `correction`.
struct StepRow {
  Coefficients<double> coefficients;
  Correction<double> correction;
};

}  // namespace nesterov_pp
