// One number for each parameter, such as its step count, each in its own tensor, which others may write as well.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace nesterov_pp {

class Counts {
 public:
  // `what` names the numbers in error messages.
  Counts(const char* what, std::vector<at::Tensor> tensors);

  bool empty() const { return tensors_.empty(); }

  // Throws std::invalid_argument, naming the parameter, unless its tensor is on the CPU and holds one finite number of
  // at least 0.
  double read(size_t i, const std::string& parameter) const;
  void write(size_t i, double value) const;

  // Prefetches memory that `read` needs.
  void prefetch(size_t i) const;

 private:
  // The place of a float32 number, valid while its tensor keeps its storage, so that nothing else of the tensor has to
  // be read. Null for other tensors.
  struct Place {
    const c10::StorageImpl* storage = nullptr;
    const void* data = nullptr;  // of the storage
    float* number = nullptr;
  };
  float* place(size_t i) const;

  const char* what_;
  std::vector<at::Tensor> tensors_;
  std::vector<Place> places_;
};

}  // namespace nesterov_pp
