#include "memory.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros_like.h>

#include <cstddef>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nesterov_pp {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

#if defined(__linux__)
// Zeroed pages, of which the first lies at a multiple of the huge page size.
class Region {
 public:
  explicit Region(size_t bytes) : mapped_(bytes + kHugePage) {
    void* start = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return;
    start_ = start;
    const auto address = reinterpret_cast<size_t>(start);
    data_ = static_cast<char*>(start) + (kHugePage - address % kHugePage) % kHugePage;
    madvise(data_, bytes, MADV_HUGEPAGE);  // a refusal leaves ordinary pages
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() {
    if (start_ != nullptr) munmap(start_, mapped_);
  }
  char* data() const { return data_; }

 private:
  size_t mapped_;
  void* start_ = nullptr;
  char* data_ = nullptr;
};
#endif

size_t lines(const at::Tensor& t, at::ScalarType dtype) {
  const size_t bytes = static_cast<size_t>(t.numel()) * c10::elementSize(dtype);
  return (bytes + kLine - 1) / kLine * kLine;
}

}  // namespace

std::vector<at::Tensor> zeros_like(const std::vector<at::Tensor>& tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
#if defined(__linux__)
  size_t bytes = 0;
  for (const auto& t : tensors) bytes += lines(t, dtype);
  if (bytes >= kHugePage) {
    const auto region = std::make_shared<Region>(bytes);
    if (region->data() != nullptr) {
      char* next = region->data();
      for (const auto& t : tensors) {
        const auto options = t.options().dtype(dtype).requires_grad(false);
        result.push_back(at::from_blob(next, t.sizes(), t.strides(), [region](void*) {}, options));
        next += lines(t, dtype);
      }
      return result;
    }
  }
#endif
  for (const auto& t : tensors) result.push_back(at::zeros_like(t, t.options().dtype(dtype)));
  return result;
}

}  // namespace nesterov_pp
