"""The maps that the CUDA kernel scans (csrc/gae/scan.h), run on the host: any bracketing of them is the recursion."""

import ctypes

import pytest
import torch
from backends import MASKS, compile_host, make_mask, pointer

from srppo_kernels.gae import gae

# The kernel's schedule: eight tokens a thread, an inclusive scan by doubling in each warp, the state through the
# warps' totals in turn; then each thread steps on from the state that reaches it.
SOURCE = """
#include "csrc/common/scalar.h"
namespace srppo::scalar {
#include "csrc/gae/step.h"
#include "csrc/gae/scan.h"

constexpr int kEach = 8, kWarps = 4, kTile = kWarps * 32 * kEach;

template <bool carry>
void row(const float* r, const float* v, const bool* m, int n, GaeCoefficients k, float start, float* adv, float* ret) {
  while (n > 0 && !m[n - 1]) adv[n - 1] = ret[n - 1] = 0, --n;
  GaeState state{start, 0.0f, start};
  for (int right = n; right > 0; right -= kTile) {
    GaeMap maps[kWarps][32], next[32];
    for (int thread = 0; thread < kWarps * 32; ++thread) {
      GaeMap& map = maps[thread / 32][thread % 32] = gae_identity();
      for (int j = 0; j < kEach; ++j) {
        const int at = right - 1 - (thread * kEach + j);
        const bool valid = at >= 0 && m[at];
        map = gae_compose(gae_map<carry>(valid ? r[at] : 0, valid ? v[at] : 0, valid, k), map);
      }
    }
    for (int warp = 0; warp < kWarps; ++warp) {
      for (int by = 1; by < 32; by *= 2) {
        for (int i = 0; i < 32; ++i) next[i] = i >= by ? gae_compose(maps[warp][i], maps[warp][i - by]) : maps[warp][i];
        for (int i = 0; i < 32; ++i) maps[warp][i] = next[i];
      }
      for (int lane = 0; lane < 32; ++lane) {
        GaeState here = lane ? gae_apply(maps[warp][lane - 1], state) : state;
        for (int j = 0; j < kEach; ++j) {
          const int at = right - 1 - ((warp * 32 + lane) * kEach + j);
          if (at < 0) break;
          const float value = m[at] ? v[at] : 0;
          here = gae_step<carry>(here, m[at] ? r[at] : 0, value, m[at], k);
          adv[at] = m[at] ? gae_advantage(here, value) : 0;
          ret[at] = m[at] ? gae_return(here) : 0;
        }
      }
      state = gae_apply(maps[warp][31], state);
    }
  }
}
}  // namespace srppo::scalar

extern "C" void gae_row(const float* r, const float* v, const bool* m, int n, float gamma, float lam, float start,
                        bool carry, float* adv, float* ret) {
  const srppo::scalar::GaeCoefficients k{float(double(gamma) * (1 - double(lam))), float(double(gamma) * lam)};
  if (carry) srppo::scalar::row<true>(r, v, m, n, k, start, adv, ret);
  else srppo::scalar::row<false>(r, v, m, n, k, start, adv, ret);
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_host(SOURCE, tmp_path_factory.mktemp("scan"))


@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_scanned_maps_are_the_recursion(host, mask_mode, kind, gamma, lam):
    generator = torch.Generator().manual_seed(0)
    for steps in (1, 7, 8, 255, 257, 1023, 1024, 1025, 2500):
        rewards, values = (torch.randn(3, steps, generator=generator) for _ in range(2))
        mask, end = make_mask(kind, 3, steps, generator), torch.randn(3, generator=generator)
        advantages, returns = torch.empty(3, steps), torch.empty(3, steps)
        for b in range(3):
            host.gae_row(
                pointer(rewards[b]), pointer(values[b]), pointer(mask[b]), steps, ctypes.c_float(gamma),
                ctypes.c_float(lam), ctypes.c_float(float(end[b])), mask_mode == "carry", pointer(advantages[b]),
                pointer(returns[b]),
            )  # fmt: skip
        expected = gae(
            rewards.double(), values.double(), mask, gamma=gamma, lam=lam, bootstrap=end.double(), mask_mode=mask_mode
        )
        for got, want in zip((advantages, returns), expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=3e-5)
