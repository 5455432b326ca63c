// The list of tensors that an optimizer steps, kept from step to step and checked on every one.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "update.h"

namespace nesterov_pp {

using Row = std::array<double, kCoefficients>;

// Throws std::invalid_argument naming `name` unless the four (non-adaptive: three) tensors can be passed over as one
// flat run beside `weight`: CPU, dense, same shape and strides, the gradient in the weight's dtype (float32, float64,
// bfloat16 or float16), both moments in one that goes with it.
void check_tensors(const std::string& name, const at::Tensor& weight, const at::Tensor& weight_out,
                   const at::Tensor& grad, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq);

// One pass: weights -> weights_out (the same lists for an in-place step). Everything is checked before anything is
// written. `exp_avg_sqs` is empty for non-adaptive rules; an undefined gradient carries the weight over unchanged;
// tensor i takes the coefficients rows[row_of[i]].
void step(const std::vector<std::string>& names, at::TensorList weights, at::TensorList weights_out,
          at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs, const std::vector<Row>& rows,
          const std::vector<int64_t>& row_of);

// Parameters of one group that share a step count, and so their coefficients.
struct StepClass {
  int64_t group;
  double step;
  double mu_product;
};

class Plan {
 public:
  // slots[s][i] is parameter i in ring slot s (one slot for an optimizer without a ring); the other lists run over
  // parameters. `exp_avg_sqs` and `mu_products` may be empty: the rule has none.
  Plan(std::vector<std::string> names, std::vector<int64_t> groups, std::vector<std::vector<at::Tensor>> slots,
       std::vector<at::Tensor> exp_avgs, std::vector<at::Tensor> exp_avg_sqs, std::vector<at::Tensor> steps,
       std::vector<at::Tensor> mu_products);

  // Takes the gradients of slot `grads_of` for a step from slot `from` to slot `to`, checks every tensor, and returns
  // the classes of the parameters that have a gradient. Changes nothing.
  std::vector<StepClass> collect(size_t grads_of, size_t from, size_t to);

  // Euclidean norm of all gradients collected, reading each once.
  double gradient_norm() const;

  // The first parameter whose gradient is not finite everywhere; empty if there is none.
  std::string nonfinite_parameter() const;

  // Runs the step collected, with one row and one new mu_product for each class, and counts it.
  void apply(const std::vector<Row>& rows, const std::vector<double>& mu_products);

 private:
  const std::vector<std::string> names_;
  const std::vector<int64_t> groups_;
  const std::vector<std::vector<at::Tensor>> slots_;
  const std::vector<at::Tensor> exp_avgs_, exp_avg_sqs_, steps_, mu_products_;

  size_t from_ = 0, to_ = 0;
  bool collected_ = false;
  std::vector<at::Tensor> grads_;  // undefined where a parameter has none
  std::vector<int64_t> class_of_;
  size_t classes_ = 0;
};

}  // namespace nesterov_pp
