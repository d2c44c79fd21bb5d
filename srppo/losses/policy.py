"""Policy losses per token. r = pi / pi_old of the token taken, A its advantage, sg = no gradient, w its weight.

Every one takes ``weights``, non-negative, that multiply a token's term: 1 / length for a mean per sequence
(``mean_weights``), TIS or IcePop factors (``tis_weights``, ``icepop_weights``), or their product.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from srppo.losses.contract import (
    LOG_RATIO_BOUND,
    LossResult,
    check_positive,
    divided,
    level,
    log_one_minus_exp,
    require,
    sums,
    tokens,
)
from srppo_kernels import PPOStats, ppo_loss
from srppo_kernels._arguments import bounded, check_choice, check_mask, check_same_shape
from srppo_kernels.ppo_loss.op import check_clips, check_normalizer

__all__ = ["apa", "cispo", "dppo", "entropy_bonus", "kl_penalty", "ppo", "reinforce"]


def bounded_ratio(logprob: Tensor, old: Tensor) -> Tensor:
    """``exp(logprob - old)``, the difference kept in [-20, 20]."""
    return bounded(logprob - old, -LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def clip_statistics(stats: PPOStats, unit: str) -> dict[str, Tensor]:
    """``ppo_loss``'s means as sums over ``unit``."""
    count = stats.count
    return {
        unit: count,
        "approx_kl": stats.approx_kl * count,
        "clipped_low": stats.clipfrac_low * count,
        "clipped_high": stats.clipfrac_high * count,
        "clipped_dual": stats.clipfrac_dual * count,
    }


@level("token")
def ppo(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
) -> LossResult:
    """Clipped PPO: ``-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - entropy_coef H``.

    With ``dual_clip`` c, where A < 0, a term is at most ``-w c A``. The maths is ``srppo_kernels.ppo_loss``'s: this is
    it in the shape of the other losses. (``linear_ppo_loss`` is the same straight from hidden states, without
    autograd.)

    Args:
        logprob, entropy, mask: ``[B, T]`` or ``[n]``; the entropy is read only for its bonus.
        old_logprobs, advantages: the same shape, constants.
        weights: the same shape, non-negative; None for 1. They do not weigh the bonus: beside ``mean_weights`` it would
            be a sum per sequence, so take :func:`entropy_bonus` with the same weights.
        normalizer: what the sum is divided by, such as the number of tokens of the whole batch.

    Returns:
        ``(loss, aux)`` with sums ``tokens``, ``approx_kl`` (k3), ``clipped_low``, ``clipped_high``, ``clipped_dual``.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7 [paper]; dual clip: arXiv 1912.09729 [paper].
    """
    require("ppo", old_logprobs=old_logprobs, advantages=advantages)
    return clipped(
        "ppo", logprob, entropy if entropy_coef else None, mask, old_logprobs, advantages, weights, normalizer,
        clip_low, clip_high, dual_clip, entropy_coef,
    )  # fmt: skip


def clipped(
    op: str,
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    normalizer: float | Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    unit: str = "tokens",
) -> LossResult:
    """``ppo_loss`` as a sum over a normalizer. The loss is linear in ``|A|``, so a weight goes to the advantage; one of
    0 takes its sign away, which tells what is clipped, and such tokens are counted apart."""
    check_clips(op, clip_low, clip_high, dual_clip)
    check_normalizer(op, normalizer, zero=True)
    lp, old, advantage, weight = tokens(op, logprob, mask, old_logprobs=old, advantages=advantages, weights=weights)
    if entropy_coef and entropy is None:
        raise ValueError(f"{op}: entropy_coef={entropy_coef} needs entropy; linear_loss gives it")
    if not isinstance(normalizer, Tensor) and normalizer == 0:
        normalizer = 1.0
    sums_of = partial(ppo_loss, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, reduction="sum")
    loss, stats = sums_of(
        lp, old.detach(), (advantage * weight).detach(), mask, entropy=entropy, entropy_coef=entropy_coef,
        normalizer=normalizer,
    )  # fmt: skip
    aux = clip_statistics(stats, unit)
    if weights is not None:
        weightless = mask & (weight == 0)
        _, stats = sums_of(lp.detach(), old.detach(), advantage.detach(), weightless)
        others = clip_statistics(stats, unit)
        aux |= {name: aux[name] + others[name] for name in aux if name.startswith("clipped_")}
    return loss, aux


@level("token")
def dppo(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    divergence: str = "tv",
    delta: float | None = None,
    ratio_cap: float = 20.0,
) -> LossResult:
    """Divergence PPO: ``-w A sg(min(r, C)) M log pi``, with a trust region on probabilities instead of ratios.

    M is 0 where the update would leave the trust region, else 1. mu is the behaviour policy that sampled the token, pi
    the one being trained, and only the token taken is looked at (its probability against all others'):

        tv:   M = 0 where  A > 0 and pi - mu > delta,  or  A < 0 and mu - pi > delta                    delta 0.15
        kl:   D = mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi));
              M = 0 where  D > delta and the update widens it (A > 0 and pi > mu, or A < 0 and pi < mu)  delta 0.05

    A rare token may thus move by a large ratio, which PPO would clip, and a likely one may not move far, which PPO
    allows.

    Args:
        logprob, mask, advantages, weights, normalizer: as in :func:`ppo`; ``entropy`` is not read.
        old_logprobs: log mu, of the sampler.
        divergence: ``"tv"`` or ``"kl"``.
        delta: radius of the trust region; None for the default of the divergence.
        ratio_cap: C, 10 to 20.

    Returns:
        ``(loss, aux)`` with sums ``tokens``, ``outside`` (M = 0) and ``capped`` (r > C).

    Source: arXiv 2602.04879 [paper's code]. That the KL form looks at the direction as the TV form does, and the
    default C of 20, are readings of ours; verl's are the same.
    """
    require("dppo", old_logprobs=old_logprobs, advantages=advantages)
    check_choice("dppo", "divergence", divergence, ("tv", "kl"))
    delta = {"tv": 0.15, "kl": 0.05}[divergence] if delta is None else delta
    check_positive("dppo", delta=delta, ratio_cap=ratio_cap)
    lp, old, advantage, weight = tokens(
        "dppo", logprob, mask, old_logprobs=old_logprobs, advantages=advantages, weights=weights
    )
    with torch.no_grad():
        pi, mu, ratio = lp.exp(), old.exp(), bounded_ratio(lp, old)
        if divergence == "tv":
            distance = (pi - mu).abs()
        else:
            distance = mu * (old - lp) + (1 - mu) * (log_one_minus_exp(old) - log_one_minus_exp(lp))
        outside = (advantage * (pi - mu) > 0) & (distance > delta)
        factor = advantage * weight * ratio.clamp(max=ratio_cap)
        factor = torch.where(outside, 0, factor)
    loss = divided("dppo", -factor * lp, normalizer)
    return loss, sums(tokens=mask, outside=outside, capped=mask & (ratio > ratio_cap))


@level("token")
def cispo(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> LossResult:
    """CISPO: ``-w sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi``: the weight is clipped, the gradient never is.

    Args:
        logprob, mask, old_logprobs, advantages, weights, normalizer: as in :func:`ppo`; ``entropy`` is not read.
        clip_low: 1 for no lower bound.
        clip_high: above 1; TRL's ``epsilon_high`` is ``1 + clip_high``.

    Returns:
        ``(loss, aux)`` with sums ``tokens``, ``clipped_low``, ``clipped_high``.

    Source: MiniMax-M1 (arXiv 2506.13585) [code]. The default bounds, no lower one and an upper one of 5, are those that
    TRL's documentation recommends.
    """
    require("cispo", old_logprobs=old_logprobs, advantages=advantages)
    check_clips("cispo", clip_low, clip_high, None)
    lp, old, advantage, weight = tokens(
        "cispo", logprob, mask, old_logprobs=old_logprobs, advantages=advantages, weights=weights
    )
    with torch.no_grad():
        ratio = bounded_ratio(lp, old)
        factor = advantage * weight * ratio.clamp(1 - clip_low, 1 + clip_high)
    low, high = mask & (ratio < 1 - clip_low), mask & (ratio > 1 + clip_high)
    return divided("cispo", -factor * lp, normalizer), sums(tokens=mask, clipped_low=low, clipped_high=high)


@level("token")
def apa(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    init_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    lam: float = 0.1,
) -> LossResult:
    """Advantage-induced policy alignment: ``w (log pi - A / lam - log pi_init)^2``.

    A regression to the optimum of ``E[A] - lam KL(pi || pi_init)``, ``log pi* = log pi_init + A / lam`` up to a
    constant.

    Args:
        logprob, mask, advantages, weights, normalizer: as in :func:`ppo`; ``entropy`` is not read.
        init_logprobs: under the policy that training starts from.
        lam: weight of the KL penalty in that optimum.

    Returns:
        ``(loss, aux)`` with sums ``tokens`` and ``error`` (the absolute error).

    Source: arXiv 2306.02231 [paper's code].
    """
    require("apa", init_logprobs=init_logprobs, advantages=advantages)
    check_positive("apa", lam=lam)
    lp, init, advantage, weight = tokens(
        "apa", logprob, mask, init_logprobs=init_logprobs, advantages=advantages, weights=weights
    )
    error = lp - (advantage / lam + init).detach()
    return divided("apa", weight.detach() * error.square(), normalizer), sums(tokens=mask, error=error.abs())


@level("token")
def reinforce(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
) -> LossResult:
    """The plain policy gradient: ``-w sg(A) log pi``, for samples of the policy itself.

    Args:
        logprob, mask, advantages, weights, normalizer: as in :func:`ppo`; ``entropy`` is not read.

    Returns:
        ``(loss, aux)`` with the sum ``tokens``.

    Source: Williams 1992.
    """
    require("reinforce", advantages=advantages)
    lp, advantage, weight = tokens("reinforce", logprob, mask, advantages=advantages, weights=weights)
    return divided("reinforce", -(advantage * weight).detach() * lp, normalizer), sums(tokens=mask)


@level("token")
def kl_penalty(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    ref_logprobs: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    coef: float,
) -> LossResult:
    """A penalty to add to another loss: ``coef w (exp(d) - d - 1)``, d = log pi_ref - log pi kept at 20 or below (k3).

    verl, OpenRLHF, AReaL and slime cut the estimate to [-10, 10] instead, with no gradient beyond: at d = 8 that is 10
    and 0, and here, as in TRL, 2972 and -2980.

    Args:
        logprob, mask, weights, normalizer: as in :func:`ppo`; ``entropy`` is not read.
        ref_logprobs: of the frozen reference.
        coef: beta of GRPO.

    Returns:
        ``(loss, aux)`` with sums ``tokens`` and ``kl``.

    Source: GRPO (arXiv 2402.03300), eq. 4 [code]; Schulman, "Approximating KL divergence".
    """
    require("kl_penalty", ref_logprobs=ref_logprobs)
    lp, ref, weight = tokens("kl_penalty", logprob, mask, ref_logprobs=ref_logprobs, weights=weights)
    d = bounded(ref.detach() - lp, high=LOG_RATIO_BOUND)
    kl = torch.expm1(d) - d
    return divided("kl_penalty", coef * weight.detach() * kl, normalizer), sums(tokens=mask, kl=kl)


@level("token")
def entropy_bonus(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    coef: float,
) -> LossResult:
    """A bonus to add to another loss: ``-coef w H``.

    Args:
        logprob: of the same shape as ``entropy``; not read.
        entropy: in nats, as ``linear_loss`` gives it.
        mask, weights, normalizer: as in :func:`ppo`.

    Returns:
        ``(loss, aux)`` with sums ``tokens`` and ``entropy``.
    """
    if entropy is None:
        raise ValueError("entropy_bonus: entropy is missing; linear_loss gives it, or linear_logprob(entropy=True)")
    check_mask("entropy_bonus", mask)
    check_same_shape("entropy_bonus", "logprob", logprob, optional=("entropy",), entropy=entropy)
    h, weight = tokens("entropy_bonus", entropy, mask, weights=weights)
    return divided("entropy_bonus", -coef * weight.detach() * h, normalizer), sums(tokens=mask, entropy=h)
