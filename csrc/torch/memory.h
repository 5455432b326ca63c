// Memory for lists of tensors that are passed over together.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace nesterov_pp {

// Zeros like each of the dense CPU `tensors`, in `dtype`, side by side in one region that the system may back by huge
// pages: a pass over many streams then seldom waits for address translation. Every tensor has a storage of its own,
// whose pages go back to the system with it; the addresses of the region stay taken as long as any of them is there.
// Falls back to ordinary memory where the system offers no such thing.
std::vector<at::Tensor> zeros_like(const std::vector<at::Tensor>& tensors, at::ScalarType dtype);

}  // namespace nesterov_pp
