// The passes of csrc/device on a CUDA device. Free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../device/pass.h"

namespace nesterov_pp::cuda {

// Where a reduction leaves its results: the gradients' norm over the scale of the loss, and what gradients are
// multiplied by (device::factor_of).
struct Scaling {
  double norm;
  double factor;
};

// One launch for all chunks, of a pass that there is (spec.h). Nothing is launched for none.
cudaError_t step(const device::Launch&, const Spec&, cudaStream_t);

// Writes the sum of squares of each chunk's gradients to partials[0 ... chunk_count).
cudaError_t squares(device::Table, const int64_t* chunks, int64_t chunk_count, Dtype grad, double* partials,
                    cudaStream_t);

// Adds the partial sums in a fixed order and writes the norm times `scale` over the loss scale (1 where `grad_scale` is
// null), and the factor for a `limit` (0: no clipping).
cudaError_t scaling(const double* partials, int64_t count, double scale, double limit, const float* grad_scale,
                    Scaling* result, cudaStream_t);

}  // namespace nesterov_pp::cuda
