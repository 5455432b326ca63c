#include "plan.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <utility>

#include "fail.h"
#include "raw.h"

namespace nesterov_pp {
namespace {

// Returns the gradient laid out in memory like its parameter, so that a pass can go over both as flat runs. It is
// copied if it is laid out differently, if a bit changes its values (negative, conjugate), or if it is a tensor of
// zeros without memory. A gradient that cannot be copied in this way is returned as it is, for `check` to refuse.
at::Tensor laid_out_as(const at::Tensor& weight, const at::Tensor& grad) {
  if (!answers(weight) || !has_only(grad, kOrdinaryKeys | kResolvedKeys)) return grad;
  const bool resolved = has_only(grad, kOrdinaryKeys);
  const bool same = resolved && (grad.strides() == weight.strides() || weight.numel() <= 1);
  if (same || grad.layout() != at::kStrided || grad.sizes() != weight.sizes()) return grad;
  if (!grad._is_zerotensor() && !has_strided_memory(grad)) return grad;
  const at::NoGradGuard no_grad;
  return at::empty_like(weight, grad.options()).copy_(grad);
}

// With fewer than twice as many tensors, waking the other threads costs more than it saves.
constexpr int64_t kTensorsOfThread = 256;

// Returns the gradient of a leaf. Tensor::grad() would first check that the tensor is a leaf.
const at::Tensor& grad_of(const at::Tensor& leaf) { return leaf.unsafeGetTensorImpl()->grad(); }

// Calls `visit(i)` for all i below n, on torch's intra-op threads if n is large.
template <class Visit>
void for_each_tensor(size_t n, const Visit& visit) {
  at::parallel_for(0, static_cast<int64_t>(n), kTensorsOfThread, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) visit(i);
  });
}

void prefetch_line(const void* address) { __builtin_prefetch(address); }

void prefetch_tensor(const at::Tensor& t) {
  if (!t.defined()) return;
  const char* impl = reinterpret_cast<const char*>(t.unsafeGetTensorImpl());
  for (size_t line = 0; line < sizeof(at::TensorImpl); line += 64) prefetch_line(impl + line);
}

void prefetch_storage(const at::Tensor& t) {
  if (!t.defined()) return;
  const void* storage = t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  if (storage != nullptr) prefetch_line(static_cast<const char*>(storage) + 16);
}

}  // namespace

Plan::Plan(Tensors tensors, std::optional<uint64_t> seed)
    : t_(std::move(tensors)),
      steps_("step count", t_.steps),
      mu_products_("mu product", t_.mu_products),
      seed_(seed),
      device_(t_.slots.empty() || t_.slots[0].empty() ? at::Device(at::kCPU) : t_.slots[0][0]->device()) {
  const size_t n = t_.names.size();
  const auto fits = [n](const auto& list) { return list.size() == n; };
  const auto fits_if = [&fits](bool needed, const auto& list) { return needed ? fits(list) : list.empty(); };
  const Rule& rule = t_.rule;
  bool same = fits(t_.numbers) && fits(t_.groups) && fits(t_.exp_avgs) && fits(t_.masters) && !t_.slots.empty() &&
              fits_if(!t_.steps.empty(), t_.steps) && fits_if(!t_.mu_products.empty(), t_.mu_products) &&
              fits_if(rule.normaliser == Normaliser::kRms, t_.exp_avg_sqs) &&
              fits_if(t_.corrects && has_mean(rule.kind), t_.means) &&
              fits_if(t_.ring_predicts || !t_.shadows.empty(), t_.shadows) &&
              fits_if(!t_.exp_avg_scales.empty(), t_.exp_avg_scales) &&
              fits_if(!t_.exp_avg_sq_scales.empty(), t_.exp_avg_sq_scales) &&
              fits_if(!t_.residuals.empty(), t_.residuals);
  for (const auto& slot : t_.slots) same = same && fits(slot);
  if (!same) fail("a plan of ", n, " parameters takes lists of ", n, " tensors");
}

Item Plan::item(size_t i, const at::Tensor& grad) const {
  const auto of = [i](const std::vector<at::Tensor>& list) {
    return list.empty() || !list[i].defined() ? nullptr : &list[i];
  };
  return {&t_.names[i],
          t_.slots[slots_.source][i],
          t_.slots[slots_.target][i],
          &grad,
          &t_.exp_avgs[i],
          of(t_.exp_avg_sqs),
          t_.masters[i].defined() ? &t_.masters[i] : nullptr,
          t_.corrects ? t_.slots[slots_.grads][i] : nullptr,
          of(t_.means),
          of(t_.shadows),
          t_.ring_predicts,
          of(t_.exp_avg_scales),
          of(t_.exp_avg_sq_scales),
          of(t_.residuals)};
}

// [note: prefetching]
// Besides the elements, a step reads some 20 cache lines for each parameter. They are scattered over the memory, behind
// chains of two or three pointers. If the tensors are many and small, a loop that read these lines one after the other
// would spend most of the step waiting. So each line is prefetched a few parameters ahead, a pointer before the memory
// it points to.
void Plan::prefetch(size_t i) const {
  constexpr size_t kApart = 4;
  const size_t n = t_.names.size(), near = i + kApart, middle = near + kApart, far = middle + kApart;
  const auto &weights = t_.slots[slots_.source], &next = t_.slots[slots_.target], &leaves = t_.slots[slots_.grads];
  if (far < n) {
    prefetch_tensor(*weights[far]);
    if (slots_.grads != slots_.source) prefetch_tensor(*leaves[far]);
    if (slots_.target != slots_.source) prefetch_tensor(*next[far]);
    prefetch_tensor(t_.exp_avgs[far]);
    if (!t_.exp_avg_sqs.empty()) prefetch_tensor(t_.exp_avg_sqs[far]);
    steps_.prefetch(far);
    mu_products_.prefetch(far);
  }
  if (middle < n) {
    prefetch_line(leaves[middle]->unsafeGetTensorImpl()->autograd_meta());
    prefetch_storage(*weights[middle]);
    if (slots_.target != slots_.source) prefetch_storage(*next[middle]);
    prefetch_storage(t_.exp_avgs[middle]);
    if (!t_.exp_avg_sqs.empty()) prefetch_storage(t_.exp_avg_sqs[middle]);
  }
  if (near < n) prefetch_tensor(grad_of(*leaves[near]));
}

std::vector<StepClass> Plan::collect(const StepSlots& slots) {
  const size_t last = std::max({slots.grads, slots.source, slots.target});
  if (last >= t_.slots.size()) fail("slot ", last, " of a ring of ", t_.slots.size(), " slots does not exist");
  const size_t n = t_.names.size();
  collected_ = false;
  slots_ = slots;
  grads_.assign(n, at::Tensor());
  tasks_.resize(n);
  counts_.resize(n);
  classes_.clear();
  const auto gather = [&](size_t i) {
    prefetch(i);
    this->gather(i);
  };
  try {
    try {
      for_each_tensor(n, gather);
    } catch (const std::invalid_argument&) {
      for (size_t i = 0; i < n; ++i)
        gather(i);  // throws for the first invalid tensor, whichever thread found one first
    }
  } catch (...) {
    forget();
    throw;
  }
  for (size_t i = 0; i < n; ++i) {
    if (tasks_[i].row == kCarried) continue;
    if (steps_.empty()) {
      tasks_[i].row = static_cast<int64_t>(i);
      continue;
    }
    const size_t k = class_of(counts_[i]);
    tasks_[i].row = static_cast<int64_t>(k);
    tasks_[i].run.noise = {seed_.value_or(t_.code_seed), static_cast<uint32_t>(t_.numbers[i]),
                           number_of_step(classes_[k]), 0};
  }
  collected_ = true;
  return classes_;
}

void Plan::gather(size_t i) {
  const at::Tensor& weight = *t_.slots[slots_.source][i];
  const at::Tensor& grad = grad_of(*t_.slots[slots_.grads][i]);
  if (grad.defined()) grads_[i] = laid_out_as(weight, grad);
  const Item item = this->item(i, grads_[i]);
  if (grad.defined())
    check(item, seed_.has_value(), device_);
  else if (moves(item))
    check_carried(item, device_);
  tasks_[i] = task_of(item, t_.rule, seed_.has_value());
  if (!grad.defined() || steps_.empty()) return;
  const std::string& name = t_.names[i];
  counts_[i] = {t_.groups[i], steps_.read(i, name), mu_products_.empty() ? 1.0 : mu_products_.read(i, name)};
}

size_t Plan::class_of(const StepClass& now) {
  for (size_t k = classes_.size(); k > 0; --k) {
    const StepClass& known = classes_[k - 1];
    if (known.group == now.group && known.step == now.step && known.mu_product == now.mu_product) return k - 1;
  }
  classes_.push_back(now);
  return classes_.size() - 1;
}

std::string Plan::nonfinite_parameter() const {
  for (size_t i = 0; i < grads_.size(); ++i)
    if (grads_[i].defined() && !at::isfinite(grads_[i]).all().item<bool>()) return t_.names[i];
  return "";
}

bool Plan::note_written(size_t i) const {
  // A version counter lies behind a pointer. Increments wait for each other, reads do not: so counters are read ahead.
  constexpr size_t kAhead = 8;
  const auto touch = [](const at::Tensor& t) {
    if (!t.is_inference()) (void)t.unsafeGetTensorImpl()->version_counter().current_version();
  };
  if (const size_t ahead = i + kAhead; ahead < tasks_.size()) {
    touch(*t_.slots[slots_.target][ahead]);
    touch(t_.exp_avgs[ahead]);
    if (!t_.exp_avg_sqs.empty()) touch(t_.exp_avg_sqs[ahead]);
  }
  note_writes(item(i, grads_[i]));
  return tasks_[i].row != kCarried;
}

void Plan::forget() {
  collected_ = false;
  tasks_.clear();
  grads_.clear();
}

void Plan::apply(const std::vector<Row>& rows, const std::vector<double>& mu_products,
                 const std::vector<CorrectionRow>& corrections) {
  if (!collected_) fail("apply() runs the step that collect() has prepared; call collect() first");
  if (rows.size() != classes_.size() || mu_products.size() != classes_.size())
    fail("a step of ", classes_.size(), " classes takes ", classes_.size(), " rows and mu_products, not ", rows.size(),
         " and ", mu_products.size());
  if (corrections.size() != (t_.corrects ? classes_.size() : 0))
    fail("a step takes a row of corrections for each class of corrected tensors, and none else, not ",
         corrections.size());
  std::vector<StepRow> of_classes(rows.size());
  for (size_t k = 0; k < rows.size(); ++k) {
    of_classes[k].coefficients = Coefficients<double>::from(rows[k].data());
    if (t_.corrects) of_classes[k].correction = Correction<double>::from(corrections[k].data());
  }
  pass(of_classes);
  for_each_tensor(tasks_.size(), [&](size_t i) {
    if (!note_written(i)) return;
    const auto k = static_cast<size_t>(tasks_[i].row);
    steps_.write(i, classes_[k].step + 1);
    if (!mu_products_.empty()) mu_products_.write(i, mu_products[k]);
  });
  ++steps_run_;
  forget();
}

}  // namespace nesterov_pp
