// CUDA kernel of GAE's gradient; cuda.cu launches it, and tests/gae/test_gae_cuda.py runs it on the host.
//
// The adjoint of the recursion is the same recursion from left to right (srppo_kernels/gae/reference.py has the derivation).
// With g the sum of the gradients of advantage and return, G_t = g_t + gamma lambda G' and
//
//     dreward_t = G_t      dvalue_t = gamma (1 - lambda) G' - dA_t      dbootstrap = gamma G at the last valid token
//
// so a tile is scanned as in cuda_kernels.h, with g for the reward and no values. A block walks a row; tiles are counted from
// its first valid token, so padding changes no bit. Few very long rows are not spread over blocks: no trainer differentiates
// through GAE, and a block takes 131072 tokens in 128 tiles.
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
  int turn = 0;
  for (int64_t left = begin; left < end; left += kTile) {
    const int count = tokens_in(left, end);
    float of_advantage[kEach], of_both[kEach], d_rewards[kEach], d_values[kEach];
    unsigned char valid[kEach];
    fetch<1>(p.d_advantages + left, count, of_advantage);
    fetch<1>(p.d_returns + left, count, of_both);
    fetch<1>(p.mask + left, count, valid);
    trade<true>(of_advantage);
    trade<true>(of_both);
    GaeMap map = gae_identity();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      of_advantage[j] = valid[j] ? of_advantage[j] : 0.0f;
      of_both[j] = valid[j] ? of_advantage[j] + of_both[j] : 0.0f;
      if (along() + j < count) map = gae_compose(gae_map<carry>(of_both[j], 0.0f, valid[j], k), map);
    }
    GaeState here = scan_block(map, state, turn ^= 1);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float to_the_left = gae_return(here);
      here = gae_step<carry>(here, of_both[j], 0.0f, valid[j], k);
      d_rewards[j] = valid[j] ? gae_return(here) : 0.0f;
      d_values[j] = valid[j] ? fma(factors.through, to_the_left, -of_advantage[j]) : 0.0f;
    }
    store<1>(p.d_rewards + left, count, d_rewards);
    store<1>(p.d_values + left, count, d_values);
  }
  if (threadIdx.x == 0) p.d_bootstrap[row] = static_cast<float>(gamma_of(p, row)) * gae_return(state);
}

}  // namespace srppo::scalar
