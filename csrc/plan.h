// The list of tensors that an optimizer steps, kept from step to step and checked on every one.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dtype.h"
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

// Throws std::invalid_argument naming the parameter unless its tensors can be passed over as one flat run: on `device`,
// dense, same shape and strides, the gradient in the weight's dtype (float32, float64, bfloat16 or float16), both
// moments in one that goes with it.
void check(const Item& item, bool stochastic, const at::Device& device);

// The dtypes of a checked item's pass.
Dtypes dtypes_of(const Item& item);

// Whether the new weights go to another slot than the one that is read.
bool moves(const Item& item);

// One pass over checked items on the CPU.
void run(const std::vector<Item>& items, const std::vector<Row>& rows);

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

// On the CPU; device/plan.h for others.
class Plan {
 public:
  // With a seed, bfloat16 is rounded stochastically.
  Plan(Tensors tensors, std::optional<uint64_t> seed);
  virtual ~Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Takes the gradients of slot `grads_of` for a step from slot `from` to slot `to`, checks every tensor, and returns
  // the classes of the parameters that have a gradient. Changes nothing.
  virtual std::vector<StepClass> collect(size_t grads_of, size_t from, size_t to);

  // Euclidean norm of all gradients collected, reading each once.
  virtual double gradient_norm();

  // The first parameter whose gradient is not finite everywhere; empty if there is none.
  std::string nonfinite_parameter() const;

  // Runs the step collected, with one row and one new mu_product for each class, and counts it.
  void apply(const std::vector<Row>& rows, const std::vector<double>& mu_products);

 protected:
  // Starts, or runs, the pass over the items collected.
  virtual void pass(const std::vector<Row>& rows);

  // The number of the step that a class takes, counted from 1.
  static uint32_t number_of_step(const StepClass& c) { return static_cast<uint32_t>(c.step) + 1; }

  const Tensors t_;
  const std::optional<uint64_t> seed_;
  const at::Device device_;  // of all parameters

  bool collected_ = false;
  std::vector<Item> items_;        // of the step collected
  std::vector<at::Tensor> grads_;  // undefined where a parameter has none
  std::vector<StepClass> classes_;
};

}  // namespace nesterov_pp
