// The list of tensors that an optimizer steps, kept from step to step and checked on every one.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "update.h"

namespace nesterov_pp {

using Row = std::array<double, kCoefficients>;

// One parameter's tensors in one step.
struct Item {
  const std::string* name;
  const at::Tensor* weight;
  const at::Tensor* next;  // takes the new weight; `weight` itself for a step in place
  const at::Tensor* grad;  // undefined: the weight is carried over unchanged
  const at::Tensor* exp_avg;
  const at::Tensor* exp_avg_sq;  // null: the rule has none
  const at::Tensor* master;      // null, or the float32 weights that are stepped, of which `next` takes a copy
  int64_t row;                   // of the coefficients
  int64_t number;                // of the parameter, for stochastic rounding
};

// Rounds bfloat16 stochastically (random.h): the seed, and the step count of every row.
struct Rounding {
  uint64_t seed;
  std::vector<uint32_t> steps;
};

// Throws std::invalid_argument naming the parameter unless its tensors can be passed over as one flat run: CPU, dense,
// same shape and strides, the gradient in the weight's dtype (float32, float64, bfloat16 or float16), both moments in
// one that goes with it.
void check(const Item& item, bool stochastic);

// One pass over checked items.
void run(const std::vector<Item>& items, const std::vector<Row>& rows, const Rounding* rounding);

// Parameters of one group that share a step count, and so their coefficients.
struct StepClass {
  int64_t group;
  double step;
  double mu_product;
};

// The tensors of one optimizer; every list runs over its parameters. slots[s][i] is parameter i in ring slot s (one
// slot for an optimizer without a ring). `exp_avg_sqs` and `mu_products` are empty where the rule has none, and a
// master is undefined where the parameter has none.
struct Tensors {
  std::vector<std::string> names;
  std::vector<int64_t> numbers;
  std::vector<int64_t> groups;
  std::vector<std::vector<at::Tensor>> slots;
  std::vector<at::Tensor> exp_avgs, exp_avg_sqs, masters, steps, mu_products;
};

class Plan {
 public:
  // With a seed, bfloat16 is rounded stochastically.
  Plan(Tensors tensors, std::optional<uint64_t> seed);

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
  const Tensors t_;
  const std::optional<uint64_t> seed_;

  bool collected_ = false;
  std::vector<Item> items_;        // of the step collected
  std::vector<at::Tensor> grads_;  // undefined where a parameter has none
  std::vector<StepClass> classes_;
};

}  // namespace nesterov_pp
