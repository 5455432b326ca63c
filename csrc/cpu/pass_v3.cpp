// The passes with AVX2.
// Wide vectors are passed between inlined functions only, so their calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "pass.h"

#if NPP_X86
namespace nesterov_pp::cpu {
namespace {

template <class P>
NPP_TARGET_V3 void pass_v3(const Run& run, const StepRow& row, bool streaming) {
  pass<P, 32>(run, row, streaming);
}
template <class S>
NPP_TARGET_V3 double sum_of_squares_v3(const void* values, long long count) {
  return sum_of_squares<S, 32>(values, count);
}

}  // namespace

Kernel kernel_v3(const Spec& spec) {
  Kernel found = nullptr;
  const auto find = [&](auto p) { found = pass_v3<decltype(p)>; };
  if (!visit(spec, find)) visit_small(spec, find);
  return found;
}

Squares squares_v3(Dtype dtype) {
  return squares_of(dtype, [](auto s) { return static_cast<Squares>(sum_of_squares_v3<decltype(s)>); });
}

}  // namespace nesterov_pp::cpu
#endif
