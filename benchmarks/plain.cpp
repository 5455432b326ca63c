// What the memory gives to a loop with the optimizer's streams and next to no arithmetic.
#include <cstddef>

// Reads p, g, m and v, writes p, m and v, over n tensors split evenly by elements.
extern "C" void seven_streams(float** p, const float** g, float** m, float** v, const size_t* first, size_t n,
                              int threads) {
  const size_t total = first[n];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    const size_t begin = total * t / threads, end = total * (t + 1) / threads;
    for (size_t i = 0; i < n; ++i) {
      const size_t from = begin > first[i] ? begin - first[i] : 0;
      const size_t to = (end < first[i + 1] ? end : first[i + 1]) - first[i];
      if (first[i + 1] <= begin || first[i] >= end) continue;
      float* __restrict pi = p[i];
      const float* __restrict gi = g[i];
      float* __restrict mi = m[i];
      float* __restrict vi = v[i];
      for (size_t k = from; k < to; ++k) {
        mi[k] = 0.9f * mi[k] + 0.1f * gi[k];
        vi[k] = 0.9f * vi[k] + 0.1f * gi[k];
        pi[k] = pi[k] - 1e-3f * (mi[k] + vi[k]);
      }
    }
  }
}

// Reads g once.
extern "C" float sum_of_squares(const float** g, const size_t* first, size_t n, int threads) {
  const size_t total = first[n];
  float sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
  for (int t = 0; t < threads; ++t) {
    const size_t begin = total * t / threads, end = total * (t + 1) / threads;
    for (size_t i = 0; i < n; ++i) {
      const size_t from = begin > first[i] ? begin - first[i] : 0;
      const size_t to = (end < first[i + 1] ? end : first[i + 1]) - first[i];
      if (first[i + 1] <= begin || first[i] >= end) continue;
      const float* __restrict gi = g[i];
      float part = 0;
#pragma omp simd reduction(+ : part)
      for (size_t k = from; k < to; ++k) part += gi[k] * gi[k];
      sum += part;
    }
  }
  return sum;
}
