// CUDA kernel of srppo_kernels/log_ratio. Compiled here, not run: no device was at hand; backend="native" takes it. The maths
// of the KL estimates (terms.h) is what the CPU kernel runs.
//
// One launch, a block a row. The first walk sums log pi_sft - log pi_base in float64, counts the valid tokens and finds the
// last of them; the second, out of L2, writes every token's reward and its KL penalty.
#include <limits>

#include "../common/cuda_launch.h"
#include "../common/cuda_reduce.h"
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
  float* penalty;  // null: no parts; with it score and shaped, one value a row
  float* score;
  float* shaped;
};

__global__ void __launch_bounds__(kThreads) reward_rows(RewardParams p) {
  const int64_t row = blockIdx.x, begin = row * p.steps, end = begin + p.steps;
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
    if (p.penalty) p.penalty[at] = penalty;
  }
  if (!p.penalty) return;
  shaped = block_sum<kThreads>(shaped);
  if (threadIdx.x == 0) {
    p.score[row] = static_cast<float>(sum);
    p.shaped[row] =
        length > 0.0 ? static_cast<float>(shaped + static_cast<double>(at_last) - static_cast<double>(cut)) : 0.0f;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> log_ratio_reward(
    const Tensor& sft, const Tensor& base, const Tensor& mask, bool per_token, bool by_length, double std,
    const std::optional<Tensor>& std_tensor, double scale, std::optional<double> clip,
    const std::optional<Tensor>& truncated, double missing_eos, const std::optional<Tensor>& policy,
    const std::optional<Tensor>& ref, double kl_coef, int64_t estimator, bool parts) {
  const torch::stable::accelerator::DeviceGuard guard(sft.get_device_index());
  const int64_t total = sft.numel(), rows = sft.size(0);
  RewardParams p{};
  p.sft = device_data<float>(sft, ScalarType::Float, total, "logprobs_sft");
  p.base = device_data<float>(base, ScalarType::Float, total, "logprobs_base");
  p.mask = device_data<bool>(mask, ScalarType::Bool, total, "mask");
  if (policy && ref && kl_coef != 0.0) {
    p.policy = device_data<float>(policy, ScalarType::Float, total, "logprobs_policy");
    p.ref = device_data<float>(ref, ScalarType::Float, total, "logprobs_ref");
  }
  p.truncated = device_data<bool>(truncated, ScalarType::Bool, rows, "truncated");
  p.std_tensor = device_data<float>(std_tensor, ScalarType::Float, 1, "running_std");
  p.per_token = per_token;
  p.by_length = by_length;
  p.std = static_cast<float>(std);
  p.scale = static_cast<float>(scale);
  p.clip = clip ? static_cast<float>(*clip) : std::numeric_limits<float>::infinity();
  p.missing_eos = static_cast<float>(missing_eos);
  p.kl_coef = static_cast<float>(kl_coef);
  p.estimator = static_cast<int>(estimator);
  p.steps = sft.size(1);
  Tensor reward = torch::stable::empty_like(sft);
  Tensor penalty = parts ? torch::stable::empty_like(sft) : torch::stable::new_empty(sft, {0});
  Tensor score = torch::stable::new_empty(sft, {parts ? rows : 0});
  Tensor shaped = torch::stable::new_empty(sft, {parts ? rows : 0});
  p.reward = static_cast<float*>(reward.mutable_data_ptr());
  p.score = static_cast<float*>(score.mutable_data_ptr());
  p.shaped = static_cast<float*>(shaped.mutable_data_ptr());
  p.penalty = parts ? static_cast<float*>(penalty.mutable_data_ptr()) : nullptr;
  if (rows > 0) {
    reward_rows<<<static_cast<unsigned>(rows), kThreads, 0, current_stream(sft)>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {reward, penalty, score, shaped};
}

}  // namespace srppo::scalar

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) { m.impl("log_ratio_reward", TORCH_BOX(&srppo::scalar::log_ratio_reward)); }
