#include "plan.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
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

void check_beside(const std::string& name, const char* what, const at::Tensor& weight, const at::Tensor& other) {
  if (other.layout() != weight.layout())
    fail("the ", what, " of ", name, " has layout ", other.layout(), ", but the parameter is ", weight.layout());
  if (other.device() != weight.device())
    fail("the ", what, " of ", name, " is on ", other.device(), ", but the parameter is on ", weight.device());
  if (other.sizes() != weight.sizes())
    fail("the ", what, " of ", name, " has shape ", other.sizes(), ", but the parameter has ", weight.sizes());
  if (other.strides() != weight.strides() && weight.numel() > 1)
    fail("the ", what, " of ", name, " has strides ", other.strides(), ", but the parameter has ", weight.strides());
}

std::optional<cpu::Dtype> dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return cpu::Dtype::kFloat;
    case at::kDouble:
      return cpu::Dtype::kDouble;
    case at::kBFloat16:
      return cpu::Dtype::kBFloat16;
    case at::kHalf:
      return cpu::Dtype::kHalf;
    default:
      return std::nullopt;
  }
}

void check_dtype(const std::string& name, const char* what, const at::Tensor& weight, const at::Tensor& other) {
  if (other.scalar_type() != weight.scalar_type())
    fail("the ", what, " of ", name, " is ", other.scalar_type(), ", but the parameter is ", weight.scalar_type());
}

void check_moment(const std::string& name, const char* what, const at::Tensor& weight, const at::Tensor& moment) {
  const auto dtype = dtype_of(moment);
  if (!dtype || cpu::kernel(cpu::Isa::kBaseline, {*dtype_of(weight), *dtype}, true) == nullptr)
    fail("the ", what, " of ", name, " is ", moment.scalar_type(), ", which does not go with a ", weight.scalar_type(),
         " parameter; moments are in its dtype, Float or BFloat16 (Double with Double only)");
}

double read_scalar(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat) return *t.const_data_ptr<float>();
  if (t.scalar_type() == at::kDouble) return *t.const_data_ptr<double>();
  return t.item().toDouble();
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

}  // namespace

void check_tensors(const std::string& name, const at::Tensor& weight, const at::Tensor& weight_out,
                   const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq) {
  if (weight.layout() != at::kStrided || !weight.device().is_cpu() || !dtype_of(weight))
    fail(name, " is a ", weight.layout(), " ", weight.scalar_type(), " tensor on ", weight.device(),
         "; the cpu backend takes strided tensors of float32, float64, bfloat16 and float16 on the CPU");
  if (!weight.is_non_overlapping_and_dense())
    fail(name, " has strides ", weight.strides(), " for shape ", weight.sizes(),
         "; the cpu backend takes dense tensors without overlap");
  if (!weight_out.is_same(weight)) {
    check_beside(name, "next version", weight, weight_out);
    check_dtype(name, "next version", weight, weight_out);
  }
  if (grad.defined()) {
    check_beside(name, "gradient", weight, grad);
    check_dtype(name, "gradient", weight, grad);
  }
  check_beside(name, "first moment", weight, exp_avg);
  check_moment(name, "first moment", weight, exp_avg);
  if (!exp_avg_sq.defined()) return;
  check_beside(name, "second moment", weight, exp_avg_sq);
  if (exp_avg_sq.scalar_type() != exp_avg.scalar_type())
    fail("the second moment of ", name, " is ", exp_avg_sq.scalar_type(), ", but the first is ", exp_avg.scalar_type());
}

void step(const std::vector<std::string>& names, at::TensorList weights, at::TensorList weights_out,
          at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, const std::vector<Row>& rows,
          const std::vector<int64_t>& row_of) {
  const size_t n = weights.size();
  const bool adaptive = !exp_avg_sqs.empty();
  if (weights_out.size() != n || grads.size() != n || exp_avgs.size() != n || (adaptive && exp_avg_sqs.size() != n) ||
      row_of.size() != n)
    fail("the lists of a step differ in length: ", n, " weights, ", weights_out.size(), " next weights, ", grads.size(),
         " gradients, ", exp_avgs.size(), " first moments, ", exp_avg_sqs.size(), " second moments, ", row_of.size(),
         " coefficient indices");
  for (size_t i = 0; i < n; ++i) {
    check_tensors(names[i], weights[i], weights_out[i], grads[i], exp_avgs[i],
                  adaptive ? exp_avg_sqs[i] : at::Tensor());
    if (grads[i].defined() && (row_of[i] < 0 || row_of[i] >= static_cast<int64_t>(rows.size())))
      fail(names[i], " takes row ", row_of[i], " of ", rows.size(), " rows of coefficients");
  }

  std::vector<Coefficients<double>> coefficients;
  coefficients.reserve(rows.size());
  for (const Row& r : rows) coefficients.push_back({r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]});

  std::vector<cpu::Task> tasks;
  tasks.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const bool moves = !weights_out[i].is_same(weights[i]);
    if (!grads[i].defined() && !moves) continue;
    cpu::Task task{};
    task.run.weight = weights[i].const_data_ptr();
    task.run.weight_out = weights_out[i].mutable_data_ptr();
    task.run.count = weights[i].numel();
    task.dtypes = {*dtype_of(weights[i]), *dtype_of(exp_avgs[i])};
    task.adaptive = adaptive;
    if (grads[i].defined()) {
      task.run.grad = grads[i].const_data_ptr();
      task.run.exp_avg = exp_avgs[i].mutable_data_ptr();
      if (adaptive) task.run.exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr();
      task.coefficients = &coefficients[static_cast<size_t>(row_of[i])];
    }
    tasks.push_back(task);
  }
  cpu::run(tasks);

  for (size_t i = 0; i < n; ++i) {
    if (grads[i].defined() || !weights_out[i].is_same(weights[i])) note_write(weights_out[i]);
    if (!grads[i].defined()) continue;
    note_write(exp_avgs[i]);
    if (adaptive) note_write(exp_avg_sqs[i]);
  }
}

Plan::Plan(std::vector<std::string> names, std::vector<int64_t> groups, std::vector<std::vector<at::Tensor>> slots,
           std::vector<at::Tensor> exp_avgs, std::vector<at::Tensor> exp_avg_sqs, std::vector<at::Tensor> steps,
           std::vector<at::Tensor> mu_products)
    : names_(std::move(names)),
      groups_(std::move(groups)),
      slots_(std::move(slots)),
      exp_avgs_(std::move(exp_avgs)),
      exp_avg_sqs_(std::move(exp_avg_sqs)),
      steps_(std::move(steps)),
      mu_products_(std::move(mu_products)) {
  const size_t n = names_.size();
  bool same = groups_.size() == n && exp_avgs_.size() == n && steps_.size() == n && !slots_.empty() &&
              (exp_avg_sqs_.empty() || exp_avg_sqs_.size() == n) && (mu_products_.empty() || mu_products_.size() == n);
  for (const auto& slot : slots_) same = same && slot.size() == n;
  if (!same) fail("a plan of ", n, " parameters takes lists of ", n, " tensors");
}

std::vector<StepClass> Plan::collect(size_t grads_of, size_t from, size_t to) {
  if (grads_of >= slots_.size() || from >= slots_.size() || to >= slots_.size())
    fail("slot ", std::max({grads_of, from, to}), " of a ring of ", slots_.size(), " slots does not exist");
  const at::NoGradGuard no_grad;
  const size_t n = names_.size();
  collected_ = false;
  from_ = from;
  to_ = to;
  grads_.assign(n, at::Tensor());
  class_of_.assign(n, 0);
  std::vector<StepClass> classes;
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& weight = slots_[from][i];
    const at::Tensor& grad = slots_[grads_of][i].grad();
    if (grad.defined()) grads_[i] = laid_out_as(weight, grad);
    check_tensors(names_[i], weight, slots_[to][i], grads_[i], exp_avgs_[i],
                  exp_avg_sqs_.empty() ? at::Tensor() : exp_avg_sqs_[i]);
    if (!grad.defined()) continue;
    const double step = read_scalar(steps_[i]);
    const double mu_product = mu_products_.empty() ? 1.0 : read_scalar(mu_products_[i]);
    size_t k = classes.size();
    while (k > 0 && !(classes[k - 1].group == groups_[i] && classes[k - 1].step == step &&
                      classes[k - 1].mu_product == mu_product))
      --k;
    if (k == 0) {
      classes.push_back({groups_[i], step, mu_product});
      k = classes.size();
    }
    class_of_[i] = static_cast<int64_t>(k - 1);
  }
  classes_ = classes.size();
  collected_ = true;
  return classes;
}

double Plan::gradient_norm() const {
  std::vector<cpu::Values> values;
  for (const auto& grad : grads_)
    if (grad.defined()) values.push_back({grad.const_data_ptr(), grad.numel(), *dtype_of(grad)});
  return cpu::norm(values);
}

std::string Plan::nonfinite_parameter() const {
  for (size_t i = 0; i < grads_.size(); ++i)
    if (grads_[i].defined() && !at::isfinite(grads_[i]).all().item<bool>()) return names_[i];
  return "";
}

void Plan::apply(const std::vector<Row>& rows, const std::vector<double>& mu_products) {
  if (!collected_) fail("apply() runs the step that collect() has prepared; call collect() first");
  if (rows.size() != classes_ || mu_products.size() != classes_)
    fail("a step of ", classes_, " classes takes ", classes_, " rows and mu_products, not ", rows.size(), " and ",
         mu_products.size());
  step(names_, slots_[from_], slots_[to_], grads_, exp_avgs_, exp_avg_sqs_, rows, class_of_);
  for (size_t i = 0; i < names_.size(); ++i) {
    if (!grads_[i].defined()) continue;
    write_scalar(steps_[i], read_scalar(steps_[i]) + 1);
    if (!mu_products_.empty()) write_scalar(mu_products_[i], mu_products[static_cast<size_t>(class_of_[i])]);
  }
  collected_ = false;
  grads_.assign(names_.size(), at::Tensor());
}

}  // namespace nesterov_pp
