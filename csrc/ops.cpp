// The step as torch operators: what torch.compile, fake tensors and other languages see.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "plan.h"

namespace nesterov_pp {
namespace {

std::vector<Row> rows_of(const at::Tensor& coefficients) {
  if (!coefficients.device().is_cpu() || coefficients.scalar_type() != at::kDouble || coefficients.dim() != 2 ||
      coefficients.size(1) != kCoefficients)
    throw std::invalid_argument("coefficients must be a float64 CPU tensor of shape [rows, " +
                                std::to_string(kCoefficients) + "]");
  const at::Tensor dense = coefficients.contiguous();
  std::vector<Row> rows(static_cast<size_t>(dense.size(0)));
  const double* value = dense.const_data_ptr<double>();
  for (Row& row : rows)
    for (double& c : row) c = *value++;
  return rows;
}

std::vector<std::string> numbered(size_t n) {
  std::vector<std::string> names(n);
  for (size_t i = 0; i < n; ++i) names[i] = "parameter " + std::to_string(i);
  return names;
}

void step_(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
           const at::Tensor& coefficients, at::IntArrayRef row_of) {
  step(numbered(weights.size()), weights, weights, grads, exp_avgs, exp_avg_sqs, rows_of(coefficients), row_of.vec());
}

void step_into(at::TensorList weights, at::TensorList weights_out, at::TensorList grads, at::TensorList exp_avgs,
               at::TensorList exp_avg_sqs, const at::Tensor& coefficients, at::IntArrayRef row_of) {
  step(numbered(weights.size()), weights, weights_out, grads, exp_avgs, exp_avg_sqs, rows_of(coefficients),
       row_of.vec());
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
