// CUDA kernels of masked moments and whitening; whiten.cu launches them, and tests/gae/test_gae_cuda.py runs them on the host.
//
// A block takes 1024 tokens, held in registers, to their count, mean and squared deviations from that mean: two passes that
// read memory once, in float64. The last block merges all of them by Chan's formula.
#pragma once

#include "../common/cuda_reduce.h"

namespace srppo::whitening {

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

}  // namespace srppo::whitening
