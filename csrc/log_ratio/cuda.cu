// CUDA launch of srppo_kernels/log_ratio. First run on a device on 2026-11-26, an H100 80GB HBM3.
#include <limits>

#include "../common/cuda_launch.h"
#include "cuda_kernels.h"

namespace srppo::scalar {

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
  p.penalty = parts ? static_cast<float*>(penalty.mutable_data_ptr()) : nullptr;
  p.score = parts ? static_cast<float*>(score.mutable_data_ptr()) : nullptr;
  p.shaped = parts ? static_cast<float*>(shaped.mutable_data_ptr()) : nullptr;
  if (rows > 0) {
    reward_rows<<<static_cast<unsigned>(rows), kThreads, 0, current_stream(sft)>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {reward, penalty, score, shaped};
}

}  // namespace srppo::scalar

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) { m.impl("log_ratio_reward", TORCH_BOX(&srppo::scalar::log_ratio_reward)); }
