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
// The number of blocks for a chunk; where moments are in eight bits, a block shares what it has prepared for a chunk.
template <class P>
constexpr int kParts = P::kCodes ? 1 : 4;

namespace {

template <class P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>) step_kernel(const __grid_constant__ Launch launch) {
  if constexpr (P::kCodes) {
    __shared__ float quotients[256];
    static_assert(kThreads == 256, "a thread for each byte");
    quotients[threadIdx.x] = device::quotient_of_code(static_cast<unsigned char>(threadIdx.x));
    __syncthreads();
    device::step<P>(launch, blockIdx.x, threadIdx.x, kThreads, quotients);
  } else {
    const auto part = static_cast<int>(blockIdx.x % kParts<P>);
    const int thread = part * kThreads + static_cast<int>(threadIdx.x);
    device::step<P>(launch, blockIdx.x / kParts<P>, thread, kParts<P> * kThreads);
  }
}

template <class P>
cudaError_t launch_step(const Launch& launch, cudaStream_t stream) {
  step_kernel<P><<<static_cast<unsigned int>(kParts<P> * launch.chunk_count), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace
}  // namespace nesterov_pp::cuda
