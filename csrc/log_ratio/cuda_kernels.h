// CUDA kernel of the self-reward; cuda.cu launches it, and tests/log_ratio/test_reward_cuda.py runs it on the host. The maths of
// the KL estimates (terms.h) is what the CPU kernel runs.
//
// One launch, a block a row. The first walk sums log pi_sft - log pi_base in float64, counts the valid tokens and finds the
// last of them; the second, out of L2, writes every token's reward and its KL penalty. Both begin at the row's first valid
// token: padding on either side moves no token to another thread, and changes no bit.
#pragma once

#include "../common/cuda_rows.h"
#include "../common/scalar.h"

namespace srppo::scalar {

#include "terms.h"

constexpr int kThreads = 256;

struct RewardParams {
  const float* sft;
  const float* base;
  const bool* mask;
  const float* policy;  // null without a KL penalty
  const float* ref;
  const bool* truncated;    // null: no penalty for it
  const float* std_tensor;  // null: std
  bool per_token, by_length;
  float std, scale, clip, missing_eos, kl_coef;
  int estimator;
  int64_t steps;
  float* reward;
  float* penalty;
  float* score;  // null: no parts. Rows without tokens have them too, and no penalty
  float* shaped;
};

__global__ void __launch_bounds__(kThreads) reward_rows(RewardParams p) {
  const int64_t row = blockIdx.x, row_begin = row * p.steps, end = row_begin + p.steps;
  const int64_t begin = row_begin + first_valid<kThreads>(p.mask + row_begin, p.steps);
  double sum = 0.0, length = 0.0;
  int64_t mine = -1;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    if (!p.mask[at]) continue;
    sum += static_cast<double>(p.sft[at] - p.base[at]);
    length += 1.0;
    mine = at;
  }
  sum = block_sum<kThreads>(sum);
  length = block_sum<kThreads>(length);
  __shared__ long long last;
  if (threadIdx.x == 0) last = -1;
  __syncthreads();
  atomicMax(&last, static_cast<long long>(mine));
  __syncthreads();

  float divisor = p.std;
  if (p.by_length) divisor = length > 0.0 ? static_cast<float>(length) : 1.0f;
  else if (p.std_tensor) divisor = *p.std_tensor;
  const auto scaled = [&](float x) { return clamp(x / divisor * p.scale, -p.clip, p.clip); };
  const float at_last = p.per_token ? 0.0f : scaled(static_cast<float>(sum));
  const float cut = p.truncated && p.truncated[row] ? p.missing_eos : 0.0f;
  for (int64_t at = row_begin + threadIdx.x; at < begin; at += kThreads) {
    p.reward[at] = 0.0f;
    if (p.score) p.penalty[at] = 0.0f;
  }
  double shaped = 0.0;
  for (int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
    const bool valid = p.mask[at];
    float value = 0.0f, penalty = 0.0f;
    if (valid && p.per_token) {
      value = scaled(p.sft[at] - p.base[at]);
      shaped += static_cast<double>(value);
    }
    if (valid && p.policy) penalty = -(p.kl_coef * kl_estimate(p.policy[at] - p.ref[at], p.estimator));
    value += penalty;
    if (at == last) value = value + at_last - cut;
    p.reward[at] = valid ? value : 0.0f;
    if (p.score) p.penalty[at] = penalty;
  }
  if (!p.score) return;
  shaped = block_sum<kThreads>(shaped);
  if (threadIdx.x == 0) {
    p.score[row] = static_cast<float>(sum);
    p.shaped[row] =
        length > 0.0 ? static_cast<float>(shaped + static_cast<double>(at_last) - static_cast<double>(cut)) : 0.0f;
  }
}

}  // namespace srppo::scalar
