// CUDA kernel of GAE's gradient; cuda.cu launches it, and tests/gae/test_gae_cuda.py runs it on the host.
//
// The adjoint of the recursion is the same recursion from left to right (srppo_kernels/gae/reference.py has the derivation).
// With g the sum of the gradients of advantage and return, G_t = g_t + gamma lambda G' and
//
//     dreward_t = G_t      dvalue_t = gamma (1 - lambda) G' - dA_t      dbootstrap = gamma G at the last valid token
//
// so a tile is scanned as in cuda_kernels.h, with g for the reward and no values. A block walks a row; tiles are counted from
// its first valid token, so padding changes no bit. Few very long rows are not spread over blocks: no trainer differentiates
// through GAE, and a block takes 131072 tokens in 256 tiles.
#pragma once

#include "cuda_kernels.h"

namespace srppo::scalar {

struct GaeAdjointParams {
  const float* d_advantages;
  const float* d_returns;
  const bool* mask;
  const float* gamma_rows;
  const float* lam_rows;
  const int64_t* starts;
  double gamma, lam;
  int64_t steps;
  float* d_rewards;
  float* d_values;
  float* d_bootstrap;
};

template <bool carry>
__global__ void __launch_bounds__(kThreads) gae_adjoint_rows(GaeAdjointParams p) {
  const int64_t row = blockIdx.x, first = row_begin(p, row), last = row_begin(p, row + 1);
  const int64_t begin = first + skip_invalid<false>(p.mask, first, last, p.d_rewards, p.d_values);
  const int64_t end = last - skip_invalid<true>(p.mask, begin, last, p.d_rewards, p.d_values);
  const GaeCoefficients factors = coefficients(p, row), k{0.0f, factors.decay};
  GaeState state{0.0f, 0.0f, 0.0f};  // on the left of the tile, the same in every thread
  for (int64_t left = begin; left < end; left += kTile) {
    float of_advantage[kEach], of_both[kEach];
    bool valid[kEach];
    GaeMap upto = gae_identity(), before, all;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t at = left + threadIdx.x * kEach + j;
      valid[j] = at < end && p.mask[at];
      of_advantage[j] = valid[j] ? p.d_advantages[at] : 0.0f;
      of_both[j] = valid[j] ? of_advantage[j] + p.d_returns[at] : 0.0f;
      if (at < end) upto = gae_compose(gae_map<carry>(of_both[j], 0.0f, valid[j], k), upto);
    }
    scan_block(upto, &before, &all);
    GaeState here = gae_apply(before, state);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t at = left + threadIdx.x * kEach + j;
      if (at >= end) break;
      const float to_the_left = gae_return(here);
      here = gae_step<carry>(here, of_both[j], 0.0f, valid[j], k);
      p.d_rewards[at] = valid[j] ? gae_return(here) : 0.0f;
      p.d_values[at] = valid[j] ? fma(factors.through, to_the_left, -of_advantage[j]) : 0.0f;
    }
    state = gae_apply(all, state);
  }
  if (threadIdx.x == 0) p.d_bootstrap[row] = static_cast<float>(gamma_of(p, row)) * gae_return(state);
}

}  // namespace srppo::scalar
