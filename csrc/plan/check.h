// One parameter's tensors in one step, what they have to be, and the task they make.
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
  const at::Tensor* next;  // takes the new weight; `weight` itself for a step in place
  const at::Tensor* grad;  // undefined: the weight is carried over unchanged
  const at::Tensor* exp_avg;
  const at::Tensor* exp_avg_sq;        // null: the rule has none
  const at::Tensor* master = nullptr;  // null, or the float32 weights that are stepped, of which the others take copies
  const at::Tensor* late = nullptr;    // of a rule that corrects: the weights of the gradient
  const at::Tensor* mean = nullptr;    // null: the correction has none
  const at::Tensor* shadow = nullptr;  // null: nothing is predicted
  bool ring_predicts = false;          // `next` takes the prediction, and the shadow is stepped
};

// Throws std::invalid_argument naming the parameter unless its tensors can be passed over as one flat run: on `device`,
// dense, same shape and strides, the gradient in the weight's dtype (float32, float64, bfloat16 or float16), both
// moments in one that goes with it.
void check(const Item& item, bool stochastic, const at::Device& device);

// The part of it that concerns a weight without a gradient: it and its next version.
void check_carried(const Item& item, const at::Device& device);

// The pass that a checked item takes.
Spec spec_of(const Item& item, const Rule& rule, bool stochastic);

// The dtype of a checked tensor.
Dtype dtype_of(const at::Tensor& checked);

// Whether the new weights go to another slot than the one that is read.
inline bool moves(const Item& item) { return item.next != item.weight && !item.next->is_same(*item.weight); }

// The task of a checked item, over no elements if there is nothing to do. It takes the first row of scalars until the
// caller sets another.
Task task_of(const Item& item, const Rule& rule, bool stochastic);

// Notes with autograd what the task of an item writes, since it goes through raw pointers: a graph that has saved such
// a tensor then raises instead of returning a wrong gradient.
void note_writes(const Item& item);

}  // namespace nesterov_pp
