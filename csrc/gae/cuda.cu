// CUDA launches of srppo_kernels/gae. First run on a device on 2026-11-26, an H100 80GB HBM3.
#include "../common/cuda_launch.h"
#include "cuda_adjoint.h"
#include "cuda_kernels.h"

namespace srppo::scalar {

// `average`: tokens of a row. Packed rows' own lengths lie on the device; either way is right for any length.
template <bool carry>
void launch(const GaeParams& p, const Tensor& like, int64_t rows, int64_t longest, int64_t average, cudaStream_t stream) {
  if (average < kLong || rows > kFew) {
    gae_rows<carry><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  Spread spread{};
  spread.tiles = (longest + kTile - 1) / kTile;
  const int64_t blocks = rows * spread.tiles;
  const auto bytes = [&](int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Byte); };
  Tensor ends = torch::stable::new_empty(like, {rows}, ScalarType::Long);
  Tensor maps = bytes(blocks * kWarps * static_cast<int64_t>(sizeof(GaeMap)));
  Tensor states = bytes(blocks * static_cast<int64_t>(sizeof(GaeState)));
  Tensor moments = bytes(p.moments.moments ? blocks * static_cast<int64_t>(sizeof(Moments)) : 0);
  spread.ends = static_cast<int64_t*>(ends.mutable_data_ptr());
  spread.maps = static_cast<GaeMap*>(maps.mutable_data_ptr());
  spread.states = static_cast<GaeState*>(states.mutable_data_ptr());
  spread.moments = p.moments.moments ? static_cast<Moments*>(moments.mutable_data_ptr()) : nullptr;
  row_ends<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(p, spread);
  tile_maps<carry><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, spread);
  fold_tiles<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(p, spread);
  tile_outputs<carry><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, spread);
  if (spread.moments) row_moments<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(p, spread);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// What the recursion and its gradient have in common; either has no more than this many tokens in a row.
template <class Params>
int64_t set_rows(Params& p, const Tensor& tokens, double gamma, double lam, const std::optional<Tensor>& gamma_rows,
                 const std::optional<Tensor>& lam_rows, const std::optional<Tensor>& starts) {
  const int64_t rows = starts ? starts->numel() - 1 : tokens.size(0);
  p.gamma_rows = device_data<float>(gamma_rows, ScalarType::Float, rows, "gamma");
  p.lam_rows = device_data<float>(lam_rows, ScalarType::Float, rows, "lam");
  p.starts = device_data<int64_t>(starts, ScalarType::Long, rows + 1, "cu_seqlens");
  p.gamma = gamma;
  p.lam = lam;
  p.steps = starts ? 0 : tokens.size(1);
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, double gamma,
                                       double lam, const std::optional<Tensor>& gamma_rows,
                                       const std::optional<Tensor>& lam_rows, const std::optional<Tensor>& bootstrap,
                                       bool carry, const std::optional<Tensor>& starts,
                                       const std::optional<Tensor>& finished) {
  const torch::stable::accelerator::DeviceGuard guard(rewards.get_device_index());
  const int64_t total = rewards.numel();
  GaeParams p{};
  const int64_t rows = set_rows(p, rewards, gamma, lam, gamma_rows, lam_rows, starts);
  p.rewards = device_data<float>(rewards, ScalarType::Float, total, "rewards");
  p.values = device_data<float>(values, ScalarType::Float, total, "values");
  p.mask = device_data<bool>(mask, ScalarType::Bool, total, "mask");
  p.bootstrap = device_data<float>(bootstrap, ScalarType::Float, rows, "bootstrap");
  Tensor advantages = torch::stable::empty_like(rewards), returns = torch::stable::empty_like(rewards);
  p.advantages = static_cast<float*>(advantages.mutable_data_ptr());
  p.returns = static_cast<float*>(returns.mutable_data_ptr());
  Tensor moments = torch::stable::new_empty(rewards, {finished ? 3 : 0}, ScalarType::Double);
  Tensor partials = torch::stable::new_empty(rewards, {finished ? 3 * rows : 0}, ScalarType::Double);
  if (finished)
    p.moments = {static_cast<double*>(partials.mutable_data_ptr()), counter(*finished),
                 static_cast<double*>(moments.mutable_data_ptr())};
  if (total > 0) {
    const int64_t longest = starts ? total : p.steps, average = starts ? total / rows : p.steps;
    const cudaStream_t stream = current_stream(rewards);
    if (carry) launch<true>(p, rewards, rows, longest, average, stream);
    else launch<false>(p, rewards, rows, longest, average, stream);
  } else if (finished) {
    torch::stable::fill_(moments, 0.0);
  }
  return {advantages, returns, moments};
}

std::tuple<Tensor, Tensor, Tensor> gae_backward(const Tensor& d_advantages, const Tensor& d_returns, const Tensor& mask,
                                                double gamma, double lam, const std::optional<Tensor>& gamma_rows,
                                                const std::optional<Tensor>& lam_rows, bool carry,
                                                const std::optional<Tensor>& starts) {
  const torch::stable::accelerator::DeviceGuard guard(d_advantages.get_device_index());
  const int64_t total = d_advantages.numel();
  GaeAdjointParams p{};
  const int64_t rows = set_rows(p, d_advantages, gamma, lam, gamma_rows, lam_rows, starts);
  p.d_advantages = device_data<float>(d_advantages, ScalarType::Float, total, "grad_advantages");
  p.d_returns = device_data<float>(d_returns, ScalarType::Float, total, "grad_returns");
  p.mask = device_data<bool>(mask, ScalarType::Bool, total, "mask");
  Tensor d_rewards = torch::stable::empty_like(d_advantages), d_values = torch::stable::empty_like(d_advantages);
  Tensor d_bootstrap = torch::stable::new_empty(d_advantages, {rows});
  p.d_rewards = static_cast<float*>(d_rewards.mutable_data_ptr());
  p.d_values = static_cast<float*>(d_values.mutable_data_ptr());
  p.d_bootstrap = static_cast<float*>(d_bootstrap.mutable_data_ptr());
  if (rows > 0) {  // a row of no tokens still has a bootstrap value
    const auto kernel = carry ? gae_adjoint_rows<true> : gae_adjoint_rows<false>;
    kernel<<<static_cast<unsigned>(rows), kThreads, 0, current_stream(d_advantages)>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {d_rewards, d_values, d_bootstrap};
}

}  // namespace srppo::scalar

// Beside the CPU's gae: this one returns the moments as well, where it is given the counter of its stream.
STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "gae_cuda(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? gamma_rows, Tensor? lam_rows, "
      "Tensor? bootstrap, bool carry, Tensor? cu_seqlens, Tensor(a!)? finished) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) {
  m.impl("gae_cuda", TORCH_BOX(&srppo::scalar::gae));
  m.impl("gae_backward", TORCH_BOX(&srppo::scalar::gae_backward));
}
