"""The CUDA kernels of GAE and whitening, run on the host: their schedule, barriers and last block, against float64."""

import ctypes

import pytest
import torch
from backends import MASKS, compile_host, make_mask, pointer, poison, same_bits
from torch import Tensor

from srppo_kernels.gae.reference import gae_backward_reference, gae_reference, whiten_moments, whiten_reference

SOURCE = """
#include "tests/cuda_emulator.h"
inline void __syncwarp() { emulator::wait(emulator::warp()); }
#include "csrc/gae/cuda_adjoint.h"
#include "csrc/gae/whiten_kernels.h"

using namespace srppo;
using namespace srppo::scalar;

static unsigned finished = 0;  // one counter for all launches: the last block of each leaves 0

// As launch() in csrc/gae/cuda.cu.
template <bool carry>
static void run(GaeParams p, std::int64_t rows, std::int64_t longest, bool spread, unsigned seed) {
  const int threads = srppo::scalar::kThreads;
  std::vector<double> partials(3 * rows);
  p.moments.partials = partials.data();
  p.moments.finished = &finished;
  if (!spread) return emulator::launch(rows, threads, seed, [&] { gae_rows<carry>(p); });
  Spread s{};
  s.tiles = (longest + kTile - 1) / kTile;
  std::vector<std::int64_t> ends(rows);
  std::vector<GaeMap> maps(rows * s.tiles * kWarps);
  std::vector<GaeState> states(rows * s.tiles);
  std::vector<Moments> moments(rows * s.tiles);
  s.ends = ends.data();
  s.maps = maps.data();
  s.states = states.data();
  s.moments = moments.data();
  emulator::launch(rows, threads, seed, [&] { row_ends(p, s); });
  emulator::launch(rows * s.tiles, threads, seed + 1, [&] { tile_maps<carry>(p, s); });
  emulator::launch(rows, threads, seed + 2, [&] { fold_tiles(p, s); });
  emulator::launch(rows * s.tiles, threads, seed + 3, [&] { tile_outputs<carry>(p, s); });
  emulator::launch(rows, threads, seed + 4, [&] { row_moments(p, s); });
}

extern "C" void run_gae(const float* rewards, const float* values, const bool* mask, const float* gamma,
                        const float* lam, const float* bootstrap, const std::int64_t* starts, std::int64_t rows,
                        std::int64_t steps, std::int64_t total, bool carry, bool spread, unsigned seed,
                        float* advantages, float* returns, double* moments) {
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
  p.moments.moments = moments;
  if (carry) run<true>(p, rows, starts ? total : steps, spread, seed);
  else run<false>(p, rows, starts ? total : steps, spread, seed);
}

extern "C" void run_adjoint(const float* d_advantages, const float* d_returns, const bool* mask, const float* gamma,
                            const float* lam, const std::int64_t* starts, std::int64_t rows, std::int64_t steps,
                            bool carry, unsigned seed, float* d_rewards, float* d_values, float* d_bootstrap) {
  const GaeAdjointParams p{d_advantages, d_returns, mask, gamma, lam, starts, 0.0, 0.0, steps, d_rewards, d_values,
                           d_bootstrap};
  const int threads = srppo::scalar::kThreads;
  if (carry) emulator::launch(rows, threads, seed, [&] { gae_adjoint_rows<true>(p); });
  else emulator::launch(rows, threads, seed, [&] { gae_adjoint_rows<false>(p); });
}

extern "C" void run_whiten(const float* x, const bool* mask, std::int64_t rows, std::int64_t steps, bool shift,
                           unsigned seed, double* moments, float* out) {
  using namespace srppo::whitening;
  const Rows shape = rows * steps ? Rows{rows, steps} : Rows{1, 0};
  const std::int64_t total = rows * steps, blocks = blocks_of(shape, kTokens);
  std::vector<double> partials(3 * blocks);
  const int threads = srppo::whitening::kThreads;
  const MomentsOut to{partials.data(), &finished, moments};
  emulator::launch(blocks, threads, seed, [&] { moments_kernel(x, mask, shape, to); });
  const std::int64_t flat = std::max<std::int64_t>(1, (total + kWhitened - 1) / kWhitened);
  const bool vectors = seed % 2;
  emulator::launch(flat, threads, seed, [&] { whiten_kernel(x, mask, moments, total, shift, vectors, 1e-8, out); });
}

extern "C" unsigned left_in_counter() { return finished; }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = compile_host(SOURCE, tmp_path_factory.mktemp("gae_cuda"))
    yield library
    assert library.left_in_counter() == 0


def run_gae(host, rewards, values, mask, gamma, lam, end, carry, *, starts=None, spread=False, seed=0):
    advantages, returns = torch.full_like(rewards, 7.0), torch.full_like(rewards, 7.0)
    moments = torch.full((3,), 7.0, dtype=torch.float64)
    rows, steps = (len(starts) - 1, 0) if starts is not None else rewards.shape
    numbers = [ctypes.c_int64(n) for n in (rows, steps, rewards.numel())]
    host.run_gae(
        *(pointer(x) for x in (rewards, values, mask, gamma, lam, end)), None if starts is None else pointer(starts),
        *numbers, carry, spread, seed, *(pointer(x) for x in (advantages, returns, moments)),
    )  # fmt: skip
    return advantages, returns, moments


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
    for steps in (1, 1024, 2100):  # a tile has 1024 tokens
        rewards, values, mask, gamma, lam, end = inputs(2, steps, kind)
        *got, moments = run_gae(host, rewards, values, mask, gamma, lam, end, carry, spread=spread, seed=steps)
        doubles = [x.double() for x in (rewards, values, gamma, lam, end)]
        want = gae_reference(*doubles[:2], mask, *doubles[2:], "carry" if carry else "zero")
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=3e-5)
        torch.testing.assert_close(moments, whiten_moments(got[0], mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spread", [False, True])
def test_a_valid_token_counts_once_whatever_byte_its_mask_is(host, spread):
    """As of a uint8 mask, 255 where valid, that is viewed as bool."""
    rewards, values, mask, gamma, lam, end = inputs(2, 1100, "gaps")
    made = []
    for m in (mask, (mask.to(torch.uint8) * 255).view(torch.bool)):
        made.append(run_gae(host, rewards, values, m, gamma, lam, end, True, spread=spread))
    assert all(same_bits(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("carry", [True, False])
def test_gae_bits_of_spread_packed_and_padded_rows(host, carry):
    rewards, values, mask, gamma, lam, end = inputs(3, 2300, "gaps")
    whole = run_gae(host, rewards, values, mask, gamma, lam, end, carry)
    starts = torch.arange(0, 6901, 2300)
    flat = [x.flatten() for x in (rewards, values, mask)]
    pad = torch.nn.functional.pad
    wide = [pad(x, (5, 1100), value=False if x.dtype == torch.bool else float("nan")) for x in (rewards, values, mask)]
    others = [
        run_gae(host, rewards, values, mask, gamma, lam, end, carry, spread=True, seed=1),
        run_gae(host, *flat, gamma, lam, end, carry, starts=starts, seed=2),
        run_gae(host, *flat, gamma, lam, end, carry, starts=starts, spread=True, seed=3),
        [x[:, 5:2305] if x.dim() == 2 else x for x in run_gae(host, *wide, gamma, lam, end, carry, seed=4)],
    ]
    for other in others:
        assert all(same_bits(a, b.reshape(a.shape)) for a, b in zip(whole, other, strict=True))


def test_bits_of_a_spread_row_whose_maps_are_read_in_two_turns(host):
    rewards, values, mask, gamma, lam, end = inputs(1, 34000, "gaps")  # 136 maps, of which a block reads 128 at a time
    whole = run_gae(host, rewards, values, mask, gamma, lam, end, True)
    spread = run_gae(host, rewards, values, mask, gamma, lam, end, True, spread=True, seed=1)
    assert all(same_bits(a, b) for a, b in zip(whole, spread, strict=True))


def run_adjoint(host, da, dr, mask, gamma, lam, carry, *, starts=None, seed=0):
    rows, steps = (len(starts) - 1, 0) if starts is not None else da.shape
    out = torch.full_like(da, 7.0), torch.full_like(da, 7.0), torch.full((rows,), 7.0)
    host.run_adjoint(
        *(pointer(x) for x in (da, dr, mask, gamma, lam)), None if starts is None else pointer(starts),
        ctypes.c_int64(rows), ctypes.c_int64(steps), carry, seed, *(pointer(x) for x in out),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_the_gradient_is_the_reference(host, kind, carry):
    for steps in (1, 1024, 2100):
        da, dr, mask, gamma, lam, _ = inputs(2, steps, kind)
        got = run_adjoint(host, da, dr, mask, gamma, lam, carry, seed=steps)
        clean = [torch.where(mask, x, 0).double() for x in (da, dr)]
        mode = "carry" if carry else "zero"
        want = gae_backward_reference(*clean, mask, gamma.double(), lam.double(), mode)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=3e-5)


@pytest.mark.parametrize("carry", [True, False])
def test_the_gradients_bits_of_packed_and_padded_rows(host, carry):
    da, dr, mask, gamma, lam, _ = inputs(3, 2300, "gaps")
    want = run_adjoint(host, da, dr, mask, gamma, lam, carry)
    starts = torch.arange(0, 6901, 2300)
    packed = run_adjoint(
        host, *(x.flatten() for x in (da, dr, mask)), gamma, lam, carry, starts=starts, seed=1
    )  # fmt: skip
    pad = torch.nn.functional.pad
    wide = [pad(x, (5, 1100), value=False if x.dtype == torch.bool else float("nan")) for x in (da, dr, mask)]
    padded = [x[:, 5:2305] if x.dim() == 2 else x for x in run_adjoint(host, *wide, gamma, lam, carry, seed=2)]
    for other in (packed, padded):
        assert all(same_bits(a, b.reshape(a.shape)) for a, b in zip(want, other, strict=True))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_is_the_reference_whichever_block_is_last(host, kind, shift_mean):
    for steps in (0, 1300, 4999):  # a block takes the moments of 4096 tokens, and whitens 2048
        x, _, mask, *_ = inputs(2, steps, kind)
        results = []
        for seed in range(2):
            moments, out = torch.empty(3, dtype=torch.float64), torch.empty_like(x)
            shape = [ctypes.c_int64(n) for n in x.shape]
            host.run_whiten(pointer(x), pointer(mask), *shape, shift_mean, seed, pointer(moments), pointer(out))
            results.append((moments, out))
        torch.testing.assert_close(results[0][0], whiten_moments(x, mask), rtol=1e-12, atol=1e-12)
        want = whiten_reference(x.double(), mask, shift_mean)
        torch.testing.assert_close(results[0][1].double(), want, rtol=1e-6, atol=1e-6)
        assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_padding_on_either_side_changes_no_bit_of_whitening(host):
    x, _, mask, *_ = inputs(3, 4999, "gaps")
    pad = torch.nn.functional.pad
    made = []
    for left, right in ((0, 0), (41, 6000)):
        wide = pad(x, (left, right), value=float("nan")), pad(mask, (left, right), value=False)
        moments, out = torch.empty(3, dtype=torch.float64), torch.empty_like(wide[0])
        shape = [ctypes.c_int64(n) for n in out.shape]
        host.run_whiten(*(pointer(t) for t in wide), *shape, True, left, pointer(moments), pointer(out))
        made.append((moments, out[:, left : left + 4999].contiguous()))
    assert all(same_bits(a, b) for a, b in zip(*made, strict=True))
