// A plan for tensors in host memory.
#pragma once

#include <vector>

#include "../plan/plan.h"

namespace nesterov_pp::cpu {

class CpuPlan : public Plan {
 public:
  using Plan::Plan;

  // Returns the Euclidean norm of all collected gradients, reading each once.
  double gradient_norm();

 protected:
  void pass(const std::vector<StepRow>& rows) override;
};

}  // namespace nesterov_pp::cpu
