// What a launch gives to a thread of a device: tensors and scalars, and the thread's loads and stores.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../codes.h"
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
  int64_t elements;      // in all chunks
  const double* rows;    // row_words each
  const double* factor;  // null, or a factor of the gradients in addition to the rows' grad_scale
  int32_t grads;         // ring slots
  int32_t source;
  int32_t target;
  Rule rule;
  bool ring_predicts;  // the ring receives predicted weights, and the shadows are stepped
  RoundKeys keys;      // for stochastic rounding
};

// The type that the memory of weights has; that of a residual is apart.
template <class W>
using Stored = std::conditional_t<kSame<W, Split>, BFloat16, W>;

// The number of elements that a thread takes at once: one vector of the largest of the pass's dtypes. Of a smaller
// dtype it takes less, so that neighbouring threads read and write neighbouring memory in every stream.
template <class P>
constexpr int kLargest = sizeof(Stored<typename P::W>) > sizeof(typename P::M) ? sizeof(Stored<typename P::W>)
                                                                               : sizeof(typename P::M);
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
struct Word<1> {
  using type = unsigned char;
};
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

// Loads and stores of N elements in global memory, 16 bytes at a time if there are so many. The intrinsics tell a
// device's compiler that an address from the table is one of global memory, which it cannot know otherwise, and that
// the data is used only once.
template <int N, class S>
NPP_HD Pack<S, N> load(const S* base, int i) {
  const S* from = element(base, i);
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
NPP_HD void store(S* base, int i, const Pack<S, N>& pack) {
  S* to = element(base, i);
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
  // For moments in eight bits: likewise of the chunk's first four groups; what turns the roots that the step computes
  // into those of second moments; and a code over 254 minus its magnitude, for every byte.
  unsigned int first_counter;
  PhiloxOfFirst philox_of_groups;
  float to_root;
  const float* quotients;
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
NPP_HD Constants<P> constants_of(const Launch& l, const double* row, const Span& span, const float* quotients) {
  using T = typename P::T;
  auto coefficients = Coefficients<double>::from(row);
  if (l.factor != nullptr) coefficients.grad_scale *= *l.factor;
  Constants<P> k{coefficients.template as<T>(), {}, l.rule, 0, {}, {}, 0, {}, 1, quotients};
  auto& c = k.c;
  for (T* x : {&c.grad_scale, &c.l2, &c.decay, &c.c_grad, &c.c_momentum, &c.inv_bias2, &c.eps, &c.first.weight,
               &c.second.kept, &c.second.rest, &c.second.complement})
    keep(*x);
  c.has_l2 = c.l2 != 0;
  c.has_decay = c.decay != 0;
  if constexpr (P::kCorrects) k.x = Correction<double>::from(row + kCoefficients + 1).template as<T>();
  const auto rest_of_counter = [&](uint64_t first, unsigned int flag) {
    return Words<unsigned int>{0, static_cast<unsigned int>(first >> 32) | flag,
                               static_cast<unsigned int>(l.table.at(kNumber, span.tensor)),
                               static_cast<unsigned int>(row[kCoefficients])};
  };
  if constexpr (P::kCodes && P::kMayHaveSecond) {
    const auto counter = static_cast<uint64_t>(span.begin) / (4 * kGroup);
    k.first_counter = static_cast<unsigned int>(counter);
    k.keys = l.keys;
    k.philox_of_groups = PhiloxOfFirst::from(rest_of_counter(counter, 0x80000000U), l.keys);
    k.to_root = static_cast<float>(1 / nesterov_pp::square_root(coefficients.inv_bias2));
    keep(k.to_root);
  }
  if constexpr (P::kStochastic) {
    const auto pair = static_cast<uint64_t>(span.begin) / 2;
    k.first_pair = static_cast<unsigned int>(pair);
    k.keys = held(l.keys);
    k.philox = PhiloxOfFirst::from(rest_of_counter(pair, 0), l.keys);
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
  const Stored<typename P::W>* w;
  Stored<typename P::W>* out;
  const typename P::G* grad;
  const typename P::G* late;
  typename P::M* m;
  typename P::M* v;
  typename P::M* mean;
  typename P::G* copy;
  typename P::G* ahead;
  Code* residual;
  Half* m_scale;  // of the moments' groups
  Half* v_scale;
};

template <class S>
NPP_HD S* pointer(int64_t address, int64_t begin) {
  return address == 0 ? nullptr : reinterpret_cast<S*>(static_cast<uintptr_t>(address)) + begin;
}

template <class P>
NPP_HD Pointers<P> pointers_of(const Launch& l, const Span& span) {
  using W = Stored<typename P::W>;
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
  if constexpr (P::kSplit) p.residual = pointer<Code>(at(kResidual), span.begin);
  if constexpr (P::kCodes) {
    p.m_scale = pointer<Half>(at(kExpAvgScale), span.begin / kGroup);
    if constexpr (P::kMayHaveSecond) p.v_scale = pointer<Half>(at(kExpAvgSqScale), span.begin / kGroup);
  }
  return p;
}

}  // namespace nesterov_pp::device
