// CUDA launches of srppo_kernels/ppo_loss. First run on a device on 2026-11-26, an H100 80GB HBM3.
#include "../common/cuda_launch.h"
#include "cuda_kernels.h"

namespace srppo::scalar {

// Outputs, scratch and divisor of a loss over `like`.
struct Buffers {
  Tensor loss, weight, stats, partials;
  Divisor divisor{};
  unsigned blocks;

  Buffers(const Tensor& like, int64_t reduction, std::optional<double> number, const std::optional<Tensor>& tensor,
          int64_t stats_count, int64_t sums) {
    const int64_t total = like.numel(), steps = like.size(like.dim() - 1);
    divisor.shape = total ? Rows{total / steps, steps} : Rows{1, 0};
    divisor.reduction = static_cast<int>(reduction);
    divisor.tensor = device_data<float>(tensor, ScalarType::Float, 1, "normalizer");
    divisor.given = number ? static_cast<float>(*number) : reduction == kConstantLength ? static_cast<float>(total) : 1.0f;
    blocks = blocks_of(divisor.shape, kTokens);
    const auto scalar = [&] {
      return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef{}, ScalarType::Float);
    };
    const bool counted = !number && !tensor && (reduction == kTokenMean || reduction == kSequenceMean);
    loss = scalar();
    weight = counted ? scalar() : torch::stable::new_empty(like, {0}, ScalarType::Float);
    divisor.weight = counted ? static_cast<float*>(weight.mutable_data_ptr()) : nullptr;
    stats = torch::stable::new_empty(like, {stats_count}, ScalarType::Float);
    partials = torch::stable::new_empty(like, {static_cast<int64_t>(blocks) * sums}, ScalarType::Double);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& mask,
    const std::optional<Tensor>& entropy, double clip_low, double clip_high, std::optional<double> dual_clip,
    double entropy_coef, int64_t reduction, std::optional<double> number, const std::optional<Tensor>& tensor,
    const Tensor& finished) {
  const torch::stable::accelerator::DeviceGuard guard(logprobs.get_device_index());
  const int64_t total = logprobs.numel();
  Buffers buffers(logprobs, reduction, number, tensor, 10, kPolicySums);
  Tensor d_logprobs = torch::stable::empty_like(logprobs);
  Tensor d_entropy = entropy ? torch::stable::empty_like(logprobs) : torch::stable::new_empty(logprobs, {0});
  PolicyParams p{};
  p.logprobs = device_data<float>(logprobs, ScalarType::Float, total, "logprobs");
  p.old_logprobs = device_data<float>(old_logprobs, ScalarType::Float, total, "old_logprobs");
  p.advantages = device_data<float>(advantages, ScalarType::Float, total, "advantages");
  p.mask = device_data<bool>(mask, ScalarType::Bool, total, "mask");
  p.entropy = device_data<float>(entropy, ScalarType::Float, total, "entropy");
  p.bounds = {static_cast<float>(1.0 - clip_low), static_cast<float>(1.0 + clip_high),
              dual_clip ? static_cast<float>(*dual_clip) : INFINITY};
  p.entropy_coef = static_cast<float>(entropy_coef);
  p.d_logprobs = static_cast<float*>(d_logprobs.mutable_data_ptr());
  p.d_entropy = static_cast<float*>(d_entropy.mutable_data_ptr());
  p.loss = static_cast<float*>(buffers.loss.mutable_data_ptr());
  p.stats = static_cast<float*>(buffers.stats.mutable_data_ptr());
  p.partials = static_cast<double*>(buffers.partials.mutable_data_ptr());
  p.finished = counter(finished);
  ppo_kernel<<<buffers.blocks, kThreads, 0, current_stream(logprobs)>>>(p, buffers.divisor);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {buffers.loss, d_logprobs, d_entropy, buffers.stats, buffers.weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss(const Tensor& values, const Tensor& old_values,
                                                      const Tensor& returns, const Tensor& mask,
                                                      std::optional<double> clip, std::optional<double> number,
                                                      const std::optional<Tensor>& tensor, const Tensor& finished) {
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const int64_t total = values.numel();
  Buffers buffers(values, kTokenMean, number, tensor, kValueStats, kValueSums);
  Tensor d_values = torch::stable::empty_like(values);
  ValueParams p{};
  p.values = device_data<float>(values, ScalarType::Float, total, "values");
  p.old_values = device_data<float>(old_values, ScalarType::Float, total, "old_values");
  p.returns = device_data<float>(returns, ScalarType::Float, total, "returns");
  p.mask = device_data<bool>(mask, ScalarType::Bool, total, "mask");
  p.clip = clip ? static_cast<float>(*clip) : INFINITY;
  p.d_values = static_cast<float*>(d_values.mutable_data_ptr());
  p.loss = static_cast<float*>(buffers.loss.mutable_data_ptr());
  p.stats = static_cast<float*>(buffers.stats.mutable_data_ptr());
  p.partials = static_cast<double*>(buffers.partials.mutable_data_ptr());
  p.finished = counter(finished);
  value_kernel<<<buffers.blocks, kThreads, 0, current_stream(values)>>>(p, buffers.divisor);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {buffers.loss, d_values, buffers.stats, buffers.weight};
}

std::tuple<Tensor, Tensor> scaled_gradients(const Tensor& upstream, const Tensor& weight, const Tensor& first,
                                            const Tensor& second) {
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  const int64_t total = first.numel();
  const bool two = second.numel() > 0;
  Tensor out_first = torch::stable::empty_like(first), out_second = torch::stable::empty_like(second);
  if (total > 0) {
    scale_kernel<<<static_cast<unsigned>((total + kTokens - 1) / kTokens), kThreads, 0, current_stream(first)>>>(
        device_data<float>(upstream, ScalarType::Float, 1, "upstream"),
        weight.numel() ? device_data<float>(weight, ScalarType::Float, 1, "weight") : nullptr,
        device_data<float>(first, ScalarType::Float, total, "first"),
        two ? device_data<float>(second, ScalarType::Float, total, "second") : nullptr, total,
        static_cast<float*>(out_first.mutable_data_ptr()), static_cast<float*>(out_second.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {out_first, out_second};
}

}  // namespace srppo::scalar

// Beside the CPU's ppo_loss and value_loss (cpu.cpp): these return a weight as well, and take the counter of their stream.
STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "ppo_loss_cuda(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? entropy, float clip_low, "
      "float clip_high, float? dual_clip, float entropy_coef, int reduction, float? divisor, Tensor? divisor_tensor, "
      "Tensor(a!) finished) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "value_loss_cuda(Tensor values, Tensor old_values, Tensor returns, Tensor mask, float? clip, float? divisor, "
      "Tensor? divisor_tensor, Tensor(a!) finished) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("scaled_gradients_cuda(Tensor upstream, Tensor weight, Tensor first, Tensor second) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) {
  m.impl("ppo_loss_cuda", TORCH_BOX(&srppo::scalar::ppo_loss));
  m.impl("value_loss_cuda", TORCH_BOX(&srppo::scalar::value_loss));
  m.impl("scaled_gradients_cuda", TORCH_BOX(&srppo::scalar::scaled_gradients));
}
