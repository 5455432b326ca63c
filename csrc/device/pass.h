// The work of one device thread in a pass over many tensors. Makes no CUDA calls, so that the host can run it too.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../random.h"
#include "../spec.h"
#include "lanes.h"
#include "table.h"

namespace nesterov_pp::device {

// Returns the size of a row of scalars on the device: the coefficients; the number of the step, counted from 1, or 0 to
// skip the step; and, if the pass corrects, the scalars of the correction.
NPP_HD constexpr int row_words(bool corrects) { return kCoefficients + 1 + (corrects ? kCorrections : 0); }

// The arguments of a launch. All pointers are to device memory.
struct Launch {
  Table table;
  const int64_t* chunks;
  int64_t chunk_count;
  const double* rows;    // row_words each
  const double* factor;  // null, or a factor of the gradients in addition to the rows' grad_scale
  int32_t grads;         // ring slots
  int32_t source;
  int32_t target;
  Rule rule;
  bool ring_predicts;  // the ring receives predicted weights, and the shadows are stepped
  RoundKeys keys;      // for stochastic rounding
};

// The number of elements that a thread takes at once: one vector of the largest of the pass's dtypes. Of a smaller
// dtype it takes less, so that neighbouring threads read and write neighbouring memory in every stream.
template <class P>
constexpr int kLargest = sizeof(typename P::W) > sizeof(typename P::M) ? sizeof(typename P::W) : sizeof(typename P::M);
template <class P>
constexpr int kVector = kVectorBytes / kLargest<P>;
// The number of elements that a thread computes with at once: fewer if they would not fit into its registers.
template <class P>
constexpr int kLanes = kSame<typename P::T, double>     ? 1
                       : P::kCorrects && P::kStochastic ? 2
                                                        : 4;

// Returns the address of element i, where i is not negative, in one instruction on a device.
template <class S>
NPP_HD S* element(S* base, int i) {
#if defined(__CUDA_ARCH__)
  unsigned long long address;
  asm("mad.wide.u32 %0, %1, %2, %3;"
      : "=l"(address)
      : "r"(i), "n"(sizeof(S)), "l"(reinterpret_cast<unsigned long long>(base)));
  return reinterpret_cast<S*>(address);
#else
  return base + i;
#endif
}

#if defined(__CUDA_ARCH__)
// The types that the intrinsics below move at once.
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
using WordOf = typename Word<sizeof(S)>::type;
#endif

// Loads and stores of N elements in global memory, 16 bytes at most. The intrinsics tell a device's compiler that an
// address from the table is one of global memory, which it cannot know otherwise, and that the data is used only once.
template <int N, class S>
NPP_HD Pack<S, N> load(const S* base, int i) {
  const S* from = element(base, i);
#if defined(__CUDA_ARCH__)
  return bits_of<Pack<S, N>>(__ldcs(reinterpret_cast<const WordOf<Pack<S, N>>*>(from)));
#else
  return *reinterpret_cast<const Pack<S, N>*>(from);
#endif
}

template <int N, class S>
NPP_HD void store(S* base, int i, const Pack<S, N>& pack) {
  S* to = element(base, i);
#if defined(__CUDA_ARCH__)
  using Bits = WordOf<Pack<S, N>>;
  __stcs(reinterpret_cast<Bits*>(to), bits_of<Bits>(pack));
#else
  *reinterpret_cast<Pack<S, N>*>(to) = pack;
#endif
}

// Returns whether the device found that the step is to be skipped.
NPP_HD bool is_skipped(const double* row) { return row[kCoefficients] == 0; }

// The scalars and options of a step, the same for all elements of a chunk.
template <class P>
struct Constants {
  Scalars<typename P::T> c;
  CorrectionScalars<typename P::T> x;
  Rule rule;
  // For stochastic rounding: the lower word of the number of the chunk's first pair, and Philox for the rest of the
  // counter. A chunk begins at a multiple of its size, so counting its pairs never carries into the upper word.
  unsigned int first_pair;
  PhiloxOfFirst philox;
  RoundKeys keys;
};

// Keeps a number in a register; a compiler short of registers would convert it from double again for every element.
template <class T>
NPP_HD void keep(T& x) {
#if defined(__CUDA_ARCH__)
  if constexpr (kSame<T, float>) asm volatile("" : "+f"(x));
  if constexpr (kSame<T, unsigned int>) asm volatile("" : "+r"(x));
#else
  (void)x;
#endif
}

// Returns the keys in registers. Otherwise they would be read from constant memory again for every few elements. Each
// thread of a warp reads one key and passes it to the others.
NPP_HD RoundKeys held(const RoundKeys& keys) {
#if defined(__CUDA_ARCH__)
  RoundKeys all;
  const unsigned int lane = threadIdx.x % 32;
  const unsigned int mine = reinterpret_cast<const unsigned int*>(&keys)[lane < 2 * kRounds ? lane : 0];
#pragma unroll
  for (int k = 0; k < kRounds; ++k) {
    all.a[k] = __shfl_sync(0xffffffffU, mine, k);
    all.b[k] = __shfl_sync(0xffffffffU, mine, kRounds + k);
  }
  return all;
#else
  return keys;
#endif
}

template <class P>
NPP_HD Constants<P> constants_of(const Launch& l, const double* row, const Span& span) {
  using T = typename P::T;
  auto coefficients = Coefficients<double>::from(row);
  if (l.factor != nullptr) coefficients.grad_scale *= *l.factor;
  Constants<P> k{coefficients.template as<T>(), {}, l.rule, 0, {}, {}};
  auto& c = k.c;
  for (T* x : {&c.grad_scale, &c.l2, &c.decay, &c.c_grad, &c.c_momentum, &c.inv_bias2, &c.eps, &c.first.weight,
               &c.second.kept, &c.second.rest, &c.second.complement})
    keep(*x);
  c.has_l2 = c.l2 != 0;
  c.has_decay = c.decay != 0;
  if constexpr (P::kCorrects) k.x = Correction<double>::from(row + kCoefficients + 1).template as<T>();
  if constexpr (P::kStochastic) {
    const auto pair = static_cast<uint64_t>(span.begin) / 2;
    k.first_pair = static_cast<unsigned int>(pair);
    k.keys = held(l.keys);
    k.philox = PhiloxOfFirst::from(
        {0, static_cast<unsigned int>(pair >> 32), static_cast<unsigned int>(l.table.at(kNumber, span.tensor)),
         static_cast<unsigned int>(row[kCoefficients])},
        l.keys);
    for (unsigned int* x : {&k.philox.key_c, &k.philox.key_a, &k.philox.c, &k.philox.d}) keep(*x);
  }
  return k;
}

// Returns whether a step is the usual case, which has its own loop without branches on these scalars: decoupled decay
// without L2 decay, and a first moment with a long mean.
template <class T>
NPP_HD bool is_usual(const Scalars<T>& c) {
  return !c.has_l2 && c.has_decay && c.first.is_small;
}
template <class P>
NPP_HD Constants<P> usual(const Constants<P>& k) {
  Constants<P> known = k;
  known.c.has_l2 = false;
  known.c.has_decay = known.c.first.is_small = true;
  return known;
}

// The memory of a chunk; a pointer is null if the pass does not have it. `late` may be the same memory as `w`, or as
// the one of `out`, `copy` and `ahead` that goes to the ring, whose newest version replaces its oldest.
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

// Random bits for L elements, from element i + begin of a chunk on (random.h). i and begin are even unless L is 1.
template <int L>
struct Bits {
  Noise16 weight[L], m[L], v[L], mean[L];
};

template <int L, class P>
NPP_HD Bits<L> random_bits(const Constants<P>& k, int i, int begin) {
  Bits<L> bits{};
  const unsigned int pair = k.first_pair + static_cast<unsigned int>(i) / 2 + static_cast<unsigned int>(begin) / 2;
  NPP_UNROLL
  for (int j = 0; j < L; j += 2) {
    const auto words = k.philox(pair + static_cast<unsigned int>(j) / 2, k.keys);
    NPP_UNROLL
    for (int half = 0; half < 2 && j + half < L; ++half) {
      const bool odd = L == 1 ? i % 2 != 0 : half != 0;
      const unsigned int one = odd ? words.c : words.a, other = odd ? words.d : words.b;
      bits.weight[j + half] = Noise16{one, false};
      bits.m[j + half] = Noise16{one, true};
      bits.v[j + half] = Noise16{other, false};
      bits.mean[j + half] = Noise16{other, true};
    }
  }
  return bits;
}

// Returns L elements of a pack, from element `begin` on.
template <int L, class T, class S, int N>
NPP_HD Lanes<T, L> lanes_of(const Pack<S, N>& pack, int begin) {
  Lanes<T, L> lanes;
  get<L>(pack, begin, lanes.x);
  return lanes;
}

// Returns weights as they are compared with late weights: master weights are rounded to the gradients' dtype, so that
// the difference is 0 if there was no step in between.
template <class P, class T, int L>
NPP_HD Lanes<T, L> seen(const Lanes<T, L>& w) {
  if constexpr (!P::kCopies) return w;
  Pack<typename P::G, L> rounded;
  put_nearest(rounded, 0, w.x);
  return lanes_of<L, T>(rounded, 0);
}

// Rounds L numbers into a pack, stochastically with `noise` if the pass does so.
template <class P, int L, class T, class S, int N>
NPP_HD void put(Pack<S, N>& pack, int begin, const T (&values)[L], const Noise16 (&noise)[L]) {
  if constexpr (P::kStochastic)
    put_stochastic(pack, begin, values, noise);
  else
    put_nearest(pack, begin, values);
}

// Steps element i of the chunk, with roots and quotients that are correctly rounded in all cases.
template <class P>
NPP_HD void step_one(const Pointers<P>& p, int i, const Constants<P>& k) {
  using T = typename P::T;
  const auto read = [i](const auto* base) { return T(widened(load<1>(base, i).values[0])); };
  const T w = read(p.w);
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
  write(p.out, next, bits.weight, by_pass);
  if constexpr (P::kCopies) write(p.copy, next, bits.m, nearest);
}

// Steps N elements from element i of the chunk on: all at once, or one by one if their roots and quotients are not sure
// (lanes.h).
template <class P, int N>
NPP_HD void step_vector(const Pointers<P>& p, int i, const Constants<P>& k) {
  using T = typename P::T;
  using G = typename P::G;
  using M = typename P::M;
  constexpr int L = N < kLanes<P> ? N : kLanes<P>;
  auto w = load<N>(p.w, i);
  const auto grad = load<N>(p.grad, i);
  auto m = load<N>(p.m, i);
  Pack<M, N> v{}, mean{};
  Pack<G, N> late{}, copy{}, ahead{};
  if (P::has_second(k.rule)) v = load<N>(p.v, i);
  if constexpr (P::kCorrects) {
    if (p.mean != nullptr) mean = load<N>(p.mean, i);
    if (p.late != nullptr) late = load<N>(p.late, i);
  }
  bool sure = true;
  NPP_UNROLL
  for (int j = 0; j < N; j += L) {
    const auto wj = lanes_of<L, T>(w, j);
    auto mj = lanes_of<L, T>(m, j), vj = lanes_of<L, T>(v, j);
    Late<Lanes<T, L>> of{};
    if constexpr (P::kCorrects) of = {difference(seen<P>(wj), lanes_of<L, T>(late, j)), lanes_of<L, T>(mean, j), {}};
    const auto next = update<P>(k.rule, k.c, k.x, wj, lanes_of<L, T>(grad, j), mj, vj, of);
    sure = is_sure(next);
    if (P::kCorrects) sure &= of.mean.sure & is_sure(of.ahead);
    // A sign is finite also where the new moment is NaN, which is not roundable.
    if (P::kStochastic && P::kMayBeSign) sure &= is_sure(mj);
    if (!sure) break;  // also keeps the compiler to the order of the elements, which takes fewer registers
    Bits<L> bits{};
    if constexpr (P::kStochastic) bits = random_bits<L>(k, i, j);
    put<P>(m, j, mj.x, bits.m);
    if constexpr (P::kMayHaveSecond) put<P>(v, j, vj.x, bits.v);
    if constexpr (P::kCorrects) put<P>(mean, j, of.mean.x, bits.mean);
    put<P>(w, j, next.x, bits.weight);
    if constexpr (P::kCopies) put_nearest(copy, j, next.x);
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
  store(p.out, i, w);
  if constexpr (P::kCopies) store(p.copy, i, copy);
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

// Steps one thread's part of a chunk, which is divided among `threads` threads.
template <class P>
NPP_HD void step(const Launch& l, int64_t chunk, int thread, int threads) {
  constexpr int N = kVector<P>;
  const Span span = span_of(l.table, l.chunks[chunk]);
  const int64_t number = l.table.at(kRow, span.tensor);
  if (number < 0) {
    carry<typename P::G>(l, span, thread, threads);
    return;
  }
  const double* row = l.rows + number * row_words(P::kCorrects);
  if (is_skipped(row)) return;
  const auto k = constants_of<P>(l, row, span);
  const auto p = pointers_of<P>(l, span);
  const int whole = l.table.at(kAligned, span.tensor) != 0 ? span.count / N * N : 0;
  if (!P::kCorrects && is_usual(k.c)) {
    const Constants<P> known = usual(k);
    for (int i = thread * N; i < whole; i += threads * N) step_vector<P, N>(p, i, known);
  } else {
    for (int i = thread * N; i < whole; i += threads * N) step_vector<P, N>(p, i, k);
  }
  for (int i = whole + thread; i < span.count; i += threads) step_one(p, i, k);
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
