"""What Triton kernels share, by itself: the sums and roundings of a whole op hide a token's place, and a digit."""

import pytest
import torch
from backends import needs_triton

from srppo_kernels.gae import whiten

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")
shared = pytest.importorskip("srppo_kernels._triton_language")
tiles = pytest.importorskip("srppo_kernels.linear_logprob.triton_tiles")
pytestmark = needs_triton


@triton.jit
def rows_kernel(mask, rows, steps, first, length, at, valid, TOKENS: tl.constexpr):
    row, place, inside, here = shared.row_tokens(mask, rows, steps, TOKENS)
    to = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tl.store(at + to, tl.where(inside, place, -1))
    tl.store(valid + to, here)
    tl.store(first + row, shared.first_valid(mask + row * steps, steps))
    tl.store(length + row, shared.row_length(mask, row, steps))


@pytest.mark.parametrize("steps", [1, 8, 9, 61])
def test_tokens_of_a_row(steps, monkeypatch):
    """From its first valid one on, wherever it is: a mask is searched 8 tokens at a time here, and a program has 16."""
    monkeypatch.setattr(shared, "_SEARCH", tl.constexpr(8))
    firsts = [0, 1, 7, 8, 9, 20, 60, steps]  # as far as there are
    mask = torch.rand(len(firsts), steps) < 0.5
    for row, begin in enumerate(min(begin, steps) for begin in firsts):
        mask[row, :begin], mask[row, begin : begin + 1] = False, True
    rows, _, programs = shared.blocks_of(mask.shape, 16)
    first, length = torch.empty(2, rows, dtype=torch.int64)
    at, valid = torch.empty(programs, 16, dtype=torch.int64), torch.empty(programs, 16, dtype=torch.bool)
    rows_kernel[(programs,)](mask, rows, steps, first, length, at, valid, TOKENS=16)
    assert torch.equal(first, mask.int().argmax(1)) and torch.equal(length, mask.sum(1))
    at, valid = (t.view(-1, rows, 16).transpose(0, 1).flatten(1) for t in (at, valid))
    for row in range(rows):
        order = row * steps + torch.arange(steps).roll(-int(first[row]))
        assert torch.equal(at[row, :steps], order) and torch.equal(valid[row, :steps], mask.flatten()[order])
    assert (at[:, steps:] == -1).all() and not valid[:, steps:].any()


def test_blocks_of_any_number_of_dimensions():
    assert shared.blocks_of((2, 3, 5), 4) == (6, 5, 12)
    assert shared.blocks_of((0, 3)) == shared.blocks_of((2, 0)) == (1, 0, 1)
    x, mask = torch.randn(2, 3, 5), torch.rand(2, 3, 5) < 0.7
    for some in ((x, mask), (x[0, 0, 0], mask[0, 0, 0])):
        torch.testing.assert_close(whiten(*some, backend="triton"), whiten(*some, backend="reference"))


@triton.jit
def grid_kernel(partials, programs, out):
    tl.store(out, shared.grid_sum(partials, 1, programs))
    tl.store(out + 1, shared.grid_max(partials, 1, programs))


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_partials_of_one_sum_and_no_other(programs, monkeypatch):
    monkeypatch.setattr(shared, "_CHUNK", tl.constexpr(4))
    partials, out = torch.full((3, programs), 99.0, dtype=torch.float64), torch.empty(2, dtype=torch.float64)
    partials[1] = torch.arange(programs) % 3 / 8
    grid_kernel[(1,)](partials, programs, out)
    assert out.tolist() == [partials[1].sum(), partials[1].max()]


@triton.jit
def placed_kernel(rows, columns, out):
    row, column = tiles.placed(tl.program_id(0), rows, columns, 2, 16)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (31, 3), (75, 3)])
def test_programs_of_a_product(rows, columns):
    """Every block of two rows and every column once; in bands of 16 blocks, which run fastest."""
    blocks = range(0, rows, 2)
    want = [[r, c] for band in range(0, len(blocks), 16) for c in range(columns) for r in blocks[band : band + 16]]
    out = torch.empty(len(want), 2, dtype=torch.int32)
    placed_kernel[(len(want),)](rows, columns, out)
    assert out.tolist() == want


@triton.jit
def functions_kernel(x, out, clamped, N: tl.constexpr):
    at = tl.arange(0, N)
    given = tl.load(x + at)
    bounded = shared.clamp(given, 20.0)
    tl.store(clamped + at, bounded)
    e, tail = shared.exp_parts(bounded)
    tl.store(out + at, e)
    tl.store(out + N + at, tail)
    e, less_one = shared.exp_expm1(given)
    tl.store(out + 2 * N + at, e)
    tl.store(out + 3 * N + at, less_one)
    tl.store(out + 4 * N + at, shared.log1p(given))
    tl.store(out + 5 * N + at, tiles.tanh(given))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity
def test_functions_keep_their_digits():
    """To an ulp or two, of results near 0 as well; numbers on both sides of where their formulas change."""
    ends = torch.tensor([0.0, -0.0, 87.0, 88.0, 88.5, -87.0, -87.5, -90.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan])
    near = torch.cat([torch.logspace(-9, 1.9, 1000), torch.linspace(0.3, 0.4, 500)])
    x = torch.cat([ends, near, -near, torch.linspace(-1, 20, 1083)])
    assert len(x) == 4096
    out, clamped = torch.empty(6, len(x)), torch.empty_like(x)
    functions_kernel[(1,)](x, out, clamped, N=len(x))
    assert torch.equal(clamped.nan_to_num(-1), x.clamp(-20, 20).nan_to_num(-1))
    b, x = clamped.double(), x.double()
    tail = torch.where(b.abs() < 1e-2, b * b / 2 * (1 + b / 3 * (1 + b / 4 * (1 + b / 5))), b.expm1() - b)
    e = torch.where(x < -87, 0, torch.where(x > 88, torch.inf, x.exp()))
    less_one = torch.where(x.abs() < 1, x.expm1(), e - 1)
    exact = {"e": b.exp(), "e - 1 - x": tail, "any e": e, "any e - 1": less_one, "log1p": x.log1p(), "tanh": x.tanh()}
    for got, (name, want) in zip(out, exact.items(), strict=True):
        off = ((got - want) / want).abs().nan_to_num()  # where all is 0
        bound = torch.full_like(x, 1e-7 if name.endswith("e") else 5e-7 if name == "tanh" else 3e-7)
        if name == "e - 1 - x":
            bound[b.abs() > 0.34] = 2e-6  # where it is a difference
        if name == "tanh":
            bound[x.abs() < 0.25] = 1.5e-7  # of its series
        assert (off <= bound)[want.isfinite()].all(), name
        assert torch.equal(got[~want.isfinite()].nan_to_num(), want[~want.isfinite()].float().nan_to_num()), name
