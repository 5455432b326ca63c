#include "driver.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "../codes.h"

namespace nesterov_pp::cpu {
namespace {

// A tensor is split between threads only at multiples of this many elements, which fill whole cache lines (128 to 512
// bytes) in every dtype, and whole groups of moments in eight bits.
constexpr int64_t kUnit = 64;
static_assert(kUnit % kGroup == 0, "a group belongs to one thread");
// The cost of finding a tensor's elements in memory, as a number of elements to pass over.
constexpr int64_t kTaskElements = 512;
// With fewer elements than this, waking the other threads costs more than it saves.
constexpr int64_t kParallelElements = 131072;
// A pass that writes at least this many bytes of new weights to memory it has not read streams them past the caches.
constexpr int64_t kStreamingBytes = int64_t{8} << 20;

constexpr size_t kTasksAhead = 2;

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

int64_t units_of(const Task& task) { return (task.run.count + kUnit - 1) / kUnit; }

template <class Pointer>
Pointer advance(Pointer base, int64_t bytes) {
  using Char = std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return base == nullptr ? base : static_cast<Char*>(base) + bytes;
}

// Returns whether the new version goes to memory that the pass does not read: another slot, or the copy of a master.
bool writes_unread(const Task& task) {
  const Run& run = task.run;
  const void* next = run.copy != nullptr ? run.copy : run.weight_out;
  return next != run.weight && next != run.grad;
}

void run_part(const Task& task, const std::vector<StepRow>& rows, int64_t begin, int64_t end, bool streaming, Isa isa) {
  const Dtypes& dtypes = task.spec.dtypes;
  const int64_t weights = begin * size_of(dtypes.weight), grads = begin * size_of(dtypes.grad),
                moments = begin * size_of(dtypes.moment);
  Run part{advance(task.run.weight, weights),
           advance(task.run.weight_out, weights),
           advance(task.run.grad, grads),
           advance(task.run.late, grads),
           advance(task.run.exp_avg, moments),
           advance(task.run.exp_avg_sq, moments),
           advance(task.run.mean, moments),
           advance(task.run.copy, grads),
           advance(task.run.ahead, grads),
           end - begin,
           task.run.rule,
           task.run.noise,
           advance(task.run.exp_avg_scale, begin / kGroup * size_of(Dtype::kHalf)),
           advance(task.run.exp_avg_sq_scale, begin / kGroup * size_of(Dtype::kHalf)),
           advance(task.run.residual, begin)};
  part.noise.first += begin;
  if (task.row == kCarried)
    carry(part.weight, part.weight_out, part.count * size_of(dtypes.weight));
  else
    kernel(isa, task.spec)(part, rows[static_cast<size_t>(task.row)], streaming && writes_unread(task));
}

// Prefetches the elements of a small tensor: the processor's own prefetching finds no pattern across small tensors.
void prefetch(const Task& task) {
  constexpr int64_t kSmall = 256;
  if (task.run.count > kSmall) return;
  const int64_t bytes = task.run.count * size_of(task.spec.dtypes.weight);
  for (const void* list : {task.run.weight, task.run.grad, static_cast<const void*>(task.run.exp_avg),
                           static_cast<const void*>(task.run.exp_avg_sq)})
    if (list != nullptr)
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(list) + line, 1);
}

}  // namespace

void run(const std::vector<Task>& tasks, const std::vector<StepRow>& rows) {
  std::vector<int64_t> first_unit(tasks.size() + 1, 0);
  int64_t new_bytes = 0;
  for (size_t i = 0; i < tasks.size(); ++i) {
    first_unit[i + 1] = first_unit[i] + units_of(tasks[i]);
    if (writes_unread(tasks[i])) new_bytes += tasks[i].run.count * size_of(tasks[i].spec.dtypes.grad);
  }
  const int64_t units = first_unit.back();
  if (units == 0) return;
  const bool streaming = new_bytes >= kStreamingBytes;
  const Isa isa = selected_isa();

  const auto all = static_cast<int64_t>(tasks.size()) * kTaskElements + units * kUnit;
  const int64_t grain = std::max<int64_t>(1, units * kParallelElements / all);

  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    auto it = std::upper_bound(first_unit.begin(), first_unit.end(), begin) - 1;
    for (auto i = static_cast<size_t>(it - first_unit.begin()); i < tasks.size() && first_unit[i] < end; ++i) {
      const int64_t from = std::max<int64_t>(0, begin - first_unit[i]) * kUnit;
      const int64_t to = std::min<int64_t>(tasks[i].run.count, (end - first_unit[i]) * kUnit);
      if (i + kTasksAhead < tasks.size()) prefetch(tasks[i + kTasksAhead]);
      if (from < to) run_part(tasks[i], rows, from, to, streaming, isa);
    }
  });
}

double norm(const std::vector<Values>& tensors) {
  // Every chunk of this fixed size has its own sum, and the sums are added in order, so that the result does not depend
  // on the number of threads.
  constexpr int64_t kChunk = 8 * kSquaresRun;
  std::vector<int64_t> first_chunk(tensors.size() + 1, 0);
  for (size_t i = 0; i < tensors.size(); ++i)
    first_chunk[i + 1] = first_chunk[i] + (tensors[i].count + kChunk - 1) / kChunk;
  std::vector<double> sums(static_cast<size_t>(first_chunk.back()), 0.0);
  const Isa isa = selected_isa();
  at::parallel_for(0, first_chunk.back(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      auto it = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - 1;
      const auto i = static_cast<size_t>(it - first_chunk.begin());
      const Values& t = tensors[i];
      const int64_t from = (chunk - first_chunk[i]) * kChunk;
      const int64_t count = std::min<int64_t>(kChunk, t.count - from);
      sums[static_cast<size_t>(chunk)] = squares(isa, t.dtype)(advance(t.data, from * size_of(t.dtype)), count);
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

Isa selected_isa() { return selected().load(std::memory_order_relaxed); }

std::string isa() { return isa_name(selected_isa()); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) names.emplace_back(isa_name(static_cast<Isa>(i)));
  return names;
}

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
    if (name == isa_name(static_cast<Isa>(i))) {
      selected().store(static_cast<Isa>(i));
      return;
    }
  }
  std::string message = "instruction set '" + name + "' is not available on this processor; choose one of:";
  for (const auto& known : isas()) message += " " + known;
  throw std::invalid_argument(message);
}

}  // namespace nesterov_pp::cpu
