// No torch and no standard-library templates here: a weak symbol compiled for AVX-512 could be chosen by the linker for
// every caller, and crash older processors.
// Wide vectors are passed between inlined functions only, so no calling convention is concerned.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "kernels.h"

#include "lanes.h"

#if NPP_X86
#include <emmintrin.h>
#endif

namespace nesterov_pp::cpu {
namespace {

// `noise` matters where bfloat16 is rounded stochastically.
template <class S, int N, bool kStochastic>
NPP_INLINE typename Element<S, N>::Stored narrowed(const typename Element<S, N>::Value& value,
                                                   const typename Lanes<N>::U& noise) {
  if constexpr (kStochastic && kSame<S, BFloat16>) return Element<S, N>::narrow(value, noise);
  return Element<S, N>::narrow(value);
}

template <class S, int N, bool kStochastic>
NPP_INLINE void store(S* to, const typename Element<S, N>::Value& value, const typename Lanes<N>::U& noise) {
  const auto stored = narrowed<S, N, kStochastic>(value, noise);
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

// The dtypes of a pass: weights computed with, gradients, moments.
template <class WeightType, class GradType, class MomentType>
struct Types {
  using W = WeightType;
  using G = GradType;
  using M = MomentType;
  using T = typename Compute<W>::type;
  static constexpr bool kCopies = !kSame<W, G>;  // beside master weights
  static constexpr bool kPairs = kSame<W, BFloat16> && kSame<G, BFloat16> && kSame<M, BFloat16>;  // taken in pairs
  static constexpr int kSpread = kPairs ? 2 : 1;                                                  // elements a lane
};

// What varies in the code beside dtypes and width.
template <bool adaptive, bool streaming, bool stochastic>
struct Mode {
  static constexpr bool kAdaptive = adaptive;
  static constexpr bool kStreaming = streaming;
  static constexpr bool kStochastic = stochastic;
};

template <class Y>
struct Pointers {
  const typename Y::W* w;
  typename Y::W* out;  // `w` or disjoint from it
  const typename Y::G* grad;
  typename Y::M* m;
  typename Y::M* v;
  typename Y::G* copy;

  NPP_INLINE_METHOD Pointers at(long long i) const {
    return {w + i, out + i, grad + i, m + i, v == nullptr ? v : v + i, copy == nullptr ? copy : copy + i};
  }
};

// The words of the counters that belong to element i of a run and the `offsets` after it (random.h).
template <int N>
NPP_INLINE Words<typename Lanes<N>::U> random_words(const Noise& noise, long long i,
                                                    const typename Lanes<N>::U& offsets) {
  using U = typename Lanes<N>::U;
  using W = typename Lanes<N>::W;
  const auto first = static_cast<unsigned long long>(noise.first + i) / 2;
  const U low = offsets + static_cast<unsigned int>(first);
  const U carry = -bits_of<U>(low < static_cast<unsigned int>(first));
  const W a = bits_of<W>(low), b = bits_of<W>(carry + static_cast<unsigned int>(first >> 32));
  const W tensor = W{} + noise.tensor, step = W{} + noise.step;
  const Words<W> x = philox<W>({a, b, tensor, step}, noise.seed);
  const Words<W> y = philox<W>({a >> 32, b >> 32, tensor, step}, noise.seed);
  return {joined<N>(x.a, y.a), joined<N>(x.b, y.b), joined<N>(x.c, y.c), joined<N>(x.d, y.d)};
}

template <int N>
NPP_INLINE typename Lanes<N>::U counting(unsigned int divisor) {
  typename Lanes<N>::U lanes{};
  for (unsigned int k = 0; k < N; ++k) lanes[k] = k / divisor;
  return lanes;
}

template <class Mode, class Stored>
NPP_INLINE void store_next(void* to, const Stored& stored) {
  if constexpr (Mode::kStreaming)
    stream(to, stored);
  else
    __builtin_memcpy(to, &stored, sizeof(stored));
}

// 2 N elements of bfloat16, of which a lane holds an even and an odd one.
template <class Mode, class Y, int N, class T>
NPP_INLINE void block_of_pairs(const Pointers<Y>& p, long long i, const Scalars<T>& c, const Noise& noise) {
  using P = BFloat16Pairs<N>;
  typename P::Stored ws, gs, ms, vs{};
  __builtin_memcpy(&ws, p.w, sizeof(ws));
  __builtin_memcpy(&gs, p.grad, sizeof(gs));
  __builtin_memcpy(&ms, p.m, sizeof(ms));
  if constexpr (Mode::kAdaptive) __builtin_memcpy(&vs, p.v, sizeof(vs));
  auto m1 = P::first(ms), m2 = P::second(ms), v1 = P::first(vs), v2 = P::second(vs);
  const auto next1 = update<Mode::kAdaptive, false>(c, P::first(ws), P::first(gs), m1, v1);
  const auto next2 = update<Mode::kAdaptive, false>(c, P::second(ws), P::second(gs), m2, v2);
  if constexpr (Mode::kStochastic) {
    const auto words = random_words<N>(noise, i, counting<N>(1));
    ws = P::join(next1, next2, words.a & 0xffffU, words.c & 0xffffU);
    ms = P::join(m1, m2, words.a >> 16, words.c >> 16);
    if constexpr (Mode::kAdaptive) vs = P::join(v1, v2, words.b & 0xffffU, words.d & 0xffffU);
  } else {
    ws = P::join(next1, next2);
    ms = P::join(m1, m2);
    if constexpr (Mode::kAdaptive) vs = P::join(v1, v2);
  }
  __builtin_memcpy(p.m, &ms, sizeof(ms));
  if constexpr (Mode::kAdaptive) __builtin_memcpy(p.v, &vs, sizeof(vs));
  store_next<Mode>(p.out, ws);
}

template <class Mode, class Y, int N, class T>
NPP_INLINE void block_of_lanes(const Pointers<Y>& p, long long i, const Scalars<T>& c, const Noise& noise) {
  using W = typename Y::W;
  using G = typename Y::G;
  using M = typename Y::M;
  using U = typename Lanes<N>::U;
  auto m = load<M, N>(p.m);
  auto v = Mode::kAdaptive ? load<M, N>(p.v) : m;
  const auto next = update<Mode::kAdaptive, kSame<M, Half>>(c, load<W, N>(p.w), load<G, N>(p.grad), m, v);
  U weight_noise{}, m_noise{}, v_noise{};
  if constexpr (Mode::kStochastic) {
    const auto words = random_words<N>(noise, i, counting<N>(2));
    const U odd = -(counting<N>(1) & 1U);
    const U first = choose_lanes(odd, words.c, words.a), second = choose_lanes(odd, words.d, words.b);
    weight_noise = first & 0xffffU;
    m_noise = first >> 16;
    v_noise = second & 0xffffU;
  }
  store<M, N, Mode::kStochastic>(p.m, m, m_noise);
  if constexpr (Mode::kAdaptive) store<M, N, Mode::kStochastic>(p.v, v, v_noise);
  if constexpr (Y::kCopies) {
    store<W, N, false>(p.out, next, weight_noise);
    store_next<Mode>(p.copy, Element<G, N>::narrow(next));
  } else {
    store_next<Mode>(p.out, narrowed<W, N, Mode::kStochastic>(next, weight_noise));
  }
}

// N lanes from element i of the run on.
template <class Mode, class Y, int N, class T>
NPP_INLINE void block(const Pointers<Y>& p, long long i, const Scalars<T>& c, const Noise& noise) {
  if constexpr (Y::kPairs)
    block_of_pairs<Mode, Y, N>(p, i, c, noise);
  else
    block_of_lanes<Mode, Y, N>(p, i, c, noise);
}

template <class Mode, class Y, int N, class T>
NPP_INLINE void blocks(const Pointers<Y>& p, long long n, const Scalars<T>& c, const Noise& noise) {
  constexpr int kElements = N * Y::kSpread;
  long long i = 0;
  for (; i + kElements <= n; i += kElements) block<Mode, Y, N>(p.at(i), i, c, noise);
  if (i == n) return;
  // The rest as a block of its own, filled up with zeros.
  typename Y::W w[kElements] = {};
  typename Y::G grad[kElements] = {}, copy[kElements] = {};
  typename Y::M m[kElements] = {}, v[kElements] = {};
  const Pointers<Y> from = p.at(i);
  const auto count = static_cast<unsigned long>(n - i);
  __builtin_memcpy(w, from.w, count * sizeof(w[0]));
  __builtin_memcpy(grad, from.grad, count * sizeof(grad[0]));
  __builtin_memcpy(m, from.m, count * sizeof(m[0]));
  if constexpr (Mode::kAdaptive) __builtin_memcpy(v, from.v, count * sizeof(v[0]));
  using Plain = ::nesterov_pp::cpu::Mode<Mode::kAdaptive, false, Mode::kStochastic>;
  block<Plain, Y, N>(Pointers<Y>{w, w, grad, m, v, copy}, i, c, noise);
  __builtin_memcpy(from.out, w, count * sizeof(w[0]));
  __builtin_memcpy(from.m, m, count * sizeof(m[0]));
  if constexpr (Mode::kAdaptive) __builtin_memcpy(from.v, v, count * sizeof(v[0]));
  if constexpr (Y::kCopies) __builtin_memcpy(from.copy, copy, count * sizeof(copy[0]));
}

// The same, with a loop of its own for each of the usual cases: no branches on scalars between the vectors.
template <class Mode, class Y, int N, class T>
NPP_INLINE void usual_blocks(const Pointers<Y>& p, long long n, const Scalars<T>& c, const Noise& noise) {
  if constexpr (Mode::kAdaptive && !Mode::kStochastic) {
    if (!c.has_l2 && c.first.is_small) {
      Scalars<T> known = c;
      known.has_l2 = false;
      known.first.is_small = true;
      if (c.has_decay) {
        known.has_decay = true;
        blocks<Mode, Y, N>(p, n, known, noise);
      } else {
        known.has_decay = false;
        blocks<Mode, Y, N>(p, n, known, noise);
      }
      return;
    }
  }
  blocks<Mode, Y, N>(p, n, c, noise);
}

template <class Y, bool kAdaptive, bool kStochastic, int kBytes>
NPP_INLINE void pass(const Run& r, const Coefficients<double>& coefficients) {
  constexpr int N = kBytes / static_cast<int>(sizeof(typename Y::T));
  const auto c = coefficients.as<typename Y::T>();
  const Pointers<Y> p{static_cast<const typename Y::W*>(r.weight), static_cast<typename Y::W*>(r.weight_out),
                      static_cast<const typename Y::G*>(r.grad),   static_cast<typename Y::M*>(r.exp_avg),
                      static_cast<typename Y::M*>(r.exp_avg_sq),   static_cast<typename Y::G*>(r.copy)};
#if NPP_X86
  const void* next = Y::kCopies ? r.copy : r.weight_out;
  if (r.streaming && reinterpret_cast<unsigned long>(next) % 16 == 0) {
    usual_blocks<Mode<kAdaptive, true, kStochastic>, Y, N>(p, r.count, c, r.noise);
    _mm_sfence();  // streamed stores are weakly ordered: publish them before the thread joins
    return;
  }
#endif
  usual_blocks<Mode<kAdaptive, false, kStochastic>, Y, N>(p, r.count, c, r.noise);
}

// 32 partial sums whatever the vectors' width, so that the order of additions does not depend on it. In two vectors: an
// addition that waited for the one before would take longer than the values take to arrive.
template <class S>
NPP_INLINE double sum_of_squares(const void* values, long long count) {
  constexpr int N = 16;
  using V = typename Element<S, N>::Value;
  const auto* x = static_cast<const S*>(values);
  double total = 0;
  for (long long begin = 0; begin < count; begin += kSquaresRun) {
    const long long end = count - begin < kSquaresRun ? count : begin + kSquaresRun;
    V even{}, odd{};
    long long i = begin;
    for (; i + 2 * N <= end; i += 2 * N) {
      const V first = load<S, N>(x + i), second = load<S, N>(x + i + N);
      even += first * first;
      odd += second * second;
    }
    if (i < end) {
      S rest[2 * N] = {};
      __builtin_memcpy(rest, x + i, static_cast<unsigned long>(end - i) * sizeof(S));
      const V first = load<S, N>(rest), second = load<S, N>(rest + N);
      even += first * first;
      odd += second * second;
    }
    const V sums = even + odd;
    for (int k = 0; k < N; ++k) total += static_cast<double>(sums[k]);
  }
  return total;
}

template <class Y, bool kAdaptive, bool kStochastic>
void pass_baseline(const Run& r, const Coefficients<double>& c) {
  pass<Y, kAdaptive, kStochastic, 16>(r, c);
}
template <class S>
double squares_baseline(const void* values, long long count) {
  return sum_of_squares<S>(values, count);
}
#if NPP_X86
template <class Y, bool kAdaptive, bool kStochastic>
NPP_TARGET_V3 void pass_v3(const Run& r, const Coefficients<double>& c) {
  pass<Y, kAdaptive, kStochastic, 32>(r, c);
}
template <class S>
NPP_TARGET_V3 double squares_v3(const void* values, long long count) {
  return sum_of_squares<S>(values, count);
}
template <class Y, bool kAdaptive, bool kStochastic>
NPP_TARGET_V4 void pass_v4(const Run& r, const Coefficients<double>& c) {
  pass<Y, kAdaptive, kStochastic, 64>(r, c);
}
template <class S>
NPP_TARGET_V4 double squares_v4(const void* values, long long count) {
  return sum_of_squares<S>(values, count);
}
#endif

template <class Y, bool kStochastic>
Kernel by_isa(Isa isa, bool adaptive) {
#if NPP_X86
  if (isa == Isa::kV4) return adaptive ? pass_v4<Y, true, kStochastic> : pass_v4<Y, false, kStochastic>;
  if (isa == Isa::kV3) return adaptive ? pass_v3<Y, true, kStochastic> : pass_v3<Y, false, kStochastic>;
#endif
  (void)isa;
  return adaptive ? pass_baseline<Y, true, kStochastic> : pass_baseline<Y, false, kStochastic>;
}

// Where nothing is stored in bfloat16, there is nothing to round stochastically.
template <class W, class G, class M>
Kernel by_rounding(Isa isa, bool adaptive, bool stochastic) {
  constexpr bool kRounds = kSame<W, BFloat16> || kSame<M, BFloat16>;
  if constexpr (kSame<W, Half> || kSame<M, Half>)
    if (stochastic) return nullptr;
  if constexpr (kRounds && !kSame<W, Half>)
    if (stochastic) return by_isa<Types<W, G, M>, true>(isa, adaptive);
  return by_isa<Types<W, G, M>, false>(isa, adaptive);
}

template <class W, class G>
Kernel by_moment(Isa isa, Dtype moment, bool adaptive, bool stochastic) {
  if (moment == Dtype::kFloat) return by_rounding<W, G, float>(isa, adaptive, stochastic);
  if (moment == Dtype::kBFloat16) return by_rounding<W, G, BFloat16>(isa, adaptive, stochastic);
  if constexpr (kSame<W, Half>)
    if (moment == Dtype::kHalf) return by_rounding<Half, Half, Half>(isa, adaptive, stochastic);
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

Kernel kernel(Isa isa, Dtypes dtypes, bool adaptive, bool stochastic) {
  const auto [weight, grad, moment] = dtypes;
  if (weight == Dtype::kDouble)
    return grad == weight && moment == weight ? by_rounding<double, double, double>(isa, adaptive, stochastic)
                                              : nullptr;
  if (weight == Dtype::kFloat) {
    if (grad == Dtype::kFloat) return by_moment<float, float>(isa, moment, adaptive, stochastic);
    if (grad == Dtype::kBFloat16) return by_moment<float, BFloat16>(isa, moment, adaptive, stochastic);
    if (grad == Dtype::kHalf) return by_moment<float, Half>(isa, moment, adaptive, stochastic);
    return nullptr;
  }
  if (weight != grad) return nullptr;
  if (weight == Dtype::kBFloat16) return by_moment<BFloat16, BFloat16>(isa, moment, adaptive, stochastic);
  return by_moment<Half, Half>(isa, moment, adaptive, stochastic);
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
