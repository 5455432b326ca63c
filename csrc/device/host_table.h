// The host's copy of a table (table.h), with the range of words that the device does not have yet. Independent of torch
// and CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "table.h"

namespace nesterov_pp::device {

class HostTable {
 public:
  HostTable(int64_t tensors, int64_t slots)
      : tensors_(tensors), words_(static_cast<size_t>((kSlots + slots) * tensors), 0), end_(words_.size()) {}

  void set(int column, int64_t tensor, int64_t value) {
    const auto k = static_cast<size_t>(column * tensors_ + tensor);
    if (words_[k] == value) return;
    words_[k] = value;
    if (begin_ == end_) begin_ = end_ = k;
    begin_ = std::min(begin_, k);
    end_ = std::max(end_, k + 1);
  }
  int64_t at(int column, int64_t tensor) const { return words_[static_cast<size_t>(column * tensors_ + tensor)]; }

  // The words from `begin` to `end` include all that changed since the last call of `sent`; at first, all words.
  size_t begin() const { return begin_; }
  size_t end() const { return end_; }
  void sent() { begin_ = end_ = 0; }

  const std::vector<int64_t>& all() const { return words_; }

 private:
  int64_t tensors_;
  std::vector<int64_t> words_;
  size_t begin_ = 0, end_;
};

// Returns the chunks of tensors of these sizes, one word for each chunk.
inline std::vector<int64_t> chunks_of(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> chunks;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t count = (sizes[i] + kChunk - 1) / kChunk;
    if (i > 0x7fffffff || count > 0xffffffff) throw std::length_error("a pass takes fewer tensors and elements");
    for (int64_t k = 0; k < count; ++k) chunks.push_back((static_cast<int64_t>(i) << 32) | k);
  }
  return chunks;
}

}  // namespace nesterov_pp::device
