#include "check.h"

#include <c10/core/InferenceMode.h>

#include "../codes.h"
#include "fail.h"
#include "raw.h"

namespace nesterov_pp {
namespace {

// Returns whether a pass can go over both side by side as flat runs.
bool laid_out_alike(const at::Tensor& weight, const at::Tensor& other) {
  return other.layout() == at::kStrided && other.device() == weight.device() && other.sizes() == weight.sizes() &&
         (other.strides() == weight.strides() || weight.numel() <= 1);
}

// Checks that a tensor is raw and, if it is written, that a version counter notes the write. Inference tensors have no
// version counter; only inference mode may write them.
void check_memory(const std::string& name, const char* what, const at::Tensor& t, bool written) {
  check_raw(what, name, t);
  if (!written || !t.is_inference() || c10::InferenceMode::is_enabled()) return;
  const char* advice = " is an inference tensor, which only inference mode may write; make it outside or clone() it";
  if (*what == '\0') fail(name, advice);
  fail("the ", what, " of ", name, advice);
}

void check_matches(const std::string& name, const char* what, const at::Tensor& weight, const at::Tensor& other,
                   bool written = true) {
  if (!answers(other)) check_raw(what, name, other);
  if (laid_out_alike(weight, other)) {
    check_memory(name, what, other, written);
    return;
  }
  if (other.layout() != weight.layout())
    fail("the ", what, " of ", name, " has layout ", other.layout(), ", but the parameter is ", weight.layout());
  if (other.device() != weight.device())
    fail("the ", what, " of ", name, " is on ", other.device(), ", but the parameter is on ", weight.device());
  if (other.sizes() != weight.sizes())
    fail("the ", what, " of ", name, " has shape ", other.sizes(), ", but the parameter has ", weight.sizes());
  fail("the ", what, " of ", name, " has strides ", other.strides(), ", but the parameter has ", weight.strides());
}

std::optional<Dtype> known_dtype(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      return std::nullopt;
  }
}

void check_dtype(const std::string& name, const char* what, const at::Tensor& weight, const at::Tensor& other) {
  if (other.dtype() != weight.dtype())
    fail("the ", what, " of ", name, " is ", other.scalar_type(), ", but the parameter is ", weight.scalar_type());
}

// Returns the weights that a step computes with.
const at::Tensor& computed(const Item& item) { return item.master != nullptr ? *item.master : *item.weight; }

std::optional<Dtype> moment_dtype(const Item& item) {
  if (item.exp_avg_scale != nullptr && item.exp_avg->scalar_type() == at::kChar) return Dtype::kCode;
  return known_dtype(*item.exp_avg);
}

// Returns nullopt if no pass takes one of the dtypes.
std::optional<Spec> known_spec(const Item& item, Normaliser normaliser, bool stochastic) {
  const auto grad = known_dtype(*item.weight), moment = moment_dtype(item);
  auto weight = known_dtype(computed(item));
  if (item.residual != nullptr) weight = Dtype::kSplit;
  if (!weight || !grad || !moment) return std::nullopt;
  return Spec{{*weight, *grad, *moment}, normaliser, item.late != nullptr, stochastic};
}

// Returns the elements of a checked tensor, without the checks of data_ptr().
const void* elements(const at::Tensor& t) {
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  return static_cast<const char*>(impl->unsafe_storage().data()) + impl->storage_offset() * impl->itemsize();
}

void* writable(const at::Tensor& t) {
  const at::TensorImpl* impl = t.unsafeGetTensorImpl();
  return static_cast<char*>(impl->unsafe_storage().mutable_data()) + impl->storage_offset() * impl->itemsize();
}

void check_dtypes(const Item& item, bool stochastic) {
  const auto spec = known_spec(item, Normaliser::kNone, false);
  // Most parameters take this pass; it needs no lookup.
  if (spec && !stochastic && spec->dtypes.weight == spec->dtypes.grad && spec->dtypes.moment == spec->dtypes.grad)
    return;
  if (!spec || !supported(*spec))
    fail("the first moment of ", *item.name, " is ", item.exp_avg->scalar_type(), ", which does not go with a ",
         item.weight->scalar_type(),
         " parameter; use the parameter's dtype, Float or BFloat16 (for Double, only Double)");
  if (stochastic && !supported(*known_spec(item, Normaliser::kNone, true)))
    fail(*item.name, " or its moments are Half, which is not rounded stochastically; use BFloat16, or master weights");
}

void check_scale(const Item& item, const char* what, const at::Tensor& scale) {
  const int64_t groups = (item.weight->numel() + kGroup - 1) / kGroup;
  if (!answers(scale)) check_raw(what, *item.name, scale);
  if (scale.scalar_type() != at::kHalf || scale.dim() != 1 || scale.numel() != groups || !scale.is_contiguous() ||
      scale.device() != item.weight->device())
    fail("the ", what, " of ", *item.name, " must be ", groups, " contiguous Half numbers on ", item.weight->device());
  check_memory(*item.name, what, scale, /*written=*/true);
}

void check_small(const Item& item) {
  const std::string& name = *item.name;
  if (item.exp_avg_scale != nullptr) check_scale(item, "scale of the first moment", *item.exp_avg_scale);
  if (item.exp_avg_sq_scale != nullptr) check_scale(item, "scale of the second moment", *item.exp_avg_sq_scale);
  if (item.residual == nullptr) return;
  check_matches(name, "residual", *item.weight, *item.residual);
  if (item.residual->scalar_type() != at::kChar || item.weight->scalar_type() != at::kBFloat16)
    fail("the residual of ", name, " is ", item.residual->scalar_type(), ", but it must be Char, of BFloat16 weights");
}

}  // namespace

Spec spec_of(const Item& item, const Rule& rule, bool stochastic) {
  return *known_spec(item, rule.normaliser, stochastic);
}

Dtype dtype_of(const at::Tensor& checked) { return *known_dtype(checked); }

void check_carried(const Item& item, const at::Device& device) {
  const std::string& name = *item.name;
  const at::Tensor& weight = *item.weight;
  if (!answers(weight)) check_raw("", name, weight);
  if (weight.layout() != at::kStrided || weight.device() != device || !known_dtype(weight))
    fail(name, " is a ", weight.layout(), " ", weight.scalar_type(), " tensor on ", weight.device(),
         "; this pass takes strided tensors of float32, float64, bfloat16 and float16 on ", device);
  if (!weight.is_non_overlapping_and_dense())
    fail(name, " has strides ", weight.strides(), " for shape ", weight.sizes(),
         "; this pass takes dense tensors without overlap");
  check_memory(name, "", weight, /*written=*/!moves(item) && item.master == nullptr);
  if (moves(item)) {
    check_matches(name, "next version", weight, *item.next);
    check_dtype(name, "next version", weight, *item.next);
  }
}

void check(const Item& item, bool stochastic, const at::Device& device) {
  check_carried(item, device);
  const std::string& name = *item.name;
  const at::Tensor& weight = *item.weight;
  if (item.grad->defined()) {
    check_matches(name, "gradient", weight, *item.grad, /*written=*/false);
    check_dtype(name, "gradient", weight, *item.grad);
  }
  if (item.master != nullptr) {
    check_matches(name, "master weight", weight, *item.master);
    if (item.master->scalar_type() != at::kFloat)
      fail("the master weight of ", name, " is ", item.master->scalar_type(), ", but it must be Float");
  }
  check_matches(name, "first moment", weight, *item.exp_avg);
  check_dtypes(item, stochastic);
  check_small(item);
  if (item.mean != nullptr) {
    check_matches(name, "running mean", weight, *item.mean);
    if (item.mean->dtype() != item.exp_avg->dtype())
      fail("the running mean of ", name, " is ", item.mean->scalar_type(), ", but the first moment is ",
           item.exp_avg->scalar_type());
  }
  if (item.late != nullptr) {
    check_matches(name, "weight version of the gradient", weight, *item.late, /*written=*/false);
    check_dtype(name, "weight version of the gradient", weight, *item.late);
  }
  if (item.shadow != nullptr) {
    check_matches(name, "shadow", weight, *item.shadow);
    check_dtype(name, "shadow", weight, *item.shadow);
  }
  if (item.exp_avg_sq == nullptr) return;
  check_matches(name, "second moment", weight, *item.exp_avg_sq);
  if (item.exp_avg_scale != nullptr && item.exp_avg_sq->scalar_type() == at::kByte && item.exp_avg_sq_scale != nullptr)
    return;
  if (item.exp_avg_sq->dtype() != item.exp_avg->dtype() || item.exp_avg_scale != nullptr)
    fail("the second moment of ", name, " is ", item.exp_avg_sq->scalar_type(), ", but the first is ",
         item.exp_avg->scalar_type());
}

Task task_of(const Item& item, const Rule& rule, bool stochastic) {
  Task task{};
  Run& run = task.run;
  if (!item.grad->defined()) {
    task.row = kCarried;
    if (!moves(item)) return task;
    const Dtype dtype = dtype_of(*item.weight);
    task.spec.dtypes = {dtype, dtype, dtype};
    run.count = item.weight->numel();
    run.weight = elements(*item.weight);
    run.weight_out = writable(*item.next);
    return task;
  }
  task.spec = spec_of(item, rule, stochastic);
  run.rule = rule;
  run.count = item.weight->numel();
  run.grad = elements(*item.grad);
  run.exp_avg = writable(*item.exp_avg);
  if (item.exp_avg_sq != nullptr) run.exp_avg_sq = writable(*item.exp_avg_sq);
  if (item.late != nullptr) run.late = elements(*item.late);
  if (item.exp_avg_scale != nullptr) run.exp_avg_scale = writable(*item.exp_avg_scale);
  if (item.exp_avg_sq_scale != nullptr) run.exp_avg_sq_scale = writable(*item.exp_avg_sq_scale);
  if (item.residual != nullptr) run.residual = writable(*item.residual);
  if (item.mean != nullptr) run.mean = writable(*item.mean);
  // Either the ring holds the stepped weights and the shadow the predicted ones, or the other way round.
  const bool swapped = item.ring_predicts;
  const at::Tensor* predicted = swapped ? item.next : item.shadow;
  if (predicted != nullptr) run.ahead = writable(*predicted);
  const at::Tensor& stepped = swapped ? *item.shadow : *item.weight;
  void* out = writable(swapped ? *item.shadow : moves(item) ? *item.next : *item.weight);
  if (item.master != nullptr) {
    run.weight = run.weight_out = writable(*item.master);
    run.copy = out;
  } else {
    run.weight = &stepped == item.weight && moves(item) ? elements(stepped) : out;
    run.weight_out = out;
  }
  return task;
}

void note_writes(const Item& item) {
  const auto note = [](const at::Tensor& t) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();  // an inference tensor has no version counter
  };
  const bool steps = item.grad->defined();
  if (steps || moves(item)) note(*item.next);
  if (!steps) return;
  note(*item.exp_avg);
  for (const at::Tensor* written :
       {item.exp_avg_sq, item.master, item.mean, item.shadow, item.exp_avg_scale, item.exp_avg_sq_scale, item.residual})
    if (written != nullptr) note(*written);
}

}  // namespace nesterov_pp
