"""The clipped value loss against the textbook formula and autograd, on every backend and instruction level."""

import pytest
import torch
from backends import BACKENDS, MASKS, NATIVE, make_mask, poison, running, same_bits, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srppo_kernels.ppo_loss import ValueStats, value_loss


def textbook(values, old, returns, mask, clip):
    v, o, r = values[mask], old[mask], returns[mask]
    unclipped = (v - r) ** 2
    clipped = (o + (v - o).clamp(-clip, clip) - r) ** 2 if clip is not None else unclipped
    n = max(v.numel(), 1)
    explained = 1 - (v - r).var(correction=0) / r.var(correction=0) if v.numel() > 1 else torch.zeros(())
    stats = {
        "clipfrac": (clipped > unclipped).sum() / n,
        "error": unclipped.sum() / n,
        "value_mean": v.sum() / n,
        "return_mean": r.sum() / n,
        "return_var": r.var(correction=0) if v.numel() else torch.zeros(()),
        "residual_var": (v - r).var(correction=0) if v.numel() else torch.zeros(()),
        "explained_variance": explained,
        "count": torch.tensor(v.numel()),
    }
    return 0.5 * torch.max(unclipped, clipped).sum() / n, stats


def inputs(rows: int, steps: int, kind: str = "gaps", seed: int = 0, centre: float = 0.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    returns, old, moved = (torch.randn(rows, steps, generator=generator) for _ in range(3))
    old = old + centre
    return old + 0.3 * moved, old, returns + centre, make_mask(kind, rows, steps, generator)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 7),
    steps=st.integers(0, 60),
    kind=st.sampled_from(MASKS),
    clip=st.sampled_from([None, 0.0, 0.2, 10.0]),
    centre=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_is_the_textbook(backend, rows, steps, kind, clip, centre, seed):
    values, old, returns, mask = inputs(rows, steps, kind, seed, centre)
    v64 = values.double().requires_grad_()
    expected, expected_stats = textbook(v64, old.double(), returns.double(), mask, clip)
    (wanted,) = torch.autograd.grad(expected, v64)
    v = poison(values.requires_grad_(), mask)
    with running(backend) as name:
        loss, stats = value_loss(v, poison(old, mask), poison(returns, mask), mask, clip=clip, backend=name)
    (gradient,) = torch.autograd.grad(loss, v)

    moved, error = (v64 - old.double()).detach(), (v64 - returns.double()).detach()
    limit = float("inf") if clip is None else clip
    clipped_error = (old.double() + moved.clamp(-limit, limit) - returns.double()).abs()
    # On a tie autograd of max halves the gradient; near one, rounding picks the side.
    edge = mask & (((moved.abs() - limit).abs() < 1e-4) | ((clipped_error - error.abs()).abs() < 1e-4 + 1e-6 * centre))
    inside = moved.abs() < limit - 1e-4
    sure = ~edge | inside
    slack = 1e-5 * max(centre, 1)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=slack)
    torch.testing.assert_close(gradient.double()[sure], wanted[sure], rtol=2e-6, atol=slack)
    assert (gradient[~mask] == 0).all()
    for field, got in zip(ValueStats._fields, stats, strict=True):
        assert got.dtype == torch.float32
        assert not got.requires_grad
        loose = float((mask & ~sure).sum()) / max(int(mask.sum()), 1) if field == "clipfrac" else 0.0
        if field == "explained_variance":  # a quotient of variances: with few tokens the denominator may vanish
            loose = 1e-4 / max(float(expected_stats["return_var"].detach()), 1e-4)
        want = expected_stats[field].detach().double()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=slack + loose)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_branch(backend):
    #  moved beyond the clip: away from the return (clipped error smaller), towards it (clipped error larger), inside it
    values, old = torch.tensor([[1.0, -1.0, 0.1]]).requires_grad_(), torch.zeros(1, 3)
    returns = torch.tensor([[-1.0, -1.0, 1.0]])
    with running(backend) as name:
        loss, stats = value_loss(
            values, old, returns, torch.ones(1, 3, dtype=torch.bool), normalizer=torch.tensor(1), backend=name
        )
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.5 * (4.0 + 0.64 + 0.81), rtol=1e-6, atol=0)
    torch.testing.assert_close(values.grad, torch.tensor([[2.0, 0.0, -0.9]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.clipfrac.item(), 1 / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_explained_variance(backend):
    returns = torch.randn(4, 50)
    mask = torch.ones(4, 50, dtype=torch.bool)
    with running(backend) as name:
        perfect = value_loss(returns + 3, returns, returns, mask, backend=name)[1]
        useless = value_loss(torch.zeros(4, 50), returns, returns, mask, backend=name)[1]
        constant = value_loss(returns, returns, torch.ones(4, 50), mask, backend=name)[1]
    torch.testing.assert_close(perfect.explained_variance.item(), 1.0)
    torch.testing.assert_close(useless.explained_variance.item(), 0.0, atol=1e-6, rtol=0)
    assert constant.explained_variance == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_returns_that_do_not_vary(backend):
    """Their sums round: in 7 of 100 such batches that was a variance, and an explained one of -1e17."""
    generator = torch.Generator().manual_seed(0)
    for constant, steps in zip(torch.randn(40, generator=generator), range(100, 5000, 120), strict=False):
        values, returns = torch.randn(1, steps, generator=generator), constant.expand(1, steps)
        mask = torch.ones(1, steps, dtype=torch.bool)
        parts = [slice(steps * i // 7, steps * (i + 1) // 7) for i in range(7)]
        with running(backend) as name:

            def run(rows, values=values, returns=returns, mask=mask, name=name):
                return value_loss(values[:, rows], values[:, rows], returns[:, rows], mask[:, rows], backend=name)[1]

            whole, merged = run(slice(None)), ValueStats.merge([run(rows) for rows in parts])
        assert whole.return_var == whole.explained_variance == 0
        assert merged.return_var == merged.explained_variance == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_micro_batches_are_one_batch(backend):
    values, old, returns, mask = inputs(9, 30, seed=4, centre=20)
    mask[3:5] = False
    with running(backend) as name:

        def run(rows):
            return value_loss(values[rows], old[rows], returns[rows], mask[rows], normalizer=500.0, backend=name)

        whole, stats = run(slice(None))
        parts = [run(rows) for rows in (slice(0, 3), slice(3, 5), slice(5, 9))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for a, b in zip(ValueStats.merge([part for _, part in parts]), stats, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    nothing = ValueStats(*map(torch.zeros_like, stats))
    assert ValueStats.merge([nothing, nothing]) == nothing
    for a, b in zip(ValueStats.merge([stats]), ValueStats.merge([stats, nothing]), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="stats is empty"):
        ValueStats.merge([])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", MASKS)
def test_bits_do_not_depend_on_padding_or_threads(backend, kind):
    values, old, returns, mask = inputs(5, 5000, kind, seed=6)

    def run(pad=(0, 0)):
        v, o, r = (torch.nn.functional.pad(x, pad, value=float("nan")) for x in (values, old, returns))
        v.requires_grad_()
        loss, stats = value_loss(v, o, r, torch.nn.functional.pad(mask, pad, value=False), backend=name)
        (grad,) = torch.autograd.grad(loss, v)
        return [loss.detach(), grad[:, pad[0] : pad[0] + 5000].contiguous(), torch.stack(list(stats))]

    with running(backend) as name:
        whole = run()
        for others in (run((0, 3)), run((7, 0)), run((33, 4000))):
            assert all(same_bits(a, b) for a, b in zip(whole, others, strict=True))
        for n in (1, 3):
            with threads(n):
                assert all(same_bits(a, b) for a, b in zip(whole, run(), strict=True))


def test_gradcheck_and_double_use():
    values, old, returns, mask = (x.double() if x.is_floating_point() else x for x in inputs(3, 8))
    values.requires_grad_()
    for clip in (None, 0.2):
        assert torch.autograd.gradcheck(lambda v, clip=clip: value_loss(v, old, returns, mask, clip=clip)[0], values)
    loss, _ = value_loss(values, old, returns, mask)
    loss.backward(retain_graph=True)
    first = values.grad.clone()
    loss.backward()
    assert torch.equal(values.grad, 2 * first)
    loss, _ = value_loss(values, old, returns, mask)
    for outer in (loss.square(), loss):  # whether the upstream gradient has a graph or is a constant
        (gradient,) = torch.autograd.grad(outer, values, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):  # differentiable once, and not silently wrong
            (values.sum() + gradient.sum()).backward()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_opcheck_and_compile(backend):
    values, old, returns, mask = inputs(3, 6)
    values.requires_grad_()
    torch.library.opcheck(torch.ops.srppo.value_loss, (values, old, returns, mask, 0.2, None, None, backend))

    def run(v):
        return value_loss(v, old, returns, mask, backend=backend)

    (loss, stats), (loss2, stats2) = run(values), torch.compile(run, fullgraph=True, backend="aot_eager")(values)
    assert torch.equal(torch.autograd.grad(loss, values)[0], torch.autograd.grad(loss2, values)[0])
    assert all(torch.equal(a, b) for a, b in zip(stats, stats2, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_nothing_valid(dtype):
    values, old, returns, mask = (x.to(dtype) if x.is_floating_point() else x for x in inputs(4, 5))
    v = values.requires_grad_()
    loss, _ = value_loss(v, old.t().contiguous().t(), returns, mask)
    loss.backward()
    assert v.grad.dtype == dtype
    expected, _ = textbook(values.double(), old.double(), returns.double(), mask, 0.2)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss, stats = value_loss(v, old, returns, torch.zeros_like(mask))
    assert loss == 0
    assert all(value == 0 for value in stats)


def test_bad_input():
    x, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="returns has shape"):
        value_loss(x, x, x[:1], mask)
    with pytest.raises(ValueError, match=r"values is 0-d; pass \[B, T\] or \[N\]"):
        value_loss(x[0, 0], x[0, 0], x[0, 0], mask[0, 0])
    with pytest.raises(TypeError, match="old_values must be a tensor, got NoneType"):
        value_loss(x, None, x, mask)
    with pytest.raises(TypeError, match=r"mask has dtype torch\.uint8"):
        value_loss(x, x, x, mask.byte())
    with pytest.raises(ValueError, match="clip=-1 must not be negative; pass None"):
        value_loss(x, x, x, mask, clip=-1)
    with pytest.raises(ValueError, match="normalizer=-2 must be positive"):
        value_loss(x, x, x, mask, normalizer=-2)
