// No torch and no standard-library templates here: a weak symbol compiled for AVX-512 could be chosen by the linker for
// every caller, and crash older processors.
#include "kernels.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#define NPP_X86 1
#define NPP_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#define NPP_TARGET_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif

namespace nesterov_pp::cpu {
namespace {

#define NPP_INLINE static inline __attribute__((always_inline))

// Elements computed in the first-level cache before they are streamed out.
constexpr long long kTile = 512;

template <class T, bool kAdaptive>
NPP_INLINE void compute(const T* w, T* out, const T* grad, T* m, T* v, long long n, const Coefficients<T>& c) {
  // `out` is `w` or disjoint from it: either way element i depends on element i alone.
#pragma GCC ivdep
  for (long long i = 0; i < n; ++i) {
    T mi = m[i];
    T vi = kAdaptive ? v[i] : T(0);
    out[i] = update<kAdaptive, T>(c, w[i], grad[i], mi, vi);
    m[i] = mi;
    if constexpr (kAdaptive) v[i] = vi;
  }
}

NPP_INLINE void stream_out(void* to, const void* from, long long bytes) {
  auto* destination = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  long long i = 0;
#if NPP_X86
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(destination + i),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(source + i)));
#endif
  __builtin_memcpy(destination + i, source + i, static_cast<unsigned long>(bytes - i));
}

template <class T, bool kAdaptive>
NPP_INLINE void pass(const Run& r, const Coefficients<double>& coefficients) {
  const Coefficients<T> c = coefficients.as<T>();
  const auto* w = static_cast<const T*>(r.weight);
  const auto* grad = static_cast<const T*>(r.grad);
  auto* out = static_cast<T*>(r.weight_out);
  auto* m = static_cast<T*>(r.exp_avg);
  auto* v = static_cast<T*>(r.exp_avg_sq);
#if NPP_X86
  if (r.streaming && reinterpret_cast<unsigned long>(out) % 16 == 0) {
    alignas(64) T tile[kTile];
    for (long long i = 0; i < r.count; i += kTile) {
      const long long n = r.count - i < kTile ? r.count - i : kTile;
      compute<T, kAdaptive>(w + i, tile, grad + i, m + i, kAdaptive ? v + i : v, n, c);
      stream_out(out + i, tile, n * static_cast<long long>(sizeof(T)));
    }
    _mm_sfence();  // streamed stores are weakly ordered: publish them before the thread joins
    return;
  }
#endif
  compute<T, kAdaptive>(w, out, grad, m, v, r.count, c);
}

template <class T, bool kAdaptive>
void pass_baseline(const Run& r, const Coefficients<double>& c) {
  pass<T, kAdaptive>(r, c);
}
#if NPP_X86
template <class T, bool kAdaptive>
NPP_TARGET_V3 void pass_v3(const Run& r, const Coefficients<double>& c) {
  pass<T, kAdaptive>(r, c);
}
template <class T, bool kAdaptive>
NPP_TARGET_V4 void pass_v4(const Run& r, const Coefficients<double>& c) {
  pass<T, kAdaptive>(r, c);
}
#endif

template <class T, bool kAdaptive>
Kernel choose(Isa isa) {
#if NPP_X86
  if (isa == Isa::kV4) return pass_v4<T, kAdaptive>;
  if (isa == Isa::kV3) return pass_v3<T, kAdaptive>;
#endif
  (void)isa;
  return pass_baseline<T, kAdaptive>;
}

}  // namespace

Isa best_isa() {
#if NPP_X86
  __builtin_cpu_init();
  // By feature, not by level: GCC 11 does not know the names of the levels here.
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

Kernel kernel(Isa isa, bool is_double, bool adaptive) {
  if (is_double) return adaptive ? choose<double, true>(isa) : choose<double, false>(isa);
  return adaptive ? choose<float, true>(isa) : choose<float, false>(isa);
}

void carry(const void* from, void* to, long long bytes) {
  __builtin_memcpy(to, from, static_cast<unsigned long>(bytes));
}

}  // namespace nesterov_pp::cpu
