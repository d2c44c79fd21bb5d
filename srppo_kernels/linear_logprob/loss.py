"""Losses over per-token log-probabilities, straight from hidden states: no logits, masked rows free."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srppo_kernels.linear_logprob.op import linear_logprob


def linear_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, loss_fn: Callable[..., Any], *loss_args: Any, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """``loss_fn(logprob, entropy, *loss_args) -> (scalar, aux)`` on the op's outputs."""
    out = linear_logprob(hidden, weight, targets, entropy=True, **options)
    return loss_fn(out.logprob, out.entropy, *loss_args)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The clipped PPO loss of a head's log-probs: ``(loss, PPOStats)``."""
    from srppo_kernels.ppo_loss import ppo_loss

    out = linear_logprob(hidden, weight, targets, mask=mask, entropy=True, **options)
    live = mask.bool() & (targets != options.get("ignore_index", -100))
    count = live.sum().clamp(min=1) if normalizer is None else normalizer
    return ppo_loss(
        out.logprob, old_logprobs, advantages, live, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
        entropy=out.entropy, entropy_coef=entropy_coef, normalizer=count,
    )  # fmt: skip
