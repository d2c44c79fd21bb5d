"""Losses on pairs: ``[2P, T]``, the P chosen sequences first, then the P rejected ones in the same order.

lp is the sum of a sequence's log-probs, m their mean, w the chosen and l the rejected one of a pair. A pair has part
in a loss if both of its sequences have tokens. Normalizer: the number of pairs of the whole batch.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from srppo.losses.contract import (
    LossResult,
    check_positive,
    divided,
    halves,
    level,
    live_pairs,
    log_one_minus_exp,
    per_sequence,
    require,
    sequence_means,
    sequence_sums,
    sums,
    whole,
)

__all__ = ["asft", "dpo", "orpo", "spin"]


@level("pair")
def dpo(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    ref_logprobs: Tensor,
    *,
    normalizer: float | Tensor,
    beta: float = 0.1,
) -> LossResult:
    """DPO: ``-log sigma(beta [(lp_w - lp_l) - (ref_w - ref_l)])``.

    Args:
        logprob, mask: ``[2P, T]``; ``entropy`` is not read.
        ref_logprobs: of the frozen reference, ``[2P, T]``, or ``[2P]`` sums.
        normalizer: the number of pairs of the whole batch.
        beta: strength of the tie to the reference.

    Returns:
        ``(loss, aux)`` with sums over pairs: ``pairs``, ``margin`` (the argument of sigma), ``correct`` (margin > 0).

    Raises:
        ValueError: rows that are no whole pairs, as in a chunk of ``linear_loss``; a missing reference.

    Source: arXiv 2305.18290, eq. 7 [paper].
    """
    whole("dpo", logprob, mask, what="pairs of sequences, [2P, T]")
    require("dpo", ref_logprobs=ref_logprobs)
    return _log_ratio_pairs("dpo", logprob, mask, "ref_logprobs", ref_logprobs, normalizer, beta)


@level("pair")
def spin(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    opponent_logprobs: Tensor,
    *,
    normalizer: float | Tensor,
    beta: float = 0.1,
) -> LossResult:
    """Self-play: ``-log sigma(beta [(lp - lp_t)(demonstration) - (lp - lp_t)(sample)])``.

    DPO's loss whose chosen sequences are demonstrations, whose rejected ones the last iteration's model sampled, and
    whose reference is that model.

    Args:
        logprob, mask: ``[2P, T]``, demonstrations first; ``entropy`` is not read.
        opponent_logprobs: of the model of the iteration before, ``[2P, T]``, or ``[2P]`` sums.
        normalizer, beta: as in :func:`dpo`.

    Returns:
        ``(loss, aux)`` as :func:`dpo`.

    Source: arXiv 2401.01335 [paper's code].
    """
    whole("spin", logprob, mask, what="pairs of sequences, [2P, T]")
    require("spin", opponent_logprobs=opponent_logprobs)
    return _log_ratio_pairs("spin", logprob, mask, "opponent_logprobs", opponent_logprobs, normalizer, beta)


def _log_ratio_pairs(
    op: str, logprob: Tensor, mask: Tensor, name: str, reference: Tensor, normalizer: float | Tensor, beta: float
) -> LossResult:
    check_positive(op, beta=beta)
    live = live_pairs(op, mask)
    chosen, rejected = halves(op, sequence_sums(logprob, mask) - per_sequence(op, name, reference, mask))
    margin = beta * (chosen - rejected).masked_fill(~live, 0)
    terms = (-logsigmoid(margin)).masked_fill(~live, 0)
    return divided(op, terms, normalizer), sums(pairs=live, margin=margin, correct=margin > 0)


@level("pair")
def orpo(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    *,
    normalizer: float | Tensor,
    weight: float = 0.05,
) -> LossResult:
    """ORPO, with no reference: ``-m_w - weight log sigma(o_w - o_l)``, log odds ``o = m - log(1 - e^m)``.

    Args:
        logprob, mask: ``[2P, T]``; ``entropy`` is not read.
        normalizer: the number of pairs of the whole batch. The NLL is a mean per sequence, over the mask. TRL's and
            SAPO's code average it over a batch's tokens, the prompts' included: add :func:`sft` on those.
        weight: of the odds ratio: 0.05 in SAPO, 0.1 by default in TRL and Liger.

    Returns:
        ``(loss, aux)`` with sums over pairs: ``pairs``, ``nll``, ``margin`` (the log odds ratio), ``correct``.

    Raises:
        ValueError: rows that are no whole pairs, as in a chunk of ``linear_loss``.

    Source: arXiv 2403.07691; the odds ratio as in SAPO's code [paper's code].
    """
    whole("orpo", logprob, mask, what="pairs of sequences, [2P, T]")
    live = live_pairs("orpo", mask)
    chosen, rejected = halves("orpo", sequence_means(logprob, mask))
    chosen, rejected = (m.masked_fill(~live, -1.0) for m in (chosen, rejected))  # a number with finite odds
    margin = (chosen - log_one_minus_exp(chosen)) - (rejected - log_one_minus_exp(rejected))
    terms = (-chosen - weight * logsigmoid(margin)).masked_fill(~live, 0)
    aux = sums(pairs=live, nll=(-chosen).masked_fill(~live, 0), margin=margin, correct=margin > 0)
    return divided("orpo", terms, normalizer), aux


@level("pair")
def asft(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    *,
    normalizer: float | Tensor,
    lam: float = 1.0,
) -> LossResult:
    """Aligned SFT, with no reference: ``-(1 + lam) log p_w - lam log(1 - p_l)``, p = exp(m).

    Args:
        logprob, mask: ``[2P, T]``; ``entropy`` is not read.
        normalizer: the number of pairs of the whole batch.
        lam: weight of the alignment term; 0 leaves SFT on the chosen answers.

    Returns:
        ``(loss, aux)`` with sums over pairs: ``pairs``, ``chosen`` and ``rejected`` (mean log-probs).

    Raises:
        ValueError: rows that are no whole pairs, as in a chunk of ``linear_loss``.

    Source: arXiv 2409.10571 [second-hand]: **reconstructed** from summaries, not from the paper's text; that p is the
    exponential of the mean log-prob is theirs, the default of lam and the guard that keeps ``m_l`` at -1e-7 or below
    are ours.
    """
    whole("asft", logprob, mask, what="pairs of sequences, [2P, T]")
    live = live_pairs("asft", mask)
    chosen, rejected = halves("asft", sequence_means(logprob, mask))
    chosen, rejected = (m.masked_fill(~live, -1.0) for m in (chosen, rejected))
    terms = (-(1 + lam) * chosen - lam * log_one_minus_exp(rejected)).masked_fill(~live, 0)
    aux = sums(pairs=live, chosen=chosen.masked_fill(~live, 0), rejected=rejected.masked_fill(~live, 0))
    return divided("asft", terms, normalizer), aux
