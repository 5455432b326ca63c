// The tensors that an optimizer steps, kept from step to step and checked in every step.
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

// The parameters of one group that share a step count, and therefore their coefficients.
struct StepClass {
  int64_t group;
  double step;
  double mu_product;
};

// Returns the number of the step that a class takes, counted from 1.
inline uint32_t number_of_step(const StepClass& c) { return static_cast<uint32_t>(c.step) + 1; }

// A step in two halves: the first checks everything, the second writes everything. Derived classes know where the
// elements are and how to pass over them.
class Plan {
 public:
  // With a seed, bfloat16 is rounded stochastically.
  Plan(Tensors tensors, std::optional<uint64_t> seed);
  virtual ~Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Collects the gradients for a step between slots, checks every tensor, and returns the classes of the parameters
  // that have a gradient. Changes nothing.
  virtual std::vector<StepClass> collect(const StepSlots& slots);

  // Releases the collected gradients of a step that will not be run.
  void forget();

  // The number of steps run, for a caller that was interrupted between a step and the work that follows it.
  int64_t steps_run() const { return steps_run_; }

  // Returns the name of the first parameter whose gradient is not finite everywhere; empty if there is none.
  std::string nonfinite_parameter() const;

  // Runs the collected step, with one row and one new mu_product for each class, and counts it. `corrections` has one
  // row for each class if the step corrects, and none otherwise.
  void apply(const std::vector<Row>& rows, const std::vector<double>& mu_products,
             const std::vector<CorrectionRow>& corrections);

 protected:
  // Notes what the started pass writes for parameter i; returns whether the parameter is stepped. Several threads may
  // call this at once.
  bool note_written(size_t i) const;

  // Starts or runs the pass over the collected tasks; the row of a task is an index of `rows`.
  virtual void pass(const std::vector<StepRow>& rows) = 0;

  // Returns the tensors of parameter i in a step with this gradient.
  Item item(size_t i, const at::Tensor& grad) const;

  const Tensors t_;
  const Counts steps_, mu_products_;
  const std::optional<uint64_t> seed_;
  const at::Device device_;  // of all parameters

  int64_t steps_run_ = 0;
  bool collected_ = false;
  // The state of the collected step.
  StepSlots slots_;
  std::vector<at::Tensor> grads_;  // undefined where a parameter has none
  std::vector<Task> tasks_;
  std::vector<StepClass> classes_;

 private:
  // Collects and checks what a step needs of parameter i. Several threads may call this at once, each for its own i.
  void gather(size_t i);
  void prefetch(size_t i) const;
  size_t class_of(const StepClass& now);

  std::vector<StepClass> counts_;  // of each parameter that has a gradient
};

}  // namespace nesterov_pp
