#include "plan.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "cpu/driver.h"

namespace nesterov_pp {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// Whether both can be passed over side by side as flat runs.
bool laid_out_alike(const at::Tensor& weight, const at::Tensor& other) {
  return other.layout() == at::kStrided && other.device() == weight.device() && other.sizes() == weight.sizes() &&
         (other.strides() == weight.strides() || weight.numel() <= 1);
}

void check_beside(const std::string& name, const char* what, const at::Tensor& weight, const at::Tensor& other) {
  if (laid_out_alike(weight, other)) return;
  if (other.layout() != weight.layout())
    fail("the ", what, " of ", name, " has layout ", other.layout(), ", but the parameter is ", weight.layout());
  if (other.device() != weight.device())
    fail("the ", what, " of ", name, " is on ", other.device(), ", but the parameter is on ", weight.device());
  if (other.sizes() != weight.sizes())
    fail("the ", what, " of ", name, " has shape ", other.sizes(), ", but the parameter has ", weight.sizes());
  fail("the ", what, " of ", name, " has strides ", other.strides(), ", but the parameter has ", weight.strides());
}

std::optional<Dtype> dtype_of(const at::Tensor& t) {
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

void check_dtype(const std::string& name, const char* what, at::ScalarType dtype, const at::Tensor& other) {
  if (other.scalar_type() != dtype)
    fail("the ", what, " of ", name, " is ", other.scalar_type(), ", but the parameter is ", dtype);
}

// A step count or a product of mu.
double read_scalar(const std::string& name, const char* what, const at::Tensor& t) {
  if (!t.device().is_cpu() || t.layout() != at::kStrided || t.numel() != 1)
    fail("the ", what, " of ", name, " must be one number in a tensor on the CPU, not of shape ", t.sizes(), " on ",
         t.device());
  double value = 0;
  if (t.scalar_type() == at::kFloat)
    value = *t.const_data_ptr<float>();
  else if (t.scalar_type() == at::kDouble)
    value = *t.const_data_ptr<double>();
  else
    value = t.item().toDouble();
  if (!std::isfinite(value) || value < 0)
    fail("the ", what, " of ", name, " must be a finite number from 0 on, not ", value);
  return value;
}

void write_scalar(const at::Tensor& t, double value) {
  if (t.scalar_type() == at::kFloat)
    *t.mutable_data_ptr<float>() = static_cast<float>(value);
  else if (t.scalar_type() == at::kDouble)
    *t.mutable_data_ptr<double>() = value;
  else
    t.fill_(value);
}

// Autograd learns of the write by the version counter alone, since it went through a raw pointer: a graph that saved
// the tensor then raises instead of returning a wrong gradient.
void note_write(const at::Tensor& t) { t.unsafeGetTensorImpl()->bump_version(); }

// A gradient laid out in memory as its parameter is, so that both are passed over as flat runs.
at::Tensor laid_out_as(const at::Tensor& weight, const at::Tensor& grad) {
  const bool same = grad.strides() == weight.strides() || weight.numel() <= 1;
  if (same || grad.layout() != at::kStrided || grad.sizes() != weight.sizes()) return grad;
  return at::empty_like(weight, grad.options()).copy_(grad);
}

// Rounds bfloat16 stochastically (random.h): the seed, and the number of the step of every row.
struct Rounding {
  uint64_t seed;
  std::vector<uint32_t> steps;
};

// The weights that are computed with, and the dtypes of their pass. Null where the tensors do not go together.
const at::Tensor& stepped(const Item& item) { return item.master != nullptr ? *item.master : *item.weight; }

std::optional<Dtypes> known_dtypes(const Item& item) {
  const auto weight = dtype_of(stepped(item)), grad = dtype_of(*item.weight), moment = dtype_of(*item.exp_avg);
  if (!weight || !grad || !moment) return std::nullopt;
  return Dtypes{*weight, *grad, *moment};
}

cpu::Task task_of(const Item& item, const std::vector<Coefficients<double>>& rows, const Rounding* rounding) {
  cpu::Task task{};
  task.dtypes = dtypes_of(item);
  task.run.count = item.weight->numel();
  if (!item.grad->defined()) {
    task.run.weight = item.weight->const_data_ptr();
    task.run.weight_out = item.next->mutable_data_ptr();
    task.dtypes.weight = task.dtypes.grad;
    return task;
  }
  const auto row = static_cast<size_t>(item.row);
  task.coefficients = &rows[row];
  task.adaptive = item.exp_avg_sq != nullptr;
  task.run.grad = item.grad->const_data_ptr();
  task.run.exp_avg = item.exp_avg->mutable_data_ptr();
  if (task.adaptive) task.run.exp_avg_sq = item.exp_avg_sq->mutable_data_ptr();
  if (item.master != nullptr) {
    task.run.weight = task.run.weight_out = item.master->mutable_data_ptr();
    task.run.copy = item.next->mutable_data_ptr();
  } else if (moves(item)) {
    task.run.weight = item.weight->const_data_ptr();
    task.run.weight_out = item.next->mutable_data_ptr();
  } else {
    task.run.weight = task.run.weight_out = item.weight->mutable_data_ptr();
  }
  if (rounding != nullptr) {
    task.stochastic = true;
    task.run.noise = {rounding->seed, static_cast<uint32_t>(item.number), rounding->steps[row], 0};
  }
  return task;
}

}  // namespace

Dtypes dtypes_of(const Item& item) { return *known_dtypes(item); }

bool moves(const Item& item) { return item.next != item.weight && !item.next->is_same(*item.weight); }

void check(const Item& item, bool stochastic, const at::Device& device) {
  const std::string& name = *item.name;
  const at::Tensor& weight = *item.weight;
  if (weight.layout() != at::kStrided || weight.device() != device || !dtype_of(weight))
    fail(name, " is a ", weight.layout(), " ", weight.scalar_type(), " tensor on ", weight.device(),
         "; this pass takes strided tensors of float32, float64, bfloat16 and float16 on ", device);
  if (!weight.is_non_overlapping_and_dense())
    fail(name, " has strides ", weight.strides(), " for shape ", weight.sizes(),
         "; this pass takes dense tensors without overlap");
  if (moves(item)) {
    check_beside(name, "next version", weight, *item.next);
    check_dtype(name, "next version", weight.scalar_type(), *item.next);
  }
  if (item.grad->defined()) {
    check_beside(name, "gradient", weight, *item.grad);
    check_dtype(name, "gradient", weight.scalar_type(), *item.grad);
  }
  if (item.master != nullptr) {
    check_beside(name, "master weight", weight, *item.master);
    if (item.master->scalar_type() != at::kFloat)
      fail("the master weight of ", name, " is ", item.master->scalar_type(), ", but it must be Float");
  }
  check_beside(name, "first moment", weight, *item.exp_avg);
  const auto dtypes = known_dtypes(item);
  if (!dtypes || cpu::kernel(cpu::Isa::kBaseline, *dtypes, true, false) == nullptr)
    fail("the first moment of ", name, " is ", item.exp_avg->scalar_type(), ", which does not go with a ",
         weight.scalar_type(), " parameter; moments are in its dtype, Float or BFloat16 (Double with Double only)");
  if (stochastic && cpu::kernel(cpu::Isa::kBaseline, *dtypes, true, true) == nullptr)
    fail(name, " or its moments are Half, which is not rounded stochastically; use BFloat16, or master weights");
  if (item.exp_avg_sq == nullptr) return;
  check_beside(name, "second moment", weight, *item.exp_avg_sq);
  if (item.exp_avg_sq->scalar_type() != item.exp_avg->scalar_type())
    fail("the second moment of ", name, " is ", item.exp_avg_sq->scalar_type(), ", but the first is ",
         item.exp_avg->scalar_type());
}

namespace {

void compute(const std::vector<Item>& items, const std::vector<Row>& rows, const Rounding* rounding) {
  std::vector<Coefficients<double>> coefficients;
  coefficients.reserve(rows.size());
  for (const Row& r : rows) coefficients.push_back({r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]});
  std::vector<cpu::Task> tasks;
  tasks.reserve(items.size());
  for (const Item& item : items)
    if (item.grad->defined() || moves(item)) tasks.push_back(task_of(item, coefficients, rounding));
  cpu::run(tasks);
}

void note_writes(const std::vector<Item>& items) {
  for (const Item& item : items) {
    if (item.grad->defined() || moves(item)) note_write(*item.next);
    if (!item.grad->defined()) continue;
    note_write(*item.exp_avg);
    if (item.exp_avg_sq != nullptr) note_write(*item.exp_avg_sq);
    if (item.master != nullptr) note_write(*item.master);
  }
}

}  // namespace

void run(const std::vector<Item>& items, const std::vector<Row>& rows) {
  compute(items, rows, nullptr);
  note_writes(items);
}

Plan::Plan(Tensors tensors, std::optional<uint64_t> seed)
    : t_(std::move(tensors)),
      seed_(seed),
      device_(t_.slots.empty() || t_.slots[0].empty() ? at::Device(at::kCPU) : t_.slots[0][0].device()) {
  const size_t n = t_.names.size();
  const auto fits = [n](const auto& list) { return list.size() == n; };
  bool same = fits(t_.numbers) && fits(t_.groups) && fits(t_.exp_avgs) && fits(t_.masters) && fits(t_.steps) &&
              !t_.slots.empty() && (t_.exp_avg_sqs.empty() || fits(t_.exp_avg_sqs)) &&
              (t_.mu_products.empty() || fits(t_.mu_products));
  for (const auto& slot : t_.slots) same = same && fits(slot);
  if (!same) fail("a plan of ", n, " parameters takes lists of ", n, " tensors");
}

namespace {

// The tensors of a list lie all over the memory: the loop over them would wait for each in turn.
void prefetch(const std::vector<at::Tensor>& tensors, size_t i) {
  if (i >= tensors.size() || !tensors[i].defined()) return;
  const char* impl = reinterpret_cast<const char*>(tensors[i].unsafeGetTensorImpl());
  for (size_t line = 0; line < sizeof(at::TensorImpl); line += 64) __builtin_prefetch(impl + line);
}

}  // namespace

std::vector<StepClass> Plan::collect(size_t grads_of, size_t from, size_t to) {
  if (grads_of >= t_.slots.size() || from >= t_.slots.size() || to >= t_.slots.size())
    fail("slot ", std::max({grads_of, from, to}), " of a ring of ", t_.slots.size(), " slots does not exist");
  const at::NoGradGuard no_grad;
  const size_t n = t_.names.size();
  collected_ = false;
  grads_.assign(n, at::Tensor());
  items_.clear();
  items_.reserve(n);
  classes_.clear();
  for (size_t i = 0; i < n; ++i) {
    constexpr size_t kAhead = 4;
    prefetch(t_.slots[from], i + kAhead);
    if (to != from) prefetch(t_.slots[to], i + kAhead);
    for (const auto* list : {&t_.exp_avgs, &t_.exp_avg_sqs, &t_.steps, &t_.mu_products}) prefetch(*list, i + kAhead);
    const at::Tensor& weight = t_.slots[from][i];
    const at::Tensor& grad = t_.slots[grads_of][i].grad();
    if (grad.defined()) grads_[i] = laid_out_as(weight, grad);
    Item item{&t_.names[i],
              &weight,
              &t_.slots[to][i],
              &grads_[i],
              &t_.exp_avgs[i],
              t_.exp_avg_sqs.empty() ? nullptr : &t_.exp_avg_sqs[i],
              t_.masters[i].defined() ? &t_.masters[i] : nullptr,
              0,
              t_.numbers[i]};
    check(item, seed_.has_value(), device_);
    if (grad.defined()) {
      const StepClass now{t_.groups[i], read_scalar(t_.names[i], "step count", t_.steps[i]),
                          t_.mu_products.empty() ? 1.0 : read_scalar(t_.names[i], "mu product", t_.mu_products[i])};
      size_t k = classes_.size();
      while (k > 0 && !(classes_[k - 1].group == now.group && classes_[k - 1].step == now.step &&
                        classes_[k - 1].mu_product == now.mu_product))
        --k;
      if (k == 0) {
        classes_.push_back(now);
        k = classes_.size();
      }
      item.row = static_cast<int64_t>(k - 1);
    }
    items_.push_back(item);
  }
  collected_ = true;
  return classes_;
}

double Plan::gradient_norm() {
  std::vector<cpu::Values> values;
  for (const auto& grad : grads_)
    if (grad.defined()) values.push_back({grad.const_data_ptr(), grad.numel(), *dtype_of(grad)});
  return cpu::norm(values);
}

std::string Plan::nonfinite_parameter() const {
  for (size_t i = 0; i < grads_.size(); ++i)
    if (grads_[i].defined() && !at::isfinite(grads_[i]).all().item<bool>()) return t_.names[i];
  return "";
}

void Plan::pass(const std::vector<Row>& rows) {
  std::optional<Rounding> rounding;
  if (seed_) {
    rounding = Rounding{*seed_, {}};
    for (const auto& c : classes_) rounding->steps.push_back(number_of_step(c));
  }
  compute(items_, rows, rounding ? &*rounding : nullptr);
}

void Plan::apply(const std::vector<Row>& rows, const std::vector<double>& mu_products) {
  if (!collected_) fail("apply() runs the step that collect() has prepared; call collect() first");
  if (rows.size() != classes_.size() || mu_products.size() != classes_.size())
    fail("a step of ", classes_.size(), " classes takes ", classes_.size(), " rows and mu_products, not ", rows.size(),
         " and ", mu_products.size());
  pass(rows);
  note_writes(items_);
  for (size_t i = 0; i < items_.size(); ++i) {
    if (!items_[i].grad->defined()) continue;
    const auto k = static_cast<size_t>(items_[i].row);
    write_scalar(t_.steps[i], classes_[k].step + 1);
    if (!t_.mu_products.empty()) write_scalar(t_.mu_products[i], mu_products[k]);
  }
  collected_ = false;
  items_.clear();
  grads_.clear();
}

}  // namespace nesterov_pp
