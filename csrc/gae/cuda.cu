// CUDA launches of srppo_kernels/gae. Compiled here, not run on a device: none was at hand. So backend="auto" does not choose
// them; backend="native" does.
#include "../common/cuda_launch.h"
#include "cuda_kernels.h"

namespace srppo::scalar {

template <bool carry>
void launch(const GaeParams& p, const Tensor& like, int64_t rows, int64_t longest, cudaStream_t stream) {
  if (longest < kLong || rows > kFew) {
    gae_rows<carry><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  Spread spread{};
  spread.tiles = (longest + kTile - 1) / kTile;
  const int64_t blocks = rows * spread.tiles;
  const auto bytes = [&](int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Byte); };
  Tensor ends = torch::stable::new_empty(like, {rows}, ScalarType::Long);
  Tensor maps = bytes(blocks * static_cast<int64_t>(sizeof(GaeMap)));
  Tensor states = bytes(blocks * static_cast<int64_t>(sizeof(GaeState)));
  spread.ends = static_cast<int64_t*>(ends.mutable_data_ptr());
  spread.maps = static_cast<GaeMap*>(maps.mutable_data_ptr());
  spread.states = static_cast<GaeState*>(states.mutable_data_ptr());
  row_ends<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(p, spread);
  tile_maps<carry><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, spread);
  fold_tiles<<<static_cast<unsigned>((rows + 31) / 32), 32, 0, stream>>>(p, spread, rows);
  tile_outputs<carry><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, spread);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, double gamma, double lam,
                               const std::optional<Tensor>& gamma_rows, const std::optional<Tensor>& lam_rows,
                               const std::optional<Tensor>& bootstrap, bool carry,
                               const std::optional<Tensor>& starts) {
  const torch::stable::accelerator::DeviceGuard guard(rewards.get_device_index());
  const int64_t total = rewards.numel(), rows = starts ? starts->numel() - 1 : rewards.size(0);
  GaeParams p{};
  p.rewards = device_data<float>(rewards, ScalarType::Float, total, "rewards");
  p.values = device_data<float>(values, ScalarType::Float, total, "values");
  p.mask = device_data<bool>(mask, ScalarType::Bool, total, "mask");
  p.gamma_rows = device_data<float>(gamma_rows, ScalarType::Float, rows, "gamma");
  p.lam_rows = device_data<float>(lam_rows, ScalarType::Float, rows, "lam");
  p.bootstrap = device_data<float>(bootstrap, ScalarType::Float, rows, "bootstrap");
  p.starts = device_data<int64_t>(starts, ScalarType::Long, rows + 1, "cu_seqlens");
  p.gamma = gamma;
  p.lam = lam;
  p.steps = starts ? 0 : rewards.size(1);
  Tensor advantages = torch::stable::empty_like(rewards), returns = torch::stable::empty_like(rewards);
  p.advantages = static_cast<float*>(advantages.mutable_data_ptr());
  p.returns = static_cast<float*>(returns.mutable_data_ptr());
  if (total > 0) {
    // Packed rows' lengths lie on the device: none is longer than all of them. Either way is right for any length.
    const int64_t longest = starts ? total : p.steps;
    const cudaStream_t stream = current_stream(rewards);
    if (carry) launch<true>(p, rewards, rows, longest, stream);
    else launch<false>(p, rewards, rows, longest, stream);
  }
  return {advantages, returns};
}

}  // namespace srppo::scalar

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) { m.impl("gae", TORCH_BOX(&srppo::scalar::gae)); }
