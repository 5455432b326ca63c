#include "kernels.h"
#include "step.h"

namespace nesterov_pp::cuda {

cudaError_t step_small(const Launch& launch, const Spec& spec, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidDeviceFunction;
  visit_small(spec, [&](auto pass) { error = launch_step<decltype(pass)>(launch, stream); });
  return error;
}

}  // namespace nesterov_pp::cuda
