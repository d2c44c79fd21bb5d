// CUDA launches of srppo_kernels/ppo_loss. Compiled here, not run on a device: none was at hand. So backend="auto" does not
// choose them; backend="native" does.
#include "../common/cuda_launch.h"
#include "cuda_kernels.h"

namespace srppo::scalar {

// Outputs and scratch of a loss over `like`; `lengths` is counted where the divisor needs it.
struct Buffers {
  Tensor loss, stats, partials, finished;
  std::optional<Tensor> lengths;
  Divisor divisor{};
  unsigned blocks;

  Buffers(const Tensor& like, const Tensor& mask, int64_t reduction, std::optional<double> number,
          const std::optional<Tensor>& tensor, int64_t stats_count, int64_t sums, cudaStream_t stream) {
    divisor.total = like.numel();
    divisor.steps = like.size(like.dim() - 1);
    divisor.rows = divisor.total ? divisor.total / divisor.steps : 0;
    divisor.reduction = static_cast<int>(reduction);
    divisor.given = number ? static_cast<float>(*number) : 0.0f;
    divisor.tensor = device_data<float>(tensor, ScalarType::Float, 1, "normalizer");
    // An empty batch still runs one block, which writes the zeros.
    blocks = static_cast<unsigned>(divisor.total ? (divisor.total + kTokens - 1) / kTokens : 1);
    loss = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef{}, ScalarType::Float);
    stats = torch::stable::new_empty(like, {stats_count}, ScalarType::Float);
    partials = torch::stable::new_empty(like, {static_cast<int64_t>(blocks) * sums}, ScalarType::Double);
    finished = torch::stable::new_zeros(like, {1}, ScalarType::Int);
    const bool given = number || tensor;
    if (reduction == kSequenceMean || (reduction == kTokenMean && !given)) {
      lengths = torch::stable::new_empty(like, {divisor.rows}, ScalarType::Int);
      auto* counts = static_cast<int*>(lengths->mutable_data_ptr());
      if (divisor.rows > 0)
        count_kernel<<<static_cast<unsigned>(divisor.rows), kThreads, 0, stream>>>(
            device_data<bool>(mask, ScalarType::Bool, divisor.total, "mask"), divisor.steps, counts);
      divisor.lengths = counts;
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& mask,
    const std::optional<Tensor>& entropy, double clip_low, double clip_high, std::optional<double> dual_clip,
    double entropy_coef, int64_t reduction, std::optional<double> number, const std::optional<Tensor>& tensor) {
  const torch::stable::accelerator::DeviceGuard guard(logprobs.get_device_index());
  const cudaStream_t stream = current_stream(logprobs);
  const int64_t total = logprobs.numel();
  Buffers buffers(logprobs, mask, reduction, number, tensor, 10, kPolicySums, stream);
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
  p.finished = static_cast<unsigned*>(buffers.finished.mutable_data_ptr());
  ppo_kernel<<<buffers.blocks, kThreads, 0, stream>>>(p, buffers.divisor);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {buffers.loss, d_logprobs, d_entropy, buffers.stats};
}

std::tuple<Tensor, Tensor, Tensor> value_loss(const Tensor& values, const Tensor& old_values, const Tensor& returns,
                                              const Tensor& mask, std::optional<double> clip,
                                              std::optional<double> number, const std::optional<Tensor>& tensor) {
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const cudaStream_t stream = current_stream(values);
  const int64_t total = values.numel();
  Buffers buffers(values, mask, kTokenMean, number, tensor, 7, kValueSums, stream);
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
  p.finished = static_cast<unsigned*>(buffers.finished.mutable_data_ptr());
  value_kernel<<<buffers.blocks, kThreads, 0, stream>>>(p, buffers.divisor);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {buffers.loss, d_values, buffers.stats};
}

}  // namespace srppo::scalar

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) {
  m.impl("ppo_loss", TORCH_BOX(&srppo::scalar::ppo_loss));
  m.impl("value_loss", TORCH_BOX(&srppo::scalar::value_loss));
}
