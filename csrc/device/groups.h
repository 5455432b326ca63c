// Steps with moments in eight bits, which share a scale in groups of 32 elements.
//
// [note: groups and threads]
// Neighbouring threads of a warp step the parts of a group, and exchange the largest moments that they found. A group
// with a part that is not sure (lanes.h) is then stepped by the whole warp, one element by each thread, with all that
// codes.h says of what is not finite or 0; so a part stores nothing before the exchange. The groups at the end of a
// chunk and those of unaligned tensors are stepped in this second way from the start. A warp stays together, so that
// its threads can exchange numbers: those that have no part step another thread's, and store nothing. On a host, where
// threads run one after the other, a warp is one thread, and its part a whole group.
#pragma once

#include "weights.h"

namespace nesterov_pp::device {

// The number of elements of a part, and of threads in a warp.
#if defined(__CUDA_ARCH__)
constexpr int kPart = 8, kWarp = 32;
#else
constexpr int kPart = kGroup, kWarp = 1;
#endif
constexpr int kSharing = kGroup / kPart;  // threads that share a group

// Returns the number of the calling thread in its warp.
NPP_HD int lane() {
#if defined(__CUDA_ARCH__)
  return static_cast<int>(threadIdx.x % kWarp);
#else
  return 0;
#endif
}

// Returns the result of `larger` over the values of a warp's threads, `kThreads` neighbours at a time.
template <int kThreads, class F>
NPP_HD unsigned int largest_of(unsigned int x, F larger) {
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int apart = kThreads / 2; apart > 0; apart /= 2) x = larger(x, __shfl_xor_sync(0xffffffffU, x, apart));
#else
  (void)larger;
#endif
  return x;
}

// Returns a word whose bits say for which threads of a warp x is true.
NPP_HD unsigned int lanes_where(bool x) {
#if defined(__CUDA_ARCH__)
  return __ballot_sync(0xffffffffU, x);
#else
  return x ? 1 : 0;
#endif
}

// Returns the number of the lowest bit that is set.
NPP_HD int lowest_bit(unsigned int word) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
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

// Returns the random words of four groups, of which one has this number in the chunk (random.h).
template <class P>
NPP_HD Words<unsigned int> words_of_groups(const Constants<P>& k, int group) {
  return k.philox_of_groups(k.first_counter + static_cast<unsigned int>(group) / 4, k.keys);
}

// Returns the number that the first element of a group is rounded with: 16 bits, below others.
template <class P>
NPP_HD unsigned int noise_of_group(const Constants<P>& k, int group) {
  const auto words = words_of_groups(k, group);
  return (group % 4 == 0 ? words.a : group % 4 == 1 ? words.b : group % 4 == 2 ? words.c : words.d) >> 16;
}

// The random numbers of the groups that a warp steps in parts of a chunk, drawn at once: every thread has two of them.
// A warp takes as many turns of kPart * kWarp elements as there are warps in a block; `threads` of a block are 256.
template <class P>
struct GroupNoise {
  unsigned int both;  // that of an even group in the lower half
  unsigned int
      place;  // where the next number for the calling thread is: 5 bits for the lane, then 16 for the upper half

  static constexpr int kPerTurn = kPart * kWarp / (4 * kGroup);  // counters

  static NPP_HD GroupNoise from(const Constants<P>& k, int thread, int threads) {
#if defined(__CUDA_ARCH__)
    const int counter = lane() % 16, turn = counter / kPerTurn;
    const int element = turn * threads * kPart + thread / kWarp * (kWarp * kPart) + counter % kPerTurn * (4 * kGroup);
    const auto words = words_of_groups(k, element / kGroup);
    const bool lower = lane() < 16;
    const int mine = lane() / kSharing;
    return {((lower ? words.a : words.c) >> 16) | ((lower ? words.b : words.d) & 0xffff0000U),
            static_cast<unsigned int>(mine % 4 / 2 * 16 + mine / 4 + mine % 2 * (16 << 5))};
#else
    (void)k, (void)thread, (void)threads;
    return {};
#endif
  }

  // Returns the noise of the first element of a group (noise_of_group), the calling thread's in the next turn.
  NPP_HD unsigned int next(const Constants<P>& k, int group) {
#if defined(__CUDA_ARCH__)
    (void)k, (void)group;
    const unsigned int word = __shfl_sync(0xffffffffU, both, static_cast<int>(place & 31)) >> (place >> 5);
    place += kPerTurn;
    return word & 0xffffU;
#else
    return noise_of_group(k, group);
#endif
  }
};

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

template <class P>
NPP_HD void store_scales(const Pointers<P>& p, int group, Half m_scale, Half v_scale) {
  store(p.m_scale, group, Pack<Half, 1>{{m_scale}});
  if constexpr (P::kMayHaveSecond) store(p.v_scale, group, Pack<Half, 1>{{v_scale}});
}

// Steps the `count` elements of a group from element `begin` of the chunk on, by a warp. Each element is stepped
// twice, for the largest moments and then for the codes: there is no room for a group's moments.
template <class P>
NPP_HD void step_group(const Pointers<P>& p, int begin, int count, const Constants<P>& k) {
  const int group = begin / kGroup;
  const float m_scale = codes::scale_from(load_scale(p.m_scale, group).bits);
  const float v_scale = P::kMayHaveSecond ? codes::scale_from(load_scale(p.v_scale, group).bits) : 0;
  const auto larger = [](unsigned int a, unsigned int b) { return a > b ? a : b; };
  // The bits of numbers of at least 0 are in the order of the numbers, and those of NaN are above.
  unsigned int m_largest = 0, root_largest = 0;
  NPP_ROLLED
  for (int j = lane(); j < count; j += kWarp) {
    const auto x = stepped(p, begin + j, k, m_scale, v_scale);
    m_largest = larger(m_largest, bits_of<unsigned int>(x.m) & 0x7fffffffU);
    root_largest = larger(root_largest, bits_of<unsigned int>(x.root) & 0x7fffffffU);
  }
  m_largest = largest_of<kWarp>(m_largest, larger);
  const Half new_m_scale{codes::scale_of(bits_of<float>(m_largest))};
  const float new_scale = codes::scale_from(new_m_scale.bits);
  Half new_v_scale{};
  float factor = 0;
  unsigned int noise = 0;
  if constexpr (P::kMayHaveSecond) {
    root_largest = largest_of<kWarp>(root_largest, larger);
    new_v_scale.bits = codes::scale_of(bits_of<float>(root_largest) * k.to_root);
    factor = 255.0f * k.to_root / codes::scale_from(new_v_scale.bits);
    noise = noise_of_group(k, group);
  }
  NPP_ROLLED
  for (int j = lane(); j < count; j += kWarp) {
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
  if (lane() != 0) return;
  store_scales(p, group, new_m_scale, new_v_scale);
}

constexpr unsigned int kNotSure = 0xffffffff;  // in place of a part's scales: above those of all numbers

// Steps the part of a group from element i of the chunk on, unless the group is not sure; returns whether it is.
// `noise` is that of the group's first element. A thread that is not `active` only takes part in the exchange.
template <class P>
NPP_HD bool step_part(const Pointers<P>& p, int i, bool active, unsigned int noise, const Constants<P>& k) {
  constexpr int N = kPart, L = kCodesAtOnce;
  const int group = i / kGroup;
  auto w = load_weights<P, N>(p, i);
  const auto grad = load<N>(p.grad, i);
  auto m = load_codes<N>(p.m, i);
  CodeWords<N> v{};
  float m_scale = widened(load_scale(p.m_scale, group)), v_unit = 0;
  if constexpr (P::kMayHaveSecond) {
    v = load_codes<N>(p.v, i);
    v_unit = widened(load_scale(p.v_scale, group)) * static_cast<float>(1.0 / 255.0);
  }
  float ms[N], roots[N];
  float m_largest = 0, root_largest = 0;
  bool sure = true;
  NPP_UNROLL
  for (int j = 0; j < N; j += L) {
    Lanes<float, L> mj, vj{};
    const unsigned int m_word = m.values[j / L], v_word = v.values[j / L];
    NPP_UNROLL
    for (int e = 0; e < L; ++e) {
      mj.x[e] = k.quotients[byte_of(m_word, e)] * m_scale;
      if constexpr (P::kMayHaveSecond) vj.x[e] = second_of_byte(v_word, e, v_unit);
    }
    Late<Lanes<float, L>> none{};
    const auto next = update<P>(k.rule, k.c, k.x, numbers_of<L>(w, j), lanes_of<L, float>(grad, j), mj, vj, none);
    sure &= are_sure<P>(next);
    if (P::kMayBeSign) sure &= is_sure(mj);
    if (P::kMayHaveSecond) sure &= are_usual_roots(vj);
    Bits<L> bits{};
    if constexpr (P::kStochastic) bits = random_bits<L>(k, i, j);
    put_weights(w, j, next.x, bits.weight);
    NPP_UNROLL
    for (int e = 0; e < L; ++e) {
      ms[j + e] = mj.x[e];
      roots[j + e] = vj.x[e];
      m_largest = larger_of(m_largest, nesterov_pp::absolute(mj.x[e]));
    }
    if constexpr (P::kMayHaveSecond) root_largest = largest_of(root_largest, vj);
  }
  const unsigned int own = sure ? scales_of(m_largest, root_largest * k.to_root) : kNotSure;
  const unsigned int scales = largest_of<kSharing>(own, larger_halves);
  if (!active) return true;
  if (scales >= 0xffff0000U) return false;
  const Half new_m_scale{static_cast<unsigned short>(scales & 0xffffU)};
  const Half new_v_scale{static_cast<unsigned short>(scales >> 16)};
  m_scale = widened(new_m_scale);
  float factor = 0;
  if constexpr (P::kMayHaveSecond) {
    factor = code_quotient(255.0f * k.to_root, widened(new_v_scale));
    noise += static_cast<unsigned int>(i % kGroup) * kNoiseStep;
  }
  NPP_UNROLL
  for (int j = 0; j < N; j += L) {
    m.values[j / L] = first_codes(ms + j, m_scale);
    if constexpr (P::kMayHaveSecond)
      v.values[j / L] = second_codes(roots + j, factor, noise + static_cast<unsigned int>(j) * kNoiseStep);
  }
  store_weights(p, i, w);
  store_codes(p.m, i, m);
  if constexpr (P::kMayHaveSecond) store_codes(p.v, i, v);
  if (i % kGroup == 0) store_scales(p, group, new_m_scale, new_v_scale);
  return true;
}

// Steps a thread's parts of the `whole` elements of a chunk, a multiple of a group.
template <class P>
NPP_HD void step_parts(const Pointers<P>& p, const Constants<P>& k, int whole, int thread, int threads) {
  GroupNoise<P> noise{};
  if constexpr (P::kMayHaveSecond) noise = GroupNoise<P>::from(k, thread, threads);
  for (int first = thread / kWarp * (kWarp * kPart); first < whole; first += threads * kPart) {
    const int own = first + lane() * kPart, last = whole - kPart, i = own < last ? own : last;
    unsigned int noise_of_first = 0;
    if constexpr (P::kMayHaveSecond) noise_of_first = noise.next(k, i / kGroup);
    unsigned int left = lanes_where(!step_part(p, i, own < whole, noise_of_first, k));
    while (left != 0) {
      const int part = lowest_bit(left);
      step_group(p, first + part * kPart, kGroup, k);
      left &= ~(((1U << kSharing) - 1) << part);
    }
  }
}

// Steps one thread's part of a chunk of `count` elements.
template <class P>
NPP_HD void step_groups(const Pointers<P>& p, const Constants<P>& k, int count, bool aligned, int thread, int threads) {
  const int whole = aligned ? count / kGroup * kGroup : 0;
  if (is_usual(k.c))
    step_parts(p, usual(k), whole, thread, threads);
  else
    step_parts(p, k, whole, thread, threads);
  for (int i = whole + thread / kWarp * kGroup; i < count; i += threads / kWarp * kGroup)
    step_group(p, i, count - i < kGroup ? count - i : kGroup, k);
}

}  // namespace nesterov_pp::device
