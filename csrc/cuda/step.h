// The kernel of a pass, and its launch.
#pragma once

#include "grid.h"
#include "kernels.h"

namespace nesterov_pp::cuda {

using device::Launch;

template <class P>
constexpr bool kManyRegisters =
    P::kCorrects || P::kStochastic || P::kCodes || kSame<typename P::G, Half> || kSame<typename P::T, double>;
template <class P>
constexpr int kBlocks = kManyRegisters<P> ? 2 : 4;  // per multiprocessor

namespace {

template <class P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>) step_kernel(const __grid_constant__ Launch launch) {
  if constexpr (P::kCodes) {
    __shared__ float quotients[256];
    static_assert(kThreads == 256, "a thread for each byte");
    quotients[threadIdx.x] = device::quotient_of_code(static_cast<unsigned char>(threadIdx.x));
    __syncthreads();
    device::step<P>(launch, blockIdx.x, gridDim.x, threadIdx.x, kThreads, quotients);
  } else {
    device::step<P>(launch, blockIdx.x, gridDim.x, threadIdx.x, kThreads);
  }
}

template <class P>
cudaError_t launch_step(const Launch& launch, cudaStream_t stream) {
  unsigned int blocks = 0;
  const cudaError_t error = resident_blocks(kBlocks<P>, launch.chunk_count, &blocks);
  if (error != cudaSuccess) return error;
  step_kernel<P><<<blocks, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace
}  // namespace nesterov_pp::cuda
