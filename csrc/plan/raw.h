// Checks that a pass may use a tensor's memory directly.
//
// [note: which tensors are raw]
// A pass reads and writes through pointers and bypasses torch's dispatcher. That is correct only if the value of every
// element is what lies in memory at the place given by sizes and strides. This does not hold
//   for a tensor without memory: ZeroTensor, meta, fake, a wrapper subclass, a storage resized to 0;
//   for a tensor with a bit that changes its values: negative, conjugate;
//   under a transform: functorch.
// All of these show in the dispatch keys or in the size of the storage. So a tensor is raw if it has only the keys of
// ordinary CPU and CUDA tensors and its storage is large enough; no other tensor is.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

namespace nesterov_pp {

constexpr c10::DispatchKeySet kOrdinaryKeys =
    c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::DispatchKeySet(c10::DispatchKey::CUDA) |
    c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) | c10::DispatchKeySet(c10::DispatchKey::AutogradCUDA) |
    c10::DispatchKeySet(c10::DispatchKey::AutocastCPU) | c10::DispatchKeySet(c10::DispatchKey::AutocastCUDA) |
    c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
// The keys that torch's own copy resolves without calling into Python.
constexpr c10::DispatchKeySet kResolvedKeys = c10::DispatchKeySet(c10::DispatchKey::Negative) |
                                              c10::DispatchKeySet(c10::DispatchKey::Conjugate) |
                                              c10::DispatchKeySet(c10::DispatchKey::ZeroTensor);

inline bool has_only(const at::Tensor& t, c10::DispatchKeySet keys) {
  return (t.unsafeGetTensorImpl()->key_set().raw_repr() & ~keys.raw_repr()) == 0;
}

// Returns whether the storage holds all elements of a tensor that has ordinary keys and is dense (no gaps or overlaps).
inline bool has_memory(const at::Tensor& t) {
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  const int64_t count = impl->numel();
  if (count == 0) return true;
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  return storage != nullptr && storage->data() != nullptr &&
         static_cast<uint64_t>(impl->storage_offset() + count) * impl->itemsize() <= storage->nbytes();
}

// Returns whether sizes, strides and the like can be read on any thread, without Python and without an error.
inline bool answers(const at::Tensor& t) {
  return !t.unsafeGetTensorImpl()->key_set().has_any(c10::DispatchKeySet(c10::DispatchKey::Python) |
                                                     c10::DispatchKeySet(c10::DispatchKey::NestedTensor));
}

inline bool is_raw(const at::Tensor& dense) { return has_only(dense, kOrdinaryKeys) && has_memory(dense); }

// Like `has_memory`, for a strided tensor that may have gaps or overlaps.
bool has_strided_memory(const at::Tensor& t);

// Returns why a tensor is not raw, as the end of a sentence.
std::string why_not_raw(const at::Tensor& t);

// Throws std::invalid_argument unless the tensor is raw. `what` and `name` are, for example, "gradient" and
// "layer.weight".
void check_raw(const char* what, const std::string& name, const at::Tensor& dense);

}  // namespace nesterov_pp
