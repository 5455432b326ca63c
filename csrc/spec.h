// The list of all passes, from which the kernels of every backend are made.
#pragma once

#include "dtype.h"
#include "update.h"

namespace nesterov_pp {

// A pass, described by values.
struct Spec {
  Dtypes dtypes;
  Normaliser normaliser;
  bool corrects;    // whether the pass takes a correction or writes predicted weights
  bool stochastic;  // whether bfloat16 weights and moments are rounded stochastically
};

// The part of a rule that is known when a pass is compiled: the normaliser, or only that the pass corrects. A pass that
// corrects reads its normaliser and kind of correction at run time; they are the same for all elements. A pass for each
// combination would take fifteen times the code, and a pass waits for memory anyway.
enum class Form { kNone, kRms, kSign, kCorrected };

constexpr Form form_of(const Spec& spec) {
  if (spec.corrects) return Form::kCorrected;
  if (spec.normaliser == Normaliser::kSign) return Form::kSign;
  return spec.normaliser == Normaliser::kRms ? Form::kRms : Form::kNone;
}

// A pass, described by types: those of the weights it computes with, of the gradients and of the moments.
template <class Weight, class Grad, class Moment, Form form, bool stochastic>
struct Pass {
  using W = Weight;
  using G = Grad;
  using M = Moment;
  using T = typename Compute<W>::type;
  static constexpr bool kCorrects = form == Form::kCorrected;
  static constexpr bool kMayHaveSecond = form == Form::kRms || kCorrects;
  static constexpr bool kMayBeSign = form == Form::kSign || kCorrects;
  static constexpr bool kStochastic = stochastic;
  static constexpr bool kSplit = kSame<W, Split>;           // weights in 24 bits
  static constexpr bool kCodes = kSame<M, Code>;            // moments in eight bits
  static constexpr bool kCopies = !kSame<W, G> && !kSplit;  // master weights, which are copied to the parameters
  static constexpr bool kHalfMoments = kSame<M, Half>;

  static NPP_HD constexpr Normaliser normaliser(const Rule& rule) {
    return kCorrects             ? rule.normaliser
           : form == Form::kRms  ? Normaliser::kRms
           : form == Form::kSign ? Normaliser::kSign
                                 : Normaliser::kNone;
  }
  static NPP_HD constexpr bool has_second(const Rule& rule) { return normaliser(rule) == Normaliser::kRms; }
};

namespace spec {

template <class W, class G, class M>
struct Combination {};
template <class... C>
struct Combinations {};

// Gradients have the dtype of the weights, or a lower one if the weights are float32 master weights. Moments have the
// dtype of the weights or, except for float64, float32 or bfloat16.
using All = Combinations<Combination<double, double, double>, Combination<float, float, float>,
                         Combination<float, float, BFloat16>, Combination<float, BFloat16, float>,
                         Combination<float, BFloat16, BFloat16>, Combination<float, Half, float>,
                         Combination<float, Half, BFloat16>, Combination<BFloat16, BFloat16, float>,
                         Combination<BFloat16, BFloat16, BFloat16>, Combination<Half, Half, float>,
                         Combination<Half, Half, BFloat16>, Combination<Half, Half, Half>>;

// Passes of small formats: no correction, and moments in eight bits or weights in 24.
using Small = Combinations<Combination<float, float, Code>, Combination<float, BFloat16, Code>,
                           Combination<float, Half, Code>, Combination<BFloat16, BFloat16, Code>,
                           Combination<Half, Half, Code>, Combination<Split, BFloat16, float>,
                           Combination<Split, BFloat16, BFloat16>, Combination<Split, BFloat16, Code>>;

template <class W, class G, class M, Form form, class F>
bool by_rounding(const Spec& spec, F& f) {
  constexpr bool kRounds = kSame<W, BFloat16> || kSame<M, BFloat16>, kHalf = kSame<W, Half> || kSame<M, Half>;
  if (!spec.stochastic || (!kRounds && !kHalf)) return f(Pass<W, G, M, form, false>{}), true;
  if constexpr (kRounds && !kHalf) return f(Pass<W, G, M, form, true>{}), true;
  return false;  // float16 is not rounded stochastically
}

template <class W, class G, class M, class F>
bool visit(Combination<W, G, M>, const Spec& spec, F& f) {
  const auto [weight, grad, moment] = spec.dtypes;
  if (weight != kDtype<W> || grad != kDtype<G> || moment != kDtype<M>) return false;
  switch (form_of(spec)) {
    case Form::kRms:
      return by_rounding<W, G, M, Form::kRms>(spec, f);
    case Form::kSign:
      return by_rounding<W, G, M, Form::kSign>(spec, f);
    case Form::kCorrected:
      if constexpr (!kSame<W, Split> && !kSame<M, Code>) return by_rounding<W, G, M, Form::kCorrected>(spec, f);
      return false;
    default:
      return by_rounding<W, G, M, Form::kNone>(spec, f);
  }
}

template <class... C, class F>
bool visit(Combinations<C...>, const Spec& spec, F& f) {
  return (visit(C{}, spec, f) || ...);
}

}  // namespace spec

// Calls f with the Pass of a spec, and returns whether there is one.
template <class F>
bool visit(const Spec& spec, F f) {
  return spec::visit(spec::All{}, spec, f);
}

// Like `visit`, for the passes of small formats.
template <class F>
bool visit_small(const Spec& spec, F f) {
  return spec::visit(spec::Small{}, spec, f);
}

// Returns whether a pass has moments in eight bits or weights in 24.
constexpr bool is_small(const Dtypes& dtypes) {
  return dtypes.weight == Dtype::kSplit || dtypes.moment == Dtype::kCode;
}

inline bool supported(const Spec& spec) {
  const auto nothing = [](auto) {};
  return visit(spec, nothing) || visit_small(spec, nothing);
}

}  // namespace nesterov_pp
