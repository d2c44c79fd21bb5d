"""GAE against its definition, on every backend and instruction level.

NeMo 4156: masked gaps, padding, a row that is all masked, T = 1, gamma = lambda = 1, T = 131072, packed as padded.
"""

from functools import cache

import pytest
import torch
from backends import BACKENDS, MASKS, NATIVE, make_mask, poison, running, same_bits, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srppo_kernels.gae import gae
from srppo_kernels.gae.op import _starts_fit


def by_definition(rewards, values, mask, gamma, lam, bootstrap, mask_mode):
    """In Python floats, row by row. Carry: over the compacted row. Zero: TRL's loop, up to the last valid token."""
    advantages = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(mask.shape[0]):
        reward, value, inside = rewards[b].tolist(), values[b].tolist(), mask[b].tolist()
        valid = [t for t, yes in enumerate(inside) if yes]
        if not valid:
            continue
        g, la, end = float(gamma[b]), float(lam[b]), float(bootstrap[b])
        steps = valid if mask_mode == "carry" else list(range(valid[-1] + 1))
        r = [reward[t] if inside[t] else 0.0 for t in steps]
        v = [value[t] if inside[t] else 0.0 for t in steps]
        sums, running_sum = [0.0] * len(inside), 0.0
        for i in range(len(steps) - 1, -1, -1):
            delta = r[i] + g * (v[i + 1] if i + 1 < len(v) else end) - v[i]
            running_sum = delta + g * la * running_sum
            if inside[steps[i]]:
                sums[steps[i]] = running_sum
        advantages[b] = torch.tensor(sums, dtype=torch.float64)
    return advantages, torch.where(mask, advantages + torch.where(mask, values.double(), 0), 0)


def inputs(rows: int, steps: int, kind: str = "gaps", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, steps, generator=generator) for _ in range(2))
    return rewards, values, make_mask(kind, rows, steps, generator), torch.randn(rows, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 20),
    steps=st.integers(0, 50),
    kind=st.sampled_from(MASKS),
    mask_mode=st.sampled_from(("carry", "zero")),
    by_row=st.booleans(),
    bootstrapped=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_is_the_definition(backend, rows, steps, kind, mask_mode, by_row, bootstrapped, seed):
    rewards, values, mask, end = inputs(rows, steps, kind, seed)
    gamma = torch.linspace(0.5, 1.0, rows) if by_row else torch.full((rows,), 0.97)
    lam = torch.linspace(0.0, 1.0, rows) if by_row else torch.full((rows,), 0.9)
    with running(backend) as name:
        result = gae(
            poison(rewards, mask),
            poison(values, mask),
            mask,
            gamma=gamma if by_row else 0.97,
            lam=lam if by_row else 0.9,
            bootstrap=end if bootstrapped else None,
            mask_mode=mask_mode,
            backend=name,
        )
    end = end if bootstrapped else torch.zeros(rows)
    for got, expected in zip(result, by_definition(rewards, values, mask, gamma, lam, end, mask_mode), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-5)
        assert (got[~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
def test_one_long_row_beside_short_full_ones(backend, mask_mode):
    # All lanes valid while they last: the tile's mask must still know the rows that have ended.
    steps = torch.tensor([400, 5, 16, 33, 1, 64, 2, 100, 400, 17, 16, 15, 8, 9, 32, 31])
    rewards, values, _, end = inputs(16, 400, seed=3)
    mask = torch.arange(400)[None, :] < steps[:, None]
    with running(backend) as name, threads(1):
        got, _ = gae(rewards, values, mask, lam=0.95, bootstrap=end, mask_mode=mask_mode, backend=name)
    ones = torch.ones(16)
    expected, _ = by_definition(rewards, values, mask, ones, 0.95 * ones.double(), end, mask_mode)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_one_is_monte_carlo_minus_value(backend):
    rewards, values, _, _ = inputs(4, 30, seed=1)
    mask = torch.ones(4, 30, dtype=torch.bool)
    with running(backend) as name:
        advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0, backend=name)
    discounts = 0.9 ** (torch.arange(30)[None, :] - torch.arange(30)[:, None]).clamp(min=0).double()
    monte_carlo = rewards.double() @ discounts.triu().T
    torch.testing.assert_close(returns.double(), monte_carlo, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(advantages.double(), monte_carlo - values.double(), rtol=1e-5, atol=1e-5)


@cache
def long_rows(gamma: float, lam: float) -> tuple[tuple[Tensor, ...], Tensor]:
    rewards, values, mask, end = inputs(2, 131072, "gaps", seed=2)
    rewards = rewards.abs() * 1e-3  # of one sign: with gamma = lambda = 1 an advantage is a plain sum of all of them
    expected, _ = by_definition(rewards, values, mask, [gamma] * 2, [lam] * 2, end, "carry")
    return (rewards, values, mask, end), expected


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.999, 0.99), (1 - 2**-17, 1.0)])
def test_a_row_of_131072_tokens(backend, gamma, lam):
    (rewards, values, mask, end), expected = long_rows(gamma, lam)
    with running(backend) as name:
        got, _ = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=end, backend=name)
    error = (got.double() - expected).abs().max() / expected.abs().max()
    rounds_twice = backend == "native-portable" and 0.9999 < gamma < 1  # in place of an fma
    assert error <= (1e-5 if rounds_twice else 1e-6)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
@pytest.mark.parametrize("kind", MASKS)
def test_bits_do_not_depend_on_padding_batch_or_threads(backend, mask_mode, kind):
    rewards, values, mask, end = inputs(21, 77, kind, seed=5)
    with running(backend) as name:

        def run(r, v, m, e, cu_seqlens=None):
            return gae(r, v, m, bootstrap=e, mask_mode=mask_mode, cu_seqlens=cu_seqlens, backend=name)

        whole = run(rewards, values, mask, end)
        for left, right in ((0, 1), (0, 19), (3, 0), (16, 40)):
            nan = float("nan")
            pad = torch.nn.functional.pad
            padded = run(
                pad(rewards, (left, right), value=nan),
                pad(values, (left, right), value=nan),
                pad(mask, (left, right), value=False),
                end,
            )
            for a, b in zip(whole, padded, strict=True):
                assert same_bits(a, b[:, left : left + 77].contiguous())
                assert (b[:, :left] == 0).all()
                assert (b[:, left + 77 :] == 0).all()

        starts = torch.arange(0, 21 * 77 + 1, 77, dtype=torch.int32)
        flat = run(rewards.flatten(), values.flatten(), mask.flatten(), end, starts)
        order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
        shuffled = run(rewards[order], values[order], mask[order], end[order])
        for a, packed, mixed in zip(whole, flat, shuffled, strict=True):
            assert same_bits(a.flatten(), packed)
            assert same_bits(a[order], mixed)
        for row in (0, 20):
            alone = run(rewards[row : row + 1], values[row : row + 1], mask[row : row + 1], end[row : row + 1])
            assert all(same_bits(a[row], b[0]) for a, b in zip(whole, alone, strict=True))
        for n in (1, 2, 3):
            with threads(n):
                assert all(same_bits(a, b) for a, b in zip(whole, run(rewards, values, mask, end), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=0, max_size=20), seed=st.integers(0, 2**20), wide=st.booleans())
def test_packed_equals_padded_bit_for_bit(backend, lengths, seed, wide):
    rows, longest, total = len(lengths), max([*lengths, 1]), sum(lengths)
    rewards, values, mask, end = inputs(rows, longest, "gaps", seed)
    inside = torch.arange(longest)[None, :] < torch.tensor(lengths, dtype=torch.long)[:, None]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int64 if wide else torch.int32)
    mask = mask & inside
    with running(backend) as name:
        padded = gae(rewards, values, mask, bootstrap=end, backend=name)
        packed = gae(rewards[inside], values[inside], mask[inside], bootstrap=end, cu_seqlens=starts, backend=name)
    for a, b in zip(padded, packed, strict=True):
        assert b.shape == (total,)
        assert same_bits(a[inside], b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(backend, dtype):
    rewards, values, mask, end = (x.to(dtype) if x.is_floating_point() else x for x in inputs(6, 24))
    rewards, values, mask = (x.t().contiguous().t() for x in (rewards, values, mask))
    before = rewards.clone(), values.clone(), mask.clone()
    with running(backend if dtype != torch.float64 else "reference") as name:
        got, _ = gae(rewards, values, mask, bootstrap=end, backend=name)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ones = torch.ones(6)
    expected, _ = by_definition(rewards, values, mask, ones, 0.95 * ones.double(), end, "carry")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, mask), strict=True))


@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
@pytest.mark.parametrize("kind", ["gaps", "left", "empty rows"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradient(mask_mode, kind, packed):
    rewards, values, mask, end = inputs(3, 7, kind, seed=7)
    leaves = [x.double().requires_grad_() for x in (rewards, values, end)]
    starts = torch.tensor([0, 5, 14, 21]) if packed else None
    rows = torch.tensor([0.9, 0.95, 1.0], dtype=torch.float64)

    def run(r, v, e):
        shape = (-1,) if packed else (3, 7)
        return gae(
            r.reshape(shape), v.reshape(shape), mask.reshape(shape),
            gamma=rows, lam=0.8, bootstrap=e, mask_mode=mask_mode, cu_seqlens=starts,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves)
    nan = [poison(x, mask) for x in leaves[:2]]
    out = run(*nan, leaves[2])
    (out[0].sum() + out[1].square().sum()).backward(retain_graph=True)
    first = [x.grad.clone() for x in nan]
    assert all((g[~mask] == 0).all() and g.isfinite().all() for g in first)
    (out[0].sum() + out[1].square().sum()).backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(nan, first, strict=True))


def test_a_second_derivative_is_refused_and_not_silently_zero():
    rewards, values, mask, _ = inputs(2, 5)
    (gradient,) = torch.autograd.grad(
        gae(rewards.requires_grad_(), values, mask)[0].square().sum(), rewards, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="gae is differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed):
    rewards, values, mask, end = inputs(3, 6)
    rewards.requires_grad_()
    values.requires_grad_()
    tensors = [x.detach().flatten().requires_grad_() if packed else x for x in (rewards, values)]
    starts = torch.tensor([0, 6, 12, 18]) if packed else None
    rows = torch.tensor([0.9, 0.95, 1.0])
    tail = (rows, None, end.requires_grad_(), "carry", starts, packed, backend)
    torch.library.opcheck(torch.ops.srppo.gae, (*tensors, mask.flatten() if packed else mask, 0.0, 0.95, *tail))


def test_compiles_to_one_graph():
    rewards, values, mask, end = inputs(4, 9)
    values.requires_grad_()

    def loss(r, v, m, e):
        advantages, returns = gae(r, v, m, gamma=0.99, bootstrap=e)
        return (advantages * returns).sum()

    eager = torch.autograd.grad(loss(rewards, values, mask, end), values)[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(rewards, values, mask, end), values)[0], eager)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mask": torch.ones(2, 3)}, TypeError, "mask has dtype torch.float32; pass a bool tensor"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask has shape \(2, 4\)"),
        ({"values": torch.ones(3, 2)}, ValueError, "values has shape"),
        ({"values": torch.ones(2, 3, dtype=torch.long)}, TypeError, "values has dtype torch.int64"),
        ({"rewards": torch.ones(2, 3, dtype=torch.long)}, TypeError, "rewards has dtype torch.int64"),
        ({"mask_mode": "skip"}, ValueError, "mask_mode='skip' is unknown; choose one of 'carry', 'zero'"),
        (
            {"backend": "metal"},
            ValueError,
            "backend='metal' is unknown; choose one of 'auto', 'native', 'triton', 'reference'",
        ),
        ({"gamma": torch.ones(3)}, ValueError, r"gamma has shape \(3,\); pass one value a row, shape \(2,\)"),
        ({"lam": torch.ones(2, 1)}, ValueError, "lam has shape"),
        ({"gamma": float("nan")}, ValueError, r"gamma=nan must lie in \[0, 1\]"),
        ({"lam": 1.5}, ValueError, r"lam=1.5 must lie in \[0, 1\]"),
        ({"lam": None}, TypeError, "lam=None must be a number, got NoneType"),
        ({"bootstrap": torch.ones(2, 3)}, ValueError, "bootstrap has shape"),
        ({"bootstrap": torch.ones(2, device="meta")}, ValueError, "bootstrap is on meta but the other inputs on cpu"),
        ({"bootstrap": torch.ones(2, dtype=torch.long)}, TypeError, "bootstrap has dtype torch.int64; pass a floating"),
        ({"gamma": torch.ones(2, dtype=torch.long)}, TypeError, "gamma has dtype torch.int64; pass a floating"),
        ({"bootstrap": [0.0, 0.0]}, TypeError, "bootstrap must be a tensor, got list"),
        ({"rewards": [[1.0] * 3] * 2}, TypeError, "rewards must be a tensor, got list"),
        ({"bootstrap": torch.ones(2, dtype=torch.bool)}, TypeError, "bootstrap has dtype torch.bool; pass a floating"),
        ({"values": None}, TypeError, "values must be a tensor, got NoneType"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"with cu_seqlens pass packed \[total\]"),
    ],
)
def test_bad_input(change, error, text):
    good = {"rewards": torch.ones(2, 3), "values": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(error, match=text):
        gae(**{**good, **change})


@pytest.mark.parametrize(
    ("starts", "fit"),
    [([0, 6], True), ([0, 0, 2, 2, 6], True), ([0], True), ([1, 6], False), ([0, 5], False), ([0, 7], False),
     ([0, 4, 2, 6], False), ([0, -1, 6], False)],
)  # fmt: skip
def test_what_is_asserted_of_starts_on_a_device(starts, fit):
    assert bool(_starts_fit(torch.tensor(starts), 6)) == fit


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("starts", "text"),
    [
        (torch.tensor([1, 6]), "runs from 1 to 6"),
        (torch.tensor([0, 5]), "end at the number of packed tokens, 6"),
        (torch.tensor([0, 4, 2, 6]), "cu_seqlens decreases after position 1"),
        (torch.tensor([0]), "cu_seqlens has 1 entries; it needs the start"),
        (torch.tensor([], dtype=torch.int64), "pass int32 or int64 starts"),
        (torch.tensor([0.0, 6.0]), "pass int32 or int64 starts"),
        (torch.tensor([0, 6], device="meta"), "cu_seqlens is on meta but rewards on cpu"),
    ],
)
def test_bad_starts(backend, starts, text):
    flat = torch.ones(6)
    with pytest.raises(ValueError, match=text):
        gae(flat, flat, flat.bool(), cu_seqlens=starts, backend=backend)
    with pytest.raises(ValueError, match="or packed"):
        gae(flat, flat, flat.bool())
    with pytest.raises(TypeError, match="cu_seqlens must be a tensor, got list"):
        gae(flat, flat, flat.bool(), cu_seqlens=[0, 6])
