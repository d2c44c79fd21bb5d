"""Weights for the mismatch between the sampler and the trainer: the same policy, computed by two programs.

An inference engine's log-probs differ from the trainer's (kernels, precision, quantisation), so its samples are not
quite from pi_old. With ``q = pi_old / pi_rollout`` of the token taken, pass these as ``weights`` of a policy loss. A
log-prob that is NaN gives a weight that is: mask tokens whose sampler did not tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srppo.losses.contract import require, tokens
from srppo.losses.policy import bounded_ratio

__all__ = ["icepop_weights", "tis_weights"]


def _ratio(op: str, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    require(op, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    old, rollout = tokens(op, old_logprobs, mask, rollout_logprobs=rollout_logprobs)
    return bounded_ratio(old, rollout)


@torch.no_grad()
def tis_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, low: float = 0.0, high: float = 2.0
) -> Tensor:
    """Truncated importance sampling: ``clip(q, low, high)``, 0 where masked; a constant.

    Args:
        old_logprobs: ``[B, T]`` of the sampled tokens, by the trainer.
        rollout_logprobs: the same shape, by the sampler.
        mask: bool, True on tokens that count.
        low, high: bounds; ``low=0`` leaves small ratios as they are.

    Source: known from implementations: verl and slime, whose bound of 2 is the default here, and TRL's vLLM correction
    in mode ``token_truncate`` [code].
    """
    if not 0 <= low <= high:
        raise ValueError(f"tis_weights: low={low} and high={high} must satisfy 0 <= low <= high")
    return torch.where(mask, _ratio("tis_weights", old_logprobs, rollout_logprobs, mask).clamp(low, high), 0)


@torch.no_grad()
def icepop_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, low: float = 0.5, high: float = 5.0
) -> Tensor:
    """IcePop: ``q`` inside ``[low, high]``, and 0 outside: tokens on which the two programs disagree teach nothing.

    Args:
        old_logprobs, rollout_logprobs, mask: as in :func:`tis_weights`.
        low, high: the window.

    Source: known from implementations; the default window is that of verl's preset and of OpenRLHF [code].
    """
    if not 0 <= low <= high:
        raise ValueError(f"icepop_weights: low={low} and high={high} must satisfy 0 <= low <= high")
    ratio = _ratio("icepop_weights", old_logprobs, rollout_logprobs, mask)
    return torch.where(mask & ~((ratio < low) | (ratio > high)), ratio, 0)
