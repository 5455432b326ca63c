// The arithmetic of one optimizer step, for one element. Every C++ and CUDA pass calls this and nothing else.
//
// [note: one update for the whole family]
//   g = grad_scale * grad + l2 * w            clipping, unscaling, maximize and L2 decay are one scalar each
//   m' = m + (1 - beta1) (g - m)              or g - beta1 (g - m)
//   v' = b v + (r v + (1 - beta2) g g)        b + r = beta2; rules normalised by rms only
//   w' = w - (decay * w + direction)
// The direction is what the rule's normaliser makes of the momentum:
//   none:  c_grad * g + c_momentum * m'
//   rms:   the same over D = sqrt(v' * inv_bias2) + eps
//   sign:  sign(c_grad * g + c_momentum * m) * inv_bias2; m is the one before the step, and inv_bias2 holds its size
// NAdam, AdamW, NAG and Lion differ in normaliser and scalars alone; nesterov_pp/optim/coefficients.py computes these
// in double.
// `decay` is lr * weight_decay and not its complement: 1 - 2e-4 rounded to float32 is off by the same 1e-8 on every
// step, which in a thousand steps is the largest error of all.
//
// [note: what is not finite]
// As in torch, a weight that is infinite stays so, and a second moment that overflows stops its weight and no more.
//   m: as torch's lerp, m + c (g - m) for c below 0.5 and g - (1 - c) (g - m) from there on: for c = 1 the first would
//      lose a small g beside a large m.
//   v: v + c (g g - v) is inf - inf once v has overflowed, and loses g g where c is near 1; b v + c g g loses neither,
//      but beta2 rounded to float32 is off by as much as 3e-8 on every step. Hence two parts, b a little below beta2
//      and r the rest: both above 0, so that nothing is inf - inf. g is multiplied by c first, which does not overflow
//      early.
//   l2, decay: 0 times an infinite w is NaN, so a 0 is left out. An infinite w does not decay.
// Stored in float16, v overflows at 65,520; it then counts as infinite in the same step.
#pragma once

#if defined(__CUDACC__)
#define NPP_HD __host__ __device__ __forceinline__
#else
#define NPP_HD inline __attribute__((always_inline))
#endif

namespace nesterov_pp {

// A running mean, m + c (x - m).
template <class T>
struct Mean {
  T weight;  // c if it is below 0.5, else 1 - c
  bool is_small;

  static NPP_HD Mean from(double complement) {
    const bool is_small = T(complement) < T(0.5);
    return {is_small ? T(complement) : T(1 - complement), is_small};
  }
  template <class V>
  NPP_HD V of(const V& m, const V& x) const {
    const V step = weight * (x - m);
    if (!is_small) return x - step;
    return m + step;
  }
};

// A running mean of squares, (1 - c) v + c x x.
template <class T>
struct SquareMean {
  T kept;  // slightly less than 1 - c
  T rest;  // 1 - c minus `kept`
  T complement;

  static NPP_HD SquareMean from(double complement) {
    const double all = 1 - complement;
    const T kept = T(all * (1 - 0x1p-23));
    return {kept, T(all - double(kept)), T(complement)};
  }
  template <class V>
  NPP_HD V of(const V& v, const V& x) const {
    return kept * v + (rest * v + complement * x * x);
  }
};

// The coefficients below, converted to the dtype of the computation.
template <class T>
struct Scalars {
  T grad_scale;
  T l2;
  T decay;
  T c_grad;
  T c_momentum;
  T inv_bias2;
  T eps;
  Mean<T> first;
  SquareMean<T> second;
  bool has_l2;
  bool has_decay;
};

// The scalars of the update, in the order of nesterov_pp.kernels.Coefficients.
template <class T>
struct Coefficients {
  T grad_scale;
  T l2;
  T beta1_complement;
  T beta2_complement;
  T decay;
  T c_grad;
  T c_momentum;
  T inv_bias2;
  T eps;

  static NPP_HD Coefficients from(const double* r) { return {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]}; }

  template <class U>
  NPP_HD Scalars<U> as() const {
    return {U(grad_scale),
            U(l2),
            U(decay),
            U(c_grad),
            U(c_momentum),
            U(inv_bias2),
            U(eps),
            Mean<U>::from(beta1_complement),
            SquareMean<U>::from(beta2_complement),
            U(l2) != 0,
            U(decay) != 0};
  }
};

constexpr int kCoefficients = 9;
static_assert(sizeof(Coefficients<double>) == kCoefficients * sizeof(double), "plain row of scalars");

#if defined(__CUDACC__)
NPP_HD float square_root(float x) { return sqrtf(x); }
NPP_HD double square_root(double x) { return sqrt(x); }
#else
NPP_HD float square_root(float x) { return __builtin_sqrtf(x); }
NPP_HD double square_root(double x) { return __builtin_sqrt(x); }
#endif

// Returns the root of every lane of a vector. The compiler turns the loop into one instruction; GCC has no square root
// of vectors.
template <class V>
NPP_HD V square_root(const V& x) {
  V root;
  for (unsigned k = 0; k < sizeof(V) / sizeof(x[0]); ++k) root[k] = square_root(x[k]);
  return root;
}

#if defined(__CUDACC__)
NPP_HD float absolute(float x) { return fabsf(x); }
NPP_HD double absolute(double x) { return fabs(x); }
#else
NPP_HD float absolute(float x) { return __builtin_fabsf(x); }
NPP_HD double absolute(double x) { return __builtin_fabs(x); }
#endif

template <class V>
NPP_HD V absolute(const V& x) {
  V result;
  for (unsigned k = 0; k < sizeof(V) / sizeof(x[0]); ++k) result[k] = absolute(x[k]);
  return result;
}

// Selects `yes` or `no`, lane by lane. `Mask` is the type of a comparison of two V.
template <class Mask, class V>
NPP_HD V choose(const Mask& mask, const V& yes, const V& no) {
  return mask ? yes : no;
}

template <class T, class V>
NPP_HD V gradient_of(const Scalars<T>& c, const V& w, const V& grad) {
  V g = c.grad_scale * grad;
  if (c.has_l2) g = g + c.l2 * w;
  return g;
}

template <class T, class V>
NPP_HD V decay_of(const Scalars<T>& c, const V& w) {
  return choose(absolute(w) < T(__builtin_inff()), c.decay * w, V{});
}

// Returns v with infinity in place of values that overflow float16, which is how the next step reads them back.
template <class V>
NPP_HD V overflowed(const V& v) {
  return choose(v >= 65520.0f, V{} + __builtin_inff(), v);
}

// The normalisation of the momentum, in the order of nesterov_pp.kernels.Normaliser.
enum class Normaliser : int { kNone, kRms, kSign };

// Returns the sign of x; NaN stays NaN, so that errors remain visible.
template <class T, class V>
NPP_HD V sign_of(const V& x) {
  return choose(x > T(0), V{} + T(1), choose(x < T(0), V{} + T(-1), x));
}

// [note: corrections of late gradients]
// A correction is an optional addition to the update above. Depending on its kind, it uses the weights that the
// gradient was computed with, a running mean in addition to the moments, or both. nesterov_pp/kernels/scalars.py has
// the equations, and the kinds and scalars in the same order.
enum class CorrectionKind : int { kNone, kDelayCompensation, kAdaptiveDelayCompensation, kGap, kDiscrepancy };

NPP_HD constexpr bool has_mean(CorrectionKind kind) {
  return kind == CorrectionKind::kAdaptiveDelayCompensation || kind == CorrectionKind::kGap ||
         kind == CorrectionKind::kDiscrepancy;
}
NPP_HD constexpr bool compares(CorrectionKind kind) {
  return kind != CorrectionKind::kNone && kind != CorrectionKind::kDiscrepancy;
}

// The options of a step, the same for all its elements.
struct Rule {
  Normaliser normaliser = Normaliser::kRms;
  CorrectionKind kind = CorrectionKind::kNone;
  bool predicts = false;  // whether there is a shadow, so that weights are predicted
};

template <class T>
struct CorrectionScalars {
  T strength;
  T inv_bias;
  T eps;
  T ahead_last;
  T ahead_momentum;
  T ahead_mean;
  Mean<T> mean;
  SquareMean<T> square_mean;
};

// The scalars of a correction, in the order of nesterov_pp.kernels.Correction.
template <class T>
struct Correction {
  T strength;
  T mean_complement;
  T inv_bias;
  T eps;
  T ahead_last;
  T ahead_momentum;
  T ahead_mean;

  static NPP_HD Correction from(const double* r) { return {r[0], r[1], r[2], r[3], r[4], r[5], r[6]}; }

  template <class U>
  NPP_HD CorrectionScalars<U> as() const {
    return {U(strength),
            U(inv_bias),
            U(eps),
            U(ahead_last),
            U(ahead_momentum),
            U(ahead_mean),
            Mean<U>::from(mean_complement),
            SquareMean<U>::from(mean_complement)};
  }
};

constexpr int kCorrections = 7;
static_assert(sizeof(Correction<double>) == kCorrections * sizeof(double), "plain row of scalars");

// Returns a - b, or 0 (not NaN) if both are infinite with the same sign.
template <class V>
NPP_HD V difference(const V& a, const V& b) {
  return choose(a == b, V{}, a - b);
}

// The inputs and outputs of a correction for one element.
template <class V>
struct Late {
  V apart;  // the weight minus the one that the gradient was computed with
  V mean;   // updated in place
  V ahead;  // receives the predicted weight
};

// Corrects the gradient and the decay, before the moments are updated.
template <class T, class V>
NPP_HD void correct(CorrectionKind kind, const CorrectionScalars<T>& x, Late<V>& late, V& g, V& decay) {
  // With the factors in this order, a large g does not overflow if the weight has not changed (apart is 0).
  if (kind == CorrectionKind::kDelayCompensation) g = g + x.strength * g * (g * late.apart);
  if (kind == CorrectionKind::kAdaptiveDelayCompensation) {
    late.mean = x.square_mean.of(late.mean, g);
    g = g + x.strength / square_root(late.mean + x.eps) * g * (g * late.apart);
  }
  if (kind == CorrectionKind::kGap) {
    const V gap = T(1) + absolute(late.apart) / (square_root(late.mean * x.inv_bias) + x.eps);
    g = g / gap;
    decay = decay / gap;
  }
}

// Predicts the weight, after the update; first updates the running mean if the prediction uses one.
template <class T, class V>
NPP_HD void predict(CorrectionKind kind, const CorrectionScalars<T>& x, const V& w, const V& next, const V& momentum,
                    Late<V>& late) {
  const V last = difference(next, w);
  V further = x.ahead_last * last - x.ahead_momentum * momentum;
  if (kind == CorrectionKind::kDiscrepancy) {
    late.mean = x.mean.of(late.mean, last);
    further = further + x.ahead_mean * late.mean;  // not for other kinds: 0 times an infinite mean is NaN
  }
  late.ahead = next + further;
}

// Divides a momentum, which is rarely 0. This is a separate function because a device has a faster way for it.
template <class V>
NPP_HD V quotient(const V& a, const V& b) {
  return a / b;
}
#if defined(__CUDACC__)
// A momentum is 0 where there has been no gradient yet; without this case, the division would be slow there.
NPP_HD float quotient(float a, float b) { return a == 0 && b > 0 ? a : a / b; }
#endif

// Returns the new weight; m, v and `late` are updated in place. `V` is the scalar `T` or a vector of `T`, and `P` is a
// Pass (spec.h).
template <class P, class T, class V>
NPP_HD V update(const Rule& rule, const Scalars<T>& c, const CorrectionScalars<T>& x, const V& w, const V& grad, V& m,
                V& v, Late<V>& late) {
  const Normaliser normaliser = P::normaliser(rule);
  V g = gradient_of(c, w, grad), decay{};
  if (c.has_decay) decay = decay_of(c, w);
  if constexpr (P::kCorrects) correct(rule.kind, x, late, g, decay);
  const V before = m;
  m = c.first.of(m, g);
  V momentum = m;
  if (normaliser == Normaliser::kSign) momentum = before;  // copied: a choice of references would need addresses
  V direction = c.c_grad * g + c.c_momentum * momentum;
  if (normaliser == Normaliser::kRms) {
    v = c.second.of(v, g);
    if constexpr (P::kHalfMoments) v = overflowed(v);
    const V root = square_root(v * c.inv_bias2);
    const V denominator = root + c.eps;
    if constexpr (P::kCodes) v = root;  // codes are of the root (codes.h)
    direction = quotient(direction, denominator);
    if (P::kCorrects && rule.predicts) momentum = quotient(momentum, denominator);
  }
  if (normaliser == Normaliser::kSign) {
    direction = c.inv_bias2 * sign_of<T>(direction);
    momentum = sign_of<T>(m);
  }
  const V next = w - (c.has_decay ? decay + direction : direction);
  if constexpr (P::kCorrects) {
    if (rule.kind == CorrectionKind::kGap) late.mean = x.square_mean.of(late.mean, direction);
    if (rule.predicts) predict(rule.kind, x, w, next, momentum, late);
  }
  return next;
}

}  // namespace nesterov_pp
