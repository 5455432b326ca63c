// The kernel of a pass, and its launch.
#pragma once

#include "grid.h"
#include "kernels.h"

namespace nesterov_pp::cuda {

using device::Launch;
using device::Stored;

template <class P>
constexpr bool kManyRegisters = (P::kCorrects || P::kStochastic || kSame<typename P::G, Half>) && !P::kCodes;
// The least number of blocks per multiprocessor, and so the most registers that a thread has.
template <class P>
constexpr int kBlocks = kSame<typename P::T, double> ? 2
                        : kManyRegisters<P>          ? 3
                                                     : 4;
// The bytes of a parameter that a plain step reads and writes.
template <class P>
constexpr int kMoved =
    2 * (static_cast<int>(sizeof(Stored<typename P::W>)) + P::kSplit) +
    (P::kCopies ? 2 : 1) * static_cast<int>(sizeof(typename P::G)) + 4 * static_cast<int>(sizeof(typename P::M));

// Returns how often the number of blocks for a chunk is doubled: as often as leaves a thread at least 200 bytes to move
// in a chunk of mean size, since what a block does at its start and end shows where it moves less. Where moments are in
// eight bits, a block shares what it has prepared for a chunk.
template <class P>
int doublings(const Launch& launch) {
  constexpr int64_t kLeast = 200;
  int found = 0;
  if constexpr (!P::kCodes)
    while ((launch.chunk_count << (found + 1)) * kLeast * kThreads <= launch.elements * kMoved<P>) ++found;
  return found;
}

namespace {

template <class P>
__global__ void __launch_bounds__(kThreads, kBlocks<P>)
    step_kernel(const __grid_constant__ Launch launch, const int doublings) {
  if constexpr (P::kCodes) {
    __shared__ float quotients[256];
    static_assert(kThreads == 256, "a thread for each byte");
    quotients[threadIdx.x] = device::quotient_of_code(static_cast<unsigned char>(threadIdx.x));
    __syncthreads();
    device::step<P>(launch, blockIdx.x, threadIdx.x, kThreads, quotients);
  } else {
    const unsigned int part = blockIdx.x & ((1U << doublings) - 1);
    const auto thread = static_cast<int>(part * kThreads + threadIdx.x);
    device::step<P>(launch, blockIdx.x >> doublings, thread, kThreads << doublings);
  }
}

template <class P>
cudaError_t launch_step(const Launch& launch, cudaStream_t stream) {
  const int times = doublings<P>(launch);
  step_kernel<P><<<static_cast<unsigned int>(launch.chunk_count << times), kThreads, 0, stream>>>(launch, times);
  return cudaGetLastError();
}

}  // namespace
}  // namespace nesterov_pp::cuda
