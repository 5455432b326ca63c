// What one thread of a device does in a pass with a correction of late gradients in it (update.h).
#pragma once

#include "pass.h"

namespace nesterov_pp::device {

// The dtypes of a corrected pass: weights and gradients in W, moments and the running mean in M.
template <class WeightType, class MomentType, bool adaptive, Kind kind>
struct CorrectedPass {
  using W = WeightType;
  using M = MomentType;
  using T = typename Compute<W>::type;
  static constexpr bool kAdaptive = adaptive;
  static constexpr Kind kKind = kind;
  static constexpr int kSmallest = sizeof(W) < sizeof(M) ? sizeof(W) : sizeof(M);
  static constexpr int kVector = static_cast<int>(kVectorBytes) / kSmallest;  // elements
};

// `out` may be the same memory as `late`: the ring's oldest version makes room for its newest.
template <class P>
struct CorrectedPointers {
  const typename P::W* w;
  typename P::W* out;
  const typename P::W* grad;
  const typename P::W* late;
  typename P::W* ahead;  // null: what is predicted is not kept
  typename P::M* m;
  typename P::M* v;
  typename P::M* mean;
};

// Weights that stand in the master column are stepped in place, and the ring takes what is predicted of them.
template <class P>
NPP_HD CorrectedPointers<P> corrected_pointers_of(const Launch& l, const Span& span) {
  using W = typename P::W;
  using M = typename P::M;
  const auto at = [&](int column) { return l.table.at(column, span.tensor); };
  const int64_t stepped = at(kMaster), source = at(kSlots + l.source), target = at(kSlots + l.target);
  const int64_t ahead = stepped != 0 ? target : at(kBeside);
  CorrectedPointers<P> p{};
  p.w = pointer<const W>(stepped != 0 ? stepped : source) + span.begin;
  p.out = pointer<W>(stepped != 0 ? stepped : target) + span.begin;
  p.grad = pointer<const W>(at(kGrad)) + span.begin;
  if constexpr (compares(P::kKind)) p.late = pointer<const W>(at(kSlots + l.late)) + span.begin;
  if (ahead != 0) p.ahead = pointer<W>(ahead) + span.begin;
  p.m = pointer<M>(at(kExpAvg)) + span.begin;
  if constexpr (P::kAdaptive) p.v = pointer<M>(at(kExpAvgSq)) + span.begin;
  if constexpr (has_mean(P::kKind)) p.mean = pointer<M>(at(kMean)) + span.begin;
  return p;
}

// N elements from element i of the pointers on.
template <class P, int N>
NPP_HD void corrected_elements(const CorrectedPointers<P>& p, int64_t i, const Scalars<typename P::T>& c,
                               const CorrectionScalars<typename P::T>& x) {
  using T = typename P::T;
  using W = typename P::W;
  using M = typename P::M;
  auto w = load<N>(p.w + i);
  const auto grad = load<N>(p.grad + i);
  auto m = load<N>(p.m + i);
  Pack<M, N> v{}, mean{};
  Pack<W, N> late{}, ahead{};
  if constexpr (P::kAdaptive) v = load<N>(p.v + i);
  if constexpr (has_mean(P::kKind)) mean = load<N>(p.mean + i);
  if constexpr (compares(P::kKind)) late = load<N>(p.late + i);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int j = 0; j < N; ++j) {
    T mj = widened(m.values[j]), vj = widened(v.values[j]), mean_j = widened(mean.values[j]), ahead_j{};
    const T next = corrected_update<P::kKind, P::kAdaptive>(c, x, T(widened(w.values[j])), T(widened(late.values[j])),
                                                            T(widened(grad.values[j])), mj, vj, mean_j, ahead_j);
    m.values[j] = Narrow<M>::nearest(mj);
    if constexpr (P::kAdaptive) v.values[j] = Narrow<M>::nearest(vj);
    if constexpr (has_mean(P::kKind)) mean.values[j] = Narrow<M>::nearest(mean_j);
    w.values[j] = Narrow<W>::nearest(next);
    ahead.values[j] = Narrow<W>::nearest(ahead_j);
  }
  store(p.m + i, m);
  if constexpr (P::kAdaptive) store(p.v + i, v);
  if constexpr (has_mean(P::kKind)) store(p.mean + i, mean);
  if (p.ahead != nullptr) store(p.ahead + i, ahead);
  store(p.out + i, w);
}

// One thread's part of a corrected step, for a grid of `blocks` blocks of `threads` threads.
template <class P>
NPP_HD void corrected_step(const Launch& l, int64_t block, int64_t blocks, int64_t thread, int64_t threads) {
  using T = typename P::T;
  constexpr int N = P::kVector;
  for (int64_t k = block; k < l.chunk_count; k += blocks) {
    const Span span = span_of(l.table, l.chunks[k]);
    const int64_t row = l.table.at(kRow, span.tensor);
    if (row < 0) {
      carry<typename P::W>(l, span, thread, threads);
      continue;
    }
    const double* r = l.rows + row * kCorrectedRowWords;
    if (is_skipped(r)) continue;
    const auto c = coefficients_of<T>(l, r);
    const double* x = r + kRowWords;
    const auto correction = Correction<double>{x[0], x[1], x[2], x[3], x[4], x[5], x[6]}.template as<T>();
    const auto p = corrected_pointers_of<P>(l, span);
    const int64_t whole = l.table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
    for (int64_t i = thread * N; i < whole; i += threads * N) corrected_elements<P, N>(p, i, c, correction);
    for (int64_t i = whole + thread; i < span.count; i += threads) corrected_elements<P, 1>(p, i, c, correction);
  }
}

}  // namespace nesterov_pp::device
