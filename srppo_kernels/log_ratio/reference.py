"""The self-reward of Self-Rewarding PPO in plain torch: the maths, and the tests' oracle.

Coherent reward (arXiv 2510.21090): `r(x, y) = log pi_sft(y|x) - log pi_base(y|x)`, a sum over the tokens of y. With
`u_t` the difference of the two log-probs on valid token t and n the row's number of valid tokens, in this order:

    placement "eos":    s = sum_t u_t;  s /= n or running_std;  s *= scale;  s = clip(s, -c, c);
                        s -= penalty if truncated;  reward s at the row's last valid token, 0 elsewhere
    placement "token":  every u_t likewise through divisor, scale and clip; the penalty at the row's last valid token
    then on every valid token   reward_t -= kl_coef kl_t

With `d_t = log pi - log pi_ref` of the policy that sampled: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman,
"Approximating KL divergence"); in k3's exponential `-d` is clamped to [-20, 20], with derivative 0 outside. verl,
OpenRLHF and AReaL cut the estimate itself to [-10, 10].

The parts of it that a trainer logs: the row's `score` sum_t u_t as it is, its `shaped` score, which is the row's sum of
rewards before the KL penalty, and every token's `penalty` -kl_coef kl_t.

Dividing by n under "token" keeps the row's sum what "eos" gives. A row without valid tokens gets no reward and no
penalty: it has no token to carry one. Equal sft and base log-probs give exactly 0.
"""

import torch
from torch import Tensor

from srppo_kernels._arguments import bounded, compute_dtype, sum_dtype

__all__ = ["KL_BOUND", "KL_ESTIMATORS", "NORMALIZATIONS", "PLACEMENTS", "log_ratio_reward_reference"]

PLACEMENTS = ("eos", "token")
NORMALIZATIONS = ("none", "length", "running")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_BOUND = 20.0


def last_valid(mask: Tensor) -> Tensor:
    """`[B, T]` bool: True on each row's last valid token only."""
    after = mask.flip(-1).cumsum(-1).flip(-1)  # valid tokens from here on
    return mask & (after == 1)


def kl_per_token(d: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    return torch.expm1(bounded(-d, -KL_BOUND, KL_BOUND)) + d


def log_ratio_reward_reference(
    logprobs_sft: Tensor,
    logprobs_base: Tensor,
    mask: Tensor,
    placement: str = "eos",
    normalize: str = "none",
    running_std: float | Tensor | None = None,
    scale: float = 1.0,
    clip: float | None = None,
    truncated: Tensor | None = None,
    missing_eos_penalty: float | None = None,
    logprobs_policy: Tensor | None = None,
    logprobs_ref: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k1",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> reward and penalty `[B, T]`, 0 on masked tokens; score and shaped score `[B]`; differentiable by autograd."""
    dtype = compute_dtype(logprobs_sft, logprobs_base, logprobs_policy, logprobs_ref)
    ratio = torch.where(mask, logprobs_sft.to(dtype), 0) - torch.where(mask, logprobs_base.to(dtype), 0)
    total = ratio.sum(-1, keepdim=True, dtype=sum_dtype(mask.device)).to(dtype)
    score = ratio if placement == "token" else total
    if normalize == "length":
        score = score / mask.sum(-1, keepdim=True).clamp(min=1).to(dtype)
    elif normalize == "running":
        assert running_std is not None
        score = score / running_std
    score = score * scale
    if clip is not None:
        score = bounded(score, -clip, clip)

    last = last_valid(mask)
    reward = torch.where(mask if placement == "token" else last, score, 0)
    if truncated is not None and missing_eos_penalty is not None:
        reward = torch.where(last & truncated[:, None], reward - missing_eos_penalty, reward)
    shaped = reward.sum(-1, dtype=sum_dtype(mask.device)).to(dtype)
    penalty = torch.zeros_like(ratio)
    if logprobs_policy is not None and logprobs_ref is not None and kl_coef != 0:
        d = torch.where(mask, logprobs_policy.to(dtype), 0) - torch.where(mask, logprobs_ref.to(dtype), 0)
        penalty = -kl_coef * torch.where(mask, kl_per_token(d, kl_estimator), 0)
        reward = reward + penalty
    return reward.to(dtype), penalty, total.squeeze(-1), shaped
