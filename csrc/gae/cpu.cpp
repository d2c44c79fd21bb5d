// CPU kernels of srppo_kernels/gae: GAE over padded or packed rows and its gradient, masked moments and whitening.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../common/blocks.h"
#include "../common/tensors.h"
#include "join.h"

namespace srppo {
namespace {

struct GaeRows {
  const bool* mask;
  const float* gamma_rows;  // null: the same for all rows
  const float* lam_rows;
  double gamma, lam;
  bool carry;
  std::int64_t rows, steps;
  const std::int64_t* starts;  // null: padded, [rows, steps]

  std::int64_t row_begin(std::int64_t row) const { return starts ? starts[row] : row * steps; }
};

struct GaeArgs : GaeRows {
  const float* rewards;
  const float* values;
  const float* bootstrap;  // null: 0
  float* advantages;
  float* returns;
};

struct GaeAdjointArgs : GaeRows {
  const float* d_advantages;
  const float* d_returns;
  float* d_rewards;
  float* d_values;
  float* d_bootstrap;
};

struct WhitenScale {
  double mean, factor, shift;
};

}  // namespace
}  // namespace srppo

#define SRPPO_KERNELS "../gae/cpu_kernels.h"
#include "../common/each_level.h"

namespace srppo {
namespace {

// Checks and fills in what both directions need of the rows of `like`.
void describe_rows(GaeRows& args, const Tensor& like, const Tensor& mask, double gamma, double lam,
                   const std::optional<Tensor>& gamma_rows, const std::optional<Tensor>& lam_rows, bool carry,
                   const std::optional<Tensor>& starts) {
  const std::int64_t total = like.numel();
  args.mask = bools(mask, total, "mask");
  if (starts) {
    check(*starts, ScalarType::Long, -1, "cu_seqlens");
    args.starts = static_cast<const std::int64_t*>(starts->const_data_ptr());
    args.rows = starts->numel() - 1;
    STD_TORCH_CHECK(args.rows >= 0 && args.starts[0] == 0 && args.starts[args.rows] == total,
                    "gae: cu_seqlens must start at 0 and end at the number of packed tokens, ", total);
    for (std::int64_t row = 0; row < args.rows; ++row)
      STD_TORCH_CHECK(args.starts[row] <= args.starts[row + 1], "gae: cu_seqlens decreases at position ", row + 1);
  } else {
    args.rows = like.size(0);
    args.steps = like.size(1);
  }
  args.gamma_rows = floats(gamma_rows, args.rows, "gamma");
  args.lam_rows = floats(lam_rows, args.rows, "lam");
  args.gamma = gamma;
  args.lam = lam;
  args.carry = carry;
}

// Few rows: spread them over the threads rather than fill one thread's lanes. A row's bits do not depend on it.
template <class Args, class Run>
void each_group(const Args& args, std::int64_t total, int width, const Run& run) {
  const std::int64_t threads = std::max<std::int64_t>(1, torch::stable::get_num_threads());
  const int per_group = static_cast<int>(std::clamp<std::int64_t>((args.rows + threads - 1) / threads, 1, width));
  const std::int64_t groups = (args.rows + per_group - 1) / per_group;
  const std::int64_t grain = std::max<std::int64_t>(1, groups * kTokensPerThread / std::max<std::int64_t>(total, 1));
  torch::stable::parallel_for(0, groups, grain,
                              [&](std::int64_t begin, std::int64_t end) { run(args, per_group, begin, end); });
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, double gamma, double lam,
                               const std::optional<Tensor>& gamma_rows, const std::optional<Tensor>& lam_rows,
                               const std::optional<Tensor>& bootstrap, bool carry,
                               const std::optional<Tensor>& starts) {
  const std::int64_t total = rewards.numel();
  GaeArgs args{};
  describe_rows(args, rewards, mask, gamma, lam, gamma_rows, lam_rows, carry, starts);
  args.rewards = floats(rewards, total, "rewards");
  args.values = floats(values, total, "values");
  args.bootstrap = floats(bootstrap, args.rows, "bootstrap");
  Tensor advantages = torch::stable::empty_like(rewards), returns = torch::stable::empty_like(rewards);
  args.advantages = mutable_floats(advantages);
  args.returns = mutable_floats(returns);
  if (total > 0) each_group(args, total, SRPPO_AT_LEVEL(gae_width)(), SRPPO_AT_LEVEL(gae_groups));
  return {advantages, returns};
}

std::tuple<Tensor, Tensor, Tensor> gae_backward(const Tensor& d_advantages, const Tensor& d_returns, const Tensor& mask,
                                                double gamma, double lam, const std::optional<Tensor>& gamma_rows,
                                                const std::optional<Tensor>& lam_rows, bool carry,
                                                const std::optional<Tensor>& starts) {
  const std::int64_t total = d_advantages.numel();
  GaeAdjointArgs args{};
  describe_rows(args, d_advantages, mask, gamma, lam, gamma_rows, lam_rows, carry, starts);
  args.d_advantages = floats(d_advantages, total, "grad_advantages");
  args.d_returns = floats(d_returns, total, "grad_returns");
  Tensor d_rewards = torch::stable::empty_like(d_advantages), d_values = torch::stable::empty_like(d_advantages);
  Tensor d_bootstrap = torch::stable::new_empty(d_advantages, {args.rows}, ScalarType::Float);
  args.d_rewards = mutable_floats(d_rewards);
  args.d_values = mutable_floats(d_values);
  args.d_bootstrap = mutable_floats(d_bootstrap);
  if (args.rows > 0) each_group(args, total, SRPPO_AT_LEVEL(gae_width)(), SRPPO_AT_LEVEL(gae_adjoint_groups));
  return {d_rewards, d_values, d_bootstrap};
}

std::int64_t row_length(const Tensor& x) { return x.dim() == 0 ? 1 : x.size(x.dim() - 1); }

Tensor whiten_moments(const Tensor& x, const Tensor& mask) {
  const std::int64_t total = x.numel(), steps = row_length(x);
  const float* px = floats(x, total, "x");
  const bool* pm = bools(mask, total, "mask");
  const Blocks blocks(pm, total ? total / steps : 0, steps);
  std::vector<Moments> partial(blocks.list.size());
  const auto moments_of = SRPPO_AT_LEVEL(whiten_block);
  blocks.each([&](const Block& block, std::size_t i) {
    partial[i] = moments_of(px + block.begin, pm + block.begin, block.end - block.begin);
  });
  Moments all;
  for (const Moments& part : partial) all = join(all, part);
  Tensor out = torch::stable::new_empty(x, {3}, ScalarType::Double);
  auto* p = static_cast<double*>(out.mutable_data_ptr());
  p[0] = all.count;
  p[1] = all.mean;
  p[2] = all.squares;
  return out;
}

Tensor whiten_apply(const Tensor& x, const Tensor& mask, const Tensor& moments, bool shift_mean, double eps) {
  const std::int64_t total = x.numel();
  const float* px = floats(x, total, "x");
  const bool* pm = bools(mask, total, "mask");
  check(moments, ScalarType::Double, 3, "moments");
  const auto* m = static_cast<const double*>(moments.const_data_ptr());
  const double variance = m[2] / std::max(m[0] - 1.0, 1.0);
  const WhitenScale scale{m[1], 1.0 / std::sqrt(variance + eps), shift_mean ? 0.0 : m[1]};
  Tensor out = torch::stable::empty_like(x);
  float* po = mutable_floats(out);
  const auto whiten = SRPPO_AT_LEVEL(whiten_range);
  torch::stable::parallel_for(0, total, kTokensPerThread, [&](std::int64_t begin, std::int64_t end) {
    whiten(px + begin, pm + begin, po + begin, end - begin, scale);
  });
  return out;
}

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? gamma_rows, Tensor? lam_rows, "
      "Tensor? bootstrap, bool carry, Tensor? starts) -> (Tensor, Tensor)");
  m.def(
      "gae_backward(Tensor grad_advantages, Tensor grad_returns, Tensor mask, float gamma, float lam, Tensor? gamma_rows, "
      "Tensor? lam_rows, bool carry, Tensor? starts) -> (Tensor, Tensor, Tensor)");
  m.def("whiten_moments(Tensor x, Tensor mask) -> Tensor");
  m.def("whiten_apply(Tensor x, Tensor mask, Tensor moments, bool shift_mean, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CPU, m) {
  m.impl("gae", TORCH_BOX(&srppo::gae));
  m.impl("gae_backward", TORCH_BOX(&srppo::gae_backward));
  m.impl("whiten_moments", TORCH_BOX(&srppo::whiten_moments));
  m.impl("whiten_apply", TORCH_BOX(&srppo::whiten_apply));
}
