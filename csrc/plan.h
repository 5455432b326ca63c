// The list of tensors that an optimizer steps, kept from step to step and checked on every one.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "counts.h"
#include "item.h"
#include "update.h"

namespace nesterov_pp {

using Row = std::array<double, kCoefficients>;
using CorrectionRow = std::array<double, kCorrections>;

// One pass over checked items on the CPU; item i takes row row_of[i].
void run(const std::vector<Item>& items, at::IntArrayRef row_of, const std::vector<Row>& rows);

// Parameters of one group that share a step count, and so their coefficients.
struct StepClass {
  int64_t group;
  double step;
  double mu_product;
};

// The number of the step that a class takes, counted from 1.
inline uint32_t number_of_step(const StepClass& c) { return static_cast<uint32_t>(c.step) + 1; }

// The tensors of one optimizer; every list runs over its parameters. slots[s][i] is parameter i in ring slot s (one
// slot for an optimizer without a ring), in the place where its owner has it: another reference would keep
// torch.utils.swap_tensors from exchanging what is there, which `module.to()` may do. `owners` keeps these places.
// `exp_avg_sqs` and `mu_products` are empty where the rule has none, and a master is undefined where the parameter has
// none. `steps` and `mu_products` are empty where the caller counts; then every parameter has a row of its own.
struct Tensors {
  std::vector<std::string> names;
  std::vector<int64_t> numbers;
  std::vector<int64_t> groups;
  std::vector<std::vector<const at::Tensor*>> slots;
  std::shared_ptr<const void> owners;
  std::vector<at::Tensor> exp_avgs, exp_avg_sqs, masters, steps, mu_products;
  // Of corrected steps; both lists are empty where there are none.
  bool corrects = false;
  Kind kind = Kind::kNone;
  std::vector<at::Tensor> means, besides;
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

  // Lets go of the gradients collected, of a step that is not to be run.
  void forget();

  // How many steps have been run: for a caller who was interrupted between one and what he does after it.
  int64_t steps_run() const { return steps_run_; }

  // Euclidean norm of all gradients collected, reading each once.
  virtual double gradient_norm();

  // The first parameter whose gradient is not finite everywhere; empty if there is none.
  std::string nonfinite_parameter() const;

  // Runs the step collected, with one row and one new mu_product for each class, and counts it. `corrections` has a row
  // for each class of corrected tensors, none for others.
  void apply(const std::vector<Row>& rows, const std::vector<double>& mu_products,
             const std::vector<CorrectionRow>& corrections);

 protected:
  // Notes the writes of the pass that was started; returns whether parameter i was stepped. Of several threads at once.
  bool note_written(size_t i) const;

  // Starts, or runs, the pass over the items collected.
  virtual void pass(const std::vector<Row>& rows);

  // Parameter i in a step with this gradient.
  Item item(size_t i, const at::Tensor& grad) const;

  const Tensors t_;
  const Counts steps_, mu_products_;
  const std::optional<uint64_t> seed_;
  const at::Device device_;  // of all parameters

  int64_t steps_run_ = 0;
  bool collected_ = false;
  // Of the step collected.
  size_t from_ = 0, to_ = 0;  // slots
  size_t grads_of_ = 0;
  std::vector<at::Tensor> grads_;  // undefined where a parameter has none
  std::vector<cpu::Task> tasks_;
  std::vector<StepClass> classes_;
  std::vector<Correction<double>> corrections_;  // of the classes, from `apply` on

 private:
  // All that is known of parameter i in a step. Of several threads at once, each for its own i.
  void gather(size_t i, size_t grads_of);
  void prefetch(size_t i, size_t grads_of) const;
  size_t class_of(const StepClass& now);

  std::vector<StepClass> counts_;  // of each parameter that has a gradient
};

}  // namespace nesterov_pp
