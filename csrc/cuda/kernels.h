// The passes of csrc/device on a CUDA device. Independent of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../device/pass.h"

namespace nesterov_pp::cuda {

// The results of `scaling`: the norm of the gradients divided by the loss scale, and the factor of the gradients
// (device::factor_of).
struct Scaling {
  double norm;
  double factor;
};

// Launches a supported pass (spec.h) once for all chunks, or not at all if there are no chunks.
cudaError_t step(const device::Launch&, const Spec&, cudaStream_t);
// The same for a pass of small formats, in a file of its own, so that the two are compiled side by side.
cudaError_t step_small(const device::Launch&, const Spec&, cudaStream_t);

// Writes the sum of squares of each chunk's gradients to partials[0 ... chunk_count).
cudaError_t squares(device::Table, const int64_t* chunks, int64_t chunk_count, Dtype grad, double* partials,
                    cudaStream_t);

// Adds the partial sums in a fixed order. Writes the norm times `scale` divided by the loss scale (1 if `grad_scale` is
// null), and the factor that clips this norm to `limit` (0 for no clipping).
cudaError_t scaling(const double* partials, int64_t count, double scale, double limit, const float* grad_scale,
                    Scaling* result, cudaStream_t);

}  // namespace nesterov_pp::cuda
