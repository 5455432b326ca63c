#include "plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../plan/raw.h"

namespace nesterov_pp::cuda {
namespace {

void check(cudaError_t error, const char* what, const at::Device& device) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("nesterov_pp: the " + std::string(what) + " on " + device.str() +
                           " was not launched: " + cudaGetErrorString(error));
}

device::Table table_of(const device::Group& group) {
  return {group.table.const_data_ptr<int64_t>(), static_cast<int64_t>(group.members.size())};
}

}  // namespace

std::vector<StepClass> CudaPlan::collect(const StepSlots& slots) {
  scaling_.reset();
  if (groups().empty()) return DevicePlan::collect(slots);  // no parameter, so no device
  const c10::cuda::OptionalCUDAGuard guard(device_);
  return DevicePlan::collect(slots);
}

bool CudaPlan::captures() const {
  auto status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(device_.index()), &status);
  if (error != cudaSuccess)
    throw std::runtime_error("nesterov_pp: " + device_.str() +
                             " does not say whether it captures a graph: " + cudaGetErrorString(error));
  return status != cudaStreamCaptureStatusNone;
}

at::Tensor CudaPlan::reduce(double scale, double limit, const float* grad_scale, bool with_norm) const {
  const c10::cuda::OptionalCUDAGuard guard(device_);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device_.index());
  const auto options = at::device(device_).dtype(at::kDouble);
  const int64_t count = with_norm ? chunk_count() : 0;
  const at::Tensor partials = at::empty({std::max<int64_t>(count, 1)}, options), result = at::empty({2}, options);
  auto* sums = partials.mutable_data_ptr<double>();
  if (with_norm)
    for (const auto& group : groups())
      check(squares(table_of(group), group.chunks.const_data_ptr<int64_t>(), group.chunks.numel(), group.dtypes.grad,
                    sums + group.first_chunk, stream),
            "norm of the gradients", device_);
  static_assert(sizeof(Scaling) == 2 * sizeof(double), "a tensor of two elements");
  check(scaling(sums, count, scale, limit, grad_scale, reinterpret_cast<Scaling*>(result.mutable_data_ptr<double>()),
                stream),
        "scaling of the gradients", device_);
  return result;
}

double CudaPlan::gradient_norm() { return groups().empty() ? 0 : reduce(1, 0, nullptr, true)[0].item<double>(); }

std::optional<at::Tensor> CudaPlan::scale(double scale, std::optional<double> limit,
                                          const std::optional<at::Tensor>& grad_scale) {
  if (groups().empty()) return limit ? std::optional<at::Tensor>(at::zeros({}, at::kDouble)) : std::nullopt;
  const float* divisor = nullptr;
  if (grad_scale) {
    if (grad_scale->device() != device_ || grad_scale->scalar_type() != at::kFloat || grad_scale->numel() != 1 ||
        !is_raw(*grad_scale))
      throw std::invalid_argument("grad_scale must be one float32 number on " + device_.str());
    divisor = grad_scale->const_data_ptr<float>();
  }
  scaling_ = reduce(scale, limit.value_or(0), divisor, limit.has_value());
  return limit ? std::optional<at::Tensor>(scaling_[0]) : std::nullopt;
}

void CudaPlan::launch(const at::Tensor& rows) {
  if (groups().empty()) return;
  const c10::cuda::OptionalCUDAGuard guard(device_);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device_.index());
  const double* factor = scaling_.defined() ? scaling_.const_data_ptr<double>() + 1 : nullptr;
  for (const auto& group : groups()) {
    const device::Launch launch{table_of(group),
                                group.chunks.const_data_ptr<int64_t>(),
                                group.chunks.numel(),
                                group.elements,
                                rows.const_data_ptr<double>(),
                                factor,
                                static_cast<int32_t>(slots_.grads),
                                static_cast<int32_t>(slots_.source),
                                static_cast<int32_t>(slots_.target),
                                t_.rule,
                                t_.ring_predicts,
                                RoundKeys::from(seed_.value_or(t_.code_seed))};
    check(step(launch, {group.dtypes, t_.rule.normaliser, t_.corrects, seed_.has_value()}, stream), "step", device_);
  }
  scaling_.reset();
}

}  // namespace nesterov_pp::cuda
