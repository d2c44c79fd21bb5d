"""The GRPO family: PPO's clipped loss with advantages from a group of answers to one prompt, and what it is a mean of.

name      advantage                    mean                                   normalizer to pass
grpo      (R - mean) / std             over tokens of a sequence, then        sequences
                                       over sequences
dr_grpo   R - mean                     constant length                        sequences * longest completion allowed
dapo      (R - mean) / std             over all tokens of the batch           tokens
gspo      (R - mean) / std             over sequences, ratio of sequences     sequences
"""

from __future__ import annotations

from torch import Tensor

from srppo.losses.contract import LossResult, level, per_sequence, require, sequence_means, whole
from srppo.losses.policy import clipped
from srppo_kernels._arguments import check_mask, compute_dtype, sum_dtype

__all__ = ["dapo", "dr_grpo", "group_advantages", "grpo", "gspo", "mean_weights"]


def group_advantages(rewards: Tensor, group_size: int, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """``(R - mean) / (std + eps)`` within each group of ``group_size`` neighbours, ``[B]`` fp32 (fp64 stays fp64).

    In fp64, and around the group's first: the mean of equal rewards is then that reward, where a mean that is rounded
    to fp32 gave groups of equal rewards around -300 advantages of up to 0.2, all of one sign.

    Args:
        rewards: ``[B]``, the answers to one prompt side by side. A NaN makes its whole group NaN.
        scale: False leaves the division out (Dr.GRPO).
        eps: added to the standard deviation, which is the unbiased one, as in TRL.

    Source: GRPO (arXiv 2402.03300), Dr.GRPO (arXiv 2503.20783) [code].
    """
    if rewards.dim() != 1 or group_size < 2 or rewards.shape[0] % group_size:
        raise ValueError(
            f"group_advantages: rewards of shape {tuple(rewards.shape)} are no groups of {group_size}; pass [B], the "
            f"answers to one prompt side by side, at least two each"
        )
    grouped = rewards.to(sum_dtype(rewards.device)).view(-1, group_size)
    grouped = grouped - grouped[:, :1]  # equal ones are then 0, and their mean is, where there is no fp64 either
    centred = grouped - grouped.mean(-1, keepdim=True)
    if scale:
        centred = centred / (grouped.std(-1, keepdim=True) + eps)
    return centred.view(-1).to(compute_dtype(rewards))


def mean_weights(mask: Tensor) -> Tensor:
    """``[B, T]`` fp32: 1 / length on a sequence's tokens, 0 elsewhere; the weights of a mean per sequence.

    A chunk of rows does not see its sequences, so ``linear_loss`` needs these as one of its arguments.
    """
    check_mask("mean_weights", mask)
    return mask.float() / mask.sum(-1, keepdim=True).clamp(min=1)


@level("token")
def grpo(
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
) -> LossResult:
    """GRPO: PPO's clipped term, averaged over each sequence's tokens and then over sequences.

    Args:
        logprob, mask, old_logprobs: as in ``ppo``; ``entropy`` is not read.
        advantages: of :func:`group_advantages`, spread over tokens: ``a[:, None].expand_as(mask)``.
        weights: :func:`mean_weights` of the mask, times others if wanted. May be left out for ``[B, T]``; in chunks it
            is needed.
        normalizer: the number of sequences of the whole batch. In TRL one without tokens counts, in verl and OpenRLHF
            it does not.
        clip_low, clip_high, dual_clip: as in ``ppo``. A KL penalty is ``kl_penalty`` with ``mean_weights(mask)`` alone.

    Returns:
        ``(loss, aux)`` as ``ppo``.

    Source: arXiv 2402.03300 [code].
    """
    require("grpo", old_logprobs=old_logprobs, advantages=advantages)
    if weights is None:
        if logprob.dim() != 2:
            raise ValueError(
                "grpo: weights are missing; a flat vector of rows does not tell which sequence a row is of, so pass "
                "mean_weights(mask) of the [B, T] mask as the tensor after advantages"
            )
        weights = mean_weights(mask)
    return clipped(
        "grpo", logprob, None, mask, old_logprobs, advantages, weights, normalizer, clip_low, clip_high, dual_clip
    )


@level("token")
def dr_grpo(
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
) -> LossResult:
    """Dr.GRPO: PPO's clipped term, summed and divided by a constant, so that no length is favoured.

    Args:
        logprob, mask, old_logprobs, weights, clip_low, clip_high, dual_clip: as in ``ppo``; ``entropy`` is not read.
        advantages: of ``group_advantages(scale=False)``, spread over tokens.
        normalizer: the number of sequences of the whole batch times the longest completion allowed.

    Returns:
        ``(loss, aux)`` as ``ppo``.

    Source: arXiv 2503.20783 [code].
    """
    require("dr_grpo", old_logprobs=old_logprobs, advantages=advantages)
    return clipped(
        "dr_grpo", logprob, None, mask, old_logprobs, advantages, weights, normalizer, clip_low, clip_high, dual_clip
    )


@level("token")
def dapo(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> LossResult:
    """DAPO: PPO's clipped term with a higher upper clip, averaged over all tokens of the batch.

    Args:
        logprob, mask, old_logprobs, weights, clip_low, clip_high, dual_clip: as in ``ppo``; ``entropy`` is not read.
        advantages: of :func:`group_advantages`, spread over tokens.
        normalizer: the number of tokens of the whole batch.

    Returns:
        ``(loss, aux)`` as ``ppo``. Dynamic sampling and the reward for length, DAPO's other parts, belong to the
        rollout.

    Source: arXiv 2503.14476 [code].
    """
    require("dapo", old_logprobs=old_logprobs, advantages=advantages)
    return clipped(
        "dapo", logprob, None, mask, old_logprobs, advantages, weights, normalizer, clip_low, clip_high, dual_clip
    )


@level("sequence")
def gspo(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> LossResult:
    """GSPO, per sequence: ``-w min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)``, ``s = exp(mean_t log r_t)``.

    The mean is kept in [-20, 20], as log-ratios are in ``ppo_loss``.

    Args:
        logprob, mask: ``[B, T]``; ``entropy`` is not read. A sequence without tokens has no part in it.
        old_logprobs: ``[B, T]``, or ``[B]`` means over tokens.
        advantages: ``[B]``, of :func:`group_advantages`.
        weights: ``[B]``, non-negative; None for 1.
        normalizer: the number of sequences of the whole batch.

    Returns:
        ``(loss, aux)`` with sums over sequences: ``sequences`` and the rest as in ``ppo``.

    Raises:
        ValueError: rows that are no whole sequences, as in a chunk of ``linear_loss``.

    Source: arXiv 2507.18071 [code].
    """
    whole("gspo", logprob, mask)
    require("gspo", old_logprobs=old_logprobs, advantages=advantages)
    for name, value in (("advantages", advantages), ("weights", weights)):
        if value is not None and value.shape != mask.shape[:1]:
            raise ValueError(f"gspo: {name} has shape {tuple(value.shape)}; pass one a sequence, ({mask.shape[0]},)")
    old = per_sequence("gspo", "old_logprobs", old_logprobs, mask, mean=True)
    mean = sequence_means(logprob, mask)
    return clipped("gspo", mean, None, mask.any(-1), old, advantages, weights, normalizer, clip_low, clip_high,
                   unit="sequences")  # fmt: skip
