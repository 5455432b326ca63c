// The work of one device thread in a pass over many tensors. Makes no CUDA calls, so that the host can run it too.
#pragma once

#include "groups.h"
#include "launch.h"
#include "weights.h"

namespace nesterov_pp::device {

// Steps element i of the chunk, with roots and quotients that are correctly rounded in all cases.
template <class P>
NPP_HD void step_one(const Pointers<P>& p, int i, const Constants<P>& k) {
  using T = typename P::T;
  const auto read = [i](const auto* base) { return T(widened(load<1>(base, i).values[0])); };
  auto weights = load_weights<P, 1>(p, i);
  const T w = numbers_of<1>(weights, 0).x[0];
  T m = read(p.m), v = 0;
  Late<T> late{};
  if (P::has_second(k.rule)) v = read(p.v);
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) late.mean = read(p.mean);
    if (p.late != nullptr) late.apart = difference(seen<P>(Lanes<T, 1>{{w}}).x[0], read(p.late));
  }
  const T next = update<P>(k.rule, k.c, k.x, w, read(p.grad), m, v, late);
  Bits<1> bits{};
  if constexpr (P::kStochastic) bits = random_bits<1>(k, i, 0);
  const auto write = [i](auto* base, T value, const Noise16(&noise)[1], auto rounds) {
    Pack<std::remove_pointer_t<decltype(base)>, 1> one;
    const T values[1] = {roundable(value)};
    rounds(one, values, noise);
    store(base, i, one);
  };
  const auto by_pass = [](auto& pack, const auto& values, const auto& noise) { put<P>(pack, 0, values, noise); };
  const auto nearest = [](auto& pack, const auto& values, const auto&) { put_nearest(pack, 0, values); };
  write(p.m, m, bits.m, by_pass);
  if (P::has_second(k.rule)) write(p.v, v, bits.v, by_pass);
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) write(p.mean, late.mean, bits.mean, by_pass);
    if (p.ahead != nullptr) write(p.ahead, late.ahead, bits.m, nearest);
  }
  const T values[1] = {roundable(next)};
  put_weights(weights, 0, values, bits.weight);
  store_weights(p, i, weights);
}

// Steps N elements from element i of the chunk on: all at once, or one by one if their roots and quotients are not sure
// (lanes.h).
template <class P, int N>
NPP_HD void step_vector(const Pointers<P>& p, int i, const Constants<P>& k) {
  using T = typename P::T;
  using G = typename P::G;
  using M = typename P::M;
  constexpr int L = N < kLanes<P> ? N : kLanes<P>;
  auto w = load_weights<P, N>(p, i);
  const auto grad = load<N>(p.grad, i);
  auto m = load<N>(p.m, i);
  Pack<M, N> v{}, mean{};
  Pack<G, N> late{}, ahead{};
  if (P::has_second(k.rule)) v = load<N>(p.v, i);
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) mean = load<N>(p.mean, i);
    if (p.late != nullptr) late = load<N>(p.late, i);
  }
  bool sure = true;
  NPP_UNROLL
  for (int j = 0; j < N; j += L) {
    const auto wj = numbers_of<L>(w, j);
    auto mj = lanes_of<L, T>(m, j), vj = lanes_of<L, T>(v, j);
    Late<Lanes<T, L>> of{};
    if constexpr (P::kCorrects) of = {difference(seen<P>(wj), lanes_of<L, T>(late, j)), lanes_of<L, T>(mean, j), {}};
    const auto next = update<P>(k.rule, k.c, k.x, wj, lanes_of<L, T>(grad, j), mj, vj, of);
    sure = are_sure<P>(next);
    if (P::kCorrects) sure &= of.mean.sure & is_sure(of.ahead);
    // A sign is finite also where the new moment is NaN, which is not roundable.
    if (P::kStochastic && P::kMayBeSign) sure &= is_sure(mj);
    if (!sure) break;  // also keeps the compiler to the order of the elements, which takes fewer registers
    Bits<L> bits{};
    if constexpr (P::kStochastic) bits = random_bits<L>(k, i, j);
    put<P>(m, j, mj.x, bits.m);
    if constexpr (P::kMayHaveSecond) put<P>(v, j, vj.x, bits.v);
    if constexpr (P::kCorrects) put<P>(mean, j, of.mean.x, bits.mean);
    put_weights(w, j, next.x, bits.weight);
    if constexpr (P::kCorrects) put_nearest(ahead, j, of.ahead.x);
  }
  if (!sure) {
    NPP_ROLLED
    for (int j = 0; j < N; ++j) step_one(p, i + j, k);
    return;
  }
  store(p.m, i, m);
  if (P::has_second(k.rule)) store(p.v, i, v);
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) store(p.mean, i, mean);
    if (p.ahead != nullptr) store(p.ahead, i, ahead);
  }
  store_weights(p, i, w);
}

// Copies a weight that received no gradient into the next slot.
template <class S>
NPP_HD void carry(const Launch& l, const Span& span, int thread, int threads) {
  if (l.source == l.target) return;
  constexpr int N = kVectorBytes / static_cast<int>(sizeof(S));
  const auto* from = pointer<const S>(l.table.at(kSlots + l.source, span.tensor), span.begin);
  auto* to = pointer<S>(l.table.at(kSlots + l.target, span.tensor), span.begin);
  const int whole = l.table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
  for (int i = thread * N; i < whole; i += threads * N) store(to, i, load<N>(from, i));
  for (int i = whole + thread; i < span.count; i += threads) store(to, i, load<1>(from, i));
}

// Steps one thread's part of a chunk of `count` elements.
template <class P>
NPP_HD void step_chunk(const Pointers<P>& p, const Constants<P>& k, int count, bool aligned, int thread, int threads) {
  constexpr int N = kVector<P>;
  const int whole = aligned ? count / N * N : 0;
  if (!P::kCorrects && is_usual(k.c)) {
    const Constants<P> known = usual(k);
    for (int i = thread * N; i < whole; i += threads * N) step_vector<P, N>(p, i, known);
  } else {
    for (int i = thread * N; i < whole; i += threads * N) step_vector<P, N>(p, i, k);
  }
  for (int i = whole + thread; i < count; i += threads) step_one(p, i, k);
}

// Steps one thread's part of a chunk, which is divided among `threads` threads. `quotients` has 256 entries (small.h)
// that a block shares, and is null unless moments are in eight bits.
template <class P>
NPP_HD void step(const Launch& l, int64_t chunk, int thread, int threads, const float* quotients = nullptr) {
  const Span span = span_of(l.table, l.chunks[chunk]);
  const int64_t number = l.table.at(kRow, span.tensor);
  if (number < 0) {
    carry<typename P::G>(l, span, thread, threads);
    return;
  }
  const double* row = l.rows + number * row_words(P::kCorrects);
  if (is_skipped(row)) return;
  const auto k = constants_of<P>(l, row, span, quotients);
  const auto p = pointers_of<P>(l, span);
  const bool aligned = l.table.at(kAligned, span.tensor) != 0;
  if constexpr (P::kCodes)
    step_groups(p, k, span.count, aligned, thread, threads);
  else
    step_chunk(p, k, span.count, aligned, thread, threads);
}

// Returns one thread's part of the sum of squares of one chunk's gradients, 0 for a tensor without a gradient.
template <class G>
NPP_HD double squares(const Table& table, int64_t chunk, int thread, int threads) {
  using T = typename Compute<G>::type;
  constexpr int N = kVectorBytes / static_cast<int>(sizeof(G));
  const Span span = span_of(table, chunk);
  if (table.at(kRow, span.tensor) < 0) return 0;
  const auto* grad = pointer<const G>(table.at(kGrad, span.tensor), span.begin);
  const int whole = table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
  T sum = 0;
  for (int i = thread * N; i < whole; i += threads * N) {
    const auto pack = load<N>(grad, i);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int j = 0; j < N; ++j) {
      const T value = widened(pack.values[j]);
      sum += value * value;
    }
  }
  for (int i = whole + thread; i < span.count; i += threads) {
    const T value = widened(load<1>(grad, i).values[0]);
    sum += value * value;
  }
  return static_cast<double>(sum);
}

// Returns the factor of the gradients in addition to the rows' grad_scale: 1 / loss_scale, times
// min(1, limit / (norm + 1e-6)) if they are clipped (limit above 0), as in torch.nn.utils.clip_grad_norm_. A norm of
// NaN makes the factor NaN.
NPP_HD double factor_of(double norm, double limit, double loss_scale) {
  const double unscaled = 1 / loss_scale;
  if (!(limit > 0)) return unscaled;
  const double clipped = limit / (norm + 1e-6);
  return clipped >= 1 ? unscaled : unscaled * clipped;
}

}  // namespace nesterov_pp::device
