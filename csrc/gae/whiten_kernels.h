// CUDA kernels of masked moments and whitening; whiten.cu launches them, and tests/gae/test_gae_cuda.py runs them on the host.
//
// Moments: a block takes 4096 tokens of a row, from its first valid one on and held in registers, to their count, mean and
// squared deviations from that mean: two passes that read memory once, in float64. All 16 loads of a thread are on their way
// together, and 512 x 4096 tokens are one wave of blocks on an H100. The last block merges all of them by Chan's formula.
//
// Whitening: one thread of a block takes the moments to mean and scale, while the loads of the others are on their way.
#pragma once

#include "../common/cuda_rows.h"
#include "moments.h"

namespace srppo::whitening {

constexpr int kThreads = 256;
constexpr int kEach = 16, kTokens = kThreads * kEach;              // of moments
constexpr int kVectors = 2, kWhitened = kThreads * 4 * kVectors;  // of whitening, four tokens a vector

__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    moments_kernel(const float* x, const bool* mask, Rows shape, MomentsOut out) {
  const int64_t row = blockIdx.x % static_cast<unsigned>(shape.rows), part = blockIdx.x / static_cast<unsigned>(shape.rows);
  x += row * shape.steps;
  mask += row * shape.steps;
  const int64_t begin = first_valid<kThreads>(mask, shape.steps) + part * kTokens, left = shape.steps - begin;
  const int count = left < 0 ? 0 : left < kTokens ? static_cast<int>(left) : kTokens;
  float value[kEach];
  bool valid[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int place = j * kThreads + static_cast<int>(threadIdx.x);
    value[j] = place < count ? x[begin + place] : 0.0f;
    valid[j] = place < count && mask[begin + place];
  }
  merge_moments<kThreads>(out, block_moments<kThreads>(value, valid));
}

struct alignas(16) Four {
  float x[4];
};
struct alignas(4) FourBools {
  bool x[4];
};

// `vectors`: x and out lie at multiples of 16 bytes, and mask of 4.
__global__ void __launch_bounds__(kThreads)
    whiten_kernel(const float* x, const bool* mask, const double* moments, int64_t total, bool shift_mean, bool vectors,
                  double eps, float* out) {
  __shared__ double mean, scale;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWhitened + 4 * threadIdx.x;
  Four value[kVectors];
  FourBools valid[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = first + j * 4 * kThreads;
    if (vectors && at + 4 <= total) {
      value[j] = *reinterpret_cast<const Four*>(x + at);
      valid[j] = *reinterpret_cast<const FourBools*>(mask + at);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[j].x[i] = at + i < total ? x[at + i] : 0.0f;
      valid[j].x[i] = at + i < total && mask[at + i];
    }
  }
  if (threadIdx.x == 0) {
    const double freedom = moments[0] - 1.0;
    mean = moments[1];
    scale = rsqrt(moments[2] / (freedom > 1.0 ? freedom : 1.0) + eps);
  }
  __syncthreads();
  const double centre = mean, by = scale, shift = shift_mean ? 0.0 : centre;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int64_t at = first + j * 4 * kThreads;
    Four made;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      made.x[i] = valid[j].x[i] ? static_cast<float>((static_cast<double>(value[j].x[i]) - centre) * by + shift) : 0.0f;
    }
    if (vectors && at + 4 <= total) {
      *reinterpret_cast<Four*>(out + at) = made;
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i < total) out[at + i] = made.x[i];
    }
  }
}

}  // namespace srppo::whitening
