// The tensors of one parameter in one step, their checks, and the task made from them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "task.h"
#include "tensors.h"

namespace nesterov_pp {

struct Item {
  const std::string* name;
  const at::Tensor* weight;
  const at::Tensor* next;  // receives the new weight; `weight` itself for a step in place
  const at::Tensor* grad;  // undefined if the weight is carried over unchanged
  const at::Tensor* exp_avg;
  const at::Tensor* exp_avg_sq;        // null if the rule has no second moment
  const at::Tensor* master = nullptr;  // float32 weights that are stepped and copied from; null if none
  const at::Tensor* late = nullptr;    // weights that the gradient was computed with; null unless the step corrects
  const at::Tensor* mean = nullptr;    // running mean of the correction; null if it has none
  const at::Tensor* shadow = nullptr;  // null if nothing is predicted
  bool ring_predicts = false;          // `next` receives the prediction, and the shadow is stepped
  const at::Tensor* exp_avg_scale = nullptr;     // null if the moments are not in eight bits
  const at::Tensor* exp_avg_sq_scale = nullptr;  // null if they are not, or if the rule has no second moment
  const at::Tensor* residual = nullptr;          // null if the weights are not in 24 bits
};

// Throws std::invalid_argument, naming the parameter, unless a pass can go over its tensors as one flat run. They have
// to be on `device`, dense, and of the same shape and strides, with the gradient in the weight's dtype (float32,
// float64, bfloat16 or float16) and both moments in one dtype that goes with it.
void check(const Item& item, bool stochastic, const at::Device& device);

// Checks, like `check`, a weight without a gradient and its next version.
void check_carried(const Item& item, const at::Device& device);

// Returns the pass that a checked item takes.
Spec spec_of(const Item& item, const Rule& rule, bool stochastic);

// Returns the dtype of a checked tensor.
Dtype dtype_of(const at::Tensor& checked);

// Returns whether the new weights go to a slot other than the one that is read.
inline bool moves(const Item& item) { return item.next != item.weight && !item.next->is_same(*item.weight); }

// Returns the task of a checked item, with no elements if there is nothing to do. If the item is stepped, the task
// takes the first row of scalars until the caller sets another.
Task task_of(const Item& item, const Rule& rule, bool stochastic);

// Tells autograd which tensors the task of an item writes, since a pass writes through raw pointers. A graph that has
// saved one of these tensors then raises an error instead of returning a wrong gradient.
void note_writes(const Item& item);

}  // namespace nesterov_pp
