"""The Triton kernels of both losses, interpreted, against the float64 reference: value, gradients, every statistic."""

import pytest
import torch
from backends import MASKS, make_mask, needs_triton, poison, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import fresh_memory_is_nan
from loss_rounding import absolute_errors

from srppo_kernels.ppo_loss import ppo_loss, value_loss

pytestmark = needs_triton

SHAPES = [(0, 3), (2, 0), (1, 1), (3, 60), (5, 300), (1100,)]  # a program takes 512 tokens


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Loops that small shapes would go through once take several turns, as those of large ones do."""
    import triton.language as tl

    from srppo_kernels import _triton_language

    monkeypatch.setattr(_triton_language, "_CHUNK", tl.constexpr(2))
    monkeypatch.setattr(_triton_language, "_SEARCH", tl.constexpr(512))
    with fresh_memory_is_nan():
        yield


def tokens(shape: tuple[int, ...], kind: str, spread: float, seed: int) -> list[torch.Tensor]:
    """new, old, advantages, entropy, mask; no ratio within rounding of a clip bound that the tests use."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=generator) * 5
    shift = torch.randn(shape, generator=generator) * spread
    for bound in (0.8, 1.28, 1.5):
        shift = torch.where((shift.exp() - bound).abs() < 1e-4, 0.01, shift)
    advantages, entropy = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    rows = old.numel() // shape[-1] if shape[-1] else shape[0]
    mask = make_mask(kind, rows, shape[-1], generator).reshape(shape)
    return [old + shift, old, advantages, entropy, mask]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(MASKS),
    reduction=st.sampled_from(("token_mean", "sequence_mean", "sum", "constant_length")),
    normalizer=st.sampled_from((None, 50.0, torch.tensor(50), torch.tensor(0.0))),
    spread=st.sampled_from([0.0, 1e-4, 0.3, 5.0, 100.0]),
    dual_clip=st.sampled_from([None, 1.5]),
    coef=st.sampled_from([None, 0.0, 0.01]),
    seed=st.integers(0, 2**20),
)
def test_policy_is_the_reference(shape, kind, reduction, normalizer, spread, dual_clip, coef, seed):
    if reduction == "sequence_mean" and len(shape) == 1:
        reduction = "token_mean"
    new, old, advantages, entropy, mask = tokens(shape, kind, spread, seed)

    def run(backend, convert):
        leaves = [convert(x).detach().requires_grad_() for x in (new, entropy)]
        loss, stats = ppo_loss(
            leaves[0], convert(old), convert(advantages), mask, entropy=None if coef is None else leaves[1],
            clip_high=0.28, dual_clip=dual_clip, entropy_coef=coef or 0.0, reduction=reduction, normalizer=normalizer,
            backend=backend,
        )  # fmt: skip
        return loss, stats, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    loss, stats, gradients = run("triton", lambda x: poison(x, mask))
    expected, wanted, exact = run("reference", torch.Tensor.double)
    assert loss.dtype == torch.float32
    d = (new.double() - old).clamp(-20, 20)
    largest = max([1.0, *((advantages.double().abs() * d.exp())[mask].tolist())])
    summed = largest * max(int(mask.sum()), 1) if reduction == "sum" and normalizer is None else largest
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-6 * summed)
    for got, want in zip(gradients, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-9)
        assert (got[~mask] == 0).all()
    rounding = absolute_errors(d[mask])
    for name, got, want in zip(stats._fields, stats, wanted, strict=True):
        if want is None:
            assert got is None
            continue
        atol = rounding.get(name, 1e-7)
        torch.testing.assert_close(got, want, rtol=3e-6, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(MASKS),
    clip=st.sampled_from((None, 0.0, 0.2)),
    normalizer=st.sampled_from((None, 50.0, torch.tensor(50))),
    spread=st.sampled_from([0.0, 0.3, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_value_is_the_reference(shape, kind, clip, normalizer, spread, seed):
    values, old, returns, _, mask = tokens(shape, kind, spread, seed)
    near = ((values - old).abs() - 0.2).abs() < 1e-4
    values = torch.where(near, old, values)

    def run(backend, convert):
        leaf = convert(values).detach().requires_grad_()
        loss, stats = value_loss(
            leaf, convert(old), convert(returns), mask, clip=clip, normalizer=normalizer, backend=backend
        )
        return loss, stats, torch.autograd.grad(loss, leaf)[0]

    loss, stats, gradient = run("triton", lambda x: poison(x, mask))
    expected, wanted, exact = run("reference", torch.Tensor.double)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), exact, rtol=2e-6, atol=1e-6 * max(spread, 1.0))
    assert (gradient[~mask] == 0).all()
    for name, got, want in zip(stats._fields, stats, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of the NaN, by numpy
def test_small_kl_keeps_its_digits_and_a_nan_is_seen():
    d = torch.linspace(-1e-3, 1e-3, 999)[None, :]
    mask = torch.ones_like(d, dtype=torch.bool)
    _, stats = ppo_loss(d, torch.zeros_like(d), d, mask, backend="triton")
    exact = (torch.expm1(d.double()) - d.double()).mean()
    torch.testing.assert_close(stats.approx_kl.double(), exact, rtol=1e-6, atol=0)
    lp = d.clone()
    lp[0, 700] = float("nan")
    lp.requires_grad_()
    loss, stats = ppo_loss(lp, torch.zeros_like(d), d, mask, backend="triton")
    loss.backward()
    assert loss.isnan() and stats.ratio_max.isnan() and stats.ratio_mean.isnan()
    assert lp.grad.isnan().nonzero().tolist() == [[0, 700]]


def test_what_is_at_a_bound_is_not_beyond_it():
    """A ratio of 1 where it may not move, a log-ratio of 20, no advantage; a value whose clipped error is as large."""
    new, mask = torch.tensor([[0.0, 0, 1, -1, 20, -20, 30, -30]]), torch.ones(1, 8, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -1, 0, 0, -1, 1, -1, 1]])
    values, returns = torch.tensor([[1.0, 0.5, -1]]), torch.tensor([[0.75, 0, 0]])

    def run(backend, dual_clip, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (new, values)]
        loss, stats = ppo_loss(
            leaves[0], torch.zeros_like(leaves[0]), advantages.to(dtype), mask, clip_low=0.0, clip_high=0.0,
            dual_clip=dual_clip, backend=backend,
        )  # fmt: skip
        of_values, value_stats = value_loss(
            leaves[1], torch.zeros_like(leaves[1]), returns.to(dtype), mask[:, :3], clip=0.5, backend=backend
        )
        return [*stats, *value_stats, *torch.autograd.grad(loss + of_values, leaves)]

    for dual_clip in (None, 1.5):
        exact = run("reference", dual_clip, torch.float64)
        for got, want in zip(run("triton", dual_clip, torch.float32), exact, strict=True):
            assert got is want is None or torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-12)


def padded(x: torch.Tensor, left: int, right: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (left, right), value=False if x.dtype == torch.bool else float("nan"))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("kind", ["gaps", "empty rows"])
def test_padding_on_either_side_changes_no_bit(kind, reduction):
    new, old, advantages, entropy, mask = tokens((3, 600), kind, 0.3, 1)
    mask[:, 0] = kind == "gaps"  # padding follows where a row may begin late as well

    def run(left, right):
        made = [padded(x, left, right) for x in (new, old, advantages, entropy, mask)]
        leaves = [x.requires_grad_() for x in (made[0], made[3])]
        loss, stats = ppo_loss(
            leaves[0], made[1], made[2], made[4], entropy=leaves[1], entropy_coef=0.01, reduction=reduction,
            backend="triton",
        )  # fmt: skip
        of_values, value_stats = value_loss(leaves[0], made[1], made[2], made[4], backend="triton")
        gradients = torch.autograd.grad(loss + of_values, leaves)
        return [loss, of_values, *stats, *value_stats], [x[:, left : left + 600].contiguous() for x in gradients]

    (want, gradients), (got, others) = run(0, 0), run(637, 1000)
    exact, _ = ppo_loss(
        new, old, advantages, mask, entropy=entropy, entropy_coef=0.01, reduction=reduction, backend="reference"
    )
    torch.testing.assert_close(want[0], exact)
    assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))
    assert all(same_bits(a, b) for a, b in zip(gradients, others, strict=True))


def test_packed_is_padded_but_for_the_order_of_its_sums():
    new, old, advantages, _, mask = tokens((3, 700), "right", 0.3, 1)

    def run(pick):
        leaf = pick(new).requires_grad_()
        loss, stats = ppo_loss(leaf, pick(old), pick(advantages), pick(mask), backend="triton")
        return loss, stats, torch.autograd.grad(loss, leaf)[0]

    (loss, stats, gradient), (packed_loss, packed_stats, packed_gradient) = run(lambda x: x), run(lambda x: x[mask])
    assert same_bits(gradient[mask], packed_gradient)
    for a, b in zip((loss, *stats), (packed_loss, *packed_stats), strict=True):
        assert a is b is None or abs(a - b) <= 1.2e-7 * abs(a)


def test_the_explained_variance_of_returns_that_do_not_vary():
    values, mask = torch.randn(2, 1500), torch.ones(2, 1500, dtype=torch.bool)
    for constant in (1.0, 0.3, -0.1156, 0.0033, 231.9395):
        _, stats = value_loss(values, values, torch.full((2, 1500), constant), mask, backend="triton")
        assert stats.return_var == stats.explained_variance == 0
    nearly = 100 + 0.05 * torch.randn(2, 1500)
    _, stats = value_loss(values, values, nearly, mask, backend="triton")
    assert stats.return_var == pytest.approx(nearly.double().var(correction=0).item(), rel=1e-4)


def test_opcheck():
    new, old, advantages, entropy, mask = tokens((2, 30), "gaps", 0.3, 1)
    leaves = new.requires_grad_(), entropy.requires_grad_()
    options = (0.2, 0.2, None, 0.01, "token_mean", None, None, "triton")
    torch.library.opcheck(torch.ops.srppo.ppo_loss, (leaves[0], old, advantages, mask, leaves[1], *options))
    torch.library.opcheck(torch.ops.srppo.value_loss, (leaves[0], old, advantages, mask, 0.2, None, None, "triton"))
