// The pass of csrc/device run by the host: every thread of every block in turn.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "device/corrected.h"
#include "device/host_table.h"

namespace {

using namespace nesterov_pp;
using namespace nesterov_pp::device;

template <class P>
void run_pass(const Launch& l, int64_t blocks, int64_t threads) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t thread = 0; thread < threads; ++thread) step<P>(l, block, blocks, thread, threads);
}

template <class W, class G, class M>
void run_dtypes(const Launch& l, bool adaptive, bool stochastic, int64_t blocks, int64_t threads) {
  if (adaptive)
    stochastic ? run_pass<Pass<W, G, M, true, true>>(l, blocks, threads)
               : run_pass<Pass<W, G, M, true, false>>(l, blocks, threads);
  else
    stochastic ? run_pass<Pass<W, G, M, false, true>>(l, blocks, threads)
               : run_pass<Pass<W, G, M, false, false>>(l, blocks, threads);
}

template <class W, class G>
void run_moment(Dtype moment, const Launch& l, bool adaptive, bool stochastic, int64_t blocks, int64_t threads) {
  if (moment == Dtype::kBFloat16)
    run_dtypes<W, G, BFloat16>(l, adaptive, stochastic, blocks, threads);
  else if (moment == Dtype::kHalf)
    run_dtypes<W, G, Half>(l, adaptive, stochastic, blocks, threads);
  else
    run_dtypes<W, G, float>(l, adaptive, stochastic, blocks, threads);
}

template <class W, class M, bool kAdaptive, Kind kKind>
void run_corrected(const Launch& l, int64_t blocks, int64_t threads) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t thread = 0; thread < threads; ++thread)
      corrected_step<CorrectedPass<W, M, kAdaptive, kKind>>(l, block, blocks, thread, threads);
}

template <class W, class M, bool kAdaptive>
void run_kind(const Launch& l, Kind kind, int64_t blocks, int64_t threads) {
  switch (kind) {
    case Kind::kDelayCompensation:
      return run_corrected<W, M, kAdaptive, Kind::kDelayCompensation>(l, blocks, threads);
    case Kind::kAdaptiveDelayCompensation:
      return run_corrected<W, M, kAdaptive, Kind::kAdaptiveDelayCompensation>(l, blocks, threads);
    case Kind::kGap:
      return run_corrected<W, M, kAdaptive, Kind::kGap>(l, blocks, threads);
    case Kind::kDiscrepancy:
      return run_corrected<W, M, kAdaptive, Kind::kDiscrepancy>(l, blocks, threads);
    default:
      return run_corrected<W, M, kAdaptive, Kind::kNone>(l, blocks, threads);
  }
}

template <class W, class M>
void run_rule(const Launch& l, bool adaptive, Kind kind, int64_t blocks, int64_t threads) {
  adaptive ? run_kind<W, M, true>(l, kind, blocks, threads) : run_kind<W, M, false>(l, kind, blocks, threads);
}

}  // namespace

extern "C" {

int64_t chunk_elements() { return kChunk; }
int row_words() { return kRowWords; }
int corrected_row_words() { return kCorrectedRowWords; }

void* words_new(int64_t tensors, int64_t slots) { return new HostTable(tensors, slots); }
void words_delete(void* words) { delete static_cast<HostTable*>(words); }
void words_set(void* words, int column, int64_t tensor, int64_t value) {
  static_cast<HostTable*>(words)->set(column, tensor, value);
}
void words_changed(void* words, int64_t* begin, int64_t* end) {
  *begin = static_cast<int64_t>(static_cast<HostTable*>(words)->begin());
  *end = static_cast<int64_t>(static_cast<HostTable*>(words)->end());
}
void words_sent(void* words) { static_cast<HostTable*>(words)->sent(); }
const int64_t* words_data(void* words) { return static_cast<HostTable*>(words)->all().data(); }

// Counts the chunks, and writes them where `to` is not null.
int64_t chunks(const int64_t* sizes, int64_t tensors, int64_t* to) {
  const auto found = chunks_of(std::vector<int64_t>(sizes, sizes + tensors));
  if (to != nullptr) std::memcpy(to, found.data(), found.size() * sizeof(int64_t));
  return static_cast<int64_t>(found.size());
}

void spans(const int64_t* words, int64_t tensors, const int64_t* chunk, int64_t count, int64_t* to) {
  for (int64_t k = 0; k < count; ++k) {
    const Span span = span_of({words, tensors}, chunk[k]);
    to[3 * k] = span.tensor;
    to[3 * k + 1] = span.begin;
    to[3 * k + 2] = span.count;
  }
}

void step_on_host(const int64_t* words, int64_t tensors, const int64_t* chunk, int64_t chunk_count, const double* rows,
                  const double* factor, int source, int target, uint64_t seed, int weight, int grad, int moment,
                  int adaptive, int stochastic, int64_t blocks, int64_t threads) {
  const Launch l{{words, tensors}, chunk, chunk_count, rows, factor, source, target, source, seed};
  const auto w = static_cast<Dtype>(weight), g = static_cast<Dtype>(grad), m = static_cast<Dtype>(moment);
  if (w == Dtype::kDouble)
    run_dtypes<double, double, double>(l, adaptive, stochastic, blocks, threads);
  else if (w == Dtype::kBFloat16)
    run_moment<BFloat16, BFloat16>(m, l, adaptive, stochastic, blocks, threads);
  else if (w == Dtype::kHalf)
    run_moment<Half, Half>(m, l, adaptive, stochastic, blocks, threads);
  else if (g == Dtype::kBFloat16)
    run_moment<float, BFloat16>(m, l, adaptive, stochastic, blocks, threads);
  else if (g == Dtype::kHalf)
    run_moment<float, Half>(m, l, adaptive, stochastic, blocks, threads);
  else
    run_moment<float, float>(m, l, adaptive, stochastic, blocks, threads);
}

void corrected_on_host(const int64_t* words, int64_t tensors, const int64_t* chunk, int64_t chunk_count,
                       const double* rows, int source, int target, int late, int weight, int moment, int adaptive,
                       int kind, int64_t blocks, int64_t threads) {
  const Launch l{{words, tensors}, chunk, chunk_count, rows, nullptr, source, target, late, 0};
  const auto w = static_cast<Dtype>(weight), m = static_cast<Dtype>(moment);
  const auto k = static_cast<Kind>(kind);
  if (w == Dtype::kDouble)
    run_rule<double, double>(l, adaptive, k, blocks, threads);
  else if (w == Dtype::kFloat && m == Dtype::kFloat)
    run_rule<float, float>(l, adaptive, k, blocks, threads);
  else if (w == Dtype::kFloat)
    run_rule<float, BFloat16>(l, adaptive, k, blocks, threads);
  else if (m == Dtype::kFloat)
    run_rule<BFloat16, float>(l, adaptive, k, blocks, threads);
  else
    run_rule<BFloat16, BFloat16>(l, adaptive, k, blocks, threads);
}

double squares_on_host(const int64_t* words, int64_t tensors, int64_t chunk, int grad, int64_t threads) {
  double sum = 0;
  for (int64_t thread = 0; thread < threads; ++thread) {
    const Table table{words, tensors};
    switch (static_cast<Dtype>(grad)) {
      case Dtype::kDouble:
        sum += squares<double>(table, chunk, thread, threads);
        break;
      case Dtype::kBFloat16:
        sum += squares<BFloat16>(table, chunk, thread, threads);
        break;
      case Dtype::kHalf:
        sum += squares<Half>(table, chunk, thread, threads);
        break;
      default:
        sum += squares<float>(table, chunk, thread, threads);
    }
  }
  return sum;
}

double clipping_factor(double norm, double limit, double loss_scale) { return factor_of(norm, limit, loss_scale); }

// All 65,536 values of a two-byte type.
void widen_all(int dtype, float* to) {
  for (unsigned int bits = 0; bits < 65536; ++bits) {
    const auto low = static_cast<unsigned short>(bits);
    to[bits] = dtype == static_cast<int>(Dtype::kHalf) ? widened(Half{low}) : widened(BFloat16{low});
  }
}
void narrow_all(int dtype, const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = dtype == static_cast<int>(Dtype::kHalf) ? Narrow<Half>::nearest(from[i]).bits
                                                    : Narrow<BFloat16>::nearest(from[i]).bits;
}
}
