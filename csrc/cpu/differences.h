// Older versions of weights as 8-bit differences between each version and the next.
//
// [note: the format]
// A row holds one difference d = next - version of many tensors. In memory order, every kGroup elements of a tensor
// share one scale s, a bfloat16 number, and each has a code q, a signed byte:
//     s = bfloat16(max |d| / 127),   q = round(d / s)  (to even; at most 127 in magnitude; 0 if s is 0 or not finite)
// The version is decoded from the newest weights by the rows of all versions since: newest - (s q + s' q' + ...),
// summed from the newest difference to the oldest in float32 and subtracted with one rounding. bfloat16 has the range
// of float32, which the differences of small learning rates need. Where a difference is not finite, its group decodes
// to NaN. The codes of each tensor begin at a multiple of kAlign.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtype.h"

namespace nesterov_pp::cpu {

constexpr int64_t kGroup = 32;
constexpr int64_t kAlign = 64;

// A tensor of `count` elements whose codes begin at `first`. An encoder reads version `a` and the next version `b`; a
// decoder reads the newest version `a` and writes `out`.
struct Differing {
  const void* a;
  const void* b;
  void* out;
  int64_t count;
  int64_t first;
  Dtype dtype;
};

// The codes and scales of one row.
struct CodeRow {
  int8_t* codes;
  uint16_t* scales;
};

// Both run on torch's intra-op threads. The bits are the same for every instruction set and number of threads.
void encode(const std::vector<Differing>& tensors, const CodeRow& row);
void decode(const std::vector<Differing>& tensors, const std::vector<CodeRow>& rows);

}  // namespace nesterov_pp::cpu
