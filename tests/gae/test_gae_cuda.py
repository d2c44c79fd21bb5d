"""The CUDA kernels of GAE and whitening, run on the host: their schedule, barriers and last block, against float64."""

import ctypes

import pytest
import torch
from backends import MASKS, compile_host, make_mask, pointer, poison, same_bits
from torch import Tensor

from srppo_kernels.gae.reference import gae_reference, whiten_moments, whiten_reference

SOURCE = """
#include "tests/cuda_emulator.h"
#include "csrc/gae/cuda_kernels.h"
#include "csrc/gae/whiten_kernels.h"

using namespace srppo::scalar;

template <bool carry>
static void run(const GaeParams& p, std::int64_t rows, std::int64_t longest, bool spread, unsigned seed) {
  if (!spread) return emulator::launch(rows, srppo::scalar::kThreads, seed, [&] { gae_rows<carry>(p); });
  Spread s{};
  s.tiles = (longest + kTile - 1) / kTile;
  std::vector<std::int64_t> ends(rows);
  std::vector<GaeMap> maps(rows * s.tiles);
  std::vector<GaeState> states(rows * s.tiles);
  s.ends = ends.data();
  s.maps = maps.data();
  s.states = states.data();
  emulator::launch(rows, srppo::scalar::kThreads, seed, [&] { row_ends(p, s); });
  emulator::launch(rows * s.tiles, srppo::scalar::kThreads, seed + 1, [&] { tile_maps<carry>(p, s); });
  emulator::launch((rows + 31) / 32, 32, seed + 2, [&] { fold_tiles(p, s, rows); });
  emulator::launch(rows * s.tiles, srppo::scalar::kThreads, seed + 3, [&] { tile_outputs<carry>(p, s); });
}

extern "C" void run_gae(const float* rewards, const float* values, const bool* mask, const float* gamma,
                        const float* lam, const float* bootstrap, const std::int64_t* starts, std::int64_t rows,
                        std::int64_t steps, std::int64_t total, bool carry, bool spread, unsigned seed,
                        float* advantages, float* returns) {
  GaeParams p{};
  p.rewards = rewards;
  p.values = values;
  p.mask = mask;
  p.gamma_rows = gamma;
  p.lam_rows = lam;
  p.bootstrap = bootstrap;
  p.starts = starts;
  p.steps = steps;
  p.advantages = advantages;
  p.returns = returns;
  if (carry) run<true>(p, rows, starts ? total : steps, spread, seed);
  else run<false>(p, rows, starts ? total : steps, spread, seed);
}

extern "C" void run_whiten(const float* x, const bool* mask, std::int64_t total, bool shift, unsigned seed,
                           double* moments, float* out) {
  using namespace srppo::whitening;
  const std::int64_t tokens = srppo::whitening::kTokens;
  const std::int64_t blocks = std::max<std::int64_t>(1, (total + tokens - 1) / tokens);
  std::vector<double> partials(3 * blocks);
  unsigned finished = 0;
  const int threads = srppo::whitening::kThreads;
  emulator::launch(blocks, threads, seed, [&] { moments_kernel(x, mask, total, partials.data(), &finished, moments); });
  emulator::launch(blocks, threads, seed, [&] { whiten_kernel(x, mask, moments, total, shift, 1e-8, out); });
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_host(SOURCE, tmp_path_factory.mktemp("gae_cuda"))


def run_gae(host, rewards, values, mask, gamma, lam, end, carry, *, starts=None, spread=False, seed=0):
    advantages, returns = torch.full_like(rewards, 7.0), torch.full_like(rewards, 7.0)
    rows, steps = (len(starts) - 1, 0) if starts is not None else rewards.shape
    numbers = [ctypes.c_int64(n) for n in (rows, steps, rewards.numel())]
    host.run_gae(
        *(pointer(x) for x in (rewards, values, mask, gamma, lam, end)), None if starts is None else pointer(starts),
        *numbers, carry, spread, seed, pointer(advantages), pointer(returns),
    )  # fmt: skip
    return advantages, returns


def inputs(rows: int, steps: int, kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(rows, steps, generator=generator) for _ in range(2))
    mask, end = make_mask(kind, rows, steps, generator), torch.randn(rows, generator=generator)
    gamma, lam = torch.linspace(0.9, 1.0, rows), torch.linspace(1.0, 0.5, rows)
    return [poison(rewards, mask), poison(values, mask), mask, gamma, lam, end]


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_gae_is_the_reference(host, kind, carry, spread):
    for steps in (1, 512, 1100):  # a tile has 512 tokens
        rewards, values, mask, gamma, lam, end = inputs(2, steps, kind)
        got = run_gae(host, rewards, values, mask, gamma, lam, end, carry, spread=spread, seed=steps)
        doubles = [x.double() for x in (rewards, values, gamma, lam, end)]
        want = gae_reference(*doubles[:2], mask, *doubles[2:], "carry" if carry else "zero")
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=3e-5)


@pytest.mark.parametrize("carry", [True, False])
def test_gae_bits_of_spread_packed_and_padded_rows(host, carry):
    rewards, values, mask, gamma, lam, end = inputs(3, 1300, "gaps")
    whole = run_gae(host, rewards, values, mask, gamma, lam, end, carry)
    starts = torch.arange(0, 3901, 1300)
    flat = [x.flatten() for x in (rewards, values, mask)]
    pad = torch.nn.functional.pad
    wide = [pad(x, (5, 600), value=False if x.dtype == torch.bool else float("nan")) for x in (rewards, values, mask)]
    others = [
        run_gae(host, rewards, values, mask, gamma, lam, end, carry, spread=True, seed=1),
        run_gae(host, *flat, gamma, lam, end, carry, starts=starts, seed=2),
        run_gae(host, *flat, gamma, lam, end, carry, starts=starts, spread=True, seed=3),
        [x[:, 5:1305] for x in run_gae(host, *wide, gamma, lam, end, carry, seed=4)],
    ]
    for other in others:
        assert all(same_bits(a, b.reshape(3, 1300)) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_is_the_reference_whichever_block_is_last(host, kind, shift_mean):
    for steps in (0, 1300):
        x, _, mask, *_ = inputs(2, steps, kind)
        results = []
        for seed in range(2):
            moments, out = torch.empty(3, dtype=torch.float64), torch.empty_like(x)
            total = ctypes.c_int64(x.numel())
            host.run_whiten(pointer(x), pointer(mask), total, shift_mean, seed, pointer(moments), pointer(out))
            results.append((moments, out))
        torch.testing.assert_close(results[0][0], whiten_moments(x, mask), rtol=1e-12, atol=1e-12)
        want = whiten_reference(x.double(), mask, shift_mean)
        torch.testing.assert_close(results[0][1].double(), want, rtol=1e-6, atol=1e-6)
        assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
