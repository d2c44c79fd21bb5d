// CUDA kernels of the policy and value losses; cuda.cu launches them, and tests/ppo_loss/test_losses_cuda.py runs them on the
// host. The maths (terms.h) is what the CPU kernels run.
//
// One elementwise pass writes the gradient and leaves one float64 partial of every sum a block; the block that finishes last
// adds them in a fixed order, so a result does not depend on which it was. Where the divisor is a count of the mask, a first
// launch counts it: nothing waits for the host.
#pragma once

#include <math.h>

#include "../common/cuda_reduce.h"
#include "../common/scalar.h"

namespace srppo::scalar {

#include "terms.h"

constexpr int kThreads = 256, kPerThread = 4, kTokens = kThreads * kPerThread;

// The order of REDUCTIONS in reference.py.
enum Reduction : int { kTokenMean, kSequenceMean, kSum, kConstantLength };

struct Divisor {
  int reduction;
  float given;            // caller's number, or 0
  const float* tensor;    // caller's tensor, or null
  const int* lengths;     // valid tokens of each row; null where no count is needed
  int64_t rows, steps, total;
};

__global__ void count_kernel(const bool* mask, int64_t steps, int* lengths) {
  int mine = 0;
  for (int64_t t = threadIdx.x; t < steps; t += blockDim.x) mine += mask[blockIdx.x * steps + t];
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, mine);  // integers: any order
  __syncthreads();
  if (threadIdx.x == 0) lengths[blockIdx.x] = sum;
}

// What a token of the batch is weighted by, before its row's length. Called by a whole block.
__device__ float block_weight(const Divisor& d) {
  __shared__ int64_t counted;
  if (threadIdx.x == 0) counted = 0;
  __syncthreads();
  if (d.lengths && !d.tensor && d.given == 0.0f) {
    int64_t mine = 0;
    for (int64_t row = threadIdx.x; row < d.rows; row += blockDim.x)
      mine += d.reduction == kSequenceMean ? d.lengths[row] > 0 : d.lengths[row];
    atomicAdd(reinterpret_cast<unsigned long long*>(&counted), static_cast<unsigned long long>(mine));
  }
  __syncthreads();
  float by = 1.0f;
  if (d.tensor) by = *d.tensor;
  else if (d.given != 0.0f) by = d.given;
  else if (d.lengths) by = static_cast<float>(counted);
  else if (d.reduction == kConstantLength) by = static_cast<float>(d.total);
  return 1.0f / (by == 0.0f ? 1.0f : by);
}

__device__ __forceinline__ float token_weight(const Divisor& d, float weight, int64_t at) {
  if (d.reduction != kSequenceMean) return weight;
  const int length = d.lengths[at / d.steps];
  return weight / static_cast<float>(length > 0 ? length : 1);
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

__device__ double variance(double sum, double squares, double count) {
  const double mean = sum / count, result = squares / count - mean * mean;
  return result < 0.0 ? 0.0 : result;
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

constexpr int kPolicySums = 11;  // loss, k3, log ratio, deviation, its square, entropy, low, high, dual, valid, largest ratio

__global__ void __launch_bounds__(kThreads) ppo_kernel(PolicyParams p, Divisor divisor) {
  const float weight = block_weight(divisor);
  double sums[kPolicySums] = {};
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokens + j * kThreads + threadIdx.x;
    if (at >= divisor.total) break;
    const bool valid = p.mask[at];
    const float w = token_weight(divisor, weight, at);
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
    sums[10] = terms.ratio > sums[10] ? terms.ratio : sums[10];
  }
  if (!grid_total(sums, p.partials, p.finished)) return;
  const double n = sums[9] > 0 ? sums[9] : 1.0, mean = sums[9] > 0 ? 1.0 + sums[3] / n : 0.0;
  *p.loss = static_cast<float>(sums[0]);
  const double stats[] = {sums[1] / n, -sums[2] / n, sums[6] / n, sums[7] / n, sums[8] / n, mean,
                          isnan(mean) ? mean : sums[10], variance(sums[3], sums[4], n), sums[5] / n, sums[9]};
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

constexpr int kValueSums = 9;  // loss, error, its square, value, return, its square, clipped, valid, (no maximum)

__global__ void __launch_bounds__(kThreads) value_kernel(ValueParams p, Divisor divisor) {
  const float weight = block_weight(divisor);
  double sums[kValueSums] = {};
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokens + j * kThreads + threadIdx.x;
    if (at >= divisor.total) break;
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
  *p.loss = static_cast<float>(sums[0]);
  const double stats[] = {sums[6] / n,  sums[2] / n, sums[3] / n, sums[4] / n, variance(sums[4], sums[5], n),
                          variance(sums[1], sums[2], n), sums[7]};
  for (int i = 0; i < 7; ++i) p.stats[i] = static_cast<float>(stats[i]);
}

}  // namespace srppo::scalar
