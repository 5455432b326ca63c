#include "counts.h"

#include <cmath>
#include <utility>

#include "fail.h"
#include "raw.h"

namespace nesterov_pp {
namespace {

bool is_number(const at::Tensor& t) {
  return answers(t) && t.device().is_cpu() && t.layout() == at::kStrided && t.numel() == 1 && is_raw(t);
}

}  // namespace

Counts::Counts(const char* what, std::vector<at::Tensor> tensors) : what_(what), tensors_(std::move(tensors)) {
  for (const at::Tensor& t : tensors_) {
    places_.emplace_back();
    if (!is_number(t) || t.scalar_type() != at::kFloat) continue;
    float* number = t.mutable_data_ptr<float>();
    const c10::StorageImpl* storage = t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    places_.back() = {storage, storage->data(), number};
  }
}

float* Counts::place(size_t i) const {
  const Place& place = places_[i];
  const c10::StorageImpl* storage = tensors_[i].unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  return place.storage == storage && storage != nullptr && storage->data() == place.data ? place.number : nullptr;
}

double Counts::read(size_t i, const std::string& parameter) const {
  const at::Tensor& t = tensors_[i];
  const float* number = place(i);
  if (number == nullptr && !is_number(t)) {
    if (!answers(t) || (t.device().is_cpu() && t.numel() == 1)) check_raw(what_, parameter, t);
    fail("the ", what_, " of ", parameter, " must be a CPU tensor with one number, not a tensor of shape ", t.sizes(),
         " on ", t.device());
  }
  double value = 0;
  if (number != nullptr)
    value = *number;
  else if (t.scalar_type() == at::kDouble)
    value = *t.const_data_ptr<double>();
  else
    value = t.item().toDouble();
  if (!std::isfinite(value) || value < 0)
    fail("the ", what_, " of ", parameter, " must be a finite number of at least 0, not ", value);
  return value;
}

void Counts::write(size_t i, double value) const {
  const at::Tensor& t = tensors_[i];
  if (float* number = place(i))
    *number = static_cast<float>(value);
  else if (t.scalar_type() == at::kDouble)
    *t.mutable_data_ptr<double>() = value;
  else
    t.fill_(value);
}

void Counts::prefetch(size_t i) const {
  if (i < tensors_.size()) __builtin_prefetch(tensors_[i].unsafeGetTensorImpl());
}

}  // namespace nesterov_pp
