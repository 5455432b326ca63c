// The passes with vectors of 16 bytes, which every processor has.
// Wide vectors are passed between inlined functions only, so their calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "pass.h"

namespace nesterov_pp::cpu {
namespace {

template <class P>
void pass_baseline(const Run& run, const StepRow& row, bool streaming) {
  pass<P, 16>(run, row, streaming);
}
template <class S>
double sum_of_squares_baseline(const void* values, long long count) {
  return sum_of_squares<S, 16>(values, count);
}

}  // namespace

Kernel kernel_baseline(const Spec& spec) {
  Kernel found = nullptr;
  const auto find = [&](auto p) { found = pass_baseline<decltype(p)>; };
  if (!visit(spec, find)) visit_small(spec, find);
  return found;
}

Squares squares_baseline(Dtype dtype) {
  return squares_of(dtype, [](auto s) { return static_cast<Squares>(sum_of_squares_baseline<decltype(s)>); });
}

}  // namespace nesterov_pp::cpu
