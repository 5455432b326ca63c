#include "plan.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "../plan/fail.h"
#include "pass.h"

namespace nesterov_pp::device {
namespace {

int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(pointer)); }

bool same(const Dtypes& a, const Dtypes& b) { return a.weight == b.weight && a.grad == b.grad && a.moment == b.moment; }

}  // namespace

DevicePlan::DevicePlan(Tensors tensors, std::optional<uint64_t> seed) : Plan(std::move(tensors), seed) {
  std::vector<std::pair<Dtypes, std::vector<size_t>>> found;
  for (size_t i = 0; i < t_.names.size(); ++i) {
    const at::Tensor none;
    const Item item = this->item(i, none);
    check(item, seed_.has_value(), device_);
    const Dtypes dtypes = spec_of(item, t_.rule, false).dtypes;
    auto group = std::find_if(found.begin(), found.end(), [&](const auto& g) { return same(g.first, dtypes); });
    if (group == found.end()) group = found.insert(found.end(), {dtypes, {}});
    group->second.push_back(i);
  }
  for (auto& [dtypes, members] : found) groups_.push_back(make_group(dtypes, std::move(members)));
}

Group DevicePlan::make_group(Dtypes dtypes, std::vector<size_t> members) {
  const auto n = static_cast<int64_t>(members.size());
  HostTable host(n, static_cast<int64_t>(t_.slots.size()));
  std::vector<int64_t> sizes;
  for (int64_t k = 0; k < n; ++k) {
    const size_t i = members[static_cast<size_t>(k)];
    sizes.push_back(t_.slots[0][i]->numel());
    host.set(kNumel, k, sizes.back());
    host.set(kNumber, k, t_.numbers[i]);
    for (size_t s = 0; s < t_.slots.size(); ++s)
      host.set(kSlots + static_cast<int>(s), k, address(t_.slots[s][i]->const_data_ptr()));
  }
  const std::vector<int64_t> chunks = chunks_of(sizes);
  Group group{dtypes,
              std::move(members),
              std::move(host),
              {},
              {},
              {},
              send(chunks.data(), static_cast<int64_t>(chunks.size()), at::kLong),
              std::accumulate(sizes.begin(), sizes.end(), int64_t{0}),
              chunk_count_};
  const auto words = static_cast<int64_t>(group.host.all().size());
  group.table = group.kept = at::empty({words}, at::device(device_).dtype(at::kLong));
  if (t_.steps.empty())  // otherwise the host counts steps, which a graph cannot do
    for (size_t s = 0; s < t_.slots.size(); ++s) group.unused.push_back(staging(words, at::kLong));
  chunk_count_ += static_cast<int64_t>(chunks.size());
  return group;
}

std::vector<StepClass> DevicePlan::collect(const StepSlots& slots) {
  auto classes = Plan::collect(slots);
  const bool in_graph = captures();
  for (const Group& group : groups_) check_unchanged(group);
  for (Group& group : groups_) {
    for (size_t k = 0; k < group.members.size(); ++k) enter(group, static_cast<int64_t>(k), tasks_[group.members[k]]);
    if (in_graph) {
      group.table = table_of_graph(group);
    } else {
      send_changes(group);
      group.table = group.kept;
    }
  }
  return classes;
}

void DevicePlan::check_unchanged(const Group& group) const {
  for (size_t k = 0; k < group.members.size(); ++k) {
    const size_t i = group.members[k];
    const Task& task = tasks_[i];
    const bool stepped = task.row != kCarried;
    if (!stepped && task.run.count == 0) continue;
    if (task.run.count != group.host.at(kNumel, static_cast<int64_t>(k)) ||
        (stepped ? !same(task.spec.dtypes, group.dtypes) : task.spec.dtypes.grad != group.dtypes.grad))
      fail(t_.names[i], " has another size or dtype than when the step was planned");
  }
}

void DevicePlan::send_changes(Group& group) const {
  const auto begin = static_cast<int64_t>(group.host.begin()), end = static_cast<int64_t>(group.host.end());
  if (begin == end) return;
  const at::Tensor staged = staging(end - begin, at::kLong);
  std::memcpy(staged.mutable_data_ptr(), group.host.all().data() + begin, staged.nbytes());
  group.kept.narrow(0, begin, end - begin).copy_(staged, /*non_blocking=*/true);
  group.host.sent();
}

at::Tensor DevicePlan::table_of_graph(Group& group) {
  const auto& words = group.host.all();
  const auto count = static_cast<int64_t>(words.size());
  if (group.unused.empty()) group.unused.push_back(staging(count, at::kLong));
  const at::Tensor staged = group.unused.back();
  std::memcpy(staged.mutable_data_ptr(), words.data(), staged.nbytes());
  at::Tensor table = at::empty({count}, group.kept.options());
  table.copy_(staged, /*non_blocking=*/true);
  of_graphs_.push_back(staged);
  group.unused.pop_back();
  return table;
}

void DevicePlan::enter(Group& group, int64_t k, const Task& task) {
  const Run& run = task.run;
  HostTable& host = group.host;
  const int64_t weight = address(run.weight), out = address(run.weight_out), grad = address(run.grad),
                m = address(run.exp_avg), v = address(run.exp_avg_sq), copy = address(run.copy),
                late = address(run.late), mean = address(run.mean), ahead = address(run.ahead),
                m_scale = address(run.exp_avg_scale), v_scale = address(run.exp_avg_sq_scale),
                residual = address(run.residual);
  const bool stepped = task.row != kCarried;
  host.set(kRow, k, task.row);
  host.set(kGrad, k, grad);
  host.set(
      kAligned, k,
      (weight | out | grad | m | v | copy | late | mean | ahead | m_scale | v_scale | residual) % kVectorBytes == 0);
  if (run.count == 0) return;
  if (stepped) {
    host.set(kExpAvg, k, m);
    host.set(kExpAvgSq, k, v);
    host.set(kMean, k, mean);
    host.set(kExpAvgScale, k, m_scale);
    host.set(kExpAvgSqScale, k, v_scale);
    host.set(kResidual, k, residual);
  }
  const auto slot = [](size_t number) { return kSlots + static_cast<int>(number); };
  if (late != 0) host.set(slot(slots_.grads), k, late);
  const bool has_master = stepped && t_.masters[group.members[static_cast<size_t>(k)]].defined();
  const bool swapped = stepped && t_.ring_predicts;
  const int64_t next = has_master ? copy : out;
  if (has_master) host.set(kMaster, k, weight);
  if (stepped) host.set(kShadow, k, swapped ? next : ahead);
  if (!has_master && !swapped) host.set(slot(slots_.source), k, weight);
  host.set(slot(slots_.target), k, swapped ? ahead : next);
}

void DevicePlan::pass(const std::vector<StepRow>& rows) {
  std::vector<double> words;
  const auto append = [&words](const auto& scalars) {
    const auto* first = reinterpret_cast<const double*>(&scalars);
    words.insert(words.end(), first, first + sizeof(scalars) / sizeof(double));
  };
  for (size_t k = 0; k < rows.size(); ++k) {
    append(rows[k].coefficients);
    words.push_back(number_of_step(classes_[k]));
    if (t_.corrects) append(rows[k].correction);
  }
  launch(send(words.data(), static_cast<int64_t>(words.size()), at::kDouble));
}

void DevicePlan::apply_rows(const at::Tensor& rows) {
  const auto n = static_cast<int64_t>(t_.names.size());
  const int words = row_words(t_.corrects);
  if (!collected_ || !t_.steps.empty())
    fail("apply_rows() runs the step that collect() of a plan without counts has prepared");
  if (rows.device() != device_ || rows.scalar_type() != at::kDouble || !rows.is_contiguous() || rows.dim() != 2 ||
      rows.size(0) != n || rows.size(1) != words)
    fail("rows must be float64 of shape [", n, ", ", words, "] on ", device_, ", not ", rows.scalar_type(),
         " of shape ", rows.sizes(), " on ", rows.device());
  launch(rows);
  for (size_t i = 0; i < t_.names.size(); ++i) note_written(i);
  ++steps_run_;
  forget();
}

at::Tensor DevicePlan::send(const void* values, int64_t count, at::ScalarType dtype) const {
  const at::Tensor staged = staging(count, dtype);
  if (count > 0) std::memcpy(staged.mutable_data_ptr(), values, staged.nbytes());
  return staged.to(device_, /*non_blocking=*/true);
}

at::Tensor DevicePlan::staging(int64_t count, at::ScalarType dtype) const {
  // The allocator of pinned memory waits for the copies started from a block before it gives the block out again.
  return at::empty({count}, at::device(at::kCPU).dtype(dtype).pinned_memory(device_.is_cuda()));
}

}  // namespace nesterov_pp::device
