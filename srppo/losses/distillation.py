"""Token-level rewards from log-ratios of models: ExOPD and Dense-Path REINFORCE.

Both are cousins of Self-Rewarding PPO. With the teacher pi_T = pi_sft,

    A_ExOPD = lam [ (log pi_sft - log pi_base) - 1/lam (log pi - log pi_base) ],

lam times the token-level self-reward with a KL penalty towards the base of weight beta = 1 / lam [derived].
"""

from __future__ import annotations

import torch
from torch import Tensor

from srppo.losses.contract import LossResult, check_positive, divided, level, require, sums, tokens
from srppo_kernels import gae, log_ratio_reward

__all__ = ["dense_path_returns", "dense_path_rewards", "exopd", "exopd_advantages"]


@torch.no_grad()
def exopd_advantages(
    logprob: Tensor, teacher_logprobs: Tensor, base_logprobs: Tensor, mask: Tensor, *, lam: float = 1.25
) -> Tensor:
    """``lam (log pi_T - log pi_base) - (log pi - log pi_base)`` of every token, 0 where masked; a constant.

    Args:
        logprob: ``[B, T]`` or ``[n]``, of the policy's own samples under the policy.
        teacher_logprobs, base_logprobs: the same shape, of the same tokens.
        mask: bool, True on tokens that count.
        lam: 1 distils the teacher (on-policy distillation), above 1 extrapolates past it.

    Source: G-OPD / ExOPD (arXiv 2602.12125) [paper's code].
    """
    op = "exopd_advantages"
    require(op, teacher_logprobs=teacher_logprobs, base_logprobs=base_logprobs)
    check_positive(op, lam=lam)
    lp, teacher, base = tokens(op, logprob, mask, teacher_logprobs=teacher_logprobs, base_logprobs=base_logprobs)
    return lam * (teacher - base) - (lp - base)


@level("token")
def exopd(
    logprob: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    teacher_logprobs: Tensor,
    base_logprobs: Tensor,
    weights: Tensor | None = None,
    *,
    normalizer: float | Tensor,
    lam: float = 1.25,
) -> LossResult:
    """Extrapolated on-policy distillation: ``-w sg(A) log pi`` with :func:`exopd_advantages`.

    Args:
        logprob, mask: ``[B, T]`` or ``[n]`` of the policy's own samples; ``entropy`` is not read.
        teacher_logprobs, base_logprobs, lam: as in :func:`exopd_advantages`.
        weights: the same shape; None for 1.
        normalizer: what the sum is divided by, such as the number of tokens of the whole batch.

    Returns:
        ``(loss, aux)`` with sums ``tokens`` and ``advantage``.

    Source: arXiv 2602.12125 [paper's code]. For samples of an older policy take :func:`exopd_advantages` at sampling
    time and ``ppo``.
    """
    require("exopd", teacher_logprobs=teacher_logprobs, base_logprobs=base_logprobs)
    lp, weight = tokens("exopd", logprob, mask, weights=weights)
    advantage = exopd_advantages(logprob, teacher_logprobs, base_logprobs, mask, lam=lam)
    terms = -(weight.detach() * advantage) * lp
    return divided("exopd", terms, normalizer), sums(tokens=mask, advantage=advantage)


def dense_path_rewards(logprobs_sft: Tensor, logprobs_ref: Tensor, mask: Tensor) -> Tensor:
    """The token reward ``log pi_sft - log pi_ref``, ``[B, T]``, 0 where masked; pi_ref is an earlier SFT checkpoint.

    Source: Dense-Path REINFORCE (arXiv 2510.02493) [second-hand].
    """
    return log_ratio_reward(logprobs_sft, logprobs_ref, mask, placement="token")


@torch.no_grad()
def dense_path_returns(logprobs_sft: Tensor, logprobs_ref: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Returns to go of :func:`dense_path_rewards`, ``[B, T]``, for ``reinforce``: no critic, no baseline.

    Args:
        logprobs_sft, logprobs_ref: ``[B, T]`` of the policy's own samples.
        mask: bool ``[B, T]``; may have gaps.
        gamma: discount.

    Source: arXiv 2510.02493 [second-hand]: gamma 1 and no critic are reported; that nothing else is subtracted or
    scaled is a **reconstruction**.
    """
    rewards = dense_path_rewards(logprobs_sft, logprobs_ref, mask)
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)  # without values: the sum itself
    return returns
