// One number for every parameter, such as its count of steps, each in a tensor of its own that anyone may write.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace nesterov_pp {

class Counts {
 public:
  // `what` names the numbers in messages.
  Counts(const char* what, std::vector<at::Tensor> tensors);

  bool empty() const { return tensors_.empty(); }

  // Throws std::invalid_argument naming the parameter unless its tensor is a finite number from 0 on, on the CPU.
  double read(size_t i, const std::string& parameter) const;
  void write(size_t i, double value) const;

  // Asks for the memory that `read` takes.
  void prefetch(size_t i) const;

 private:
  // Where a float32 number lies for as long as its tensor keeps its storage, so that nothing else of the tensor has to
  // be read. Null for others.
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
