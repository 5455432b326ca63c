// The sizes of the grids of passes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nesterov_pp::cuda {

// [note: the size of a grid]
// An H200 moves about 4.3 TB/s with a latency of some 0.7 us, so about 3 MB have to be in flight: 23 KB on each of 132
// multiprocessors. A thread of the float32 step has four vectors of 16 bytes in flight; four blocks of 256 threads make
// 64 KB. That many blocks fit if a thread uses at most 64 registers. Passes that need more registers run three blocks,
// or two in float64.
//
// A step has a block for every part of a chunk, two vectors for each thread of the float32 step, and the device hands
// a new block to a multiprocessor whenever one ends. Blocks that are under way at the same time then work on
// neighbouring memory. An H200 so moves 97 % of what its copy does, 96 % with four vectors a thread and 95 % with one;
// an H100 96 % with four vectors, 94 % with a whole chunk for each block, and 93 % with no more blocks than it holds at
// once, each of which takes every n-th chunk.
constexpr int kThreads = 256;

// Sets `blocks` to `wanted`, or to the number of blocks that the current device holds at once if that is smaller.
inline cudaError_t resident_blocks(int per_multiprocessor, int64_t wanted, unsigned int* blocks) {
  int current = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, current);
  const int64_t most = static_cast<int64_t>(multiprocessors) * per_multiprocessor;
  *blocks = static_cast<unsigned int>(wanted < most ? wanted : most);
  return error;
}

}  // namespace nesterov_pp::cuda
