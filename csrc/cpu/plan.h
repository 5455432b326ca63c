// A plan whose tensors are in the memory of the host.
#pragma once

#include <vector>

#include "../plan/plan.h"

namespace nesterov_pp::cpu {

class CpuPlan : public Plan {
 public:
  using Plan::Plan;

  // Euclidean norm of all gradients collected, reading each once.
  double gradient_norm();

 protected:
  void pass(const std::vector<StepRow>& rows) override;
};

}  // namespace nesterov_pp::cpu
