// The step as torch operators, for torch.compile, fake tensors and other languages.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/differences.h"
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

// Returns the tensors that are encoded or decoded together, in the order of their codes.
std::vector<cpu::Differing> differing(at::TensorList a, at::TensorList b, const at::Tensor& codes,
                                      const at::Tensor& scales) {
  int64_t places = 0;
  std::vector<cpu::Differing> found;
  if (a.size() != b.size()) throw std::invalid_argument("the lists of two versions differ in length");
  for (size_t i = 0; i < a.size(); ++i) {
    const auto kind = a[i].scalar_type();
    const bool known = kind == at::kFloat || kind == at::kBFloat16 || kind == at::kHalf;
    const bool alike = b[i].scalar_type() == kind && b[i].sizes() == a[i].sizes() && b[i].strides() == a[i].strides();
    if (!known || !alike || !a[i].is_cpu() || !b[i].is_cpu() || !a[i].is_non_overlapping_and_dense())
      throw std::invalid_argument(
          "differences are those of dense CPU tensors of float32, bfloat16 or float16, laid out "
          "alike in both versions; tensor " +
          std::to_string(i) + " is not");
    const Dtype dtype = kind == at::kFloat ? Dtype::kFloat : kind == at::kHalf ? Dtype::kHalf : Dtype::kBFloat16;
    found.push_back(
        {a[i].const_data_ptr(), b[i].const_data_ptr(), b[i].mutable_data_ptr(), a[i].numel(), places, dtype});
    places += (a[i].numel() + cpu::kAlign - 1) / cpu::kAlign * cpu::kAlign;
  }
  if (codes.dim() != 2 || scales.dim() != 2 || codes.size(1) != places || scales.size(1) != places / cpu::kGroup ||
      scales.size(0) != codes.size(0) || codes.scalar_type() != at::kChar || scales.scalar_type() != at::kBFloat16 ||
      codes.stride(1) != 1 || scales.stride(1) != 1 || !codes.is_cpu() || !scales.is_cpu())
    throw std::invalid_argument("the codes of these tensors must be int8 of shape [rows, " + std::to_string(places) +
                                "], and their scales bfloat16 of shape [rows, " + std::to_string(places / cpu::kGroup) +
                                "], on the CPU");
  return found;
}

cpu::CodeRow row_of(const at::Tensor& codes, const at::Tensor& scales, int64_t row) {
  if (row < 0 || row >= codes.size(0)) throw std::invalid_argument("there is no row " + std::to_string(row));
  return {static_cast<int8_t*>(codes.mutable_data_ptr()) + row * codes.stride(0),
          static_cast<uint16_t*>(scales.mutable_data_ptr()) + row * scales.stride(0)};
}

void encode_differences(at::TensorList version, at::TensorList next, const at::Tensor& codes, const at::Tensor& scales,
                        int64_t row) {
  cpu::encode(differing(version, next, codes, scales), row_of(codes, scales, row));
}

void decode_differences(at::TensorList newest, at::TensorList out, const at::Tensor& codes, const at::Tensor& scales,
                        at::IntArrayRef rows) {
  const auto tensors = differing(newest, out, codes, scales);
  std::vector<cpu::CodeRow> since;
  for (const int64_t row : rows) since.push_back(row_of(codes, scales, row));
  cpu::decode(tensors, since);
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
  m.def("encode_differences(Tensor[] version, Tensor[] next, Tensor(a!) codes, Tensor(b!) scales, int row) -> ()");
  m.def("decode_differences(Tensor[] newest, Tensor(a!)[] out, Tensor codes, Tensor scales, int[] rows) -> ()");
}

TORCH_LIBRARY_IMPL(nesterov_pp, CPU, m) {
  m.impl("step_", &nesterov_pp::step_);
  m.impl("step_into", &nesterov_pp::step_into);
  m.impl("encode_differences", &nesterov_pp::encode_differences);
  m.impl("decode_differences", &nesterov_pp::decode_differences);
}
