// How large the grids of passes are.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nesterov_pp::cuda {

// [note: the size of a grid]
// An H200 moves about 4.3 TB/s and answers after some 0.7 us, so about 3 MB have to be under way: 23 KB on each of 132
// multiprocessors. A thread of the float32 step has four vectors of 16 bytes under way; four blocks of 256 threads make
// 64 KB. 64 registers a thread allow that; passes that need more run two blocks, 32 to 64 KB. The grid has as many
// blocks as fit on the device at once and each takes every so many-th chunk: no last wave that is nearly empty.
constexpr int kThreads = 256;

// As many blocks as the current device holds at once.
inline cudaError_t resident_blocks(int per_multiprocessor, int64_t wanted, unsigned int* blocks) {
  int current = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, current);
  const int64_t most = static_cast<int64_t>(multiprocessors) * per_multiprocessor;
  *blocks = static_cast<unsigned int>(wanted < most ? wanted : most);
  return error;
}

}  // namespace nesterov_pp::cuda
