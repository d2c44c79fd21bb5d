"""Losses on demonstrations: SFT and its relatives. p is the probability of the token in the demonstration, H the
entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from srppo.losses.contract import (
    LossResult,
    check_positive,
    divided,
    level,
    require,
    sequence_means,
    sums,
    tokens,
    whole,
)
from srppo_kernels._arguments import bounded, check_choice

__all__ = ["dft", "idft", "implicit_reward", "poft", "sft"]

HELLINGER_EDGE = -0.9  # the squared Hellinger form has a pole at -1; from here down its tangent is taken


@level("token")
def sft(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
) -> LossResult:
    """Cross-entropy: ``-w log p``.

    Args:
        logprob, mask: ``[B, T]`` or ``[n]``; ``entropy`` is not read.
        weights: the same shape; None for 1.
        normalizer: what the sum is divided by, such as the number of tokens of the whole batch.

    Returns:
        ``(loss, aux)`` with the sum ``tokens``.
    """
    lp, weight = tokens("sft", logprob, mask, weights=weights)
    return divided("sft", -weight.detach() * lp, normalizer), sums(tokens=mask)


@level("token")
def dft(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
) -> LossResult:
    """Dynamic fine-tuning: ``-w sg(p) log p``, the gradient of ``-p`` itself; tokens that the model finds unlikely
    teach less than under SFT.

    Args:
        logprob, mask, weights, normalizer: as in :func:`sft`; ``entropy`` is not read.

    Returns:
        ``(loss, aux)`` with sums ``tokens`` and ``probability``.

    Source: arXiv 2508.05629; here as the g = 1 case of IDFT (arXiv 2602.12222) [paper's code].
    """
    lp, weight = tokens("dft", logprob, mask, weights=weights)
    p = lp.detach().exp()
    return divided("dft", -weight.detach() * p * lp, normalizer), sums(tokens=mask, probability=p.masked_fill(~mask, 0))


@level("token")
def idft(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    beta: float = 1.0,
    g_min: float = 0.1,
    g_max: float = 2.0,
) -> LossResult:
    """DFT with an exponent for each token: ``-w sg(p^g) log p``, ``phi = log p + H``, ``g = clip(exp(-phi / beta))``.

    phi is how much likelier the token is than the model expects its own tokens to be. ``g = 1`` is DFT, ``g -> 0``
    SFT: a token likelier than expected (phi > 0) is learned from as in SFT, an unexpected one is held back.

    Args:
        logprob, mask, weights, normalizer: as in :func:`sft`.
        entropy: in nats, of ``logprob``'s shape; a constant here.
        beta: temperature of g.
        g_min, g_max: bounds on g.

    Returns:
        ``(loss, aux)`` with sums ``tokens`` and ``exponent`` (g).

    Source: arXiv 2602.12222 [paper's code].
    """
    check_positive("idft", beta=beta)
    if not 0 <= g_min <= g_max:
        raise ValueError(f"idft: g_min={g_min} and g_max={g_max} must satisfy 0 <= g_min <= g_max")
    if entropy is None:
        raise ValueError("idft: entropy is missing; linear_loss gives it, or linear_logprob(entropy=True)")
    lp, h, weight = tokens("idft", logprob, mask, entropy=entropy, weights=weights)
    with torch.no_grad():
        g = (-(lp + h) / beta).exp().clamp(g_min, g_max)
        factor = weight * (g * lp).exp()
    return divided("idft", -factor * lp, normalizer), sums(tokens=mask, exponent=g.masked_fill(~mask, 0))


@level("token")
def implicit_reward(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    ref_logprobs: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    divergence: str = "pearson",
    beta: float = 1.0,
) -> LossResult:
    """SFT as learning an implicit reward, with an f-divergence: ``-w phi(x)``, ``x = beta log(pi / pi_ref)``.

        pearson     phi = x - x^2 / 4       (chi squared; its gradient vanishes at x = 2 and turns beyond)
        hellinger   phi = x / (1 + x)       (squared Hellinger; below x = -0.9 the tangent, as -1 is a pole)
        kl          phi = x                 (SFT, scaled and shifted)

    Args:
        logprob, mask, weights, normalizer: as in :func:`sft`; ``entropy`` is not read.
        ref_logprobs: of the model that SFT starts from, a constant.
        divergence: ``"pearson"``, ``"hellinger"`` or ``"kl"``.
        beta: scale of the implicit reward.

    Returns:
        ``(loss, aux)`` with sums ``tokens`` and ``reward`` (x).

    Source: arXiv 2507.00018. That SFT is implicit-reward learning, and wants a lower learning rate, is in its abstract
    [paper]. The two forms above are a **reconstruction of low confidence**, from IQ-Learn's table of divergences; that
    they apply per token, beta, and the tangent are ours [derived]. Hold them against the paper before relying on them.
    """
    check_choice("implicit_reward", "divergence", divergence, ("pearson", "hellinger", "kl"))
    check_positive("implicit_reward", beta=beta)
    require("implicit_reward", ref_logprobs=ref_logprobs)
    lp, ref, weight = tokens("implicit_reward", logprob, mask, ref_logprobs=ref_logprobs, weights=weights)
    x = beta * (lp - ref.detach())
    if divergence == "pearson":
        phi = x - x.square() / 4
    elif divergence == "hellinger":
        edge = HELLINGER_EDGE
        # Apart, so that no gradient cancels another.
        inside, below = bounded(x, low=edge), torch.where(x < edge, x - edge, 0)
        phi = 1 - 1 / (1 + inside) + below / (1 + edge) ** 2
    else:
        phi = x
    return divided("implicit_reward", -weight.detach() * phi, normalizer), sums(tokens=mask, reward=x)


@level("sequence")
def poft(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    aligned_mean_logprobs: Tensor,
    *,
    normalizer: float | Tensor,
    beta: float = 1.0,
    gamma: float = 0.0,
) -> LossResult:
    """Preference-oriented fine-tuning, per sequence: ``-log sigma(beta m - beta mean_k m_k + gamma)``.

    m is the sequence's mean log-prob under the policy, m_k under the k-th aligned model: the policy is to prefer a
    demonstration more than models that are aligned already do, and learns less once it does.

    Args:
        logprob, mask: ``[B, T]``; ``entropy`` is not read. A sequence without tokens has no part in it.
        aligned_mean_logprobs: ``[B]`` or ``[models, B]``, scored beforehand: ``sequence_means`` of each
            aligned model's log-probs, of the same text under its own tokenizer.
        normalizer: the number of sequences of the whole batch.
        beta, gamma: scale and margin.

    Returns:
        ``(loss, aux)`` with sums over sequences: ``sequences``, ``margin`` (the argument of sigma).

    Raises:
        ValueError: rows that are no whole sequences, as in a chunk of ``linear_loss``.

    Source: arXiv 2412.12865 [paper's code].
    """
    whole("poft", logprob, mask)
    require("poft", aligned_mean_logprobs=aligned_mean_logprobs)
    check_positive("poft", beta=beta)
    batch = mask.shape[0]
    if aligned_mean_logprobs.shape[-1:] != (batch,) or aligned_mean_logprobs.dim() not in (1, 2):
        shape = tuple(aligned_mean_logprobs.shape)
        raise ValueError(f"poft: aligned_mean_logprobs has shape {shape}; pass ({batch},) or (models, {batch})")
    live = mask.any(-1)
    aligned = aligned_mean_logprobs.detach().to(logprob.device)
    aligned = aligned.mean(0) if aligned.dim() == 2 else aligned
    margin = (beta * (sequence_means(logprob, mask) - aligned) + gamma).masked_fill(~live, 0)
    terms = (-logsigmoid(margin)).masked_fill(~live, 0)
    return divided("poft", terms, normalizer), sums(sequences=live, margin=margin)
