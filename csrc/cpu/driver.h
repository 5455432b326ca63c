// Passes over the elements of many tensors in one parallel region.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace nesterov_pp::cpu {

// Runs all tasks on torch's intra-op threads (torch.set_num_threads), split evenly by elements.
void run(const std::vector<Task>& tasks, const std::vector<StepRow>& rows);

// The values of one tensor.
struct Values {
  const void* data;
  long long count;
  Dtype dtype;
};

// Returns the Euclidean norm of all values together, reading each once. The bits are the same for any number of
// threads.
double norm(const std::vector<Values>& tensors);

// The instruction set in use, and those that this processor offers. set_isa throws std::invalid_argument for others.
Isa selected_isa();
std::string isa();
std::vector<std::string> isas();
void set_isa(const std::string& name);

}  // namespace nesterov_pp::cpu
