"""Losses of sequences and pairs: value, gradient, sums against scalar formulas with derivatives by hand; refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from losses.problems import MASK, batch, judge_sequences, log_sigmoid, sigmoid

from srppo import losses
from srppo.losses.contract import log_one_minus_exp

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-9)])


def mean(row: list[float]) -> float:
    return sum(row) / len(row)


def valid(values: torch.Tensor, dtype: torch.dtype) -> list[list[float]]:
    return [row[keep].to(dtype).tolist() for row, keep in zip(values, MASK, strict=True)]


@DTYPES
@pytest.mark.parametrize("options", [{}, {"clip_low": 0.003, "clip_high": 0.004}], ids=["as is", "other clips"])
@pytest.mark.parametrize("spread", [0.005, 1.0, 40.0])
def test_gspo(dtype, tolerance, spread, options):
    given = batch(("old_logprobs",), spread=spread, seed=3)
    advantages = torch.tensor([1.0, -0.5, math.nan, 0.7, -1.2, 0.3], dtype=dtype)
    weights = torch.tensor([1.0, 0.5, math.nan, 2.0, 0.0, 1.0], dtype=dtype)
    old = valid(given["old_logprobs"], dtype)
    low, high = options.get("clip_low", 3e-4), options.get("clip_high", 4e-4)

    def whole(rows):
        loss, slopes, sums = 0.0, [0.0] * len(rows), []
        for i, row in enumerate(rows):
            if not row:
                continue
            a, w, d = float(advantages[i]), float(weights[i]), mean(row) - mean(old[i])
            d = max(-20.0, min(20.0, d))
            s = math.exp(d)
            sums.append({"sequences": 1, "approx_kl": s - 1 - d, "clipped_low": a < 0 and s < 1 - low,
                         "clipped_high": a > 0 and s > 1 + high, "clipped_dual": 0})  # fmt: skip
            if (a > 0 and s > 1 + high) or (a < 0 and s < 1 - low):
                loss -= w * a * (1 + high if a > 0 else 1 - low)
            else:
                loss -= w * a * s
                slopes[i] = -w * a * s / len(row) / 4.5 if abs(d) < 20 else 0.0
        return loss / 4.5, slopes, sums

    tensors = (given["old_logprobs"].to(dtype), advantages, weights)
    loss = partial(losses.gspo, normalizer=4.5, **options)
    aux = judge_sequences(loss, given, tensors, whole, dtype=dtype, tolerance=tolerance)
    assert aux["sequences"] == 5
    means = torch.tensor([mean(row) if row else math.nan for row in old], dtype=dtype)
    again, first = (loss(given["logprob"].to(dtype), None, MASK, x, *tensors[1:])[0] for x in (means, tensors[0]))
    torch.testing.assert_close(again, first, rtol=3e-5, atol=1e-6)


def test_gspo_clips_as_tightly_as_its_source():
    old = torch.full((4, 3), -1.0)
    moved = old + torch.tensor([-2.5e-4, -3.5e-4, 3.5e-4, 4.5e-4])[:, None]
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    _, aux = losses.gspo(moved, None, torch.ones(4, 3).bool(), old, advantages, normalizer=4)
    assert (aux["clipped_low"], aux["clipped_high"]) == (1, 1)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"beta": 0.8, "gamma": 0.3}])
def test_poft(dtype, tolerance, options):
    given = batch((), seed=4)
    models = torch.tensor([[-1.0, -2.0, math.nan, -3.0, -0.5, -1.0], [-2.0, -1.0, math.inf, -1.0, -1.5, -40.0]])

    def whole(rows, beta=1.0, gamma=0.0):
        loss, slopes, sums = 0.0, [0.0] * len(rows), []
        for i, row in enumerate(rows):
            if row:
                x = beta * (mean(row) - models[:, i].double().mean().item()) + gamma
                loss -= log_sigmoid(x)
                slopes[i] = -sigmoid(-x) * beta / len(row) / 5
                sums.append({"sequences": 1, "margin": x})
        return loss / 5, slopes, sums

    loss, whole = partial(losses.poft, normalizer=5, **options), partial(whole, **options)
    aux = judge_sequences(loss, given, (models,), whole, dtype=dtype, tolerance=tolerance)
    assert aux["sequences"] == 5
    single = losses.poft(given["logprob"], None, MASK, models[0], normalizer=5)[0]
    twice = losses.poft(given["logprob"], None, MASK, models[[0, 0]], normalizer=5)[0]
    assert torch.equal(single, twice)


def pairs_of(rows):
    """Row numbers of chosen and rejected, of pairs of which both have tokens."""
    half = len(rows) // 2
    return [(i, i + half) for i in range(half) if rows[i] and rows[i + half]]


@DTYPES
@pytest.mark.parametrize("options", [{}, {"beta": 0.2}])
@pytest.mark.parametrize("name", ["dpo", "spin"])
@pytest.mark.parametrize("spread", [0.3, 300.0])
def test_dpo_and_spin(name, dtype, tolerance, spread, options):
    tensor = "ref_logprobs" if name == "dpo" else "opponent_logprobs"
    given = batch((tensor,), spread=spread, seed=5)
    ref = valid(given[tensor], dtype)

    def whole(rows, beta=0.1):
        loss, slopes, sums = 0.0, [0.0] * len(rows), []
        for w, l in pairs_of(rows):  # noqa: E741
            x = beta * ((sum(rows[w]) - sum(rows[l])) - (sum(ref[w]) - sum(ref[l])))
            loss -= log_sigmoid(x)
            slopes[w], slopes[l] = -sigmoid(-x) * beta / 3, sigmoid(-x) * beta / 3
            sums.append({"pairs": 1, "margin": x, "correct": x > 0})
        return loss / 3, slopes, sums

    loss, whole = partial(getattr(losses, name), normalizer=3, **options), partial(whole, **options)
    reference = given[tensor].to(dtype)
    aux = judge_sequences(loss, given, (reference,), whole, dtype=dtype, tolerance=tolerance)
    assert aux["pairs"] == 2
    summed = torch.tensor([sum(row) if row else math.nan for row in ref], dtype=dtype)
    got, want = (loss(given["logprob"].to(dtype), None, MASK, r)[0] for r in (summed, reference))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"weight": 0.3}])
def test_orpo(dtype, tolerance, options):
    given = batch((), seed=10)  # of which no pair is right, so that `correct` cannot be turned round

    def whole(rows, weight=0.05):
        loss, slopes, sums = 0.0, [0.0] * len(rows), []
        for w, l in pairs_of(rows):  # noqa: E741
            m_w, m_l = mean(rows[w]), mean(rows[l])
            x = m_w - math.log(-math.expm1(m_w)) - m_l + math.log(-math.expm1(m_l))
            loss += -m_w - weight * log_sigmoid(x)
            common = -weight * sigmoid(-x)
            # d(odds)/dm = 1 + e^m / (1 - e^m) = 1 / (1 - e^m)
            slopes[w] = (-1 + common / -math.expm1(m_w)) / len(rows[w]) / 2
            slopes[l] = -common / -math.expm1(m_l) / len(rows[l]) / 2
            sums.append({"pairs": 1, "nll": -m_w, "margin": x, "correct": x > 0})
        return loss / 2, slopes, sums

    loss, whole = partial(losses.orpo, normalizer=2, **options), partial(whole, **options)
    aux = judge_sequences(loss, given, (), whole, dtype=dtype, tolerance=tolerance)
    assert aux["pairs"] == 2


@DTYPES
@pytest.mark.parametrize("options", [{}, {"lam": 0.4}])
def test_asft(dtype, tolerance, options):
    given = batch((), seed=7)

    def whole(rows, lam=1.0):
        loss, slopes, sums = 0.0, [0.0] * len(rows), []
        for w, l in pairs_of(rows):  # noqa: E741
            m_w, m_l = mean(rows[w]), mean(rows[l])
            loss += -(1 + lam) * m_w - lam * math.log(-math.expm1(m_l))
            slopes[w] = -(1 + lam) / len(rows[w]) / 2
            slopes[l] = lam * math.exp(m_l) / -math.expm1(m_l) / len(rows[l]) / 2
            sums.append({"pairs": 1, "chosen": m_w, "rejected": m_l})
        return loss / 2, slopes, sums

    loss, whole = partial(losses.asft, normalizer=2, **options), partial(whole, **options)
    aux = judge_sequences(loss, given, (), whole, dtype=dtype, tolerance=tolerance)
    assert aux["pairs"] == 2


@pytest.mark.parametrize("name", ["dpo", "spin", "orpo", "asft"])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_pair_of_which_one_has_no_tokens_has_no_part_in_it(name, side):
    logprob, ref = -torch.rand(4, 3) - 0.1, -torch.rand(4, 3)
    mask = torch.ones(4, 3).bool()
    mask[1 if side == "chosen" else 3] = False
    tensors = [ref] if name in ("dpo", "spin") else []
    loss = partial(getattr(losses, name), normalizer=1)
    got, want = (loss(logprob[r], None, mask[r], *(t[r] for t in tensors)) for r in ([0, 1, 2, 3], [0, 2]))
    assert got == want


@pytest.mark.parametrize("x", [-1e-6, -1e-3, -0.5, -0.69, -0.7, -3.0, -30.0, -90.0])
def test_log_one_minus_exp_does_not_cancel(x):
    x = torch.tensor(x)
    assert log_one_minus_exp(x).item() == pytest.approx(
        math.log1p(-math.exp(x)) if x < -1 else math.log(-math.expm1(x)), rel=1e-6
    )


@pytest.mark.parametrize("name", ["orpo", "asft"])
def test_certain_answers_stay_finite(name):
    """A mean log-prob of 0 has infinite odds; the guard keeps loss and gradient finite."""
    lp = torch.tensor([[0.0, 0.0], [0.0, -0.0]], requires_grad=True)
    loss, _ = getattr(losses, name)(lp, None, torch.ones(2, 2).bool(), normalizer=1)
    (grad,) = torch.autograd.grad(loss, [lp])
    assert loss.isfinite()
    assert grad.isfinite().all()


WHOLE = {
    "gspo": lambda lp, mask: losses.gspo(lp, None, mask, lp, torch.zeros(lp.shape[0]), normalizer=1),
    "poft": lambda lp, mask: losses.poft(lp, None, mask, torch.zeros(lp.shape[0]), normalizer=1),
    "dpo": lambda lp, mask: losses.dpo(lp, None, mask, lp, normalizer=1),
    "spin": lambda lp, mask: losses.spin(lp, None, mask, lp, normalizer=1),
    "orpo": lambda lp, mask: losses.orpo(lp, None, mask, normalizer=1),
    "asft": lambda lp, mask: losses.asft(lp, None, mask, normalizer=1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_flat_vector_of_rows_is_refused(name):
    lp = torch.zeros(6)
    needs = {"sequence": r"sequences, \[B, T\]", "pair": r"pairs of sequences, \[2P, T\]"}
    needed = needs[losses.level_of(getattr(losses, name))]
    with pytest.raises(ValueError, match=f"{name}: needs whole {needed}, and got 6 rows in a flat vector"):
        WHOLE[name](lp, lp == 0)
    with pytest.raises(ValueError, match=rf"{name}: logprob has shape \(1, 2, 3\)"):
        WHOLE[name](lp.view(1, 2, 3), lp.view(1, 2, 3) == 0)
    if losses.level_of(getattr(losses, name)) == "pair":
        with pytest.raises(ValueError, match=f"{name}: got 3 sequences, which are no pairs"):
            WHOLE[name](lp.view(3, 2), lp.view(3, 2) == 0)


LP = torch.zeros(4, 3)
ON = torch.ones(4, 3).bool()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: losses.dpo(LP, None, ON, None, normalizer=1), ValueError,
         "dpo: ref_logprobs is missing; it is the log-probs of the same tokens under the frozen reference"),
        (lambda: losses.spin(LP, None, ON, None, normalizer=1), ValueError, "spin: opponent_logprobs is missing"),
        (lambda: losses.gspo(LP, None, ON, None, LP[:, 0], normalizer=1), ValueError, "gspo: old_logprobs is missing"),
        (lambda: losses.gspo(LP, None, ON, LP, LP, normalizer=1), ValueError, r"advantages has .*a sequence, \(4,\)"),
        (lambda: losses.gspo(LP, None, ON, LP, LP[:, 0], LP, normalizer=1), ValueError,
         r"weights has .*a sequence, \(4,\)"),
        (lambda: losses.dpo(LP, None, ON, LP.to("meta"), normalizer=1), ValueError,
         "dpo: ref_logprobs is on meta but mask on cpu; move one of them"),
        (lambda: losses.poft(LP, None, ON, None, normalizer=1), ValueError, "poft: aligned_mean_logprobs is missing"),
        (lambda: losses.poft(LP, None, ON, LP, normalizer=1), ValueError, r"pass \(4,\) or \(models, 4\)"),
        (lambda: losses.dpo(LP, None, ON, LP[:2], normalizer=1), ValueError,
         r"dpo: ref_logprobs has shape \(2, 3\); pass one value a token, \(4, 3\), or one a sequence, \(4,\)"),
        (lambda: losses.dpo(LP, None, ON, LP.long(), normalizer=1), TypeError, "ref_logprobs must be a floating"),
        (lambda: losses.dpo(LP, None, ON[:2], LP, normalizer=1), ValueError, r"mask has shape \(2, 3\)"),
        (lambda: losses.dpo(LP, None, ON, LP, normalizer=1, beta=0.0), ValueError, "beta=0.0 must be positive"),
    ],
)  # fmt: skip
def test_wrong_use_is_refused_in_words(call, error, text):
    with pytest.raises(error, match=text):
        call()
