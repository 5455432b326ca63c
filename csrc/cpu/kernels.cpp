// No torch and no standard-library templates here: a weak symbol compiled for AVX-512 could be chosen by the linker for
// every caller, and crash older processors.
// Wide vectors are passed between inlined functions only, so no calling convention is concerned.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "kernels.h"

#include "lanes.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#define NPP_X86 1
#define NPP_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#define NPP_TARGET_V4 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif

namespace nesterov_pp::cpu {
namespace {

template <class S, int N>
NPP_INLINE typename Element<S, N>::Value load(const S* from) {
  typename Element<S, N>::Stored stored;
  __builtin_memcpy(&stored, from, sizeof(stored));
  return Element<S, N>::widen(stored);
}

template <class S, int N>
NPP_INLINE void store(S* to, const typename Element<S, N>::Value& value) {
  const auto stored = Element<S, N>::narrow(value);
  __builtin_memcpy(to, &stored, sizeof(stored));
}

// Past the caches, to an address aligned to 16 bytes. The processor joins the parts of a cache line.
template <class V>
NPP_INLINE void stream(void* to, const V& stored) {
#if NPP_X86
  if constexpr (sizeof(V) % 16 == 0) {
    __m128i parts[sizeof(V) / 16];
    __builtin_memcpy(parts, &stored, sizeof(V));
    for (unsigned k = 0; k < sizeof(V) / 16; ++k) _mm_stream_si128(static_cast<__m128i*>(to) + k, parts[k]);
    return;
  }
#endif
  __builtin_memcpy(to, &stored, sizeof(V));
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Whether weights and moments are all bfloat16, and so can be taken in pairs.
template <class W, class M>
constexpr bool kPairs = kSame<W, BFloat16> && kSame<M, BFloat16>;

template <bool kAdaptive, int N, bool kStreaming, class T>
NPP_INLINE void block_of_pairs(const BFloat16* w, BFloat16* out, const BFloat16* grad, BFloat16* m, BFloat16* v,
                               const Coefficients<T>& c) {
  using P = BFloat16Pairs<N>;
  typename P::Stored ws, gs, ms, vs{};
  __builtin_memcpy(&ws, w, sizeof(ws));
  __builtin_memcpy(&gs, grad, sizeof(gs));
  __builtin_memcpy(&ms, m, sizeof(ms));
  if constexpr (kAdaptive) __builtin_memcpy(&vs, v, sizeof(vs));
  auto m1 = P::first(ms), m2 = P::second(ms), v1 = P::first(vs), v2 = P::second(vs);
  const auto next1 = update<kAdaptive>(c, P::first(ws), P::first(gs), m1, v1);
  const auto next2 = update<kAdaptive>(c, P::second(ws), P::second(gs), m2, v2);
  ms = P::join(m1, m2);
  ws = P::join(next1, next2);
  __builtin_memcpy(m, &ms, sizeof(ms));
  if constexpr (kAdaptive) {
    vs = P::join(v1, v2);
    __builtin_memcpy(v, &vs, sizeof(vs));
  }
  if constexpr (kStreaming)
    stream(out, ws);
  else
    __builtin_memcpy(out, &ws, sizeof(ws));
}

template <class W, class M, bool kAdaptive, int N, bool kStreaming, class T>
NPP_INLINE void block(const W* w, W* out, const W* grad, M* m, M* v, const Coefficients<T>& c) {
  if constexpr (kPairs<W, M>) {
    block_of_pairs<kAdaptive, N / 2, kStreaming>(w, out, grad, m, v, c);
  } else {
    auto mi = load<M, N>(m);
    auto vi = kAdaptive ? load<M, N>(v) : mi;
    const auto next = update<kAdaptive>(c, load<W, N>(w), load<W, N>(grad), mi, vi);
    store<M, N>(m, mi);
    if constexpr (kAdaptive) store<M, N>(v, vi);
    if constexpr (kStreaming)
      stream(out, Element<W, N>::narrow(next));
    else
      store<W, N>(out, next);
  }
}

// `out` is `w` or disjoint from it.
template <class W, class M, bool kAdaptive, int N, bool kStreaming, class T>
NPP_INLINE void blocks(const W* w, W* out, const W* grad, M* m, M* v, long long n, const Coefficients<T>& c) {
  long long i = 0;
  for (; i + N <= n; i += N)
    block<W, M, kAdaptive, N, kStreaming>(w + i, out + i, grad + i, m + i, kAdaptive ? v + i : v, c);
  if (i == n) return;
  // The rest as a block of its own, filled up with zeros.
  W w_rest[N] = {}, grad_rest[N] = {};
  M m_rest[N] = {}, v_rest[N] = {};
  const auto count = static_cast<unsigned long>(n - i);
  __builtin_memcpy(w_rest, w + i, count * sizeof(W));
  __builtin_memcpy(grad_rest, grad + i, count * sizeof(W));
  __builtin_memcpy(m_rest, m + i, count * sizeof(M));
  if constexpr (kAdaptive) __builtin_memcpy(v_rest, v + i, count * sizeof(M));
  block<W, M, kAdaptive, N, false>(w_rest, w_rest, grad_rest, m_rest, v_rest, c);
  __builtin_memcpy(out + i, w_rest, count * sizeof(W));
  __builtin_memcpy(m + i, m_rest, count * sizeof(M));
  if constexpr (kAdaptive) __builtin_memcpy(v + i, v_rest, count * sizeof(M));
}

template <class W, class M, bool kAdaptive, int kBytes>
NPP_INLINE void pass(const Run& r, const Coefficients<double>& coefficients) {
  using T = typename Compute<W>::type;
  constexpr int N = kBytes / static_cast<int>(sizeof(T)) * (kPairs<W, M> ? 2 : 1);
  const Coefficients<T> c = coefficients.as<T>();
  const auto* w = static_cast<const W*>(r.weight);
  const auto* grad = static_cast<const W*>(r.grad);
  auto* out = static_cast<W*>(r.weight_out);
  auto* m = static_cast<M*>(r.exp_avg);
  auto* v = static_cast<M*>(r.exp_avg_sq);
#if NPP_X86
  if (r.streaming && reinterpret_cast<unsigned long>(out) % 16 == 0) {
    blocks<W, M, kAdaptive, N, true>(w, out, grad, m, v, r.count, c);
    _mm_sfence();  // streamed stores are weakly ordered: publish them before the thread joins
    return;
  }
#endif
  blocks<W, M, kAdaptive, N, false>(w, out, grad, m, v, r.count, c);
}

// Sixteen partial sums whatever the vectors' width, so that the order of additions does not depend on it.
template <class S>
NPP_INLINE double sum_of_squares(const void* values, long long count) {
  constexpr int N = 16;
  using V = typename Element<S, N>::Value;
  const auto* x = static_cast<const S*>(values);
  double total = 0;
  for (long long begin = 0; begin < count; begin += kSquaresRun) {
    const long long end = count - begin < kSquaresRun ? count : begin + kSquaresRun;
    V sums{};
    long long i = begin;
    for (; i + N <= end; i += N) {
      const V value = load<S, N>(x + i);
      sums += value * value;
    }
    if (i < end) {
      S rest[N] = {};
      __builtin_memcpy(rest, x + i, static_cast<unsigned long>(end - i) * sizeof(S));
      const V value = load<S, N>(rest);
      sums += value * value;
    }
    for (int k = 0; k < N; ++k) total += static_cast<double>(sums[k]);
  }
  return total;
}

template <class W, class M, bool kAdaptive>
void pass_baseline(const Run& r, const Coefficients<double>& c) {
  pass<W, M, kAdaptive, 16>(r, c);
}
template <class S>
double squares_baseline(const void* values, long long count) {
  return sum_of_squares<S>(values, count);
}
#if NPP_X86
template <class W, class M, bool kAdaptive>
NPP_TARGET_V3 void pass_v3(const Run& r, const Coefficients<double>& c) {
  pass<W, M, kAdaptive, 32>(r, c);
}
template <class S>
NPP_TARGET_V3 double squares_v3(const void* values, long long count) {
  return sum_of_squares<S>(values, count);
}
template <class W, class M, bool kAdaptive>
NPP_TARGET_V4 void pass_v4(const Run& r, const Coefficients<double>& c) {
  pass<W, M, kAdaptive, 64>(r, c);
}
template <class S>
NPP_TARGET_V4 double squares_v4(const void* values, long long count) {
  return sum_of_squares<S>(values, count);
}
#endif

template <class W, class M>
Kernel by_isa(Isa isa, bool adaptive) {
#if NPP_X86
  if (isa == Isa::kV4) return adaptive ? pass_v4<W, M, true> : pass_v4<W, M, false>;
  if (isa == Isa::kV3) return adaptive ? pass_v3<W, M, true> : pass_v3<W, M, false>;
#endif
  (void)isa;
  return adaptive ? pass_baseline<W, M, true> : pass_baseline<W, M, false>;
}

template <class W>
Kernel by_moment(Isa isa, Dtype moment, bool adaptive) {
  if (moment == Dtype::kFloat) return by_isa<W, float>(isa, adaptive);
  if (moment == Dtype::kBFloat16) return by_isa<W, BFloat16>(isa, adaptive);
  return nullptr;
}

template <class S>
Squares squares_by_isa(Isa isa) {
#if NPP_X86
  if (isa == Isa::kV4) return squares_v4<S>;
  if (isa == Isa::kV3) return squares_v3<S>;
#endif
  (void)isa;
  return squares_baseline<S>;
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

Kernel kernel(Isa isa, Dtypes dtypes, bool adaptive) {
  switch (dtypes.weight) {
    case Dtype::kDouble:
      return dtypes.moment == Dtype::kDouble ? by_isa<double, double>(isa, adaptive) : nullptr;
    case Dtype::kFloat:
      return by_moment<float>(isa, dtypes.moment, adaptive);
    case Dtype::kBFloat16:
      return by_moment<BFloat16>(isa, dtypes.moment, adaptive);
    case Dtype::kHalf:
      if (dtypes.moment == Dtype::kHalf) return by_isa<Half, Half>(isa, adaptive);
      return by_moment<Half>(isa, dtypes.moment, adaptive);
  }
  return nullptr;
}

Squares squares(Isa isa, Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return squares_by_isa<double>(isa);
    case Dtype::kBFloat16:
      return squares_by_isa<BFloat16>(isa);
    case Dtype::kHalf:
      return squares_by_isa<Half>(isa);
    default:
      return squares_by_isa<float>(isa);
  }
}

void carry(const void* from, void* to, long long bytes) {
  __builtin_memcpy(to, from, static_cast<unsigned long>(bytes));
}

}  // namespace nesterov_pp::cpu
