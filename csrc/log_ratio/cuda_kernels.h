// CUDA kernel of the self-reward; cuda.cu launches it, and tests/log_ratio/test_reward_cuda.py runs it on the host. The maths
// of the KL estimates (terms.h) is what the CPU kernel runs.
//
// One launch, a block a row, and one walk over it that begins at the row's first valid token: padding on either side moves no
// token to another thread, and changes no bit. The walk writes every token's reward and its KL penalty, and sums
// log pi_sft - log pi_base in float64; what the row's last valid token gets on top of that, its thread writes at the end. 512
// rows of 4096 tokens are four blocks a multiprocessor: a walk takes the latency of its loads, so a thread starts several at
// once.
#pragma once

#include "../common/cuda_rows.h"
#include "../common/scalar.h"

namespace srppo::scalar {

#include "terms.h"

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // tokens of a thread whose loads are on their way together

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
  float divisor = p.std;
  if (p.by_length && p.per_token) divisor = static_cast<float>(valid_tokens<kThreads>(p.mask + row_begin, p.steps));
  else if (p.std_tensor) divisor = *p.std_tensor;
  const auto scaled = [&](float x) { return clamp(x / divisor * p.scale, -p.clip, p.clip); };
  for (int64_t at = row_begin + threadIdx.x; at < begin; at += kThreads) {
    p.reward[at] = 0.0f;
    if (p.score) p.penalty[at] = 0.0f;
  }

  double sums[3] = {};  // of log-ratios, of rewards before the KL penalty, of valid tokens
  long long mine = -1;  // this thread's last valid token, and its reward
  float at_mine = 0.0f;
  for (int64_t start = begin + threadIdx.x; start < end; start += kAhead * kThreads) {
    bool valid[kAhead];
    float ratio[kAhead], d[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t at = start + j * kThreads;
      const bool inside = at < end;
      valid[j] = inside && p.mask[at];
      ratio[j] = inside ? p.sft[at] - p.base[at] : 0.0f;
      d[j] = inside && p.policy ? p.policy[at] - p.ref[at] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t at = start + j * kThreads;
      if (at >= end) break;
      float value = 0.0f, penalty = 0.0f;
      if (valid[j]) {
        sums[0] += static_cast<double>(ratio[j]);
        if (p.per_token) value = scaled(ratio[j]);
        sums[1] += static_cast<double>(value);
        sums[2] += 1.0;
        if (p.policy) penalty = -(p.kl_coef * kl_estimate(d[j], p.estimator));
        value += penalty;
        mine = at;
        at_mine = value;
      }
      p.reward[at] = value;
      if (p.score) p.penalty[at] = penalty;
    }
  }

  __shared__ long long last;
  if (threadIdx.x == 0) last = -1;
  block_sums<kThreads>(sums);
  long long latest = mine;
  for (int by = 16; by > 0; by /= 2) {
    const long long other = __shfl_down_sync(0xffffffffu, latest, by);
    latest = other > latest ? other : latest;
  }
  if ((threadIdx.x & 31) == 0) atomicMax(&last, latest);
  __syncthreads();

  if (p.by_length && !p.per_token) divisor = sums[2] > 0.0 ? static_cast<float>(sums[2]) : 1.0f;
  const float at_last = p.per_token ? 0.0f : scaled(static_cast<float>(sums[0]));
  const float cut = p.truncated && p.truncated[row] ? p.missing_eos : 0.0f;
  if (mine >= 0 && mine == last) p.reward[mine] = at_mine + at_last - cut;
  if (p.score && threadIdx.x == 0) {
    p.score[row] = static_cast<float>(sums[0]);
    p.shaped[row] =
        sums[2] > 0.0 ? static_cast<float>(sums[1] + static_cast<double>(at_last) - static_cast<double>(cut)) : 0.0f;
  }
}

}  // namespace srppo::scalar
