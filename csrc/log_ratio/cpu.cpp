// CPU kernel of srppo_kernels/log_ratio: the self-reward, placed, normalised, clipped and with its KL penalty.
#include <algorithm>
#include <limits>

#include "../common/blocks.h"
#include "../common/tensors.h"

namespace srppo {
namespace {

struct RewardArgs {
  const float* sft;
  const float* base;
  const bool* mask;
  const float* policy;  // null without a KL penalty
  const float* ref;
  const bool* truncated;  // null: no penalty
  bool per_token, by_length;
  float std, scale, clip, missing_eos, kl_coef;
  int estimator;
  std::int64_t steps;
  float* reward;
  float* penalty;
  float* score;  // null: no parts. Rows without tokens have them too, and no penalty
  float* shaped;
};

}  // namespace
}  // namespace srppo

#define SRPPO_KERNELS "../log_ratio/cpu_kernels.h"
#include "../common/each_level.h"

namespace srppo {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> log_ratio_reward(
    const Tensor& sft, const Tensor& base, const Tensor& mask, bool per_token, bool by_length, double std,
    const std::optional<Tensor>& std_tensor, double scale, std::optional<double> clip,
    const std::optional<Tensor>& truncated, double missing_eos, const std::optional<Tensor>& policy,
    const std::optional<Tensor>& ref, double kl_coef, std::int64_t estimator, bool parts) {
  const std::int64_t total = sft.numel(), rows = sft.size(0);
  RewardArgs args{};
  args.sft = floats(sft, total, "logprobs_sft");
  args.base = floats(base, total, "logprobs_base");
  args.mask = bools(mask, total, "mask");
  args.policy = floats(policy, total, "logprobs_policy");
  args.ref = floats(ref, total, "logprobs_ref");
  args.truncated = truncated ? bools(*truncated, rows, "truncated") : nullptr;
  args.per_token = per_token;
  args.by_length = by_length;
  args.std = std_tensor ? *floats(*std_tensor, 1, "running_std") : static_cast<float>(std);
  args.scale = static_cast<float>(scale);
  args.clip = clip ? static_cast<float>(*clip) : std::numeric_limits<float>::infinity();
  args.missing_eos = static_cast<float>(missing_eos);
  args.kl_coef = args.policy && args.ref ? static_cast<float>(kl_coef) : 0.0f;
  args.estimator = static_cast<int>(estimator);
  args.steps = sft.size(1);
  Tensor reward = torch::stable::empty_like(sft);
  args.reward = mutable_floats(reward);
  Tensor penalty = parts ? torch::stable::empty_like(sft) : torch::stable::new_empty(sft, {0});
  Tensor score = torch::stable::new_empty(sft, {parts ? rows : 0});
  Tensor shaped = torch::stable::new_empty(sft, {parts ? rows : 0});
  args.penalty = parts ? mutable_floats(penalty) : nullptr;
  args.score = parts ? mutable_floats(score) : nullptr;
  args.shaped = parts ? mutable_floats(shaped) : nullptr;
  const auto compute = SRPPO_AT_LEVEL(reward_rows);
  const std::int64_t grain = std::max<std::int64_t>(1, kTokensPerThread / std::max<std::int64_t>(args.steps, 1));
  torch::stable::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) { compute(args, begin, end); });
  return {reward, penalty, score, shaped};
}

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "log_ratio_reward(Tensor sft, Tensor base, Tensor mask, bool per_token, bool by_length, float std, "
      "Tensor? std_tensor, float scale, float? clip, Tensor? truncated, float missing_eos, Tensor? policy, Tensor? ref, "
      "float kl_coef, int estimator, bool parts) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CPU, m) { m.impl("log_ratio_reward", TORCH_BOX(&srppo::log_ratio_reward)); }
