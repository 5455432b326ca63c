// Steps with moments in eight bits, which share a scale in groups of 32 elements.
//
// [note: groups and threads]
// Neighbouring threads of a warp step the parts of a group, and exchange the largest moments that they found. A group
// with a part that is not sure (lanes.h) is then stepped again by the same threads, one element at a time, with all
// that codes.h says of what is not finite or 0; so a part stores nothing before the exchange. The groups at the end of
// a chunk and those of unaligned tensors are stepped in this second way from the start, one element by each thread of a
// warp. On a host, where threads run one after the other, a thread steps whole groups in both ways.
#pragma once

#include "weights.h"

namespace nesterov_pp::device {

// The number of elements of a part, and of threads that step the elements of a group one by one.
#if defined(__CUDA_ARCH__)
constexpr int kPart = 8, kWarp = 32;
#else
constexpr int kPart = kGroup, kWarp = 1;
#endif

// Returns the number of the calling thread among the `kThreads` neighbours that share a group.
template <int kThreads>
NPP_HD int neighbour() {
#if defined(__CUDA_ARCH__)
  return static_cast<int>(threadIdx.x % kThreads);
#else
  static_assert(kThreads == 1, "a host's threads share nothing");
  return 0;
#endif
}

// Returns the result of `larger` over the values of all `kThreads` neighbours.
template <int kThreads, class F>
NPP_HD unsigned int largest_of(unsigned int x, F larger) {
#if defined(__CUDA_ARCH__)
  const unsigned int lane = threadIdx.x % kWarp;
  const unsigned int all = kThreads == kWarp ? 0xffffffffU : ((1U << kThreads) - 1) << (lane / kThreads * kThreads);
#pragma unroll
  for (int apart = kThreads / 2; apart > 0; apart /= 2) x = larger(x, __shfl_xor_sync(all, x, apart));
#else
  (void)larger;
#endif
  return x;
}

// The larger numbers of both halves of two words.
NPP_HD unsigned int larger_halves(unsigned int a, unsigned int b) {
#if defined(__CUDA_ARCH__)
  return __vmaxu2(a, b);
#else
  const unsigned int low = a & 0xffffU, other = b & 0xffffU, high = a >> 16, further = b >> 16;
  return (low > other ? low : other) | (high > further ? high : further) << 16;
#endif
}

// Returns the scale of a group; several threads load it, and one will store another.
NPP_HD Half load_scale(const Half* scales, int group) {
#if defined(__CUDA_ARCH__)
  return {__ldcg(reinterpret_cast<const unsigned short*>(element(scales, group)))};
#else
  return scales[group];
#endif
}

// Returns the number that the first element of a group is rounded with (random.h): 16 bits, below others.
template <class P>
NPP_HD unsigned int noise_of_group(const Constants<P>& k, int group) {
  const auto number = static_cast<unsigned int>(group);
  const auto words = k.philox_of_groups(k.first_counter + number / 4, k.keys);
  return (number % 4 == 0 ? words.a : number % 4 == 1 ? words.b : number % 4 == 2 ? words.c : words.d) >> 16;
}

// One element of a group after its step; `root` is that of the second moment times a factor.
template <class P>
struct Stepped {
  Weights<P, 1> weights;
  float m, root;
};

template <class P>
NPP_HD Stepped<P> stepped(const Pointers<P>& p, int i, const Constants<P>& k, float m_scale, float v_scale) {
  Stepped<P> x{load_weights<P, 1>(p, i), 0, 0};
  x.m = codes::first_of(float(static_cast<signed char>(load<1>(p.m, i).values[0].bits)), m_scale);
  if constexpr (P::kMayHaveSecond) x.root = codes::second_of(float(load<1>(p.v, i).values[0].bits), v_scale);
  Late<float> none{};
  const float w = numbers_of<1>(x.weights, 0).x[0], grad = widened(load<1>(p.grad, i).values[0]);
  const float next[1] = {roundable(update<P>(k.rule, k.c, k.x, w, grad, x.m, x.root, none))};
  Bits<1> bits{};
  if constexpr (P::kStochastic) bits = random_bits<1>(k, i, 0);
  put_weights(x.weights, 0, next, bits.weight);
  return x;
}

// Steps the `count` elements of a group from element `begin` of the chunk on, by kThreads neighbours. Each element is
// stepped twice, for the largest moments and then for the codes: there is no room for a group's moments.
template <class P, int kThreads>
NPP_HD void step_group(const Pointers<P>& p, int begin, int count, const Constants<P>& k) {
  const int group = begin / kGroup;
  const float m_scale = codes::scale_from(load_scale(p.m_scale, group).bits);
  const float v_scale = P::kMayHaveSecond ? codes::scale_from(load_scale(p.v_scale, group).bits) : 0;
  const auto larger = [](unsigned int a, unsigned int b) { return a > b ? a : b; };
  // The bits of numbers of at least 0 are in the order of the numbers, and those of NaN are above.
  unsigned int m_largest = 0, root_largest = 0;
  NPP_ROLLED
  for (int j = neighbour<kThreads>(); j < count; j += kThreads) {
    const auto x = stepped(p, begin + j, k, m_scale, v_scale);
    m_largest = larger(m_largest, bits_of<unsigned int>(x.m) & 0x7fffffffU);
    root_largest = larger(root_largest, bits_of<unsigned int>(x.root) & 0x7fffffffU);
  }
  m_largest = largest_of<kThreads>(m_largest, larger);
  const Half new_m_scale{codes::scale_of(bits_of<float>(m_largest))};
  const float new_scale = codes::scale_from(new_m_scale.bits);
  Half new_v_scale{};
  float factor = 0;
  unsigned int noise = 0;
  if constexpr (P::kMayHaveSecond) {
    root_largest = largest_of<kThreads>(root_largest, larger);
    new_v_scale.bits = codes::scale_of(bits_of<float>(root_largest) * k.to_root);
    factor = 255.0f * k.to_root / codes::scale_from(new_v_scale.bits);
    noise = noise_of_group(k, group);
  }
  NPP_ROLLED
  for (int j = neighbour<kThreads>(); j < count; j += kThreads) {
    const auto x = stepped(p, begin + j, k, m_scale, v_scale);
    store_weights(p, begin + j, x.weights);
    Pack<Code, 1> code{{{static_cast<unsigned char>(nearest_byte(codes::first_code(x.m, new_scale)))}}};
    store(p.m, begin + j, code);
    if constexpr (P::kMayHaveSecond) {
      const auto half = static_cast<unsigned short>(noise + static_cast<unsigned int>(j) * kNoiseStep);
      const float rounded = codes::second_code(x.root, factor, static_cast<float>(half) * 0x1p-16f);
      code.values[0].bits = static_cast<unsigned char>(static_cast<int>(rounded));
      store(p.v, begin + j, code);
    }
  }
  if (neighbour<kThreads>() != 0) return;
  p.m_scale[group] = new_m_scale;
  if constexpr (P::kMayHaveSecond) p.v_scale[group] = new_v_scale;
}

constexpr unsigned int kNotSure = 0xffffffff;  // in place of a part's scales: above those of all numbers

// Steps the part of a group from element i of the chunk on.
template <class P>
NPP_HD void step_part(const Pointers<P>& p, int i, const Constants<P>& k) {
  constexpr int N = kPart, L = kCodesAtOnce, kThreads = kGroup / N;
  const int group = i / kGroup;
  auto w = load_weights<P, N>(p, i);
  const auto grad = load<N>(p.grad, i);
  auto m = load<N>(p.m, i);
  Pack<Code, N> v{};
  float m_scale = widened(load_scale(p.m_scale, group)), v_unit = 0;
  if constexpr (P::kMayHaveSecond) {
    v = load<N>(p.v, i);
    v_unit = widened(load_scale(p.v_scale, group)) * static_cast<float>(1.0 / 255.0);
  }
  float ms[N], roots[N];
  float m_largest = 0, root_largest = 0;
  bool sure = true;
  NPP_UNROLL
  for (int j = 0; j < N; j += L) {
    Lanes<float, L> mj, vj{};
    const unsigned int m_word = word_at(m, j), v_word = word_at(v, j);
    NPP_UNROLL
    for (int e = 0; e < L; ++e) {
      mj.x[e] = k.quotients[byte_of(m_word, e)] * m_scale;
      if constexpr (P::kMayHaveSecond) vj.x[e] = second_of_byte(v_word, e, v_unit);
    }
    Late<Lanes<float, L>> none{};
    const auto next = update<P>(k.rule, k.c, k.x, numbers_of<L>(w, j), lanes_of<L, float>(grad, j), mj, vj, none);
    sure = are_sure<P>(next);
    if (P::kMayBeSign) sure &= is_sure(mj);
    if (P::kMayHaveSecond) sure &= are_usual_roots(vj);
    if (!sure) break;
    Bits<L> bits{};
    if constexpr (P::kStochastic) bits = random_bits<L>(k, i, j);
    put_weights(w, j, next.x, bits.weight);
    NPP_UNROLL
    for (int e = 0; e < L; ++e) {
      ms[j + e] = mj.x[e];
      roots[j + e] = vj.x[e];
      m_largest = larger_of(m_largest, nesterov_pp::absolute(mj.x[e]));
      if constexpr (P::kMayHaveSecond) root_largest = larger_of(root_largest, vj.x[e]);
    }
  }
  const unsigned int own = sure ? scales_of(m_largest, root_largest * k.to_root) : kNotSure;
  const unsigned int scales = largest_of<kThreads>(own, larger_halves);
  if (scales >= 0xffff0000U) {
    step_group<P, kThreads>(p, group * kGroup, kGroup, k);
    return;
  }
  const Half new_m_scale{static_cast<unsigned short>(scales & 0xffffU)};
  const Half new_v_scale{static_cast<unsigned short>(scales >> 16)};
  m_scale = widened(new_m_scale);
  float factor = 0;
  unsigned int noise = 0;
  if constexpr (P::kMayHaveSecond) {
    factor = code_quotient(255.0f * k.to_root, widened(new_v_scale));
    noise = noise_of_group(k, group) + static_cast<unsigned int>(i % kGroup) * kNoiseStep;
  }
  NPP_UNROLL
  for (int j = 0; j < N; j += L) {
    put_word(m, j, first_codes(ms + j, m_scale));
    if constexpr (P::kMayHaveSecond)
      put_word(v, j, second_codes(roots + j, factor, noise + static_cast<unsigned int>(j) * kNoiseStep));
  }
  store_weights(p, i, w);
  store(p.m, i, m);
  if constexpr (P::kMayHaveSecond) store(p.v, i, v);
  if (i % kGroup != 0) return;
  p.m_scale[group] = new_m_scale;
  if constexpr (P::kMayHaveSecond) p.v_scale[group] = new_v_scale;
}

// Steps one thread's part of a chunk of `count` elements.
template <class P>
NPP_HD void step_groups(const Pointers<P>& p, const Constants<P>& k, int count, bool aligned, int thread, int threads) {
  constexpr int N = kPart;
  const int whole = aligned ? count / kGroup * kGroup : 0;
  if (is_usual(k.c)) {
    const Constants<P> known = usual(k);
    for (int i = thread * N; i < whole; i += threads * N) step_part(p, i, known);
  } else {
    for (int i = thread * N; i < whole; i += threads * N) step_part(p, i, k);
  }
  for (int i = whole + thread / kWarp * kGroup; i < count; i += threads / kWarp * kGroup)
    step_group<P, kWarp>(p, i, count - i < kGroup ? count - i : kGroup, k);
}

}  // namespace nesterov_pp::device
