"""The clipped policy loss against the textbook formula and autograd, on every backend and instruction level."""

import math
from functools import cache

import pytest
import torch
from backends import BACKENDS, MASKS, NATIVE, TRITON, make_mask, poison, running, same_bits, threads
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loss_rounding import absolute_errors
from torch import Tensor
from torch.overrides import TorchFunctionMode

from srppo_kernels.ppo_loss import PPOStats, ppo_loss, ppo_terms
from srppo_kernels.ppo_loss.reference import token_weights

REDUCTIONS = ("token_mean", "sequence_mean", "sum", "constant_length")


def textbook(logprobs, old, advantages, mask, entropy, low, high, dual_clip, coef, reduction):
    """In float64, on the valid tokens alone, with min, clamp and autograd instead of branches."""
    rows = mask.nonzero()[:, 0]
    lp, lo, a = logprobs[mask], old[mask], advantages[mask]
    d = (lp - lo).clamp(-20, 20)
    ratio = d.exp()
    token = torch.max(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    if dual_clip is not None:
        token = torch.where(a < 0, torch.min(token, -a * dual_clip), token)
    if entropy is not None:
        token = token - coef * entropy[mask]
    if reduction == "sequence_mean":
        means = [token[rows == row].mean() for row in rows.unique()]
        loss = torch.stack(means).mean() if means else token.sum()
    else:
        divisor = {"token_mean": token.numel(), "sum": 1, "constant_length": mask.numel()}[reduction]
        loss = token.sum() / max(divisor, 1)
    n = max(token.numel(), 1)
    stats = {
        "approx_kl": (torch.expm1(d) - d).sum() / n,
        "approx_kl_k1": -d.sum() / n,
        "clipfrac_low": ((a < 0) & (ratio < 1 - low)).sum() / n,
        "clipfrac_high": ((a > 0) & (ratio > 1 + high)).sum() / n,
        "clipfrac_dual": ((a < 0) & (ratio > (dual_clip or math.inf))).sum() / n,
        "ratio_mean": ratio.sum() / n,
        "ratio_max": ratio.max() if token.numel() else torch.zeros(()),
        "ratio_var": ratio.var(correction=0) if token.numel() else torch.zeros(()),
        "entropy": None if entropy is None else entropy[mask].sum() / n,
        "count": torch.tensor(token.numel()),
    }
    return loss, stats


def inputs(rows: int, steps: int, kind: str = "gaps", seed: int = 0, spread: float = 0.3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, steps, generator=generator) * 5
    logprobs = old + torch.randn(rows, steps, generator=generator) * spread
    advantages = torch.randn(rows, steps, generator=generator)
    advantages[torch.rand(rows, steps, generator=generator) < 0.05] = 0
    entropy = torch.rand(rows, steps, generator=generator) * 4
    return logprobs, old, advantages, make_mask(kind, rows, steps, generator), entropy


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 7),
    steps=st.integers(0, 60),
    kind=st.sampled_from(MASKS),
    reduction=st.sampled_from(REDUCTIONS),
    spread=st.sampled_from([0.0, 1e-4, 0.3, 5.0, 100.0]),
    clips=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 3.0)]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    coef=st.sampled_from([None, 0.0, 0.01]),
    seed=st.integers(0, 2**20),
)
# Terms that nearly cancel: d = 20 and -19.93 in approx_kl_k1; ratios of 296 and 285, or of 2e-9 and 6e-7, in ratio_var.
@example(3, 3, "right", "token_mean", 100.0, (0.2, 0.2), None, None, 4084)
@example(1, 2, "full", "token_mean", 5.0, (0.2, 0.2), None, None, 525)
@example(1, 2, "full", "token_mean", 100.0, (0.2, 0.2), None, None, 62724)
def test_is_the_textbook(backend, rows, steps, kind, reduction, spread, clips, dual_clip, coef, seed):
    logprobs, old, advantages, mask, entropy = inputs(rows, steps, kind, seed, spread)
    low, high = clips
    lp64, h64 = logprobs.double().requires_grad_(), entropy.double().requires_grad_()
    with_entropy = coef is not None
    expected, expected_stats = textbook(
        lp64, old.double(), advantages.double(), mask, h64 if with_entropy else None, low, high, dual_clip, coef,
        reduction,
    )  # fmt: skip
    wanted = torch.autograd.grad(expected, (lp64, h64), allow_unused=True, materialize_grads=True)

    lp = poison(logprobs.requires_grad_(), mask)
    h = poison(entropy.requires_grad_(), mask)
    with running(backend) as name:
        loss, stats = ppo_loss(
            lp, poison(old, mask), poison(advantages, mask), mask, entropy=h if with_entropy else None,
            clip_low=low, clip_high=high, dual_clip=dual_clip, entropy_coef=coef or 0.0, reduction=reduction,
            backend=name,
        )  # fmt: skip
    gradients = torch.autograd.grad(loss, (lp, h), allow_unused=True, materialize_grads=True)

    # A ratio within rounding of a clip bound may fall on either side of it, and so may a log-ratio of the clamp's.
    raw = (lp64 - old.double()).detach()
    d = raw.clamp(-20, 20)
    bounds = [1 - low, 1 + high, *([dual_clip] if dual_clip else [])]
    edge = mask & torch.stack([(d.exp() - bound).abs() < 1e-5 for bound in bounds]).any(0)
    edge |= mask & ((raw.abs() - 20).abs() < 2e-6)
    size = (advantages.double().abs() * d.exp())[mask].max().clamp(min=1) if mask.any() else torch.tensor(1.0)
    weight = 1.0 if reduction == "sum" else 1.0 / max(int(mask.any(1).sum()), 1)
    scale = float(size) * weight
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=2e-6 * scale * max(int(mask.sum()), 1))
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got.double()[~edge], want[~edge], rtol=2e-6, atol=1e-6 * weight)
        assert (got[~mask] == 0).all()
    rounding = absolute_errors(d[mask])
    for field, got in zip(PPOStats._fields, stats, strict=True):
        want = expected_stats[field]
        if want is None:
            assert got is None
            continue
        assert got.dtype == torch.float32
        assert got.shape == ()
        assert not got.requires_grad
        slack = float(edge.sum()) / max(int(mask.sum()), 1) if field.startswith("clipfrac") else 0.0
        atol = rounding.get(field, 1e-7) + slack
        torch.testing.assert_close(got.double(), want.detach().double(), rtol=3e-6, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_kl_keeps_its_digits(backend):
    # exp(d) - 1 - d in float32 is noise at d = 1e-4; the estimate of an update of that size must not be.
    d = torch.linspace(-1e-3, 1e-3, 999)[None, :]
    with running(backend) as name:
        _, stats = ppo_loss(d, torch.zeros_like(d), d, torch.ones_like(d, dtype=torch.bool), backend=name)
    expected = (torch.expm1(d.double()) - d.double()).mean()
    torch.testing.assert_close(stats.approx_kl.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_policies_have_ratio_exactly_one(backend):
    logprobs, _, advantages, mask, _ = inputs(5, 33)
    with running(backend) as name:
        _, stats = ppo_loss(logprobs, logprobs.clone(), advantages, mask, backend=name)
    assert stats.ratio_mean == stats.ratio_max == 1
    assert stats.approx_kl == stats.approx_kl_k1 == stats.ratio_var == stats.clipfrac_low == stats.clipfrac_high == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_branch(backend):
    # ratio 2 and 0.5, advantage +1 and -1, then beyond the clamp on both sides.
    d = torch.tensor([[math.log(2.0), math.log(0.5), math.log(2.0), math.log(0.5), 30.0, -30.0, 30.0, -math.inf]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0]])
    lp = d.clone().requires_grad_()
    with running(backend) as name:
        loss, stats = ppo_loss(
            lp, torch.zeros(1, 8), advantages, torch.ones(1, 8, dtype=torch.bool), reduction="sum", backend=name
        )
    loss.backward()
    #            clipped high, kept, kept, clipped low, overflow of the clamp: no gradient on either side
    expected = torch.tensor([[0.0, -0.5, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(lp.grad, expected, rtol=1e-6, atol=0)
    e20 = math.exp(20.0)
    torch.testing.assert_close(loss.item(), -1.2 - 0.5 + 2 + 0.8 + e20 - 2 / e20 - 1.2, rtol=1e-6, atol=0)
    assert stats.clipfrac_high == 2 / 8
    assert stats.clipfrac_low == 1 / 8
    torch.testing.assert_close(stats.ratio_max.item(), e20, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
def test_a_log_ratio_at_the_bound_has_its_gradient_and_one_beyond_has_none(backend):
    """As autograd of `clamp` had it up to torch 2.13."""
    lp = torch.tensor([[20.0, -20.0, 20.00001, -20.00001]], requires_grad=True)
    assert (lp[0, 2:].abs() > 20).all()
    with running(backend) as name:
        loss, _ = ppo_loss(
            lp, torch.zeros(1, 4), torch.tensor([[-1.0, 1, -1, 1]]), lp > -math.inf, reduction="sum", backend=name
        )
    loss.backward()
    torch.testing.assert_close(lp.grad, torch.tensor([[math.exp(20), -math.exp(-20), 0, 0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_on_a_valid_token_is_seen(backend):
    logprobs, old, advantages, mask, _ = inputs(3, 40, "full")
    for which in range(3):
        tensors = [logprobs.clone(), old.clone(), advantages.clone()]
        tensors[which][1, 7] = float("nan")
        lp = tensors[0].requires_grad_()
        with running(backend) as name:
            loss, stats = ppo_loss(lp, tensors[1], tensors[2], mask, backend=name)
        loss.backward()
        assert loss.isnan()
        assert stats.ratio_mean.isnan() == stats.ratio_max.isnan() == (which < 2)
        assert lp.grad[1, 7].isnan()
        assert lp.grad.isnan().sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalizer", [50, torch.tensor(50.0), torch.tensor(50)])
def test_normalizer_replaces_the_divisor(backend, reduction, normalizer):
    logprobs, old, advantages, mask, _ = inputs(6, 20)
    n = {"token_mean": int(mask.sum()), "sequence_mean": int(mask.any(1).sum()), "sum": 1, "constant_length": 120}
    lp1, lp2 = logprobs.clone().requires_grad_(), logprobs.clone().requires_grad_()
    with running(backend) as name:
        own, _ = ppo_loss(lp1, old, advantages, mask, reduction=reduction, backend=name)
        given, _ = ppo_loss(lp2, old, advantages, mask, reduction=reduction, normalizer=normalizer, backend=name)
    own.backward()
    given.backward()
    torch.testing.assert_close(given * 50, own * n[reduction])
    torch.testing.assert_close(lp2.grad * 50, lp1.grad * n[reduction])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_valid(backend):
    logprobs, old, advantages, mask, entropy = inputs(3, 4)
    nothing = torch.zeros_like(mask)
    for reduction in REDUCTIONS:
        for normalizer in (None, torch.tensor(0.0)):
            lp = poison(logprobs.requires_grad_(), nothing)
            with running(backend) as name:
                loss, stats = ppo_loss(
                    lp,
                    old,
                    advantages,
                    nothing,
                    entropy=entropy,
                    reduction=reduction,
                    normalizer=normalizer,
                    backend=name,
                )
            loss.backward()
            assert loss == 0
            assert (lp.grad == 0).all()
            assert all(value == 0 for value in stats)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_merged_micro_batches_are_one_batch(backend, with_entropy):
    logprobs, old, advantages, mask, entropy = inputs(9, 30, "gaps", seed=4)
    mask[3:5] = False  # one micro-batch without a token
    with running(backend) as name:

        def run(rows):
            h = entropy[rows] if with_entropy else None
            return ppo_loss(
                logprobs[rows], old[rows], advantages[rows], mask[rows], entropy=h, normalizer=1000, backend=name
            )

        whole, stats = run(slice(None))
        parts = [run(rows) for rows in (slice(0, 3), slice(3, 5), slice(5, 6), slice(6, 9))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    merged = PPOStats.merge([part for _, part in parts])
    alone = PPOStats.merge([stats])  # as beside one without a token
    nothing = PPOStats(*(None if t is None else torch.zeros_like(t) for t in stats))
    assert PPOStats.merge([nothing, nothing]) == nothing
    for name, a, b in [
        *zip(PPOStats._fields, merged, stats, strict=True),
        *zip(PPOStats._fields, alone, PPOStats.merge([stats, nothing]), strict=True),
    ]:
        if a is None:
            assert name == "entropy"
            assert not with_entropy
            continue
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_merge_refuses_what_it_cannot_join():
    tensors = inputs(2, 3, "full")
    with_h = ppo_loss(*tensors[:4], entropy=tensors[4])[1]
    without = ppo_loss(*tensors[:4])[1]
    with pytest.raises(ValueError, match="entropy is None in some"):
        PPOStats.merge([with_h, without])
    with pytest.raises(ValueError, match="stats is empty"):
        PPOStats.merge([])


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
def test_bits_do_not_depend_on_padding_or_threads(backend, kind, reduction):
    logprobs, old, advantages, mask, entropy = inputs(5, 5000, kind, seed=6)

    def run(pad=(0, 0), above=0):
        def wide(x, value=float("nan")):
            x = torch.nn.functional.pad(x, pad, value=value)
            return torch.cat((torch.full((above, x.shape[1]), value, dtype=x.dtype), x))

        lp = wide(logprobs).requires_grad_()
        loss, stats = ppo_loss(
            lp, wide(old), wide(advantages), wide(mask, False), entropy=wide(entropy), entropy_coef=0.01,
            reduction=reduction, backend=name,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, lp)
        return [loss.detach(), grad[above:, pad[0] : pad[0] + 5000].contiguous(), torch.stack(list(stats))]

    with running(backend) as name:
        whole = run()
        for others in (run((0, 3)), run((7, 0)), run((33, 4000)), run((1, 1), above=2)):
            assert all(same_bits(a, b) for a, b in zip(whole, others, strict=True))
        for n in (1, 3):
            with threads(n):
                assert all(same_bits(a, b) for a, b in zip(whole, run(), strict=True))


@cache
def a_million() -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    logprobs, old, advantages, mask, _ = inputs(8, 131072, "gaps", seed=8)
    lp64 = logprobs.double().requires_grad_()
    expected, _ = textbook(lp64, old.double(), advantages.double(), mask, None, 0.2, 0.2, None, 0.0, "token_mean")
    expected.backward()
    return (logprobs, old, advantages, mask), expected, lp64


@pytest.mark.parametrize("backend", NATIVE)
def test_a_million_tokens_keep_their_digits(backend):
    (logprobs, old, advantages, mask), expected, lp64 = a_million()
    lp = logprobs.clone().requires_grad_()
    with running(backend) as name:
        loss, _ = ppo_loss(lp, old, advantages, mask, backend=name)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-8)
    ratio = (lp64.detach() - old.double()).exp()
    inner = ((ratio - 0.8).abs() > 1e-5) & ((ratio - 1.2).abs() > 1e-5)
    error = (lp.grad.double() - lp64.grad).abs() / lp64.grad.abs().clamp(min=1e-30)
    assert error[inner & (lp64.grad != 0)].max() < 1e-6


def test_gradcheck_and_double_use():
    logprobs, old, advantages, mask, entropy = (x.double() if x.is_floating_point() else x for x in inputs(3, 8))
    leaves = logprobs.requires_grad_(), entropy.requires_grad_()
    for reduction in REDUCTIONS:

        def run(lp, h, reduction=reduction):
            return ppo_loss(lp, old, advantages, mask, entropy=h, dual_clip=3.0, entropy_coef=0.1, reduction=reduction)[
                0
            ]

        assert torch.autograd.gradcheck(run, leaves)
    lp = logprobs.detach().clone().requires_grad_()
    loss, _ = ppo_loss(lp, old, advantages, mask)
    loss.backward(retain_graph=True)
    first = lp.grad.clone()
    (loss * 3).backward()
    assert torch.equal(lp.grad, first + 3 * first)
    loss, _ = ppo_loss(lp, old, advantages, mask)
    for outer in (loss.square(), loss):  # whether the upstream gradient has a graph or is a constant
        (gradient,) = torch.autograd.grad(outer, lp, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):  # differentiable once, and not silently wrong
            (lp.sum() + gradient.sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_strides(backend, dtype):
    logprobs, old, advantages, mask, _ = inputs(6, 30)
    tensors = [x.to(dtype).t().contiguous().t() for x in (logprobs, old, advantages)]
    lp = tensors[0].requires_grad_()
    before = [x.detach().clone() for x in tensors]
    with running(backend if dtype != torch.float64 else "reference") as name:
        loss, stats = ppo_loss(lp, *tensors[1:], mask.t().contiguous().t(), backend=name)
    loss.backward()
    assert lp.grad.dtype == dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert stats.count.dtype == torch.float32
    lp64 = before[0].double().requires_grad_()
    expected, _ = textbook(lp64, before[1].double(), before[2].double(), mask, None, 0.2, 0.2, None, 0.0, "token_mean")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lp.grad.double(), lp64.grad.to(dtype).double(), rtol=1e-2, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_are_the_sum_and_its_gradient(backend):
    logprobs, old, advantages, mask, entropy = inputs(4, 25)
    lp, h = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
    options = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "entropy_coef": 0.05}
    with running(backend) as name:
        loss, stats = ppo_loss(lp, old, advantages, mask, entropy=h, reduction="sum", backend=name, **options)
        terms = ppo_terms(lp, old, advantages, mask, entropy=h, backend=name, **options)
        bare = ppo_terms(logprobs, old, advantages, mask, backend=name)
    loss.backward()
    assert not any(t.requires_grad for t in (*terms[:3], *terms.stats))
    assert torch.equal(terms.loss, loss.detach())
    assert torch.equal(terms.d_logprobs, lp.grad)
    assert torch.equal(terms.d_entropy, h.grad)
    assert all(torch.equal(a, b) for a, b in zip(terms.stats, stats, strict=True))
    assert bare.d_entropy is None
    assert bare.stats.entropy is None


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(backend, with_entropy):
    logprobs, old, advantages, mask, entropy = inputs(3, 6)
    h = entropy.requires_grad_() if with_entropy else None
    tail = (0.2, 0.2, 3.0, 0.1 if with_entropy else 0.0, "sequence_mean", None, torch.tensor(4.0), backend)
    args = (logprobs.requires_grad_(), old, advantages, mask, h, *tail)
    torch.library.opcheck(torch.ops.srppo.ppo_loss, args)


def test_compiles_to_one_graph():
    logprobs, old, advantages, mask, entropy = inputs(4, 9)
    logprobs.requires_grad_()

    def run(lp, lo, a, m, h):
        return ppo_loss(lp, lo, a, m, entropy=h, entropy_coef=0.01, normalizer=7.0)

    loss, stats = run(logprobs, old, advantages, mask, entropy)
    (grad,) = torch.autograd.grad(loss, logprobs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    loss2, stats2 = compiled(logprobs, old, advantages, mask, entropy)
    (grad2,) = torch.autograd.grad(loss2, logprobs)
    assert torch.equal(loss, loss2)
    assert torch.equal(grad, grad2)
    assert all(torch.equal(a, b) for a, b in zip(stats, stats2, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mask": torch.ones(2, 3)}, TypeError, "mask has dtype torch.float32; pass a bool tensor"),
        ({"mask": [[True]]}, TypeError, "mask must be a bool tensor, got list"),
        ({"old_logprobs": torch.ones(2, 4)}, ValueError, r"old_logprobs has shape \(2, 4\) but logprobs has \(2, 3\)"),
        ({"advantages": torch.ones(2)}, ValueError, "advantages has shape"),
        ({"advantages": torch.ones(2, 3, device="meta")}, ValueError, "advantages is on meta but logprobs on cpu"),
        ({"old_logprobs": None}, TypeError, "old_logprobs must be a tensor, got NoneType"),
        ({"advantages": torch.ones(2, 3, dtype=torch.long)}, TypeError, "advantages has dtype torch.int64"),
        ({"entropy": torch.ones(3)}, ValueError, "entropy has shape"),
        ({"entropy_coef": 0.1}, ValueError, "entropy_coef=0.1 needs entropy"),
        ({"entropy_coef": float("nan"), "entropy": torch.ones(2, 3)}, ValueError, "entropy_coef=nan must be finite"),
        ({"entropy_coef": torch.ones((), requires_grad=True)}, ValueError, "pass entropy_coef.detach"),
        ({"clip_low": 1.5}, ValueError, r"clip_low=1.5 must lie in \[0, 1\]"),
        ({"clip_high": -0.1}, ValueError, "clip_high=-0.1 must not be negative"),
        ({"dual_clip": 0.9}, ValueError, "dual_clip=0.9 must be above 1"),
        ({"reduction": "mean"}, ValueError, "reduction='mean' is unknown; choose one of 'token_mean', 'sequence_mean'"),
        ({"normalizer": 0}, ValueError, "normalizer=0 must be positive"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer has shape"),
        (
            {"normalizer": torch.ones((), device="meta")},
            ValueError,
            "normalizer is on meta but the other inputs on cpu",
        ),
        ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
    ],
)
def test_bad_input(change, error, text):
    good = {name: torch.ones(2, 3) for name in ("logprobs", "old_logprobs", "advantages")}
    good["mask"] = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(error, match=text):
        ppo_loss(**{**good, **change})


def test_packed_tokens_have_no_sequences():
    flat, one = torch.ones(5), torch.ones(())
    with pytest.raises(ValueError, match=r"logprobs is 0-d; pass \[B, T\] or \[N\]"):
        ppo_loss(one, one, one, one.bool())
    assert ppo_loss(flat, flat, flat, flat.bool())[0] == -1
    with pytest.raises(ValueError, match="needs \\[B, T\\]"):
        ppo_loss(flat, flat, flat, flat.bool(), reduction="sequence_mean")


class NothingFromTheHost(TorchFunctionMode):
    """Refuses what makes a tensor on the host and copies it to a device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.as_tensor, torch.tensor)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("divisor", [None, 7.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_divisor_of_the_reference_is_no_copy_of_the_host_s(reduction, divisor):
    """On a GPU it would be waited for, and a graph could not be captured."""
    with NothingFromTheHost():
        weights = token_weights(torch.ones(2, 3, dtype=torch.bool), reduction, divisor, None, torch.float64)
    per_token = {"token_mean": 6.0, "sequence_mean": 2.0, "sum": 1.0, "constant_length": 6.0}[reduction]
    by_row = 3.0 if reduction == "sequence_mean" else 1.0
    assert weights.flatten().tolist() == pytest.approx([1 / ((divisor or per_token) * by_row)] * 2)
