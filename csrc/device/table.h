// What a pass over many tensors on a device reads to find them. Free of torch and of CUDA.
//
// [note: the table]
// Columns of 64-bit words with one word for each tensor, in device memory. It stays there from step to step; the host
// keeps a copy, compares it with the addresses of every step, and sends the words that differ: those of the gradients,
// as a rule, which is why these columns come first. The addresses of every ring slot are in it, so a step names its
// slots by number. A pass is cut into chunks of equal size: each is one word, (tensor << 32) | chunk of that tensor.
#pragma once

#include <cstdint>

#include "codec.h"

namespace nesterov_pp::device {

enum Column : int {
  kRow,      // of the coefficients; -1 for a tensor without a gradient
  kGrad,     // address
  kAligned,  // 1 where all addresses of the tensor are multiples of kVectorBytes, else 0
  kNumel,
  kNumber,  // of the parameter, for stochastic rounding
  kMaster,  // address, 0 without
  kExpAvg,
  kExpAvgSq,       // address, 0 without
  kMean,           // address of a correction's running mean, 0 without
  kShadow,         // address of the shadow of a ring that predicts, 0 without
  kExpAvgScale,    // address of the scales of a moment in eight bits, 0 without
  kExpAvgSqScale,  // likewise
  kResidual,       // address of the residuals of weights in 24 bits, 0 without
  kSlots,          // addresses in ring slot 0; those in slot s are s columns further on
};

// Even, since elements 2b and 2b + 1 share random bits, and a multiple of every vector.
constexpr int64_t kChunk = 16384;

struct Table {
  const int64_t* words;
  int64_t tensors;

  NPP_HD int64_t at(int column, int64_t tensor) const { return words[column * tensors + tensor]; }
};

// Elements `begin` to `begin + count` of a tensor.
struct Span {
  int64_t tensor;
  int64_t begin;
  int count;
};

NPP_HD Span span_of(const Table& table, int64_t chunk) {
  const int64_t tensor = chunk >> 32, begin = (chunk & 0xffffffff) * kChunk;
  const int64_t left = table.at(kNumel, tensor) - begin;
  return {tensor, begin, static_cast<int>(left < kChunk ? left : kChunk)};
}

}  // namespace nesterov_pp::device
