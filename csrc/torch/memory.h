// Memory for lists of tensors that one pass goes over.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace nesterov_pp {

// Returns zeros like each of the dense CPU `tensors`, in `dtype`, side by side in one region that the system may back
// with huge pages: a pass over many tensors then seldom waits for address translation. Every tensor has its own
// storage, whose pages go back to the system when it is freed; the addresses of the region stay reserved as long as one
// of the tensors exists. Falls back to ordinary memory if the system offers no such region, or if the tensors together
// are smaller than a huge page.
std::vector<at::Tensor> zeros_like(const std::vector<at::Tensor>& tensors, at::ScalarType dtype);

}  // namespace nesterov_pp
