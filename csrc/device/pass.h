// What one thread of a device does in a pass over many tensors. Free of CUDA calls, so that the host can run it too.
#pragma once

#include <cstdint>

#include "../random.h"
#include "../spec.h"
#include "codec.h"
#include "table.h"

namespace nesterov_pp::device {

// A row of a step as the device has it: the coefficients; the number of the step, counted from 1, 0 for no step; and,
// if the pass corrects, the scalars of the correction.
NPP_HD constexpr int row_words(bool corrects) { return kCoefficients + 1 + (corrects ? kCorrections : 0); }

// Everything that a launch is given, in the memory of the device but for the struct itself.
struct Launch {
  Table table;
  const int64_t* chunks;
  int64_t chunk_count;
  const double* rows;    // row_words each
  const double* factor;  // null, or what the gradients are multiplied by beside the rows' grad_scale
  int32_t grads;         // ring slots
  int32_t source;
  int32_t target;
  Rule rule;
  bool ring_predicts;  // the ring takes predicted weights, and what stands beside it is stepped
  uint64_t seed;
};

// Elements that a thread takes at once: a vector of the smallest of the streams.
template <class P>
constexpr int kSmallest = sizeof(typename P::G) < sizeof(typename P::M) ? sizeof(typename P::G) : sizeof(typename P::M);
template <class P>
constexpr int kVector = static_cast<int>(kVectorBytes) / kSmallest<P>;

// N elements that are loaded and stored at once, in parts of kVectorBytes where there are so many.
template <class S, int N>
struct alignas(sizeof(S) * N < kVectorBytes ? sizeof(S) * N : kVectorBytes) Pack {
  S values[N];
};

#if defined(__CUDA_ARCH__)
// What the intrinsics below move at once.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = unsigned long long;
};
template <>
struct Word<16> {
  using type = uint4;
};
template <class S>
using WordOf = typename Word<sizeof(S) < kVectorBytes ? sizeof(S) : kVectorBytes>::type;
#endif

// N elements from and to global memory, 16 bytes at a time where there are so many. A device's compiler is told so by
// intrinsics, since it cannot know what an address from the table points to; they also say that nothing is used twice.
template <int N, class S>
NPP_HD Pack<S, N> load(const S* from) {
#if defined(__CUDA_ARCH__)
  using Part = WordOf<Pack<S, N>>;
  Part parts[sizeof(Pack<S, N>) / sizeof(Part)];
#pragma unroll
  for (unsigned k = 0; k < sizeof(Pack<S, N>) / sizeof(Part); ++k)
    parts[k] = __ldcs(reinterpret_cast<const Part*>(from) + k);
  return bits_of<Pack<S, N>>(parts);
#else
  return *reinterpret_cast<const Pack<S, N>*>(from);
#endif
}

template <int N, class S>
NPP_HD void store(S* to, const Pack<S, N>& pack) {
#if defined(__CUDA_ARCH__)
  using Part = WordOf<Pack<S, N>>;
  Part parts[sizeof(pack) / sizeof(Part)];
  __builtin_memcpy(parts, &pack, sizeof(pack));
#pragma unroll
  for (unsigned k = 0; k < sizeof(pack) / sizeof(Part); ++k) __stcs(reinterpret_cast<Part*>(to) + k, parts[k]);
#else
  *reinterpret_cast<Pack<S, N>*>(to) = pack;
#endif
}

// A step that the device found not to be taken.
NPP_HD bool is_skipped(const double* row) { return row[kCoefficients] == 0; }

// What all elements of a tensor are stepped with.
template <class P>
struct Constants {
  Scalars<typename P::T> c;
  CorrectionScalars<typename P::T> x;
  Rule rule;
  uint64_t seed;
  unsigned int number, step;  // of the parameter and its step, for stochastic rounding
};

template <class P>
NPP_HD Constants<P> constants_of(const Launch& l, const double* row, int64_t tensor) {
  using T = typename P::T;
  auto coefficients = Coefficients<double>::from(row);
  if (l.factor != nullptr) coefficients.grad_scale *= *l.factor;
  Constants<P> k{coefficients.template as<T>(),
                 {},
                 l.rule,
                 l.seed,
                 static_cast<unsigned int>(l.table.at(kNumber, tensor)),
                 static_cast<unsigned int>(row[kCoefficients])};
  if constexpr (P::kCorrects) k.x = Correction<double>::from(row + kCoefficients + 1).template as<T>();
  return k;
}

// Null is what a pass does not have. `out` and `ahead` may be the same memory as `late`: the ring's oldest version
// makes room for its newest.
template <class P>
struct Pointers {
  const typename P::W* w;
  typename P::W* out;
  const typename P::G* grad;
  const typename P::G* late;
  typename P::M* m;
  typename P::M* v;
  typename P::M* mean;
  typename P::G* copy;
  typename P::G* ahead;
};

template <class S>
NPP_HD S* pointer(int64_t address, int64_t begin) {
  return address == 0 ? nullptr : reinterpret_cast<S*>(static_cast<uintptr_t>(address)) + begin;
}

template <class P>
NPP_HD Pointers<P> pointers_of(const Launch& l, const Span& span) {
  using W = typename P::W;
  using G = typename P::G;
  using M = typename P::M;
  const auto at = [&](int column) { return l.table.at(column, span.tensor); };
  int64_t source = at(kSlots + l.source), target = at(kSlots + l.target);
  Pointers<P> p{};
  if constexpr (P::kCorrects) {
    int64_t ahead = at(kShadow);
    if (l.ring_predicts) {
      const int64_t stepped = ahead;
      ahead = target;
      source = target = stepped;
    }
    p.ahead = pointer<G>(ahead, span.begin);
    if (compares(l.rule.kind)) p.late = pointer<const G>(at(kSlots + l.grads), span.begin);
    if (has_mean(l.rule.kind)) p.mean = pointer<M>(at(kMean), span.begin);
  }
  if constexpr (P::kCopies) {
    p.w = p.out = pointer<W>(at(kMaster), span.begin);
    p.copy = pointer<G>(target, span.begin);
  } else {
    p.w = pointer<const W>(source, span.begin);
    p.out = pointer<W>(target, span.begin);
  }
  p.grad = pointer<const G>(at(kGrad), span.begin);
  p.m = pointer<M>(at(kExpAvg), span.begin);
  if (P::has_second(l.rule)) p.v = pointer<M>(at(kExpAvgSq), span.begin);
  return p;
}

// Which random bits an element takes: see random.h.
struct Bits {
  unsigned int weight, m, v, mean;
};
NPP_HD Bits bits_of_element(const Words<unsigned int>& words, int64_t element) {
  const bool odd = element % 2 != 0;
  const unsigned int first = odd ? words.c : words.a, second = odd ? words.d : words.b;
  return {first & 0xffffU, first >> 16, second & 0xffffU, second >> 16};
}

// Those of an element and of its neighbour.
template <class P>
NPP_HD Words<unsigned int> random_words(const Constants<P>& k, int64_t element) {
  const auto pair = static_cast<uint64_t>(element) / 2;
  return philox<unsigned int>(
      {static_cast<unsigned int>(pair), static_cast<unsigned int>(pair >> 32), k.number, k.step}, k.seed);
}

template <class S, bool kStochastic, class T>
NPP_HD S narrowed(T value, unsigned int noise) {
  if constexpr (kStochastic && kSame<S, BFloat16>) return Narrow<S>::stochastic(value, noise);
  return Narrow<S>::nearest(value);
}

// What the weight is away from the one that the gradient was computed with: as the gradient's dtype has both, so that a
// master that has not been stepped since is no distance apart.
template <class P>
NPP_HD typename P::T apart(typename P::T w, typename P::G late) {
  using T = typename P::T;
  T seen = w;
  if constexpr (P::kCopies) seen = T(widened(Narrow<typename P::G>::nearest(w)));
  return difference(seen, T(widened(late)));
}

// N elements from element i of the pointers on, which is element `first` of the tensor.
template <class P, int N>
NPP_HD void step_elements(const Pointers<P>& p, int64_t i, int64_t first, const Constants<P>& k) {
  using T = typename P::T;
  using W = typename P::W;
  using G = typename P::G;
  using M = typename P::M;
  constexpr bool kStochastic = P::kStochastic;
  auto w = load<N>(p.w + i);
  const auto grad = load<N>(p.grad + i);
  auto m = load<N>(p.m + i);
  Pack<M, N> v{}, mean{};
  Pack<G, N> late{}, copy{}, ahead{};
  if (P::has_second(k.rule)) v = load<N>(p.v + i);
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) mean = load<N>(p.mean + i);
    if (p.late != nullptr) late = load<N>(p.late + i);
  }
  Words<unsigned int> words{};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int j = 0; j < N; ++j) {
    Bits bits{};
    if constexpr (kStochastic) {
      if (j % 2 == 0) words = random_words(k, first + j);
      bits = bits_of_element(words, N == 1 ? first : j);  // more than one begin at an even one
    }
    const T wj = widened(w.values[j]);
    T mj = widened(m.values[j]), vj = widened(v.values[j]);
    Late<T> of{};
    if constexpr (P::kCorrects) of = {apart<P>(wj, late.values[j]), T(widened(mean.values[j])), T(0)};
    const T next = update<P>(k.rule, k.c, k.x, wj, T(widened(grad.values[j])), mj, vj, of);
    m.values[j] = narrowed<M, kStochastic>(mj, bits.m);
    if constexpr (P::kMayHaveSecond) v.values[j] = narrowed<M, kStochastic>(vj, bits.v);
    w.values[j] = narrowed<W, kStochastic>(next, bits.weight);
    if constexpr (P::kCopies) copy.values[j] = Narrow<G>::nearest(next);
    if constexpr (P::kCorrects) {
      mean.values[j] = narrowed<M, kStochastic>(of.mean, bits.mean);
      ahead.values[j] = Narrow<G>::nearest(of.ahead);
    }
  }
  store(p.m + i, m);
  if (P::has_second(k.rule)) store(p.v + i, v);
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) store(p.mean + i, mean);
    if (p.ahead != nullptr) store(p.ahead + i, ahead);
  }
  store(p.out + i, w);
  if constexpr (P::kCopies) store(p.copy + i, copy);
}

// Copies a weight that received no gradient into the next slot.
template <class S>
NPP_HD void carry(const Launch& l, const Span& span, int64_t thread, int64_t threads) {
  if (l.source == l.target) return;
  constexpr int N = static_cast<int>(kVectorBytes) / static_cast<int>(sizeof(S));
  const auto* from = pointer<const S>(l.table.at(kSlots + l.source, span.tensor), span.begin);
  auto* to = pointer<S>(l.table.at(kSlots + l.target, span.tensor), span.begin);
  const int64_t whole = l.table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
  for (int64_t i = thread * N; i < whole; i += threads * N) store(to + i, load<N>(from + i));
  for (int64_t i = whole + thread; i < span.count; i += threads) store(to + i, load<1>(from + i));
}

// One thread's part of a step, for a grid of `blocks` blocks of `threads` threads.
template <class P>
NPP_HD void step(const Launch& l, int64_t block, int64_t blocks, int64_t thread, int64_t threads) {
  constexpr int N = kVector<P>;
  for (int64_t chunk = block; chunk < l.chunk_count; chunk += blocks) {
    const Span span = span_of(l.table, l.chunks[chunk]);
    const int64_t number = l.table.at(kRow, span.tensor);
    if (number < 0) {
      carry<typename P::G>(l, span, thread, threads);
      continue;
    }
    const double* row = l.rows + number * row_words(P::kCorrects);
    if (is_skipped(row)) continue;
    const auto k = constants_of<P>(l, row, span.tensor);
    const auto p = pointers_of<P>(l, span);
    const int64_t whole = l.table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
    for (int64_t i = thread * N; i < whole; i += threads * N) step_elements<P, N>(p, i, span.begin + i, k);
    for (int64_t i = whole + thread; i < span.count; i += threads) step_elements<P, 1>(p, i, span.begin + i, k);
  }
}

// One thread's part of the sum of squares of one chunk's gradients, 0 for a tensor without one.
template <class G>
NPP_HD double squares(const Table& table, int64_t chunk, int64_t thread, int64_t threads) {
  using T = typename Compute<G>::type;
  constexpr int N = static_cast<int>(kVectorBytes) / static_cast<int>(sizeof(G));
  const Span span = span_of(table, chunk);
  if (table.at(kRow, span.tensor) < 0) return 0;
  const auto* grad = pointer<const G>(table.at(kGrad, span.tensor), span.begin);
  const int64_t whole = table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
  T sum = 0;
  for (int64_t i = thread * N; i < whole; i += threads * N) {
    const auto pack = load<N>(grad + i);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int j = 0; j < N; ++j) {
      const T value = widened(pack.values[j]);
      sum += value * value;
    }
  }
  for (int64_t i = whole + thread; i < span.count; i += threads) {
    const T value = widened(load<1>(grad + i).values[0]);
    sum += value * value;
  }
  return static_cast<double>(sum);
}

// What gradients are multiplied by beside the rows' grad_scale: 1 / loss scale, and min(1, limit / (norm + 1e-6)) where
// they are clipped (limit above 0), as torch.nn.utils.clip_grad_norm_ has it. A norm that is NaN makes it NaN.
NPP_HD double factor_of(double norm, double limit, double loss_scale) {
  const double unscaled = 1 / loss_scale;
  if (!(limit > 0)) return unscaled;
  const double clipped = limit / (norm + 1e-6);
  return clipped >= 1 ? unscaled : unscaled * clipped;
}

}  // namespace nesterov_pp::device
