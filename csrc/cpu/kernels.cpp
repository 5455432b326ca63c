// No torch and no standard-library templates here: a weak symbol compiled for AVX-512 could be chosen by the linker for
// every caller, and crash older processors.
// Wide vectors are passed between inlined functions only, so no calling convention is concerned.
#pragma GCC diagnostic ignored "-Wpsabi"

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

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <class V>
NPP_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <class V>
NPP_INLINE void store(void* to, const V& value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// Past the caches, to an address aligned to 16 bytes. The processor joins the parts of a cache line.
template <class V>
NPP_INLINE void stream(void* to, const V& value) {
#if NPP_X86
  __m128i parts[sizeof(V) / 16];
  __builtin_memcpy(parts, &value, sizeof(V));
  for (unsigned k = 0; k < sizeof(V) / 16; ++k) _mm_stream_si128(static_cast<__m128i*>(to) + k, parts[k]);
#else
  store(to, value);
#endif
}

// The elements that whole vectors cover; `out` is `w` or disjoint from it. Returns their number.
template <class T, bool kAdaptive, int kBytes, bool kStreaming>
NPP_INLINE long long vectors(const T* w, T* out, const T* grad, T* m, T* v, long long n, const Coefficients<T>& c) {
  using V = typename VectorOf<T, kBytes>::type;
  constexpr long long kLanes = kBytes / static_cast<int>(sizeof(T));
  long long i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    V mi = load<V>(m + i);
    V vi = kAdaptive ? load<V>(v + i) : mi;
    const V next = update<kAdaptive>(c, load<V>(w + i), load<V>(grad + i), mi, vi);
    store(m + i, mi);
    if constexpr (kAdaptive) store(v + i, vi);
    kStreaming ? stream(out + i, next) : store(out + i, next);
  }
  return i;
}

template <class T, bool kAdaptive, int kBytes>
NPP_INLINE void pass(const Run& r, const Coefficients<double>& coefficients) {
  const Coefficients<T> c = coefficients.as<T>();
  const auto* w = static_cast<const T*>(r.weight);
  const auto* grad = static_cast<const T*>(r.grad);
  auto* out = static_cast<T*>(r.weight_out);
  auto* m = static_cast<T*>(r.exp_avg);
  auto* v = static_cast<T*>(r.exp_avg_sq);
  long long i = 0;
#if NPP_X86
  if (r.streaming && reinterpret_cast<unsigned long>(out) % 16 == 0) {
    i = vectors<T, kAdaptive, kBytes, true>(w, out, grad, m, v, r.count, c);
    _mm_sfence();  // streamed stores are weakly ordered: publish them before the thread joins
  }
#endif
  if (i == 0) i = vectors<T, kAdaptive, kBytes, false>(w, out, grad, m, v, r.count, c);
  for (; i < r.count; ++i) {
    T unused = T(0);
    out[i] = update<kAdaptive>(c, w[i], grad[i], m[i], kAdaptive ? v[i] : unused);
  }
}

// Sixteen partial sums whatever the vectors' width, so that the order of additions does not depend on it.
template <class T>
NPP_INLINE double sum_of_squares(const void* values, long long count) {
  constexpr int kSums = 16;
  const auto* x = static_cast<const T*>(values);
  double total = 0;
  for (long long begin = 0; begin < count; begin += kSquaresRun) {
    const long long n = count - begin < kSquaresRun ? count - begin : kSquaresRun;
    T sums[kSums] = {};
    long long i = begin;
    for (; i + kSums <= begin + n; i += kSums)
      for (int k = 0; k < kSums; ++k) sums[k] += x[i + k] * x[i + k];
    for (int k = 0; i < begin + n; ++i, ++k) sums[k] += x[i] * x[i];
    for (int k = 0; k < kSums; ++k) total += static_cast<double>(sums[k]);
  }
  return total;
}

template <class T>
double squares_baseline(const void* values, long long count) {
  return sum_of_squares<T>(values, count);
}
#if NPP_X86
template <class T>
NPP_TARGET_V3 double squares_v3(const void* values, long long count) {
  return sum_of_squares<T>(values, count);
}
template <class T>
NPP_TARGET_V4 double squares_v4(const void* values, long long count) {
  return sum_of_squares<T>(values, count);
}
#endif

template <class T>
Squares choose_squares(Isa isa) {
#if NPP_X86
  if (isa == Isa::kV4) return squares_v4<T>;
  if (isa == Isa::kV3) return squares_v3<T>;
#endif
  (void)isa;
  return squares_baseline<T>;
}

template <class T, bool kAdaptive>
void pass_baseline(const Run& r, const Coefficients<double>& c) {
  pass<T, kAdaptive, 16>(r, c);
}
#if NPP_X86
template <class T, bool kAdaptive>
NPP_TARGET_V3 void pass_v3(const Run& r, const Coefficients<double>& c) {
  pass<T, kAdaptive, 32>(r, c);
}
template <class T, bool kAdaptive>
NPP_TARGET_V4 void pass_v4(const Run& r, const Coefficients<double>& c) {
  pass<T, kAdaptive, 64>(r, c);
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

Squares squares(Isa isa, bool is_double) {
  return is_double ? choose_squares<double>(isa) : choose_squares<float>(isa);
}

void carry(const void* from, void* to, long long bytes) {
  __builtin_memcpy(to, from, static_cast<unsigned long>(bytes));
}

}  // namespace nesterov_pp::cpu
