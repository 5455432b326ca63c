// One parallel region over the elements of many tensors.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace nesterov_pp::cpu {

// The row of a weight that is carried to the next slot unchanged.
constexpr long long kCarried = -1;

// One tensor's share of a step. `stochastic` and a row of coefficients go with a gradient only.
struct Task {
  Run run;
  Dtypes dtypes;
  bool adaptive;
  bool stochastic;
  long long row;  // of the coefficients, and of the corrections
  Kind kind;      // of a corrected pass
};

// Runs all tasks on torch's intra-op threads (torch.set_num_threads), split evenly by elements. Corrected, if there are
// as many rows of corrections as of coefficients; plain, if there is none.
void run(const std::vector<Task>& tasks, const std::vector<Coefficients<double>>& rows,
         const std::vector<Correction<double>>& corrections);

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
