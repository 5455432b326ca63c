// The step as torch operators, for torch.compile, fake tensors and other languages.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/driver.h"
#include "../plan/check.h"

namespace nesterov_pp {
namespace {

std::vector<StepRow> rows_of(const at::Tensor& coefficients) {
  if (!coefficients.device().is_cpu() || coefficients.scalar_type() != at::kDouble || coefficients.dim() != 2 ||
      coefficients.size(1) != kCoefficients)
    throw std::invalid_argument("coefficients must be a float64 CPU tensor of shape [rows, " +
                                std::to_string(kCoefficients) + "]");
  const at::Tensor dense = coefficients.resolve_neg().contiguous();
  std::vector<StepRow> rows(static_cast<size_t>(dense.size(0)));
  const double* row = dense.const_data_ptr<double>();
  for (StepRow& r : rows) {
    r.coefficients = Coefficients<double>::from(row);
    row += kCoefficients;
  }
  return rows;
}

void step_into(at::TensorList weights, at::TensorList weights_out, at::TensorList grads, at::TensorList exp_avgs,
               at::TensorList exp_avg_sqs, const at::Tensor& coefficients, at::IntArrayRef row_of) {
  const size_t n = weights.size();
  const bool adaptive = !exp_avg_sqs.empty();
  if (weights_out.size() != n || grads.size() != n || exp_avgs.size() != n || (adaptive && exp_avg_sqs.size() != n) ||
      row_of.size() != n)
    throw std::invalid_argument("the lists of a step differ in length; there are " + std::to_string(n) + " weights");
  const std::vector<StepRow> rows = rows_of(coefficients);
  const Rule rule{adaptive ? Normaliser::kRms : Normaliser::kNone};
  std::vector<std::string> names(n);
  std::vector<Item> items;
  std::vector<Task> tasks;
  for (size_t i = 0; i < n; ++i) {
    names[i] = "parameter " + std::to_string(i);
    if (row_of[i] < 0 || row_of[i] >= static_cast<int64_t>(rows.size()))
      throw std::invalid_argument(names[i] + " takes row " + std::to_string(row_of[i]) + ", but there are " +
                                  std::to_string(rows.size()) + " rows of coefficients");
    items.push_back(
        {&names[i], &weights[i], &weights_out[i], &grads[i], &exp_avgs[i], adaptive ? &exp_avg_sqs[i] : nullptr});
    check(items.back(), false, at::kCPU);
    tasks.push_back(task_of(items.back(), rule, false));
    if (tasks[i].row != kCarried) tasks[i].row = row_of[i];
  }
  cpu::run(tasks, rows);
  for (const Item& item : items) note_writes(item);
}

void step_(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
           const at::Tensor& coefficients, at::IntArrayRef row_of) {
  step_into(weights, weights, grads, exp_avgs, exp_avg_sqs, coefficients, row_of);
}

}  // namespace
}  // namespace nesterov_pp

TORCH_LIBRARY(nesterov_pp, m) {
  m.def(
      "step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor coefficients, int[] row_of) -> ()");
  m.def(
      "step_into(Tensor[] weights, Tensor(a!)[] weights_out, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor coefficients, int[] row_of) -> ()");
}

TORCH_LIBRARY_IMPL(nesterov_pp, CPU, m) {
  m.impl("step_", &nesterov_pp::step_);
  m.impl("step_into", &nesterov_pp::step_into);
}
