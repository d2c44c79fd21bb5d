// CUDA kernels of masked moments and whitening. Compiled here, not run: no device was at hand; backend="native" takes them.
//
// A block takes 1024 tokens, held in registers, to their count, mean and squared deviations from that mean: two passes that
// read memory once, in float64. The last block merges all of them by Chan's formula.
#include <algorithm>

#include "../common/cuda_launch.h"
#include "../common/cuda_reduce.h"

namespace srppo {
namespace {

constexpr int kThreads = 256, kEach = 4, kTokens = kThreads * kEach;

__global__ void __launch_bounds__(kThreads)
    moments_kernel(const float* x, const bool* mask, int64_t total, double* partials, unsigned* finished, double* moments) {
  double value[kEach], sum = 0.0, count = 0.0, squares = 0.0;
  bool valid[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokens + j * kThreads + threadIdx.x;
    valid[j] = at < total && mask[at];
    value[j] = valid[j] ? static_cast<double>(x[at]) : 0.0;
    sum += value[j];
    count += valid[j] ? 1.0 : 0.0;
  }
  count = block_sum<kThreads>(count);
  const double mean = block_sum<kThreads>(sum) / (count > 0.0 ? count : 1.0);
#pragma unroll
  for (int j = 0; j < kEach; ++j) squares += valid[j] ? (value[j] - mean) * (value[j] - mean) : 0.0;
  squares = block_sum<kThreads>(squares);
  if (threadIdx.x == 0) {
    partials[3 * blockIdx.x] = count;
    partials[3 * blockIdx.x + 1] = mean;
    partials[3 * blockIdx.x + 2] = squares;
  }
  if (!last_block(finished)) return;

  double n = 0.0, weighted = 0.0, within = 0.0, between = 0.0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const double c = __ldcg(partials + 3 * block);
    n += c;
    weighted += c * __ldcg(partials + 3 * block + 1);
    within += __ldcg(partials + 3 * block + 2);
  }
  n = block_sum<kThreads>(n);
  const double all = block_sum<kThreads>(weighted) / (n > 0.0 ? n : 1.0);
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const double c = __ldcg(partials + 3 * block), off = __ldcg(partials + 3 * block + 1) - all;
    between += c > 0.0 ? c * off * off : 0.0;
  }
  within = block_sum<kThreads>(within + between);
  if (threadIdx.x == 0) {
    moments[0] = n;
    moments[1] = all;
    moments[2] = within;
  }
}

__global__ void __launch_bounds__(kThreads)
    whiten_kernel(const float* x, const bool* mask, const double* moments, int64_t total, bool shift_mean, double eps,
                  float* out) {
  const double freedom = moments[0] - 1.0, mean = moments[1];
  const double scale = rsqrt(moments[2] / (freedom > 1.0 ? freedom : 1.0) + eps), shift = shift_mean ? 0.0 : mean;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokens + j * kThreads + threadIdx.x;
    if (at >= total) return;
    out[at] = mask[at] ? static_cast<float>((static_cast<double>(x[at]) - mean) * scale + shift) : 0.0f;
  }
}

unsigned blocks_for(int64_t total) { return static_cast<unsigned>(std::max<int64_t>(1, (total + kTokens - 1) / kTokens)); }

Tensor whiten_moments(const Tensor& x, const Tensor& mask) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t total = x.numel();
  const unsigned blocks = blocks_for(total);  // one at least, to write the zeros of an empty batch
  Tensor moments = torch::stable::new_empty(x, {3}, ScalarType::Double);
  Tensor partials = torch::stable::new_empty(x, {3 * static_cast<int64_t>(blocks)}, ScalarType::Double);
  Tensor finished = torch::stable::new_zeros(x, {1}, ScalarType::Int);
  moments_kernel<<<blocks, kThreads, 0, current_stream(x)>>>(
      device_data<float>(x, ScalarType::Float, total, "x"), device_data<bool>(mask, ScalarType::Bool, total, "mask"), total,
      static_cast<double*>(partials.mutable_data_ptr()), static_cast<unsigned*>(finished.mutable_data_ptr()),
      static_cast<double*>(moments.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return moments;
}

Tensor whiten_apply(const Tensor& x, const Tensor& mask, const Tensor& moments, bool shift_mean, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t total = x.numel();
  Tensor out = torch::stable::empty_like(x);
  if (total > 0) {
    whiten_kernel<<<blocks_for(total), kThreads, 0, current_stream(x)>>>(
        device_data<float>(x, ScalarType::Float, total, "x"), device_data<bool>(mask, ScalarType::Bool, total, "mask"),
        device_data<double>(moments, ScalarType::Double, 3, "moments"), total, shift_mean, eps,
        static_cast<float*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) {
  m.impl("whiten_moments", TORCH_BOX(&srppo::whiten_moments));
  m.impl("whiten_apply", TORCH_BOX(&srppo::whiten_apply));
}
