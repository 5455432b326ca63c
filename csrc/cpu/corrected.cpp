// The pass with a correction of late gradients in it. Like kernels.cpp free of torch and of standard-library templates.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "kernels.h"
#include "lanes.h"

namespace nesterov_pp::cpu {
namespace {

// Weights and gradients in W, moments and the running mean in M; null pointers as in Run.
template <class W, class M>
struct Pointers {
  const W* w;
  W* out;
  const W* grad;
  const W* late;
  W* ahead;
  M* m;
  M* v;
  M* mean;
};

template <class P>
NPP_INLINE P* after(P* base, long long i) {
  return base == nullptr ? base : base + i;
}

template <class S, int N>
NPP_INLINE void store(S* to, const typename Element<S, N>::Value& value) {
  const auto stored = Element<S, N>::narrow(value);
  __builtin_memcpy(to, &stored, sizeof(stored));
}

template <Kind kKind, bool kAdaptive, class W, class M, int N, class T>
NPP_INLINE void block(const Pointers<W, M>& p, const Scalars<T>& c, const CorrectionScalars<T>& x) {
  using V = typename Element<W, N>::Value;
  const V w = load<W, N>(p.w);
  V m = load<M, N>(p.m), v{}, mean{}, late{}, ahead;
  if constexpr (kAdaptive) v = load<M, N>(p.v);
  if constexpr (has_mean(kKind)) mean = load<M, N>(p.mean);
  if constexpr (compares(kKind)) late = load<W, N>(p.late);
  const V next = corrected_update<kKind, kAdaptive>(c, x, w, late, load<W, N>(p.grad), m, v, mean, ahead);
  store<M, N>(p.m, m);
  if constexpr (kAdaptive) store<M, N>(p.v, v);
  if constexpr (has_mean(kKind)) store<M, N>(p.mean, mean);
  if (p.ahead != nullptr) store<W, N>(p.ahead, ahead);
  store<W, N>(p.out, next);
}

template <class S>
NPP_INLINE void copy(S* to, const S* from, long long count) {
  if (to != nullptr && from != nullptr) __builtin_memcpy(to, from, static_cast<unsigned long>(count) * sizeof(S));
}

template <Kind kKind, bool kAdaptive, class W, class M, int kBytes>
NPP_INLINE void pass(const Run& r, const Coefficients<double>& coefficients, const Correction<double>& correction) {
  using T = typename Compute<W>::type;
  constexpr int N = kBytes / static_cast<int>(sizeof(T));
  const auto c = coefficients.as<T>();
  const auto x = correction.as<T>();
  const Pointers<W, M> p{static_cast<const W*>(r.weight), static_cast<W*>(r.weight_out), static_cast<const W*>(r.grad),
                         static_cast<const W*>(r.late),   static_cast<W*>(r.ahead),      static_cast<M*>(r.exp_avg),
                         static_cast<M*>(r.exp_avg_sq),   static_cast<M*>(r.mean)};
  const auto at = [&p](long long i) {
    return Pointers<W, M>{p.w + i,           p.out + i, p.grad + i,    after(p.late, i),
                          after(p.ahead, i), p.m + i,   after(p.v, i), after(p.mean, i)};
  };
  long long i = 0;
  for (; i + N <= r.count; i += N) block<kKind, kAdaptive, W, M, N>(at(i), c, x);
  if (i == r.count) return;
  // The rest as a block of its own, filled up with zeros.
  const Pointers<W, M> from = at(i);
  const long long rest = r.count - i;
  W w[N] = {}, grad[N] = {}, late[N] = {}, ahead[N] = {};
  M m[N] = {}, v[N] = {}, mean[N] = {};
  copy<W>(w, from.w, rest);
  copy<W>(grad, from.grad, rest);
  copy<W>(late, from.late, rest);
  copy<M>(m, from.m, rest);
  copy<M>(v, from.v, rest);
  copy<M>(mean, from.mean, rest);
  block<kKind, kAdaptive, W, M, N>({w, w, grad, late, ahead, m, v, mean}, c, x);
  copy<W>(from.ahead, ahead, rest);
  copy<W>(from.out, w, rest);
  copy<M>(from.m, m, rest);
  copy<M>(from.v, v, rest);
  copy<M>(from.mean, mean, rest);
}

template <Kind kKind, bool kAdaptive, class W, class M>
void pass_baseline(const Run& r, const Coefficients<double>& c, const Correction<double>& x) {
  pass<kKind, kAdaptive, W, M, 16>(r, c, x);
}
#if NPP_X86
template <Kind kKind, bool kAdaptive, class W, class M>
NPP_TARGET_V3 void pass_v3(const Run& r, const Coefficients<double>& c, const Correction<double>& x) {
  pass<kKind, kAdaptive, W, M, 32>(r, c, x);
}
template <Kind kKind, bool kAdaptive, class W, class M>
NPP_TARGET_V4 void pass_v4(const Run& r, const Coefficients<double>& c, const Correction<double>& x) {
  pass<kKind, kAdaptive, W, M, 64>(r, c, x);
}
#endif

template <Kind kKind, bool kAdaptive, class W, class M>
CorrectedKernel by_isa(Isa isa) {
#if NPP_X86
  if (isa == Isa::kV4) return pass_v4<kKind, kAdaptive, W, M>;
  if (isa == Isa::kV3) return pass_v3<kKind, kAdaptive, W, M>;
#endif
  (void)isa;
  return pass_baseline<kKind, kAdaptive, W, M>;
}

template <Kind kKind, class W, class M>
CorrectedKernel by_rule(Isa isa, bool adaptive) {
  return adaptive ? by_isa<kKind, true, W, M>(isa) : by_isa<kKind, false, W, M>(isa);
}

template <class W, class M>
CorrectedKernel by_kind(Isa isa, bool adaptive, Kind kind) {
  switch (kind) {
    case Kind::kDelayCompensation:
      return by_rule<Kind::kDelayCompensation, W, M>(isa, adaptive);
    case Kind::kAdaptiveDelayCompensation:
      return by_rule<Kind::kAdaptiveDelayCompensation, W, M>(isa, adaptive);
    case Kind::kGap:
      return by_rule<Kind::kGap, W, M>(isa, adaptive);
    case Kind::kDiscrepancy:
      return by_rule<Kind::kDiscrepancy, W, M>(isa, adaptive);
    default:
      return by_rule<Kind::kNone, W, M>(isa, adaptive);
  }
}

}  // namespace

CorrectedKernel corrected_kernel(Isa isa, Dtypes dtypes, bool adaptive, Kind kind) {
  const auto [weight, grad, moment] = dtypes;
  if (weight != grad) return nullptr;
  if (weight == Dtype::kDouble && moment == weight) return by_kind<double, double>(isa, adaptive, kind);
  if (weight == Dtype::kFloat && moment == weight) return by_kind<float, float>(isa, adaptive, kind);
  if (weight == Dtype::kFloat && moment == Dtype::kBFloat16) return by_kind<float, BFloat16>(isa, adaptive, kind);
  if (weight == Dtype::kBFloat16 && moment == weight) return by_kind<BFloat16, BFloat16>(isa, adaptive, kind);
  if (weight == Dtype::kBFloat16 && moment == Dtype::kFloat) return by_kind<BFloat16, float>(isa, adaptive, kind);
  return nullptr;
}

}  // namespace nesterov_pp::cpu
