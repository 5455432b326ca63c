#include "raw.h"

#include <ATen/EmptyTensor.h>

#include "fail.h"

namespace nesterov_pp {

bool has_strided_memory(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  const c10::StorageImpl* storage = t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  if (storage == nullptr || storage->data() == nullptr) return false;
  const auto offset = static_cast<size_t>(t.storage_offset());
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), offset) <= storage->nbytes();
}

std::string why_not_raw(const at::Tensor& t) {
  const auto keys = t.unsafeGetTensorImpl()->key_set();
  if (keys.has(c10::DispatchKey::Python)) return "is a tensor subclass that keeps its elements elsewhere";
  if (keys.has(c10::DispatchKey::ZeroTensor)) return "is a tensor of zeros without memory; materialise it with clone()";
  if (keys.has(c10::DispatchKey::Negative)) return "is negated lazily; materialise it with resolve_neg()";
  if (keys.has(c10::DispatchKey::Conjugate)) return "is conjugated lazily; materialise it with resolve_conj()";
  if (has_only(t, kOrdinaryKeys)) return "has a storage smaller than its shape (resized, or freed)";
  return "is not an ordinary tensor (" + c10::toString(keys) + ")";
}

void check_raw(const char* what, const std::string& name, const at::Tensor& dense) {
  if (is_raw(dense)) return;
  if (*what == '\0') fail(name, " ", why_not_raw(dense));
  fail("the ", what, " of ", name, " ", why_not_raw(dense));
}

}  // namespace nesterov_pp
