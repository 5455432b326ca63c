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

// Whether there is such a pass; the same are there as on the CPU.
bool has_step(Dtypes, bool adaptive, bool stochastic);

// One launch for all chunks. Nothing is launched for none.
cudaError_t step(const device::Launch&, Dtypes, bool adaptive, bool stochastic, cudaStream_t);

// As `step`, with rows of kCorrectedRowWords; the same dtypes are there as on the CPU.
cudaError_t corrected_step(const device::Launch&, Dtypes, bool adaptive, Kind, cudaStream_t);

// Writes the sum of squares of each chunk's gradients to partials[0 ... chunk_count).
cudaError_t squares(device::Table, const int64_t* chunks, int64_t chunk_count, Dtype grad, double* partials,
                    cudaStream_t);

// Adds the partial sums in a fixed order and writes the norm times `scale` over the loss scale (1 where `grad_scale` is
// null), and the factor for a `limit` (0: no clipping).
cudaError_t scaling(const double* partials, int64_t count, double scale, double limit, const float* grad_scale,
                    Scaling* result, cudaStream_t);

}  // namespace nesterov_pp::cuda
