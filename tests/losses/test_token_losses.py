"""Every token-level loss: value, gradient and sums against a scalar formula with derivatives by hand, in float64.

Over masks with gaps and empty rows, NaN and infinities in masked places, probabilities near 0 and 1, and log-ratios of
tens of nats.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from losses.problems import MASK, batch, judge

from srppo import losses

OLD = ("old_logprobs", "advantages", "weights")
REF = ("ref_logprobs", "weights")


def ratio_of(lp, old):
    """The ratio, and whether it still moves with lp: log-ratios are kept in [-20, 20]."""
    d = lp - old
    return math.exp(max(-20.0, min(20.0, d))), abs(d) <= 20


def ppo_term(lp, h, old, a, w, *, low, high, dual=None, bonus=0.0):
    r, moves = ratio_of(lp, old)
    candidates = [(-r * a, -r * a if moves else 0.0), (-min(max(r, 1 - low), 1 + high) * a, 0.0)]
    if 1 - low <= r <= 1 + high:
        candidates = candidates[:1]
    value, slope = max(candidates, key=lambda c: c[0])
    dually = dual is not None and a < 0 and value > -dual * a
    if dually:
        value, slope = -dual * a, 0.0
    sums = {"approx_kl": r - 1 - math.log(r), "clipped_low": a < 0 and r < 1 - low,
            "clipped_high": a > 0 and r > 1 + high, "clipped_dual": dually}  # fmt: skip
    return w * value - bonus * h, w * slope, -bonus, sums


def dppo_term(lp, h, mu_log, a, w, *, kind, delta, cap):
    pi, mu = math.exp(lp), math.exp(mu_log)
    if kind == "tv":
        outside = (a > 0 and pi - mu > delta) or (a < 0 and mu - pi > delta)
    else:
        one_pi, one_mu = -math.expm1(min(lp, -1e-7)), -math.expm1(min(mu_log, -1e-7))
        kl = mu * (mu_log - lp) + (1 - mu) * math.log(one_mu / one_pi)
        outside = kl > delta and ((a > 0 and pi > mu) or (a < 0 and pi < mu))
    r, _ = ratio_of(lp, mu_log)
    factor = 0.0 if outside else w * a * min(r, cap)
    return -factor * lp, -factor, 0.0, {"outside": outside, "capped": r > cap}


def cispo_term(lp, h, old, a, w, *, low, high):
    r, _ = ratio_of(lp, old)
    factor = w * a * min(max(r, 1 - low), 1 + high)
    return -factor * lp, -factor, 0.0, {"clipped_low": r < 1 - low, "clipped_high": r > 1 + high}


def apa_term(lp, h, init, a, w, *, lam):
    error = lp - a / lam - init
    return w * error**2, 2 * w * error, 0.0, {"error": abs(error)}


def kl_term(lp, h, ref, w, *, coef):
    d = min(20.0, ref - lp)
    kl = math.expm1(d) - d
    return coef * w * kl, coef * w * -math.expm1(d) if ref - lp <= 20 else 0.0, 0.0, {"kl": kl}


def idft_term(lp, h, w, *, beta, low, high):
    try:
        g = math.exp(-(lp + h) / beta)
    except OverflowError:
        g = math.inf
    g = min(max(g, low), high)
    factor = w * math.exp(g * lp)
    return -factor * lp, -factor, 0.0, {"exponent": g}


def implicit_term(lp, h, ref, w, *, kind, beta):
    x = beta * (lp - ref)
    if kind == "pearson":
        phi, slope = x - x * x / 4, 1 - x / 2
    elif kind == "kl":
        phi, slope = x, 1.0
    elif x > -0.9:
        phi, slope = x / (1 + x), 1 / (1 + x) ** 2
    else:
        phi, slope = -9.0 + 100 * (x + 0.9), 100.0  # the tangent at -0.9
    return -w * phi, -w * slope * beta, 0.0, {"reward": x}


def exopd_term(lp, h, teacher, base, w, *, lam):
    a = lam * (teacher - base) - (lp - base)
    return -w * a * lp, -w * a, 0.0, {"advantage": a}


def dft_term(lp, h, w):
    p = math.exp(lp)
    return -w * p * lp, -w * p, 0.0, {"probability": p}


CASES = {
    "ppo": (partial(losses.ppo, clip_low=0.1, clip_high=0.3), OLD, partial(ppo_term, low=0.1, high=0.3)),
    "ppo dual clip and entropy": (
        partial(losses.ppo, dual_clip=1.5, entropy_coef=0.05),
        OLD,
        partial(ppo_term, low=0.2, high=0.2, dual=1.5, bonus=0.05),
    ),
    "dppo tv": (losses.dppo, OLD, partial(dppo_term, kind="tv", delta=0.15, cap=20.0)),
    "dppo kl": (
        partial(losses.dppo, divergence="kl", ratio_cap=1.2),
        OLD,
        partial(dppo_term, kind="kl", delta=0.05, cap=1.2),
    ),
    "cispo": (partial(losses.cispo, clip_low=0.2, clip_high=0.3), OLD, partial(cispo_term, low=0.2, high=0.3)),
    "cispo without a lower bound": (losses.cispo, OLD, partial(cispo_term, low=1.0, high=4.0)),
    "apa": (losses.apa, ("init_logprobs", "advantages", "weights"), partial(apa_term, lam=0.1)),
    "reinforce": (losses.reinforce, ("advantages", "weights"), lambda lp, h, a, w: (-w * a * lp, -w * a, 0.0, {})),
    "kl_penalty": (partial(losses.kl_penalty, coef=0.3), REF, partial(kl_term, coef=0.3)),
    "entropy_bonus": (
        partial(losses.entropy_bonus, coef=0.3),
        ("weights",),
        lambda lp, h, w: (-0.3 * w * h, 0.0, -0.3 * w, {"entropy": h}),
    ),
    "grpo": (losses.grpo, OLD, partial(ppo_term, low=0.2, high=0.2)),
    "dr_grpo": (losses.dr_grpo, OLD, partial(ppo_term, low=0.2, high=0.2)),
    "dapo": (losses.dapo, OLD, partial(ppo_term, low=0.2, high=0.28)),
    **{
        f"{name}, dual clip": (
            partial(getattr(losses, name), dual_clip=1.5),
            OLD,
            partial(ppo_term, low=0.2, high=h, dual=1.5),
        )
        for name, h in (("grpo", 0.2), ("dr_grpo", 0.2), ("dapo", 0.28))
    },
    "sft": (losses.sft, ("weights",), lambda lp, h, w: (-w * lp, -w, 0.0, {})),
    "dft": (losses.dft, ("weights",), dft_term),
    "idft": (losses.idft, ("weights",), partial(idft_term, beta=1.0, low=0.1, high=2.0)),
    "idft, other bounds": (
        partial(losses.idft, beta=0.5, g_min=0.3, g_max=5.0),
        ("weights",),
        partial(idft_term, beta=0.5, low=0.3, high=5.0),
    ),
    "implicit_reward": (losses.implicit_reward, REF, partial(implicit_term, kind="pearson", beta=1.0)),
    **{
        f"implicit_reward {kind}": (
            partial(losses.implicit_reward, divergence=kind, beta=0.7),
            REF,
            partial(implicit_term, kind=kind, beta=0.7),
        )
        for kind in ("pearson", "hellinger", "kl")
    },
    "exopd": (losses.exopd, ("teacher_logprobs", "base_logprobs", "weights"), partial(exopd_term, lam=1.25)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spread", [0.3, 12.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-9)])
def test_value_and_gradient(name, spread, dtype, tolerance):
    loss, names, term = CASES[name]
    given = batch(names, spread=spread, seed=len(name))
    aux = judge(loss, given, names, term, normalizer=7.5, dtype=dtype, tolerance=tolerance)
    assert aux["tokens"] == MASK.sum()
    assert losses.level_of(loss) == "token"


@pytest.mark.parametrize("name", CASES)
def test_flat_rows_parts_and_weights_left_out(name):
    """[n] gives what [B, T] gives; parts add up; weights of None are ones; without tokens all is 0."""
    loss, names, _ = CASES[name]
    given = {k: v.requires_grad_(k in ("logprob", "entropy")) for k, v in batch(names).items()}
    tensors = [given[n] for n in names[:-1]]
    ones = torch.ones(MASK.shape)
    h = given["entropy"]
    whole, aux = loss(given["logprob"], h, MASK, *tensors, ones, normalizer=torch.tensor(9))
    flat = [t.reshape(-1) for t in (given["logprob"], h, MASK, *tensors, ones)]
    joined, _ = loss(*flat, normalizer=9.0)
    assert abs(joined - whole) <= 1e-6 * abs(whole)
    pieces = [loss(*(t[s] for t in flat), normalizer=9.0) for s in (slice(0, 5), slice(5, 19), slice(19, 42))]
    torch.testing.assert_close(sum(p for p, _ in pieces), whole, rtol=1e-5, atol=1e-6)
    for key, value in aux.items():
        torch.testing.assert_close(sum(a[key] for _, a in pieces), value, rtol=1e-5, atol=1e-5, msg=key)
    if not name.startswith("grpo"):  # which takes means per sequence where it is given none
        normalizer = torch.tensor(9.0, requires_grad=True)
        bare, _ = loss(given["logprob"], h, MASK, *tensors, normalizer=normalizer)
        assert torch.equal(bare, whole)
        assert torch.autograd.grad(bare, normalizer, allow_unused=True) == (None,)
    for normalizer in (0, torch.tensor(0), 1.0):
        nothing, aux = loss(given["logprob"], h, torch.zeros_like(MASK), *tensors, ones, normalizer=normalizer)
        (grad,) = torch.autograd.grad(nothing + given["logprob"].nan_to_num().sum() * 0, [given["logprob"]])
        assert nothing == 0
        assert grad.abs().sum() == 0
        assert aux["tokens"] == 0


def test_statistics_are_sums_over_tokens():
    lp = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5]))
    old = torch.log(torch.tensor([0.25, 0.6, 0.9, 0.5]))  # ratios 2, 0.83, 0.56, 1
    a = torch.tensor([1.0, 1.0, -1.0, 1.0])
    mask = torch.ones(4).bool()
    _, aux = losses.ppo(lp, None, mask, old, a, normalizer=1)
    assert [aux[k].round().item() for k in ("tokens", "clipped_high", "clipped_low")] == [4, 1, 1]
    k3 = sum(r - 1 - math.log(r) for r in (2, 0.5 / 0.6, 0.5 / 0.9, 1))
    assert aux["approx_kl"].item() == pytest.approx(k3, rel=1e-5)
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0])
    _, weighted = losses.ppo(lp, None, mask, old, a, weights, normalizer=1)
    assert weighted == aux  # what IcePop leaves out is clipped all the same
    for loss in (partial(losses.dppo, ratio_cap=1.5), partial(losses.cispo, clip_low=0.3, clip_high=0.3)):
        assert loss(lp, None, mask, old, a, weights, normalizer=1)[1] == loss(lp, None, mask, old, a, normalizer=1)[1]
    loss, _ = losses.ppo(lp, torch.full((4,), math.nan), mask, old, a, normalizer=1)
    assert loss.isfinite()  # the entropy is for a bonus


def test_sums_are_added_in_float64():
    lp = -torch.rand(20, 3001)
    mask = torch.rand(20, 3001) > 0.1
    assert torch.equal(losses.sequence_sums(lp, mask), lp.double().masked_fill(~mask, 0).sum(-1).float())
    for row, on in zip(lp, mask, strict=True):
        assert losses.sft(row, None, on, normalizer=7)[0] == (-row.double()[on].sum() / 7).float()
    assert losses.sft(lp, None, mask, lp.double().abs(), normalizer=7)[0].dtype == torch.float64  # of any input


def test_kl_penalty_far_from_the_reference():
    """Below the reference the exponential stops growing, and with it the gradient; above it the slope stays."""
    lp = torch.tensor([-31.0, -1.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.0, -31.0, -1.0])
    loss, _ = losses.kl_penalty(lp, None, torch.ones(3).bool(), ref, normalizer=1, coef=1.0)
    (grad,) = torch.autograd.grad(loss, [lp])
    assert loss.item() == pytest.approx(math.expm1(20) - 20 + 29, rel=1e-6)
    assert grad.tolist() == [0, 1, 0]


def test_limits_of_idft():
    """g = 1 is DFT, g -> 0 is SFT."""
    given = batch(())
    lp, h = given["logprob"], given["entropy"]
    dft = losses.dft(lp, None, MASK, normalizer=3)[0]
    sft = losses.sft(lp, None, MASK, normalizer=3)[0]
    torch.testing.assert_close(losses.idft(lp, h, MASK, normalizer=3, g_min=1, g_max=1)[0], dft)
    torch.testing.assert_close(losses.idft(lp, h, MASK, normalizer=3, g_min=0, g_max=0)[0], sft)
    assert abs(dft - sft) > 0.1


def test_apa_is_at_rest_at_its_optimum():
    given = batch(("init_logprobs", "advantages"))
    best = torch.where(MASK, given["init_logprobs"] + given["advantages"] / 0.1, 0).requires_grad_()
    args = (MASK, given["init_logprobs"], given["advantages"])
    loss, _ = losses.apa(best, None, *args, normalizer=1)
    (grad,) = torch.autograd.grad(loss, [best])
    assert grad.abs().max() < 1e-4
    assert losses.apa(best.detach() + 1, None, *args, normalizer=1)[0] > 1


VALID = {"logprob": torch.zeros(2, 3), "mask": torch.ones(2, 3).bool(), "t": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda v: losses.ppo(v["logprob"], None, v["mask"], None, v["t"], normalizer=1), ValueError,
         "ppo: old_logprobs is missing; it is the log-probs under the policy that sampled, kept from the rollout"),
        (lambda v: losses.grpo(v["logprob"], None, v["mask"], None, v["t"], normalizer=1), ValueError,
         "grpo: old_logprobs is missing"),
        (lambda v: losses.dppo(v["logprob"], None, v["mask"], None, v["t"], normalizer=1), ValueError,
         "dppo: old_logprobs is missing"),
        (lambda v: losses.cispo(v["logprob"], None, v["mask"], v["t"], None, normalizer=1), ValueError,
         "cispo: advantages is missing"),
        (lambda v: losses.apa(v["logprob"], None, v["mask"], None, v["t"], normalizer=1), ValueError,
         "apa: init_logprobs is missing"),
        (lambda v: losses.exopd(v["logprob"], None, v["mask"], None, v["t"], normalizer=1), ValueError,
         "exopd: teacher_logprobs is missing"),
        (lambda v: losses.idft(v["logprob"], None, v["mask"], normalizer=1), ValueError, "idft: entropy is missing"),
        (lambda v: losses.ppo(v["logprob"], None, v["mask"], v["t"], v["t"], normalizer=1, entropy_coef=0.1),
         ValueError, "ppo: entropy_coef=0.1 needs entropy"),
        (lambda v: losses.ppo(v["logprob"], None, v["mask"], v["t"], torch.zeros(2), normalizer=1), ValueError,
         r"advantages has shape \(2,\) but logprob has \(2, 3\).*advantages\[:, None\].expand_as"),
        (lambda v: losses.dapo(v["logprob"], None, v["mask"], torch.zeros(3, 2), v["t"], normalizer=1), ValueError,
         r"dapo: old_logprobs has shape \(3, 2\)"),
        (lambda v: losses.sft(v["logprob"], None, v["mask"].long(), normalizer=1), TypeError, "sft: mask has dtype"),
        (lambda v: losses.mean_weights(v["mask"].long()), TypeError, "mean_weights: mask has dtype"),
        (lambda v: losses.entropy_bonus(v["t"][0], v["t"], v["mask"], normalizer=1, coef=1.0), ValueError,
         r"entropy_bonus: entropy has shape \(2, 3\)"),
        (lambda v: losses.sft(v["logprob"], None, v["mask"], normalizer=-1), ValueError,
         "normalizer=-1 must be positive"),
        (lambda v: losses.sft(v["logprob"], None, v["mask"], normalizer=torch.ones(2)), ValueError, "pass a number"),
        (lambda v: losses.sft(torch.zeros(1, 2, 3), None, torch.ones(1, 2, 3).bool(), normalizer=1), ValueError,
         r"pass \[B, T\] or \[n\]"),
        (lambda v: losses.dppo(v["logprob"], None, v["mask"], v["t"], v["t"], normalizer=1, divergence="js"),
         ValueError, "divergence='js' is unknown"),
        (lambda v: losses.apa(v["logprob"], None, v["mask"], v["t"], v["t"], normalizer=1, lam=0.0), ValueError,
         "lam=0.0 must be positive"),
        (lambda v: losses.cispo(v["logprob"], None, v["mask"], v["t"], v["t"], normalizer=1, clip_low=2), ValueError,
         r"cispo: clip_low=2 must lie in \[0, 1\]"),
        (lambda v: losses.dapo(v["logprob"], None, v["mask"], v["t"], v["t"], normalizer=float("nan")), ValueError,
         "dapo: normalizer=nan must be positive"),
        (lambda v: losses.idft(v["logprob"], v["t"], v["mask"], normalizer=1, g_min=3), ValueError, "g_min=3"),
        (lambda v: losses.grpo(*(v[k].view(-1) for k in ("logprob", "t", "mask", "t", "t")), normalizer=1), ValueError,
         "grpo: weights are missing; a flat vector of rows does not tell"),
        (lambda v: losses.ppo(v["logprob"], None, v["mask"], v["t"], v["t"]), TypeError, "normalizer"),
    ],
)  # fmt: skip
def test_wrong_use_is_refused_in_words(call, error, text):
    with pytest.raises(error, match=text):
        call(VALID)


def test_gradients_at_bounds_are_those_from_inside():
    """Torch's clamp gives 1 there up to 2.13, and 0 from 2.14 on."""
    mask, ref = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.float64)

    def gradient(loss, at, **given):
        lp = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        value, _ = loss(lp, None, mask, normalizer=1.0, **given)
        return torch.autograd.grad(value, lp)[0].tolist()

    assert gradient(losses.kl_penalty, [-20.0, -20.5], ref_logprobs=ref, coef=1.0) == pytest.approx(
        [1 - math.exp(20), 0]
    )
    # Of 1 - 1 / (1 + x) where x = log pi / pi_ref, and beyond -0.9 of its tangent.
    at_edge = gradient(losses.implicit_reward, [-0.9, -0.95], ref_logprobs=ref, divergence="hellinger")
    assert at_edge == pytest.approx([-100, -100])
