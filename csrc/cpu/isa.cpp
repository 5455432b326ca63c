#include "codec.h"
#include "kernels.h"

namespace nesterov_pp::cpu {

Isa best_isa() {
#if NPP_X86
  __builtin_cpu_init();
  // Asks for single features because GCC 11 does not know the names of the levels here.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) return Isa::kV4;
  if (v3) return Isa::kV3;
#endif
  return Isa::kBaseline;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kV4:
      return "x86-64-v4";
    case Isa::kV3:
      return "x86-64-v3";
    default:
      return "baseline";
  }
}

Kernel kernel(Isa isa, const Spec& spec) {
#if NPP_X86
  if (isa == Isa::kV4) return kernel_v4(spec);
  if (isa == Isa::kV3) return kernel_v3(spec);
#endif
  (void)isa;
  return kernel_baseline(spec);
}

Squares squares(Isa isa, Dtype dtype) {
#if NPP_X86
  if (isa == Isa::kV4) return squares_v4(dtype);
  if (isa == Isa::kV3) return squares_v3(dtype);
#endif
  (void)isa;
  return squares_baseline(dtype);
}

void carry(const void* from, void* to, long long bytes) {
  __builtin_memcpy(to, from, static_cast<unsigned long>(bytes));
}

}  // namespace nesterov_pp::cpu
