// Whether a pass may go over a tensor's memory itself.
//
// [note: what raw memory may be taken for a tensor's elements]
// A pass reads and writes through pointers, past torch's dispatcher. That is right only where an element's value is
// what lies in memory at the place that sizes and strides give. It is not in a tensor without memory (ZeroTensor, meta,
// fake, a wrapper subclass, a storage resized to 0), nor where a bit of the tensor changes the value (negative,
// conjugate), nor where a transform stands between (functorch). All of these show in the dispatch keys or in the size
// of the storage, so a tensor whose keys are those of ordinary CPU and CUDA tensors and whose storage is large enough
// is raw, and no other.
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
// Those that torch's own copy resolves without calling into Python.
constexpr c10::DispatchKeySet kResolvedKeys = c10::DispatchKeySet(c10::DispatchKey::Negative) |
                                              c10::DispatchKeySet(c10::DispatchKey::Conjugate) |
                                              c10::DispatchKeySet(c10::DispatchKey::ZeroTensor);

inline bool has_only(const at::Tensor& t, c10::DispatchKeySet keys) {
  return (t.unsafeGetTensorImpl()->key_set().raw_repr() & ~keys.raw_repr()) == 0;
}

// Whether the storage has all elements of a tensor of ordinary keys that is dense: without gaps and overlaps.
inline bool has_memory(const at::Tensor& t) {
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  const int64_t count = impl->numel();
  if (count == 0) return true;
  const c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  return storage != nullptr && storage->data() != nullptr &&
         static_cast<uint64_t>(impl->storage_offset() + count) * impl->itemsize() <= storage->nbytes();
}

// Whether sizes, strides and the like can be asked for on any thread, without Python and without an error.
inline bool answers(const at::Tensor& t) {
  return !t.unsafeGetTensorImpl()->key_set().has_any(c10::DispatchKeySet(c10::DispatchKey::Python) |
                                                     c10::DispatchKeySet(c10::DispatchKey::NestedTensor));
}

inline bool is_raw(const at::Tensor& dense) { return has_only(dense, kOrdinaryKeys) && has_memory(dense); }

// The same as `has_memory` of a strided tensor with gaps or overlaps.
bool has_strided_memory(const at::Tensor& t);

// What keeps a tensor from being raw, as the end of a sentence.
std::string why_not_raw(const at::Tensor& t);

// Throws std::invalid_argument unless the tensor is raw. `what` and `name`: "gradient" and "layer.weight".
void check_raw(const char* what, const std::string& name, const at::Tensor& dense);

}  // namespace nesterov_pp
