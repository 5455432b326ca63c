// What the memory gives to loops with the optimizer's streams and next to no arithmetic.
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace {

constexpr int64_t kLine = 16;  // floats in a cache line: no line is shared by two threads

// A function of its own: only the __restrict of parameters lets the compiler vectorise without checks.
void update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const float mk = m[k] + 0.1f * (g[k] - m[k]);
    const float vk = v[k] + 0.1f * (g[k] - v[k]);
    m[k] = mk;
    v[k] = vk;
    p[k] -= 1e-3f * (mk + vk);
  }
}

float squares(const float* g, int64_t n) {
  float sum = 0;
  // Many sums in flight: the loop is to wait for memory and not for additions.
#pragma omp simd reduction(+ : sum) simdlen(64)
  for (int64_t k = 0; k < n; ++k) sum += g[k] * g[k];
  return sum;
}

// Calls visit(tensor, from, to) for the share of the calling thread: all elements are split evenly, not each tensor.
template <typename Visit>
void share(const int64_t* sizes, int64_t count, const Visit& visit) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += sizes[i];
  const int64_t threads = omp_get_num_threads(), t = omp_get_thread_num();
  const int64_t begin = total * t / threads / kLine * kLine;
  const int64_t end = t + 1 == threads ? total : total * (t + 1) / threads / kLine * kLine;
  for (int64_t i = 0, first = 0; i < count && first < end; first += sizes[i++]) {
    const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, sizes[i]);
    if (from < to) visit(i, from, to);
  }
}

}  // namespace

// Reads p, g, m and v, writes p, m and v.
extern "C" void seven_streams(float* const* p, const float* const* g, float* const* m, float* const* v,
                              const int64_t* sizes, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
  share(sizes, count, [&](int64_t i, int64_t from, int64_t to) {
    update(p[i] + from, g[i] + from, m[i] + from, v[i] + from, to - from);
  });
}

// Reads g once.
extern "C" double sum_of_squares(const float* const* g, const int64_t* sizes, int64_t count, int threads) {
  double sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  share(sizes, count, [&](int64_t i, int64_t from, int64_t to) { sum += squares(g[i] + from, to - from); });
  return sum;
}
