// The list of tensors that an optimizer steps, kept from step to step and checked on every one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "counts.h"
#include "task.h"
#include "tensors.h"

namespace nesterov_pp {

// Parameters of one group that share a step count, and so their coefficients.
struct StepClass {
  int64_t group;
  double step;
  double mu_product;
};

// The number of the step that a class takes, counted from 1.
inline uint32_t number_of_step(const StepClass& c) { return static_cast<uint32_t>(c.step) + 1; }

// A step in two halves: everything is checked in the first, everything is written in the second. Where the elements
// are, and what passes over them, is known to those that derive from it.
class Plan {
 public:
  // With a seed, bfloat16 is rounded stochastically.
  Plan(Tensors tensors, std::optional<uint64_t> seed);
  virtual ~Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Takes the gradients for a step between slots, checks every tensor, and returns the classes of the parameters that
  // have a gradient. Changes nothing.
  virtual std::vector<StepClass> collect(const StepSlots& slots);

  // Lets go of the gradients collected, of a step that is not to be run.
  void forget();

  // How many steps have been run: for a caller who was interrupted between one and what he does after it.
  int64_t steps_run() const { return steps_run_; }

  // The first parameter whose gradient is not finite everywhere; empty if there is none.
  std::string nonfinite_parameter() const;

  // Runs the step collected, with one row and one new mu_product for each class, and counts it. `corrections` has a row
  // for each class of corrected tensors, none for others.
  void apply(const std::vector<Row>& rows, const std::vector<double>& mu_products,
             const std::vector<CorrectionRow>& corrections);

 protected:
  // Notes the writes of the pass that was started; returns whether parameter i was stepped. Of several threads at once.
  bool note_written(size_t i) const;

  // Starts, or runs, the pass over the tasks collected; a task's row is one of `rows`.
  virtual void pass(const std::vector<StepRow>& rows) = 0;

  // Parameter i in a step with this gradient.
  Item item(size_t i, const at::Tensor& grad) const;

  const Tensors t_;
  const Counts steps_, mu_products_;
  const std::optional<uint64_t> seed_;
  const at::Device device_;  // of all parameters

  int64_t steps_run_ = 0;
  bool collected_ = false;
  // Of the step collected.
  StepSlots slots_;
  std::vector<at::Tensor> grads_;  // undefined where a parameter has none
  std::vector<Task> tasks_;
  std::vector<StepClass> classes_;

 private:
  // All that is known of parameter i in a step. Of several threads at once, each for its own i.
  void gather(size_t i);
  void prefetch(size_t i) const;
  size_t class_of(const StepClass& now);

  std::vector<StepClass> counts_;  // of each parameter that has a gradient
};

}  // namespace nesterov_pp
