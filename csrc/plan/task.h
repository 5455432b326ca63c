// One tensor's share of a step, for any device: where it lies, and which pass it takes. Free of torch.
#pragma once

#include "../random.h"
#include "../spec.h"

namespace nesterov_pp {

// One contiguous run of elements. `weight_out` may be `weight` itself, and `ahead` may be `late`; no other two pointers
// overlap. Null is what a pass does not have.
struct Run {
  const void* weight;
  void* weight_out;
  const void* grad;
  const void* late;  // the weights of the gradient, in its dtype
  void* exp_avg;
  void* exp_avg_sq;
  void* mean;   // of a correction, in the moments' dtype
  void* copy;   // takes the new weight in the gradient's dtype, where the two differ
  void* ahead;  // takes the predicted weight in the gradient's dtype
  long long count;
  Rule rule;
  Noise noise;
};

// The row of a weight that is carried to the next slot unchanged.
constexpr long long kCarried = -1;

struct Task {
  Run run;
  Spec spec;
  long long row;  // of the step's scalars
};

// The scalars of a step; `correction` is read by passes that correct.
struct StepRow {
  Coefficients<double> coefficients;
  Correction<double> correction;
};

}  // namespace nesterov_pp
