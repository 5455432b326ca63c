// Runs the pass of csrc/device on the host: every thread of every chunk in turn.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "device/host_table.h"
#include "device/pass.h"

namespace {

using namespace nesterov_pp;
using namespace nesterov_pp::device;

template <class P>
void run_pass(const Launch& l, int threads) {
  float quotients[256];
  for (int byte = 0; byte < 256; ++byte) quotients[byte] = quotient_of_code(static_cast<unsigned char>(byte));
  for (int64_t chunk = 0; chunk < l.chunk_count; ++chunk)
    for (int thread = 0; thread < threads; ++thread) step<P>(l, chunk, thread, threads, quotients);
}

bool has_shadow(const Table& table) {
  for (int64_t k = 0; k < table.tensors; ++k)
    if (table.at(kShadow, k) != 0) return true;
  return false;
}

}  // namespace

extern "C" {

int64_t chunk_elements() { return kChunk; }
int words_of_row(int corrects) { return row_words(corrects != 0); }

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

// Counts the chunks, and writes them to `to` unless it is null.
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

int is_supported(int weight, int grad, int moment, int normaliser, int corrects, int stochastic) {
  return supported(
      {{Dtype(weight), Dtype(grad), Dtype(moment)}, Normaliser(normaliser), corrects != 0, stochastic != 0});
}

// Runs the pass of these options, and returns whether there is one.
int step_on_host(const int64_t* words, int64_t tensors, const int64_t* chunk, int64_t chunk_count, const double* rows,
                 const double* factor, int grads, int source, int target, int kind, int ring_predicts, uint64_t seed,
                 int weight, int grad, int moment, int normaliser, int corrects, int stochastic, int threads) {
  const Launch l{{words, tensors},
                 chunk,
                 chunk_count,
                 chunk_count * kChunk,
                 rows,
                 factor,
                 grads,
                 source,
                 target,
                 {Normaliser(normaliser), CorrectionKind(kind), has_shadow({words, tensors})},
                 ring_predicts != 0,
                 RoundKeys::from(seed)};
  const Spec spec{{Dtype(weight), Dtype(grad), Dtype(moment)}, Normaliser(normaliser), corrects != 0, stochastic != 0};
  const auto run = [&](auto pass) { run_pass<decltype(pass)>(l, threads); };
  return visit(spec, run) || visit_small(spec, run);
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

// Count how many of `count` roots and quotients are not correctly rounded, given inverses that are `off` units in the
// last place away from correctly rounded ones. A quotient of 2^126 or more may become infinite or NaN.
int64_t wrong_roots(const float* squares, int64_t count, int off) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto inverse = static_cast<float>(1 / std::sqrt(static_cast<double>(squares[i])));
    wrong +=
        corrected_root(squares[i], bits_of<float>(bits_of<unsigned int>(inverse) + static_cast<unsigned int>(off))) !=
        std::sqrt(squares[i]);
  }
  return wrong;
}
int64_t wrong_quotients(const float* a, const float* b, int64_t count, int off) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float inverse = bits_of<float>(bits_of<unsigned int>(1 / b[i]) + static_cast<unsigned int>(off));
    const float found = corrected_quotient(a[i], b[i], inverse), nearest = a[i] / b[i];
    const bool may_overflow = std::fabs(nearest) >= 0x1p126f;
    wrong += std::isfinite(found) || !may_overflow ? found != nearest : 0;
  }
  return wrong;
}

double clipping_factor(double norm, double limit, double loss_scale) { return factor_of(norm, limit, loss_scale); }

// Widens all 65,536 values of a two-byte type.
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
