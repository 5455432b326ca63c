// The kernel of a pass, and its launch.
#pragma once

#include "grid.h"
#include "kernels.h"

namespace nesterov_pp::cuda {

using device::Launch;
using device::Stored;

template <class P>
constexpr bool kManyRegisters =
    P::kCorrects || P::kStochastic || P::kCodes || kSame<typename P::G, Half> || kSame<typename P::T, double>;
template <class P>
constexpr int kBlocks = kManyRegisters<P> ? 2 : 4;  // per multiprocessor
// The bytes of a parameter that a plain step reads and writes.
template <class P>
constexpr int kMoved = 2 * (static_cast<int>(sizeof(Stored<typename P::W>)) + P::kSplit) +
                       (P::kCopies ? 2 : 1) * static_cast<int>(sizeof(typename P::G)) +
                       4 * static_cast<int>(sizeof(typename P::M));

// Returns the number of blocks for a chunk, a power of two: as many as leave each thread at least 200 bytes to move,
// since measured with fewer bytes, what a block does at its start and end shows.
template <class P>
constexpr int parts() {
  constexpr int kLeast = 200;
  int found = 1;
  while (2 * found * kLeast * kThreads <= device::kChunk * kMoved<P>) found *= 2;
  return found;
}
// Where moments are in eight bits, a block shares what it has prepared for a chunk.
template <class P>
constexpr int kParts = P::kCodes ? 1 : parts<P>();

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
