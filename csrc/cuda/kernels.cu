#include "grid.h"
#include "kernels.h"

namespace nesterov_pp::cuda {
namespace {

using device::Launch;
using device::Pass;
using device::Table;

constexpr int kSums = 1024;
constexpr int kMultiprocessorThreads = 2048;

template <class P>
constexpr bool kManyRegisters = P::kStochastic || kSame<typename P::G, Half> || kSame<typename P::T, double>;
template <class P>
constexpr int kBlocks = kManyRegisters<P> ? 2 : 4;  // on a multiprocessor

template <class P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>) step_kernel(const __grid_constant__ Launch launch) {
  device::step<P>(launch, blockIdx.x, gridDim.x, threadIdx.x, kThreads);
}

// The sum over a block, in thread 0; always in the same order.
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

struct StepKernel {
  void (*function)(Launch) = nullptr;
  int blocks = 0;  // on a multiprocessor
};

template <class P>
StepKernel kernel_of_pass() {
  return {step_kernel<P>, kBlocks<P>};
}

template <class W, class G, class M, bool kAdaptive>
StepKernel by_rounding(bool stochastic) {
  constexpr bool kHalf = kSame<W, Half> || kSame<M, Half>;
  constexpr bool kRounds = (kSame<W, BFloat16> || kSame<M, BFloat16>) && !kHalf;
  if (!stochastic || (!kRounds && !kHalf)) return kernel_of_pass<Pass<W, G, M, kAdaptive, false>>();
  if constexpr (kRounds) return kernel_of_pass<Pass<W, G, M, kAdaptive, true>>();
  return {};
}

template <class W, class G, bool kAdaptive>
StepKernel by_moment(Dtype moment, bool stochastic) {
  if (moment == Dtype::kFloat) return by_rounding<W, G, float, kAdaptive>(stochastic);
  if constexpr (!kSame<W, Half>)
    if (moment == Dtype::kBFloat16) return by_rounding<W, G, BFloat16, kAdaptive>(stochastic);
  if constexpr (kSame<W, Half>) {
    if (moment == Dtype::kBFloat16 && !stochastic)
      return kernel_of_pass<Pass<Half, Half, BFloat16, kAdaptive, false>>();
    if (moment == Dtype::kHalf) return by_rounding<Half, Half, Half, kAdaptive>(stochastic);
  }
  return {};
}

template <bool kAdaptive>
StepKernel kernel_of(Dtypes dtypes, bool stochastic) {
  const auto [weight, grad, moment] = dtypes;
  if (weight == Dtype::kDouble)
    return grad == weight && moment == weight ? by_rounding<double, double, double, kAdaptive>(stochastic)
                                              : StepKernel{};
  if (weight == Dtype::kFloat) {
    if (grad == Dtype::kFloat) return by_moment<float, float, kAdaptive>(moment, stochastic);
    if (grad == Dtype::kBFloat16) return by_moment<float, BFloat16, kAdaptive>(moment, stochastic);
    if (grad == Dtype::kHalf) return by_moment<float, Half, kAdaptive>(moment, stochastic);
    return {};
  }
  if (weight != grad) return {};
  if (weight == Dtype::kBFloat16) return by_moment<BFloat16, BFloat16, kAdaptive>(moment, stochastic);
  return by_moment<Half, Half, kAdaptive>(moment, stochastic);
}

StepKernel kernel_of(Dtypes dtypes, bool adaptive, bool stochastic) {
  return adaptive ? kernel_of<true>(dtypes, stochastic) : kernel_of<false>(dtypes, stochastic);
}

}  // namespace

bool has_step(Dtypes dtypes, bool adaptive, bool stochastic) {
  return kernel_of(dtypes, adaptive, stochastic).function != nullptr;
}

cudaError_t step(const Launch& launch, Dtypes dtypes, bool adaptive, bool stochastic, cudaStream_t stream) {
  if (launch.chunk_count == 0) return cudaSuccess;
  unsigned int blocks = 0;
  const StepKernel kernel = kernel_of(dtypes, adaptive, stochastic);
  if (kernel.function == nullptr) return cudaErrorInvalidDeviceFunction;
  const cudaError_t error = resident_blocks(kernel.blocks, launch.chunk_count, &blocks);
  if (error != cudaSuccess) return error;
  kernel.function<<<blocks, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
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
