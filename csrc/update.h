// The arithmetic of one optimizer step, for one element. Every C++ and CUDA driver calls this and nothing else.
//
// [note: one update for the whole family]
//   g = grad_scale * grad + l2 * w            clipping, unscaling, maximize and L2 decay are one scalar each
//   m = m + (1 - beta1) (g - m)
//   v = v + (1 - beta2) (g g - v)             adaptive rules only
//   D = sqrt(v * inv_bias2) + eps             1 for the others
//   w' = w - (decay * w + (c_grad * g + c_momentum * m) / D)
// NAdam, AdamW and NAG differ in the scalars alone; nesterov_pp/optim/coefficients.py computes them in double.
// `decay` is lr * weight_decay and not its complement: 1 - 2e-4 rounded to float32 is off by the same 1e-8 on every
// step, which in a thousand steps is the largest error of all.
#pragma once

#if defined(__CUDACC__)
#define NPP_HD __host__ __device__ __forceinline__
#else
#define NPP_HD inline __attribute__((always_inline))
#endif

namespace nesterov_pp {

// The order of the fields is that of nesterov_pp.kernels.Coefficients.
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

  template <class U>
  NPP_HD Coefficients<U> as() const {
    return {U(grad_scale), U(l2), U(beta1_complement), U(beta2_complement), U(decay), U(c_grad), U(c_momentum),
            U(inv_bias2),  U(eps)};
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

// Of a vector, lane by lane, which the compiler turns into one instruction: GCC has no square root of vectors.
template <class V>
NPP_HD V square_root(const V& x) {
  V root;
  for (unsigned k = 0; k < sizeof(V) / sizeof(x[0]); ++k) root[k] = square_root(x[k]);
  return root;
}

// Returns the new weight; m and, for adaptive rules, v are updated in place. `V` is the scalar `T` or a vector of them.
template <bool kAdaptive, class T, class V>
NPP_HD V update(const Coefficients<T>& c, const V& w, const V& grad, V& m, V& v) {
  const V g = c.grad_scale * grad + c.l2 * w;
  m = m + c.beta1_complement * (g - m);
  V direction = c.c_grad * g + c.c_momentum * m;
  if constexpr (kAdaptive) {
    v = v + c.beta2_complement * (g * g - v);
    direction = direction / (square_root(v * c.inv_bias2) + c.eps);
  }
  return w - (c.decay * w + direction);
}

// [note: corrections of late gradients]
// What a step may add to the update above, with the weights `late` that the gradient was computed with and, for some, a
// running mean beside the moments; nesterov_pp/kernels/corrections.py has the equations. The order of both is theirs.
enum class Kind : int { kNone, kDelayCompensation, kAdaptiveDelayCompensation, kGap, kDiscrepancy };

NPP_HD constexpr bool has_mean(Kind kind) {
  return kind == Kind::kAdaptiveDelayCompensation || kind == Kind::kGap || kind == Kind::kDiscrepancy;
}
NPP_HD constexpr bool compares(Kind kind) { return kind != Kind::kNone && kind != Kind::kDiscrepancy; }

template <class T>
struct Correction {
  T strength;
  T mean_complement;
  T inv_bias;
  T eps;
  T ahead_last;
  T ahead_momentum;
  T ahead_mean;

  template <class U>
  NPP_HD Correction<U> as() const {
    return {U(strength), U(mean_complement), U(inv_bias), U(eps), U(ahead_last), U(ahead_momentum), U(ahead_mean)};
  }
};

constexpr int kCorrections = 7;
static_assert(sizeof(Correction<double>) == kCorrections * sizeof(double), "plain row of scalars");

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

// As `update`; also updates `mean` in place, where the kind has one, and writes the predicted weights to `ahead`.
template <Kind kKind, bool kAdaptive, class T, class V>
NPP_HD V corrected_update(const Coefficients<T>& c, const Correction<T>& x, const V& w, const V& late, const V& grad,
                          V& m, V& v, V& mean, V& ahead) {
  V g = c.grad_scale * grad + c.l2 * w;
  V decay = c.decay * w;
  if constexpr (kKind == Kind::kDelayCompensation) g = g + x.strength * g * g * (w - late);
  if constexpr (kKind == Kind::kAdaptiveDelayCompensation) {
    mean = mean + x.mean_complement * (g * g - mean);
    g = g + x.strength / square_root(mean + x.eps) * g * g * (w - late);
  }
  if constexpr (kKind == Kind::kGap) {
    const V gap = T(1) + absolute(w - late) / (square_root(mean * x.inv_bias) + x.eps);
    g = g / gap;
    decay = decay / gap;
  }
  m = m + c.beta1_complement * (g - m);
  V direction = c.c_grad * g + c.c_momentum * m, momentum = m;
  if constexpr (kAdaptive) {
    v = v + c.beta2_complement * (g * g - v);
    const V denominator = square_root(v * c.inv_bias2) + c.eps;
    direction = direction / denominator;
    momentum = m / denominator;
  }
  const V next = w - (decay + direction);
  if constexpr (kKind == Kind::kGap) mean = mean + x.mean_complement * (direction * direction - mean);
  if constexpr (kKind == Kind::kDiscrepancy) mean = mean + x.mean_complement * ((next - w) - mean);
  ahead = next + (x.ahead_last * (next - w) - x.ahead_momentum * momentum + x.ahead_mean * mean);
  return next;
}

}  // namespace nesterov_pp
