// CUDA kernels of the policy and value losses; cuda.cu launches them, and tests/ppo_loss/test_losses_cuda.py runs them on the
// host. The maths (terms.h) is what the CPU kernels run.
//
// One launch: every block takes 1024 tokens of a row, writes their gradient and leaves one float64 partial of every sum; the
// block that finishes last adds them in a fixed order, so a result depends neither on which it was nor on padding
// (cuda_rows.h). Nothing waits, and nothing is counted beforehand: where the divisor is a count of the mask, gradients are left
// undivided, and `weight`, what they are still to be multiplied by, is written beside the loss. The backward does so
// (scale_kernel), in the launch that multiplies by the upstream gradient.
#pragma once

#include <math.h>

#include "../common/cuda_rows.h"
#include "../common/scalar.h"
#include "moments.h"

namespace srppo::scalar {

#include "terms.h"

constexpr int kThreads = 256, kPerThread = 4, kTokens = kThreads * kPerThread;

// The order of REDUCTIONS in reference.py.
enum Reduction : int { kTokenMean, kSequenceMean, kSum, kConstantLength };

struct Divisor {
  int reduction;
  float given;          // caller's number, or the reduction's; 1 where there is nothing to divide by
  const float* tensor;  // caller's tensor, or null
  float* weight;        // where the divisor is counted: 1 / divisor goes there; else null
  Rows shape;
};

// What a token of row `row` is weighted by at once.
__device__ inline float token_weight(const Divisor& d, int64_t length) {
  const float by = d.tensor ? *d.tensor : d.given, weight = 1.0f / (by == 0.0f ? 1.0f : by);
  return d.reduction == kSequenceMean ? weight / static_cast<float>(length > 0 ? length : 1) : weight;
}

// Loss and weight from the sum of all tokens and the number of them, or of rows that have some.
__device__ inline void store_loss(const Divisor& d, float* loss, double sum, double counted) {
  const double by = d.weight && counted > 0.0 ? counted : 1.0;
  *loss = static_cast<float>(sum / by);
  if (d.weight) *d.weight = static_cast<float>(1.0 / by);
}

// Sums of a block in a fixed tree, the maximum as the last of N. Thread 0 has the result.
template <int N>
__device__ void block_total(double (&x)[N]) {
  __shared__ double warps[kThreads / 32][N];
  __syncthreads();  // the call before this one has been read
#pragma unroll
  for (int i = 0; i < N; ++i)
    for (int by = 16; by > 0; by /= 2) {
      const double other = __shfl_down_sync(0xffffffffu, x[i], by);
      x[i] = i == N - 1 ? (other > x[i] ? other : x[i]) : x[i] + other;
    }
  if ((threadIdx.x & 31) == 0)
    for (int i = 0; i < N; ++i) warps[threadIdx.x / 32][i] = x[i];
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kThreads / 32; ++w)
      for (int i = 0; i < N; ++i) x[i] = i == N - 1 ? (warps[w][i] > x[i] ? warps[w][i] : x[i]) : x[i] + warps[w][i];
}

// The grid's total of every sum, in thread 0 of the block that finishes last, which alone gets true. The maximum rides along
// as the last of N; by comparison, so that it drops a NaN.
template <int N>
__device__ bool grid_total(double (&x)[N], double* partials, unsigned* finished) {
  block_total(x);
  if (threadIdx.x == 0)
    for (int i = 0; i < N; ++i) partials[blockIdx.x * N + i] = x[i];
  if (!last_block(finished)) return false;
  for (int i = 0; i < N; ++i) x[i] = 0.0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads)
    for (int i = 0; i < N; ++i) {
      const double part = __ldcg(partials + block * N + i);
      x[i] = i == N - 1 ? (part > x[i] ? part : x[i]) : x[i] + part;
    }
  block_total(x);
  return threadIdx.x == 0;
}

struct PolicyParams {
  const float* logprobs;
  const float* old_logprobs;
  const float* advantages;
  const bool* mask;
  const float* entropy;
  PpoBounds bounds;
  float entropy_coef;
  float* d_logprobs;
  float* d_entropy;
  float* loss;
  float* stats;
  double* partials;
  unsigned* finished;
};

// Loss, k3, log ratio, deviation, its square, entropy, low, high, dual, valid, rows with a valid token, largest ratio.
constexpr int kPolicySums = 12;

__global__ void __launch_bounds__(kThreads) ppo_kernel(PolicyParams p, Divisor divisor) {
  const RowTokens<kThreads, kPerThread> tokens(divisor.shape, p.mask);
  const bool by_row = divisor.reduction == kSequenceMean;
  const int64_t length = by_row ? valid_tokens<kThreads>(p.mask + tokens.begin, tokens.steps) : 0;
  const float w = token_weight(divisor, length);
  double sums[kPolicySums] = {};
  if (threadIdx.x == 0 && tokens.part == 0) sums[10] = length > 0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t at = tokens.at(j);
    if (at < 0) break;
    const bool valid = p.mask[at];
    const PpoTerms terms = ppo_terms(valid ? p.logprobs[at] : 0.0f, valid ? p.old_logprobs[at] : 0.0f,
                                     valid ? p.advantages[at] : 0.0f, valid, p.bounds);
    p.d_logprobs[at] = terms.d_logprob * w;
    const float entropy = p.entropy && valid ? p.entropy[at] : 0.0f;
    if (p.entropy) p.d_entropy[at] = valid ? -p.entropy_coef * w : 0.0f;
    if (!valid) continue;
    const double off = static_cast<double>(terms.ratio - 1.0f);
    sums[0] += (static_cast<double>(terms.loss) - static_cast<double>(p.entropy_coef) * entropy) * static_cast<double>(w);
    sums[1] += terms.k3;
    sums[2] += terms.log_ratio;
    sums[3] += off;
    sums[4] += off * off;
    sums[5] += entropy;
    sums[6] += terms.clipped_low;
    sums[7] += terms.clipped_high;
    sums[8] += terms.clipped_dual;
    sums[9] += 1.0;
    sums[11] = terms.ratio > sums[11] ? terms.ratio : sums[11];
  }
  if (!grid_total(sums, p.partials, p.finished)) return;
  const double n = sums[9] > 0 ? sums[9] : 1.0, mean = sums[9] > 0 ? 1.0 + sums[3] / n : 0.0;
  store_loss(divisor, p.loss, sums[0], by_row ? sums[10] : sums[9]);
  const double stats[] = {sums[1] / n, -sums[2] / n, sums[6] / n, sums[7] / n, sums[8] / n, mean,
                          isnan(mean) ? mean : sums[11], variance(sums[3], sums[4], n), sums[5] / n, sums[9]};
  for (int i = 0; i < 10; ++i) p.stats[i] = static_cast<float>(stats[i]);
}

struct ValueParams {
  const float* values;
  const float* old_values;
  const float* returns;
  const bool* mask;
  float clip;
  float* d_values;
  float* loss;
  float* stats;
  double* partials;
  unsigned* finished;
};

constexpr int kValueStats = 8;  // those of reference.py
constexpr int kValueSums = 9;   // loss, error, its square, value, return, its square, clipped, valid, (no maximum)

__global__ void __launch_bounds__(kThreads) value_kernel(ValueParams p, Divisor divisor) {
  const RowTokens<kThreads, kPerThread> tokens(divisor.shape, p.mask);
  const float weight = token_weight(divisor, 0);
  double sums[kValueSums] = {};
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t at = tokens.at(j);
    if (at < 0) break;
    const bool valid = p.mask[at];
    const float value = valid ? p.values[at] : 0.0f, target = valid ? p.returns[at] : 0.0f;
    const ValueTerms terms = value_terms(value, valid ? p.old_values[at] : 0.0f, target, valid, p.clip);
    p.d_values[at] = terms.d_value * weight;
    if (!valid) continue;
    const double error = terms.error, r = target;
    sums[0] += static_cast<double>(terms.loss) * static_cast<double>(weight);
    sums[1] += error;
    sums[2] += error * error;
    sums[3] += value;
    sums[4] += r;
    sums[5] += r * r;
    sums[6] += terms.clipped;
    sums[7] += 1.0;
  }
  if (!grid_total(sums, p.partials, p.finished)) return;
  const double n = sums[7] > 0 ? sums[7] : 1.0;
  store_loss(divisor, p.loss, sums[0], sums[7]);
  const double of_targets = variance(sums[4], sums[5], n), of_errors = variance(sums[1], sums[2], n);
  const double stats[kValueStats] = {sums[6] / n, sums[2] / n, sums[3] / n, sums[4] / n, of_targets, of_errors,
                                     explained_variance(of_targets, of_errors), sums[7]};
  for (int i = 0; i < kValueStats; ++i) p.stats[i] = static_cast<float>(stats[i]);
}

// Both gradients, of which the second may be null, times the upstream gradient and, if there is one, the weight.
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const float* upstream, const float* weight, const float* first, const float* second, int64_t total,
                 float* out_first, float* out_second) {
  const float by = weight ? *upstream * *weight : *upstream;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokens + j * kThreads + threadIdx.x;
    if (at >= total) return;
    out_first[at] = first[at] * by;
    if (second) out_second[at] = second[at] * by;
  }
}

}  // namespace srppo::scalar
