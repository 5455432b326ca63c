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
constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = 16 * kPage;

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

#if defined(__linux__)
// A region of zeroed pages that begins at a multiple of the huge page size.
class Region {
 public:
  explicit Region(size_t bytes) : mapped_(bytes + kHugePage) {
    void* start = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return;
    start_ = start;
    const auto address = reinterpret_cast<size_t>(start);
    data_ = static_cast<char*>(start) + (kHugePage - address % kHugePage) % kHugePage;
    madvise(data_, bytes, MADV_HUGEPAGE);  // if this fails, the pages are ordinary ones
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() {
    if (start_ != nullptr) munmap(start_, mapped_);
  }
  char* data() const { return data_; }

  // Gives the pages that lie completely within these bytes back to the system; they read as zeros afterwards.
  void give_back(size_t begin, size_t bytes) const {
    const size_t first = rounded_up(begin, kPage), end = (begin + bytes) / kPage * kPage;
    if (first < end) madvise(data_ + first, end - first, MADV_DONTNEED);
  }

 private:
  size_t mapped_;
  void* start_ = nullptr;
  char* data_ = nullptr;
};
#endif

// [note: where a tensor lies within its page]
// To decide whether a load has to wait for an earlier store, a processor first compares the low twelve bits of their
// addresses, the places within their pages. A pass stores element i of each tensor and then loads element i + 1. If two
// tensors start a cache line or two apart within their pages, every load waits; this was measured to make a pass with
// streaming stores take 1.4 to 2.6 times as long. If all start at the same place within their pages, no load waits. So
// each large tensor starts at the same place within its page as the tensor that it is like. Small tensors lie densely.
class Layout {
 public:
  // Returns where the next tensor begins, in bytes from the start of the region, which is the start of a page.
  size_t place(const at::Tensor& like, at::ScalarType dtype) {
    const size_t bytes = static_cast<size_t>(like.numel()) * c10::elementSize(dtype);
    if (bytes >= kLarge) {
      const size_t within = reinterpret_cast<size_t>(like.data_ptr()) % kPage / kLine * kLine;
      end_ += (within + kPage - end_ % kPage) % kPage;
    }
    const size_t begin = end_;
    end_ += rounded_up(bytes, kLine);
    return begin;
  }
  size_t end() const { return end_; }

 private:
  size_t end_ = 0;
};

}  // namespace

std::vector<at::Tensor> zeros_like(const std::vector<at::Tensor>& tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
#if defined(__linux__)
  Layout layout;
  std::vector<size_t> begins;
  begins.reserve(tensors.size());
  for (const auto& t : tensors) begins.push_back(layout.place(t, dtype));
  if (layout.end() >= kHugePage) {
    const auto region = std::make_shared<Region>(layout.end());
    if (region->data() != nullptr) {
      for (size_t i = 0; i < tensors.size(); ++i) {
        const at::Tensor& t = tensors[i];
        const auto options = t.options().dtype(dtype).requires_grad(false);
        const size_t begin = begins[i], bytes = static_cast<size_t>(t.numel()) * c10::elementSize(dtype);
        const auto give_back = [region, begin, bytes](void*) { region->give_back(begin, bytes); };
        result.push_back(at::from_blob(region->data() + begin, t.sizes(), t.strides(), give_back, options));
      }
      return result;
    }
  }
#endif
  for (const auto& t : tensors) result.push_back(at::zeros_like(t, t.options().dtype(dtype)));
  return result;
}

}  // namespace nesterov_pp
