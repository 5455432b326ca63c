// Wide vectors are passed between inlined functions only, so their calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "differences.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "codec.h"
#include "driver.h"

namespace nesterov_pp::cpu {
namespace {

// With fewer elements than this, waking the other threads costs more than it saves.
constexpr int64_t kParallelElements = 131072;
constexpr float kLargestCode = 127.0f;

NPP_INLINE float number_of(uint16_t bfloat16) { return bits_of<float>(static_cast<uint32_t>(bfloat16) << 16); }

NPP_INLINE uint16_t nearest_bfloat16(float x) {
  const auto u = bits_of<uint32_t>(x);
  return static_cast<uint16_t>(x == x ? (u + 0x7fffU + ((u >> 16) & 1U)) >> 16 : 0x7fc0U);
}

// The elements of a group, of which the first `count` exist and the others are zeros.
template <class S>
struct Padded {
  S elements[kGroup];
  NPP_INLINE_METHOD Padded(const S* from, int64_t count) {
    __builtin_memset(elements, 0, sizeof(elements));
    __builtin_memcpy(elements, from, static_cast<size_t>(count) * sizeof(S));
  }
};

template <class S, int N>
NPP_INLINE void encode_group(const S* version, const S* next, int8_t* codes, uint16_t* scale) {
  using F = typename Lanes<N>::F;
  using U = typename Lanes<N>::U;
  constexpr int kParts = kGroup / N;
  F d[kParts];
  U most{};
  for (int k = 0; k < kParts; ++k) {
    d[k] = load<S, N>(next + k * N) - load<S, N>(version + k * N);
    const U magnitude = bits_of<U>(d[k]) & 0x7fffffffU;  // ordered like the numbers, with NaN above all
    most = choose_lanes(bits_of<U>(magnitude > most), magnitude, most);
  }
  uint32_t largest = 0;
  for (int k = 0; k < N; ++k) largest = std::max(largest, static_cast<uint32_t>(most[k]));
  *scale = nearest_bfloat16(bits_of<float>(largest) / kLargestCode);
  const float s = number_of(*scale);
  const bool finite = s > 0.0f && s < __builtin_inff();
  for (int k = 0; k < kParts; ++k) {
    F x = finite ? d[k] / s : F{};
    x = x > kLargestCode ? F{} + kLargestCode : x;
    x = x < -kLargestCode ? F{} - kLargestCode : x;
    store_nearest<N>(codes + k * N, x);
  }
}

template <class S, int N>
NPP_INLINE void decode_group(const S* newest, const std::vector<CodeRow>& rows, int64_t place, S* out) {
  using F = typename Lanes<N>::F;
  constexpr int kParts = kGroup / N;
  F total[kParts] = {};
  for (const CodeRow& row : rows) {
    const float s = number_of(row.scales[place / kGroup]);
    for (int k = 0; k < kParts; ++k) total[k] += s * load_signed<N>(row.codes + place + k * N);
  }
  for (int k = 0; k < kParts; ++k) {
    const auto result = Element<S, N>::narrow(load<S, N>(newest + k * N) - total[k]);
    __builtin_memcpy(out + k * N, &result, sizeof(result));
  }
}

// The work on elements `begin` to `end` of one tensor; `begin` is a multiple of kGroup.
template <class S, int N>
NPP_INLINE void encode_run(const Differing& t, const CodeRow& row, int64_t begin, int64_t end) {
  const auto *version = static_cast<const S*>(t.a), *next = static_cast<const S*>(t.b);
  for (int64_t i = begin; i < end; i += kGroup) {
    int8_t* codes = row.codes + t.first + i;
    uint16_t* scale = row.scales + (t.first + i) / kGroup;
    if (i + kGroup <= t.count) {
      encode_group<S, N>(version + i, next + i, codes, scale);
    } else {
      const Padded<S> a(version + i, t.count - i), b(next + i, t.count - i);
      encode_group<S, N>(a.elements, b.elements, codes, scale);
    }
  }
}

template <class S, int N>
NPP_INLINE void decode_run(const Differing& t, const std::vector<CodeRow>& rows, int64_t begin, int64_t end) {
  const auto* newest = static_cast<const S*>(t.a);
  auto* out = static_cast<S*>(t.out);
  for (int64_t i = begin; i < end; i += kGroup) {
    if (i + kGroup <= t.count) {
      decode_group<S, N>(newest + i, rows, t.first + i, out + i);
    } else {
      const Padded<S> a(newest + i, t.count - i);
      S result[kGroup];
      decode_group<S, N>(a.elements, rows, t.first + i, result);
      __builtin_memcpy(out + i, result, static_cast<size_t>(t.count - i) * sizeof(S));
    }
  }
}

using Encode = void (*)(const Differing&, const CodeRow&, int64_t begin, int64_t end);
using Decode = void (*)(const Differing&, const std::vector<CodeRow>&, int64_t begin, int64_t end);

#define NPP_DIFFERENCES(suffix, target, lanes)                                                                    \
  template <class S>                                                                                              \
  target void encode_##suffix(const Differing& t, const CodeRow& row, int64_t begin, int64_t end) {               \
    encode_run<S, lanes>(t, row, begin, end);                                                                     \
  }                                                                                                               \
  template <class S>                                                                                              \
  target void decode_##suffix(const Differing& t, const std::vector<CodeRow>& rows, int64_t begin, int64_t end) { \
    decode_run<S, lanes>(t, rows, begin, end);                                                                    \
  }
NPP_DIFFERENCES(baseline, , 4)
#if NPP_X86
NPP_DIFFERENCES(v3, NPP_TARGET_V3, 8)
NPP_DIFFERENCES(v4, NPP_TARGET_V4, 16)
#endif

template <class S>
Encode encode_of(Isa isa) {
#if NPP_X86
  if (isa == Isa::kV4) return encode_v4<S>;
  if (isa == Isa::kV3) return encode_v3<S>;
#endif
  (void)isa;
  return encode_baseline<S>;
}

template <class S>
Decode decode_of(Isa isa) {
#if NPP_X86
  if (isa == Isa::kV4) return decode_v4<S>;
  if (isa == Isa::kV3) return decode_v3<S>;
#endif
  (void)isa;
  return decode_baseline<S>;
}

// Calls `work(tensor, begin, end)` for parts of all tensors, on several threads if there are many elements.
template <class Work>
void for_parts(const std::vector<Differing>& tensors, const Work& work) {
  std::vector<int64_t> first_unit(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i)
    first_unit[i + 1] = first_unit[i] + (tensors[i].count + kAlign - 1) / kAlign;
  at::parallel_for(0, first_unit.back(), kParallelElements / kAlign, [&](int64_t begin, int64_t end) {
    auto it = std::upper_bound(first_unit.begin(), first_unit.end(), begin) - 1;
    for (auto i = static_cast<size_t>(it - first_unit.begin()); i < tensors.size() && first_unit[i] < end; ++i) {
      const int64_t from = std::max<int64_t>(0, begin - first_unit[i]) * kAlign;
      const int64_t to = std::min<int64_t>(tensors[i].count, (end - first_unit[i]) * kAlign);
      if (from < to) work(tensors[i], from, to);
    }
  });
}

}  // namespace

void encode(const std::vector<Differing>& tensors, const CodeRow& row) {
  const Isa isa = selected_isa();
  for_parts(tensors, [&](const Differing& t, int64_t begin, int64_t end) {
    const Encode run = t.dtype == Dtype::kBFloat16 ? encode_of<BFloat16>(isa)
                       : t.dtype == Dtype::kHalf   ? encode_of<Half>(isa)
                                                   : encode_of<float>(isa);
    run(t, row, begin, end);
  });
}

void decode(const std::vector<Differing>& tensors, const std::vector<CodeRow>& rows) {
  const Isa isa = selected_isa();
  for_parts(tensors, [&](const Differing& t, int64_t begin, int64_t end) {
    const Decode run = t.dtype == Dtype::kBFloat16 ? decode_of<BFloat16>(isa)
                       : t.dtype == Dtype::kHalf   ? decode_of<Half>(isa)
                                                   : decode_of<float>(isa);
    run(t, rows, begin, end);
  });
}

}  // namespace nesterov_pp::cpu
