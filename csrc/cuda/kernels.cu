#include "grid.h"
#include "kernels.h"
#include "step.h"

namespace nesterov_pp::cuda {
namespace {

using device::Table;

constexpr int kSums = 1024;
constexpr int kMultiprocessorThreads = 2048;

// Returns the sum over a block in thread 0, always added in the same order.
template <int kSize>
__device__ double block_sum(double value) {
  __shared__ double warps[kSize / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_down_sync(0xffffffffU, value, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int k = 0; k < kSize / 32; ++k) sum += warps[k];
  __syncthreads();  // the next sum writes to the same place
  return sum;
}

template <class G>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const Table table, const int64_t* chunks, int64_t chunk_count, double* partials) {
  for (int64_t k = blockIdx.x; k < chunk_count; k += gridDim.x) {
    const double sum = block_sum<kThreads>(device::squares<G>(table, chunks[k], threadIdx.x, kThreads));
    if (threadIdx.x == 0) partials[k] = sum;
  }
}

__global__ void __launch_bounds__(kSums) scaling_kernel(const double* partials, int64_t count, double scale,
                                                        double limit, const float* grad_scale, Scaling* result) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < count; k += kSums) sum += partials[k];
  sum = block_sum<kSums>(sum);
  if (threadIdx.x != 0) return;
  const double loss_scale = grad_scale == nullptr ? 1.0 : static_cast<double>(*grad_scale);
  const double norm = sqrt(sum) * (scale / loss_scale);
  *result = {norm, device::factor_of(norm, limit, loss_scale)};
}

}  // namespace

cudaError_t step(const Launch& launch, const Spec& spec, cudaStream_t stream) {
  if (launch.chunk_count == 0) return cudaSuccess;
  if (is_small(spec.dtypes)) return step_small(launch, spec, stream);
  cudaError_t error = cudaErrorInvalidDeviceFunction;
  visit(spec, [&](auto pass) { error = launch_step<decltype(pass)>(launch, stream); });
  return error;
}

cudaError_t squares(Table table, const int64_t* chunks, int64_t chunk_count, Dtype grad, double* partials,
                    cudaStream_t stream) {
  if (chunk_count == 0) return cudaSuccess;
  unsigned int blocks = 0;
  const cudaError_t error = resident_blocks(kMultiprocessorThreads / kThreads, chunk_count, &blocks);
  if (error != cudaSuccess) return error;
  const auto kernel = grad == Dtype::kDouble     ? squares_kernel<double>
                      : grad == Dtype::kBFloat16 ? squares_kernel<BFloat16>
                      : grad == Dtype::kHalf     ? squares_kernel<Half>
                                                 : squares_kernel<float>;
  kernel<<<blocks, kThreads, 0, stream>>>(table, chunks, chunk_count, partials);
  return cudaGetLastError();
}

cudaError_t scaling(const double* partials, int64_t count, double scale, double limit, const float* grad_scale,
                    Scaling* result, cudaStream_t stream) {
  scaling_kernel<<<1, kSums, 0, stream>>>(partials, count, scale, limit, grad_scale, result);
  return cudaGetLastError();
}

}  // namespace nesterov_pp::cuda
