#include "../device/corrected.h"
#include "grid.h"
#include "kernels.h"

namespace nesterov_pp::cuda {
namespace {

using device::CorrectedPass;
using device::Launch;

constexpr int kBlocks = 2;  // on a multiprocessor: up to 128 registers a thread, for seven streams

template <class P>
__global__ void __launch_bounds__(kThreads, kBlocks) corrected_kernel(const __grid_constant__ Launch launch) {
  device::corrected_step<P>(launch, blockIdx.x, gridDim.x, threadIdx.x, kThreads);
}

using Kernel = void (*)(Launch);

template <class W, class M, bool kAdaptive>
Kernel by_kind(Kind kind) {
  switch (kind) {
    case Kind::kDelayCompensation:
      return corrected_kernel<CorrectedPass<W, M, kAdaptive, Kind::kDelayCompensation>>;
    case Kind::kAdaptiveDelayCompensation:
      return corrected_kernel<CorrectedPass<W, M, kAdaptive, Kind::kAdaptiveDelayCompensation>>;
    case Kind::kGap:
      return corrected_kernel<CorrectedPass<W, M, kAdaptive, Kind::kGap>>;
    case Kind::kDiscrepancy:
      return corrected_kernel<CorrectedPass<W, M, kAdaptive, Kind::kDiscrepancy>>;
    default:
      return corrected_kernel<CorrectedPass<W, M, kAdaptive, Kind::kNone>>;
  }
}

template <class W, class M>
Kernel by_rule(bool adaptive, Kind kind) {
  return adaptive ? by_kind<W, M, true>(kind) : by_kind<W, M, false>(kind);
}

Kernel kernel_of(Dtypes dtypes, bool adaptive, Kind kind) {
  const auto [weight, grad, moment] = dtypes;
  if (weight != grad) return nullptr;
  if (weight == Dtype::kDouble && moment == weight) return by_rule<double, double>(adaptive, kind);
  if (weight == Dtype::kFloat && moment == weight) return by_rule<float, float>(adaptive, kind);
  if (weight == Dtype::kFloat && moment == Dtype::kBFloat16) return by_rule<float, BFloat16>(adaptive, kind);
  if (weight == Dtype::kBFloat16 && moment == weight) return by_rule<BFloat16, BFloat16>(adaptive, kind);
  if (weight == Dtype::kBFloat16 && moment == Dtype::kFloat) return by_rule<BFloat16, float>(adaptive, kind);
  return nullptr;
}

}  // namespace

cudaError_t corrected_step(const Launch& launch, Dtypes dtypes, bool adaptive, Kind kind, cudaStream_t stream) {
  if (launch.chunk_count == 0) return cudaSuccess;
  unsigned int blocks = 0;
  const Kernel kernel = kernel_of(dtypes, adaptive, kind);
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  const cudaError_t error = resident_blocks(kBlocks, launch.chunk_count, &blocks);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace nesterov_pp::cuda
