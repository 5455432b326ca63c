// A plan whose tensors are on a device: what its kernels need, kept there from step to step.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../plan/plan.h"
#include "host_table.h"

namespace nesterov_pp::device {

// [note: a graph's own tables]
// A step that is captured in a graph runs later, as often as the graph is replayed, between other steps whose gradients
// lie elsewhere. So it takes no part in the tables that stay: it fills tables of its own, whole, from memory of the
// host that nothing else writes to for as long as the plan lives. That memory is pinned before any capture, one piece
// for each slot of the ring, since the allocator of pinned memory waits for events, which a capture forbids; torch 2.11
// and later allow more pieces.

// The tensors of one launch: those that agree in dtypes.
struct Group {
  Dtypes dtypes;
  std::vector<size_t> members;  // numbers of items
  HostTable host;
  at::Tensor kept;                 // int64, the words of table.h on the device, as `host` has sent them
  at::Tensor table;                // what the step collected reads: `kept`, or a graph's own
  std::vector<at::Tensor> unused;  // memory of the host for the words of graphs
  at::Tensor chunks;               // int64
  int64_t first_chunk;             // of this group among the chunks of all
};

class DevicePlan : public Plan {
 public:
  DevicePlan(Tensors tensors, std::optional<uint64_t> seed);

  // Also sends what has changed in the tables. Does not wait for the device.
  std::vector<StepClass> collect(const StepSlots& slots) override;

  // Runs the step collected with `rows`, float64 of shape [parameters, device::row_words(corrects)] on the device, of a
  // plan whose caller counts. A row whose number of the step is 0 leaves its parameter as it is.
  void apply_rows(const at::Tensor& rows);

  const std::vector<Group>& groups() const { return groups_; }
  int64_t chunk_count() const { return chunk_count_; }

 protected:
  void pass(const std::vector<StepRow>& rows) override;

  // Whether what is launched now is captured in a graph instead of run.
  virtual bool captures() const { return false; }

  // Starts the pass with rows on the device, each the coefficients, the number of the step, and what corrects it.
  virtual void launch(const at::Tensor& rows) = 0;

  // Values on the device, copied there without waiting.
  at::Tensor send(const void* values, int64_t count, at::ScalarType dtype) const;

  // Memory of the host that the device copies from without waiting.
  at::Tensor staging(int64_t count, at::ScalarType dtype) const;

 private:
  Group make_group(Dtypes dtypes, std::vector<size_t> members);
  void enter(Group& group, int64_t k, const Task& task);
  // Throws where a tensor of the step collected no longer fits the group, whose chunks are cut.
  void check_unchanged(const Group& group) const;
  void send_changes(Group& group) const;
  at::Tensor table_of_graph(Group& group);

  std::vector<Group> groups_;
  std::vector<at::Tensor> of_graphs_;  // what their replays copy from
  int64_t chunk_count_ = 0;
};

}  // namespace nesterov_pp::device
