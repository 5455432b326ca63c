// One parallel region over the elements of many tensors.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace nesterov_pp::cpu {

// Runs all tasks on torch's intra-op threads (torch.set_num_threads), split evenly by elements.
void run(const std::vector<Task>& tasks, const std::vector<StepRow>& rows);

// Values of one tensor.
struct Values {
  const void* data;
  long long count;
  Dtype dtype;
};

// Euclidean norm of all values together, read once; the same bits for any number of threads.
double norm(const std::vector<Values>& tensors);

// The instruction set in use, and the ones this processor offers. set_isa throws std::invalid_argument for others.
std::string isa();
std::vector<std::string> isas();
void set_isa(const std::string& name);

}  // namespace nesterov_pp::cpu
