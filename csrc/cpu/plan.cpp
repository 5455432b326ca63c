#include "plan.h"

#include "driver.h"

namespace nesterov_pp::cpu {

double CpuPlan::gradient_norm() {
  std::vector<Values> values;
  for (const auto& grad : grads_)
    if (grad.defined()) values.push_back({grad.const_data_ptr(), grad.numel(), dtype_of(grad)});
  return norm(values);
}

void CpuPlan::pass(const std::vector<StepRow>& rows) { run(tasks_, rows); }

}  // namespace nesterov_pp::cpu
