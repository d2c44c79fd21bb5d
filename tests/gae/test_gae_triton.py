"""GAE's Triton kernels, interpreted: against the float64 reference, and tile by tile against the walk over a row."""

import pytest
import torch
from backends import MASKS, make_mask, needs_triton, poison, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import fresh_memory_is_nan
from torch import Tensor

from srppo_kernels.gae import gae
from srppo_kernels.gae.reference import gae_reference

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten():
    with fresh_memory_is_nan():
        yield


def inputs(rows: int, steps: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, steps, generator=generator) for _ in range(2))
    return rewards, values, make_mask(kind, rows, steps, generator), torch.randn(rows, generator=generator)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 3),
    steps=st.sampled_from([0, 1, 7, 31, 32, 33, 70]),  # tiles have 32 tokens in the interpreter
    kind=st.sampled_from(MASKS),
    mask_mode=st.sampled_from(("carry", "zero")),
    by_row=st.sampled_from(("", "gamma", "lam", "both")),
    bootstrapped=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**20),
)
def test_is_the_reference(rows, steps, kind, mask_mode, by_row, bootstrapped, dtype, seed):
    rewards, values, mask, end = inputs(rows, steps, kind, seed)
    rewards, values = rewards.to(dtype), values.to(dtype)
    gamma = torch.linspace(0.5, 1.0, rows) if by_row in ("gamma", "both") else 0.97
    lam = torch.linspace(0.0, 1.0, rows) if by_row in ("lam", "both") else 0.9
    end = end if bootstrapped else None
    options = {"gamma": gamma, "lam": lam, "bootstrap": end, "mask_mode": mask_mode}
    got = gae(poison(rewards, mask), poison(values, mask), mask, **options, backend="triton")
    exact = [x.double() if isinstance(x, Tensor) else x for x in (gamma, lam)]
    expected = gae_reference(rewards.double(), values.double(), mask, *exact, end, mask_mode)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-5)
        assert (a[~mask] == 0).all()


@pytest.mark.parametrize("kind", ["gaps", "sparse", "empty rows", "left"])
@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
def test_bits_do_not_depend_on_padding_packing_or_how_tiles_are_spread(kind, mask_mode):
    from srppo_kernels.gae.triton_scan import gae_triton

    rewards, values, mask, end = inputs(3, 50, kind, seed=4)
    mask[0, -20:] = False

    def run(r, v, m, starts=None, spread=False):
        options = (1.0, 0.95, None, None, end, mask_mode == "carry", starts)
        *outputs, moments = gae_triton(r, v, m, *options, with_moments=True, tile=16, spread=spread)
        made.append(moments)
        return outputs

    made: list[Tensor] = []
    whole = run(rewards, values, mask)
    for a, b in zip(whole, run(rewards, values, mask, spread=True), strict=True):
        assert same_bits(a, b)
    pad = torch.nn.functional.pad
    wide = [pad(x, (5, 40), value=float("nan")) for x in (rewards, values)]
    padded = run(*wide, pad(mask, (5, 40), value=False), spread=mask_mode == "carry")
    for a, b in zip(whole, padded, strict=True):
        assert same_bits(a, b[:, 5:55].contiguous())
        assert (b[:, 55:] == 0).all() and (b[:, :5] == 0).all()
    starts = torch.tensor([0, 50, 100, 150], dtype=torch.int32)
    packed = run(rewards.flatten(), values.flatten(), mask.flatten(), starts, spread=kind == "gaps")
    for a, b in zip(whole, packed, strict=True):
        assert same_bits(a.flatten(), b)
    assert len(made) == 4 and all(same_bits(made[0], other) for other in made[1:])


def test_a_tile_alone_finds_the_next_value_however_far_it_is():
    """Behind a gap that begins where the third tile from the right ends: at once, in the same block, or blocks on."""
    from srppo_kernels.gae.triton_scan import gae_triton

    gaps = (1, 2, 16, 17, 31)
    rewards, values, mask, end = inputs(len(gaps), 75, "full", seed=6)
    for row, gap in enumerate(gaps):
        mask[row, 43 : 43 + gap] = False
    options = (0.9, 0.8, None, None, end, True, None)
    got = gae_triton(poison(rewards, mask), poison(values, mask), mask, *options, tile=16, spread=True)[:2]
    for a, b in zip(got, gae_reference(rewards.double(), values.double(), mask, 0.9, 0.8, end), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("spread", [False, True])
def test_a_long_row_keeps_its_digits(spread):
    from srppo_kernels.gae.triton_scan import gae_triton

    rewards, values, mask, end = inputs(1, 1500, "gaps", seed=2)
    rewards = rewards.abs()  # of one sign: with gamma = lambda = 1 an advantage is a plain sum of all of them
    got, _, _ = gae_triton(rewards, values, mask, 1.0, 1.0, None, None, end, True, None, tile=64, spread=spread)
    expected, _ = gae_reference(rewards.double(), values.double(), mask, 1.0, 1.0, end)
    assert (got.double() - expected).abs().max() / expected.abs().max() <= 2e-7


@pytest.mark.parametrize("spread", [False, True])
def test_moments_of_more_rows_than_are_merged_at_a_time(spread):
    from srppo_kernels.gae.triton_scan import gae_triton

    rewards, values, mask, _ = inputs(40, 5, "gaps")
    got, _, moments = gae_triton(
        rewards, values, mask, 1.0, 0.95, None, None, None, True, None, with_moments=True, tile=16, spread=spread
    )
    x = got[mask].double()
    exact = torch.stack([torch.tensor(float(len(x))), x.mean(), (x - x.mean()).square().sum()])
    torch.testing.assert_close(moments, exact, rtol=1e-12, atol=0)


def test_moments_of_nothing():
    nothing = torch.empty(2, 0)
    assert (gae(nothing, nothing, nothing.bool(), moments=True, backend="triton")[2] == 0).all()


def test_a_nan_on_a_valid_token_is_seen_and_only_where_it_reaches():
    rewards, values, mask, _ = inputs(1, 40, "full")
    rewards[0, 20] = float("nan")
    got, _ = gae(rewards, values, mask, backend="triton")
    assert got[0, :21].isnan().all()
    assert got[0, 21:].isfinite().all()


def test_float64_is_refused_in_words():
    rewards, values, mask, _ = inputs(1, 4, "full")
    with pytest.raises(ValueError, match="backend='triton' cannot run: it computes in float32"):
        gae(rewards.double(), values, mask, backend="triton")


def test_opcheck():
    rewards, values, mask, end = inputs(2, 20, "gaps")
    leaves = rewards.requires_grad_(), values.requires_grad_(), end.requires_grad_()
    tail = (1.0, 0.95, None, None, leaves[2], "carry", None, True, "triton")
    torch.library.opcheck(torch.ops.srppo.gae, (leaves[0], leaves[1], mask, *tail))


def test_tiles_of_the_longest_rows_fit_in_a_device_s_grid(monkeypatch):
    """Which ends at 65535 in its second dimension: 67 million tokens."""
    from srppo_kernels.gae import triton_scan

    grids = []

    class Launched:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    for kernel in ("row_ends", "tile_maps", "fold_tiles", "tile_outputs"):
        monkeypatch.setattr(triton_scan, kernel, Launched())
    x = torch.empty(2, 70_000_000, device="meta")
    triton_scan.gae_triton(x, x, x.bool(), 1.0, 0.95, None, None, None, True, None, tile=triton_scan.TILE)
    assert len(grids) == 4
    assert all(size <= 65535 for grid in grids for size in grid[1:])
