// CUDA kernels of masked moments and whitening; whiten.cu launches them, and tests/gae/test_gae_cuda.py runs them on the host.
//
// A block takes 1024 tokens of a row, held in registers, to their count, mean and squared deviations from that mean: two passes
// that read memory once, in float64. The last block merges all of them by Chan's formula.
#pragma once

#include "../common/cuda_rows.h"
#include "moments.h"

namespace srppo::whitening {

constexpr int kThreads = 256, kEach = 4, kTokens = kThreads * kEach;

__global__ void __launch_bounds__(kThreads) moments_kernel(const float* x, const bool* mask, Rows shape, MomentsOut out) {
  const RowTokens<kThreads, kEach> tokens(shape, mask);
  double value[kEach];
  bool valid[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t at = tokens.at(j);
    valid[j] = at >= 0 && mask[at];
    value[j] = valid[j] ? static_cast<double>(x[at]) : 0.0;
  }
  merge_moments<kThreads>(out, block_moments<kThreads>(value, valid));
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
