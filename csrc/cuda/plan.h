// A plan whose pass runs in the kernels of kernels.cu, on torch's current stream of the parameters' device.
#pragma once

#include <optional>
#include <vector>

#include "../device/plan.h"
#include "kernels.h"

namespace nesterov_pp::cuda {

class CudaPlan : public device::DevicePlan {
 public:
  using DevicePlan::DevicePlan;

  std::vector<StepClass> collect(const StepSlots& slots) override;

  // Returns the Euclidean norm of all collected gradients, reading each once. Waits for the device.
  double gradient_norm();

  // Makes the next pass divide the gradients by `grad_scale` (float32 on the device) and clip their norm times `scale`
  // to `limit`. Returns this norm, float64 on the device, if there is a limit. Does not wait for the device.
  std::optional<at::Tensor> scale(double scale, std::optional<double> limit,
                                  const std::optional<at::Tensor>& grad_scale);

 protected:
  bool captures() const override;
  void launch(const at::Tensor& rows) override;

 private:
  // Returns the norm and the factor (Scaling) as two float64 elements.
  at::Tensor reduce(double scale, double limit, const float* grad_scale, bool with_norm) const;

  at::Tensor scaling_;  // for the next pass; undefined if it does not scale
};

}  // namespace nesterov_pp::cuda
