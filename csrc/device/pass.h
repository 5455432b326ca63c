// What one thread of a device does in a pass over many tensors. Free of CUDA calls, so that the host can run it too.
#pragma once

#include <cstdint>

#include "../random.h"
#include "stored.h"
#include "table.h"

namespace nesterov_pp::device {

// A row of coefficients as the device has it: they, and the number of the step, counted from 1; 0 for no step.
constexpr int kRowWords = kCoefficients + 1;
// Of a corrected pass: the scalars of the correction after these.
constexpr int kCorrectedRowWords = kRowWords + kCorrections;

// Everything that a launch is given, in the memory of the device but for the struct itself.
struct Launch {
  Table table;
  const int64_t* chunks;
  int64_t chunk_count;
  const double* rows;    // kRowWords each, or kCorrectedRowWords
  const double* factor;  // null, or what the gradients are multiplied by beside the rows' grad_scale
  int32_t source;        // ring slots
  int32_t target;
  int32_t late;  // that of the gradients
  uint64_t seed;
};

// The dtypes of a pass: weights computed with, gradients, moments.
template <class WeightType, class GradType, class MomentType, bool adaptive, bool stochastic>
struct Pass {
  using W = WeightType;
  using G = GradType;
  using M = MomentType;
  using T = typename Compute<W>::type;
  static constexpr bool kAdaptive = adaptive;
  static constexpr bool kStochastic = stochastic;
  static constexpr bool kCopies = !kSame<W, G>;  // beside master weights
  static constexpr int kSmallest = sizeof(G) < sizeof(M) ? sizeof(G) : sizeof(M);
  static constexpr int kVector = static_cast<int>(kVectorBytes) / kSmallest;  // elements
};

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

// The coefficients of a row in the dtype to compute in.
template <class T>
NPP_HD Scalars<T> coefficients_of(const Launch& l, const double* r) {
  const double grad_scale = l.factor == nullptr ? r[0] : r[0] * *l.factor;
  return Coefficients<double>{grad_scale, r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]}.template as<T>();
}

// A step that the device found not to be taken.
NPP_HD bool is_skipped(const double* r) { return r[kCoefficients] == 0; }

template <class P>
struct Pointers {
  const typename P::W* w;
  typename P::W* out;
  const typename P::G* grad;
  typename P::M* m;
  typename P::M* v;
  typename P::G* copy;
};

template <class S>
NPP_HD S* pointer(int64_t address) {
  return reinterpret_cast<S*>(static_cast<uintptr_t>(address));
}

template <class P>
NPP_HD Pointers<P> pointers_of(const Launch& l, const Span& span) {
  using W = typename P::W;
  using G = typename P::G;
  using M = typename P::M;
  const auto at = [&](int column) { return l.table.at(column, span.tensor); };
  Pointers<P> p{};
  if constexpr (P::kCopies) {
    p.out = pointer<W>(at(kMaster)) + span.begin;
    p.w = p.out;
    p.copy = pointer<G>(at(kSlots + l.target)) + span.begin;
  } else {
    p.w = pointer<const W>(at(kSlots + l.source)) + span.begin;
    p.out = pointer<W>(at(kSlots + l.target)) + span.begin;
  }
  p.grad = pointer<const G>(at(kGrad)) + span.begin;
  p.m = pointer<M>(at(kExpAvg)) + span.begin;
  if constexpr (P::kAdaptive) p.v = pointer<M>(at(kExpAvgSq)) + span.begin;
  return p;
}

// Which random bits an element takes: see random.h.
struct Bits {
  unsigned int weight, m, v;
};
NPP_HD Bits bits_from(unsigned int first, unsigned int second) {
  return {first & 0xffffU, first >> 16, second & 0xffffU};
}

template <int N>
NPP_HD void random_bits(uint64_t seed, unsigned int tensor, unsigned int step, int64_t element, Bits (&bits)[N]) {
  for (int j = 0; j < N; j += 2) {
    const auto pair = static_cast<uint64_t>(element + j) / 2;
    const auto words = philox<unsigned int>(
        {static_cast<unsigned int>(pair), static_cast<unsigned int>(pair >> 32), tensor, step}, seed);
    if constexpr (N == 1) {
      bits[0] = element % 2 == 0 ? bits_from(words.a, words.b) : bits_from(words.c, words.d);
    } else {
      bits[j] = bits_from(words.a, words.b);
      bits[j + 1] = bits_from(words.c, words.d);
    }
  }
}

template <class S, bool kStochastic, class T>
NPP_HD S narrowed(T value, unsigned int noise) {
  if constexpr (kStochastic && kSame<S, BFloat16>) return Narrow<S>::stochastic(value, noise);
  return Narrow<S>::nearest(value);
}

// N elements from element i of the pointers on, which is element `first` of the tensor.
template <class P, int N>
NPP_HD void step_elements(const Pointers<P>& p, int64_t i, int64_t first, const Scalars<typename P::T>& c,
                          const Launch& l, unsigned int number, unsigned int step) {
  using T = typename P::T;
  using W = typename P::W;
  using G = typename P::G;
  using M = typename P::M;
  auto w = load<N>(p.w + i);
  const auto grad = load<N>(p.grad + i);
  auto m = load<N>(p.m + i);
  Pack<M, N> v{};
  if constexpr (P::kAdaptive) v = load<N>(p.v + i);
  Pack<G, N> copy{};
  Bits bits[N] = {};
  if constexpr (P::kStochastic) random_bits<N>(l.seed, number, step, first, bits);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int j = 0; j < N; ++j) {
    T mj = widened(m.values[j]), vj = widened(v.values[j]);
    const T next = update<P::kAdaptive, kSame<M, Half>>(c, T(widened(w.values[j])), T(widened(grad.values[j])), mj, vj);
    m.values[j] = narrowed<M, P::kStochastic>(mj, bits[j].m);
    if constexpr (P::kAdaptive) v.values[j] = narrowed<M, P::kStochastic>(vj, bits[j].v);
    w.values[j] = narrowed<W, P::kStochastic>(next, bits[j].weight);
    if constexpr (P::kCopies) copy.values[j] = Narrow<G>::nearest(next);
  }
  store(p.m + i, m);
  if constexpr (P::kAdaptive) store(p.v + i, v);
  store(p.out + i, w);
  if constexpr (P::kCopies) store(p.copy + i, copy);
}

// Copies a weight that received no gradient into the next slot.
template <class S>
NPP_HD void carry(const Launch& l, const Span& span, int64_t thread, int64_t threads) {
  if (l.source == l.target) return;
  constexpr int N = static_cast<int>(kVectorBytes) / static_cast<int>(sizeof(S));
  const auto* from = pointer<const S>(l.table.at(kSlots + l.source, span.tensor)) + span.begin;
  auto* to = pointer<S>(l.table.at(kSlots + l.target, span.tensor)) + span.begin;
  const int64_t whole = l.table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
  for (int64_t i = thread * N; i < whole; i += threads * N) store(to + i, load<N>(from + i));
  for (int64_t i = whole + thread; i < span.count; i += threads) store(to + i, load<1>(from + i));
}

// One thread's part of a step, for a grid of `blocks` blocks of `threads` threads.
template <class P>
NPP_HD void step(const Launch& l, int64_t block, int64_t blocks, int64_t thread, int64_t threads) {
  using T = typename P::T;
  constexpr int N = P::kVector;
  for (int64_t k = block; k < l.chunk_count; k += blocks) {
    const Span span = span_of(l.table, l.chunks[k]);
    const int64_t row = l.table.at(kRow, span.tensor);
    if (row < 0) {
      carry<typename P::G>(l, span, thread, threads);
      continue;
    }
    const double* r = l.rows + row * kRowWords;
    if (is_skipped(r)) continue;
    const auto c = coefficients_of<T>(l, r);
    const auto number = static_cast<unsigned int>(l.table.at(kNumber, span.tensor));
    const auto count_of_step = static_cast<unsigned int>(r[kCoefficients]);
    const auto p = pointers_of<P>(l, span);
    const int64_t whole = l.table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
    for (int64_t i = thread * N; i < whole; i += threads * N)
      step_elements<P, N>(p, i, span.begin + i, c, l, number, count_of_step);
    for (int64_t i = whole + thread; i < span.count; i += threads)
      step_elements<P, 1>(p, i, span.begin + i, c, l, number, count_of_step);
  }
}

// One thread's part of the sum of squares of one chunk's gradients, 0 for a tensor without one.
template <class G>
NPP_HD double squares(const Table& table, int64_t chunk, int64_t thread, int64_t threads) {
  using T = typename Compute<G>::type;
  constexpr int N = static_cast<int>(kVectorBytes) / static_cast<int>(sizeof(G));
  const Span span = span_of(table, chunk);
  if (table.at(kRow, span.tensor) < 0) return 0;
  const auto* grad = pointer<const G>(table.at(kGrad, span.tensor)) + span.begin;
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
