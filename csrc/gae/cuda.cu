// CUDA kernel of srppo_kernels/gae. Compiled here, not run: no device was at hand. So backend="auto" does not choose it;
// backend="native" does. The maths (step.h, scan.h) is what the CPU kernels and tests/gae/test_scan.py run.
//
// A block walks one row from its last valid token to the left, a tile of 4 tokens a thread at a time. Each thread folds its
// tokens into one map, the block scans the maps, and each thread then steps through its tokens from the state that reaches
// it. One warp a row to 4k tokens: no barrier, and hundreds of rows fill the device. Beyond, 8 warps, then 32: at 128k
// tokens that is 32 tiles a row, too few to be worth a look-back over several blocks. Tiles are counted from the last valid
// token, so that padded and packed rows have the same bits.
#include "../common/cuda_launch.h"
#include "../common/scalar.h"

namespace srppo::scalar {

#include "step.h"
#include "scan.h"

constexpr int kEach = 4;  // tokens a thread

struct GaeParams {
  const float* rewards;
  const float* values;
  const bool* mask;
  const float* gamma_rows;
  const float* lam_rows;
  const float* bootstrap;
  const int64_t* starts;
  double gamma, lam;
  int64_t steps;
  float* advantages;
  float* returns;
};

__device__ __forceinline__ GaeMap shuffle_up(GaeMap map, int by) {
  constexpr unsigned all = 0xffffffffu;
  GaeMap got;
  got.a = __shfl_up_sync(all, map.a, by);
  got.b = __shfl_up_sync(all, map.b, by);
  got.c = __shfl_up_sync(all, map.c, by);
  got.v = __shfl_up_sync(all, map.v, by);
  got.sets = __shfl_up_sync(all, static_cast<int>(map.sets), by) != 0;
  return got;
}

template <bool carry, int kWarps>
__global__ void __launch_bounds__(kWarps * 32) gae_kernel(GaeParams p) {
  constexpr int kThreads = kWarps * 32, kTile = kThreads * kEach;
  __shared__ GaeMap totals[kWarps];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int64_t row = blockIdx.x;
  const int64_t begin = p.starts ? p.starts[row] : row * p.steps;
  const int64_t row_end = p.starts ? p.starts[row + 1] : begin + p.steps;

  // One past the last valid token; what lies beyond is 0.
  __shared__ int nearest;  // the rightmost thread that sees a valid token
  int64_t end = row_end;
  while (end > begin) {
    if (thread == 0) nearest = kThreads;
    const int64_t at = end - 1 - thread;
    const bool valid = at >= begin && p.mask[at];
    const bool found = __syncthreads_or(valid);
    if (valid) atomicMin(&nearest, thread);
    __syncthreads();
    if (at >= begin && thread < nearest) p.advantages[at] = p.returns[at] = 0.0f;
    end = end - nearest > begin ? end - nearest : begin;
    if (found) break;
    __syncthreads();  // before `nearest` is set again
  }

  const double gamma = p.gamma_rows ? static_cast<double>(p.gamma_rows[row]) : p.gamma;
  const double lam = p.lam_rows ? static_cast<double>(p.lam_rows[row]) : p.lam;
  const GaeCoefficients k{static_cast<float>(gamma * (1.0 - lam)), static_cast<float>(gamma * lam)};
  const float start = p.bootstrap ? p.bootstrap[row] : 0.0f;
  GaeState state{start, 0.0f, start};  // on the right of the tile, the same in every thread

  for (int64_t right = end; right > begin; right -= kTile) {
    float reward[kEach], value[kEach];
    bool valid[kEach];
    GaeMap mine = gae_identity();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t at = right - 1 - (thread * kEach + j);
      const bool inside = at >= begin;
      valid[j] = inside && p.mask[at];
      reward[j] = valid[j] ? p.rewards[at] : 0.0f;
      value[j] = valid[j] ? p.values[at] : 0.0f;
      mine = gae_compose(gae_map<carry>(reward[j], value[j], valid[j], k), mine);
    }

    GaeMap upto = mine;  // inclusive scan; lane 0 is the rightmost
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const GaeMap other = shuffle_up(upto, by);
      if (lane >= by) upto = gae_compose(upto, other);
    }
    if (kWarps > 1) {
      if (lane == 31) totals[warp] = upto;
      __syncthreads();
    }
    GaeMap before = shuffle_up(upto, 1);
    if (lane == 0) before = gae_identity();
    GaeMap all = gae_identity();
    for (int w = 0; kWarps > 1 && w < kWarps; ++w) {
      if (w == warp) before = gae_compose(before, all);
      all = gae_compose(totals[w], all);
    }
    if (kWarps == 1) {
      all.a = __shfl_sync(0xffffffffu, upto.a, 31);
      all.b = __shfl_sync(0xffffffffu, upto.b, 31);
      all.c = __shfl_sync(0xffffffffu, upto.c, 31);
      all.v = __shfl_sync(0xffffffffu, upto.v, 31);
      all.sets = __shfl_sync(0xffffffffu, static_cast<int>(upto.sets), 31) != 0;
    }

    GaeState here = gae_apply(before, state);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t at = right - 1 - (thread * kEach + j);
      if (at < begin) break;
      here = gae_step<carry>(here, reward[j], value[j], valid[j], k);
      p.advantages[at] = valid[j] ? gae_advantage(here, value[j]) : 0.0f;
      p.returns[at] = valid[j] ? gae_return(here) : 0.0f;
    }
    state = gae_apply(all, state);
    if (kWarps > 1) __syncthreads();  // before `totals` is written again
  }
}

template <bool carry>
void launch(const GaeParams& p, int64_t rows, int64_t longest, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(rows);
  if (longest <= 4096) gae_kernel<carry, 1><<<grid, 32, 0, stream>>>(p);
  else if (longest <= 32768) gae_kernel<carry, 8><<<grid, 256, 0, stream>>>(p);
  else gae_kernel<carry, 32><<<grid, 1024, 0, stream>>>(p);
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
    // Packed rows' lengths lie on the device; their mean decides, and any kernel is right for any length.
    const int64_t longest = starts ? total / (rows > 0 ? rows : 1) : p.steps;
    const cudaStream_t stream = current_stream(rewards);
    if (carry) launch<true>(p, rows, longest, stream);
    else launch<false>(p, rows, longest, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {advantages, returns};
}

}  // namespace srppo::scalar

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) { m.impl("gae", TORCH_BOX(&srppo::scalar::gae)); }
