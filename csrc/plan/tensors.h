// The tensors of one optimizer, and what a step does with them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../spec.h"

namespace nesterov_pp {

// Every list runs over the parameters. slots[s][i] is parameter i in ring slot s (one slot for an optimizer without a
// ring), in the place where its owner has it: another reference would keep torch.utils.swap_tensors from exchanging
// what is there, which `module.to()` may do. `owners` keeps these places. `exp_avg_sqs` is empty where the rule has no
// second moment, `mu_products` where it has no momentum schedule, `means` where a correction has no running mean;
// `steps` and `mu_products` where the caller counts: then every parameter has a row of its own. A master is undefined
// where the parameter has none. `shadows` are copies outside the ring: they are stepped while the slots take
// predictions, or take the predictions; empty where nothing is predicted.
struct Tensors {
  std::vector<std::string> names;
  std::vector<int64_t> numbers;
  std::vector<int64_t> groups;
  std::vector<std::vector<const at::Tensor*>> slots;
  std::shared_ptr<const void> owners;
  std::vector<at::Tensor> exp_avgs, exp_avg_sqs, masters, steps, mu_products, means, shadows;
  Rule rule;
  bool corrects = false;       // a step takes a correction, or writes predicted weights
  bool ring_predicts = false;  // the slots take predicted weights, and the shadows are stepped
};

// The ring slots of a step: those of the gradients, of the weights read, and of the weights written.
struct StepSlots {
  size_t grads = 0, source = 0, target = 0;
};

using Row = std::array<double, kCoefficients>;
using CorrectionRow = std::array<double, kCorrections>;

}  // namespace nesterov_pp
