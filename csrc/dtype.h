// The types that tensors are stored in.
#pragma once

namespace nesterov_pp {

struct BFloat16 {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};

// A moment in eight bits, and the bfloat16 part of a weight in 24 (codes.h).
struct Code {
  unsigned char bits;
};
struct Split {
  unsigned short bits;
};

enum class Dtype : int { kFloat, kDouble, kBFloat16, kHalf, kCode, kSplit };

constexpr int size_of(Dtype dtype) {
  if (dtype == Dtype::kCode) return 1;
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// The dtypes of the weights that a pass computes with, of the gradients (and of the copies of master weights), and of
// the moments.
struct Dtypes {
  Dtype weight;
  Dtype grad;
  Dtype moment;
};

// The scalar type in which elements of type S are computed.
template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

// The Dtype of a stored type.
template <class S>
constexpr Dtype kDtype = Dtype::kFloat;
template <>
constexpr Dtype kDtype<double> = Dtype::kDouble;
template <>
constexpr Dtype kDtype<BFloat16> = Dtype::kBFloat16;
template <>
constexpr Dtype kDtype<Half> = Dtype::kHalf;
template <>
constexpr Dtype kDtype<Code> = Dtype::kCode;
template <>
constexpr Dtype kDtype<Split> = Dtype::kSplit;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

}  // namespace nesterov_pp
