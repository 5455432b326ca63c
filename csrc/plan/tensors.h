// The tensors of one optimizer, and the slots and scalars of a step.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../spec.h"

namespace nesterov_pp {

// The tensors of one optimizer; every list runs over its parameters.
//
// slots[s][i] points to parameter i in ring slot s (one slot without a ring), in the place where its owner keeps it: a
// second reference would stop torch.utils.swap_tensors, which `module.to()` may call, from exchanging the tensor there.
// `owners` keeps these places alive. `exp_avg_sqs` is empty if the rule has no second moment, `mu_products` if it has
// no momentum schedule, and `means` if the correction has no running mean. `steps` and `mu_products` are empty if the
// caller counts the steps; then every parameter has its own row of scalars. masters[i] is undefined if parameter i has
// no master weights. `shadows` are copies of the weights outside the ring, and empty if nothing is predicted: with
// `ring_predicts`, the shadows are stepped and the slots receive the predicted weights; otherwise the shadows receive
// the predicted weights.
struct Tensors {
  std::vector<std::string> names;
  std::vector<int64_t> numbers;
  std::vector<int64_t> groups;
  std::vector<std::vector<const at::Tensor*>> slots;
  std::shared_ptr<const void> owners;
  std::vector<at::Tensor> exp_avgs, exp_avg_sqs, masters, steps, mu_products, means, shadows;
  // exp_avg_scales[i] and exp_avg_sq_scales[i] are undefined if the moments of parameter i are not in eight bits, and
  // residuals[i] if its weights are not in 24; each list is empty if all its entries would be. `code_seed` is the seed
  // of the noise that rounds codes.
  std::vector<at::Tensor> exp_avg_scales, exp_avg_sq_scales, residuals;
  uint64_t code_seed = 0;
  Rule rule;
  bool corrects = false;       // whether a step takes a correction or writes predicted weights
  bool ring_predicts = false;  // whether the slots receive predicted weights, and the shadows are stepped
};

// The ring slots of a step: the slot of the gradients, of the weights read, and of the weights written.
struct StepSlots {
  size_t grads = 0, source = 0, target = 0;
};

using Row = std::array<double, kCoefficients>;
using CorrectionRow = std::array<double, kCorrections>;

}  // namespace nesterov_pp
