// A plan for tensors on a device. The tables that its kernels read stay there from step to step.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../plan/plan.h"
#include "host_table.h"

namespace nesterov_pp::device {

// [note: a graph's own tables]
// A step that is captured in a graph runs whenever the graph is replayed, between other steps whose gradients lie
// elsewhere. So it cannot use the tables that stay on the device. It fills whole tables of its own, from host memory
// that nothing else writes as long as the plan lives. This memory is pinned before any capture, one piece for each ring
// slot, because the allocator of pinned memory waits for events, which is forbidden in a capture. With torch 2.11 and
// later, a capture may allocate more pieces.

// The tensors of one launch, which all have the same dtypes.
struct Group {
  Dtypes dtypes;
  std::vector<size_t> members;  // indices of the parameters
  HostTable host;
  at::Tensor kept;                 // int64, on the device: the words of table.h as last sent from `host`
  at::Tensor table;                // the table that the collected step reads: `kept`, or a graph's own
  std::vector<at::Tensor> unused;  // host memory for the tables of future graphs
  at::Tensor chunks;               // int64
  int64_t elements;                // in all chunks
  int64_t first_chunk;             // index of this group's first chunk among those of all groups
};

class DevicePlan : public Plan {
 public:
  DevicePlan(Tensors tensors, std::optional<uint64_t> seed);

  // Also sends the changed words of the tables. Does not wait for the device.
  std::vector<StepClass> collect(const StepSlots& slots) override;

  // Runs the collected step of a plan whose caller counts the steps. `rows` is float64 of shape
  // [parameters, device::row_words(corrects)] on the device. A row with step number 0 leaves its parameter unchanged.
  void apply_rows(const at::Tensor& rows);

  const std::vector<Group>& groups() const { return groups_; }
  int64_t chunk_count() const { return chunk_count_; }

 protected:
  void pass(const std::vector<StepRow>& rows) override;

  // Returns whether launches are currently captured in a graph instead of run.
  virtual bool captures() const { return false; }

  // Starts the pass with rows on the device: the coefficients, the number of the step and the scalars of a correction.
  virtual void launch(const at::Tensor& rows) = 0;

  // Copies values to the device without waiting.
  at::Tensor send(const void* values, int64_t count, at::ScalarType dtype) const;

  // Returns host memory from which the device can copy without waiting.
  at::Tensor staging(int64_t count, at::ScalarType dtype) const;

 private:
  Group make_group(Dtypes dtypes, std::vector<size_t> members);
  void enter(Group& group, int64_t k, const Task& task);
  // Throws if a tensor of the collected step no longer fits the group, whose chunks are fixed.
  void check_unchanged(const Group& group) const;
  void send_changes(Group& group) const;
  at::Tensor table_of_graph(Group& group);

  std::vector<Group> groups_;
  std::vector<at::Tensor> of_graphs_;  // host memory that the replays of graphs copy from
  int64_t chunk_count_ = 0;
};

}  // namespace nesterov_pp::device
