"""The clipped PPO losses in plain torch: the maths, and the tests' oracle.

Policy (Schulman et al. 2017, arXiv 1707.06347, eq. 7). With `d = log pi - log pi_old` and ratio `r = exp(d)`, per token

    l = max(-A r, -A clip(r, 1 - low, 1 + high)) - entropy_coef H        and with dual clip c, where A < 0, at most -A c
    dl/dlogprob = -A r  where the unclipped branch is the one taken, else 0;      dl/dH = -entropy_coef

Asymmetric clip: DAPO (arXiv 2503.14476). Dual clip: Ye et al. 2020 (arXiv 1912.09729). The branch is decided on the
ratio: clipped high is `A > 0 and r > 1 + high`, clipped low `A < 0 and r < 1 - low`, dual-clipped `A < 0 and r > c`.

Overflow: `d` is clamped to [-20, 20] and a token outside gets gradient 0, one at a bound its own. So r is at most
4.9e8 and no loss is infinite; such a token is off-policy beyond use, and it shows in `ratio_max` and `clipfrac`.

Approximate KL of old to new, from samples of old: k1 = -d, k3 = r - 1 - d (Schulman, "Approximating KL divergence").

Value (PPO's reference code, TRL): `0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)`, gradient `V - R` where
the first is the larger or the clip is not active, else 0.

Divisors: `token_mean` the number of valid tokens; `sequence_mean` averages the sequences' token means over those
sequences that have tokens; `sum` 1; `constant_length` B T, padding included (Dr.GRPO, arXiv 2503.20783). A caller's
normalizer replaces the divisor (for sequence_mean the number of sequences). A divisor of 0, the caller's too, counts as
1: a batch without valid tokens has loss 0 and gradient 0.
"""

import torch
from torch import Tensor

from srppo_kernels._arguments import bounded, compute_dtype, sum_dtype

__all__ = [
    "LOG_RATIO_BOUND",
    "POLICY_STATS",
    "REDUCTIONS",
    "VALUE_STATS",
    "explained_variance",
    "ppo_loss_reference",
    "value_loss_reference",
]

LOG_RATIO_BOUND = 20.0
REDUCTIONS = ("token_mean", "sequence_mean", "sum", "constant_length")
# What the kernels hand to PPOStats and ValueStats, in this order.
POLICY_STATS = (
    "approx_kl",
    "approx_kl_k1",
    "clipfrac_low",
    "clipfrac_high",
    "clipfrac_dual",
    "ratio_mean",
    "ratio_max",
    "ratio_var",
    "entropy",
    "count",
)
VALUE_STATS = (
    "clipfrac",
    "error",
    "value_mean",
    "return_mean",
    "return_var",
    "residual_var",
    "explained_variance",
    "count",
)


def token_weights(
    mask: Tensor, reduction: str, divisor: float | None, divisor_tensor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`[B, 1]`: what every valid token's loss is multiplied by."""
    lengths = mask.sum(-1, keepdim=True).to(dtype)
    total: Tensor | float
    if divisor_tensor is not None:
        total = divisor_tensor.to(dtype)
    elif divisor is not None:
        total = divisor
    elif reduction == "token_mean":
        total = lengths.sum()
    elif reduction == "sequence_mean":
        total = (lengths > 0).sum().to(dtype)
    elif reduction == "constant_length":
        total = float(mask.numel())
    else:
        total = 1.0
    if not isinstance(total, Tensor):
        total = torch.full((), total, dtype=dtype, device=mask.device)  # a copy of a host's tensor would be waited for
    weights = torch.ones_like(lengths) / torch.where(total == 0, 1, total)
    return weights / lengths.clamp(min=1) if reduction == "sequence_mean" else weights


def _mean_and_variance(x: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.where(mask, x, 0).sum() / count
    return mean, torch.where(mask, (x - mean) ** 2, 0).sum() / count


def explained_variance(return_var: Tensor, residual_var: Tensor) -> Tensor:
    """`1 - Var(V - R) / Var(R)`, and 0 where the returns do not vary."""
    varies = return_var > 0
    return torch.where(varies, 1 - residual_var / torch.where(varies, return_var, 1), 0)


def ppo_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss `[]`, dloss/dlogprob and dloss/dentropy `[B, T]`, statistics float32 `[len(POLICY_STATS)]`.

    The gradients are explicit, for use as a kernel; the loss itself is also differentiable by autograd.
    """
    dtype = weights.dtype
    logprobs, old_logprobs, advantages = (
        torch.where(mask, x.to(dtype), 0) for x in (logprobs, old_logprobs, advantages)
    )
    raw = logprobs - old_logprobs
    d = bounded(raw, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = d.exp()
    high = mask & (advantages > 0) & (ratio > 1 + clip_high)
    low = mask & (advantages < 0) & (ratio < 1 - clip_low)
    dual = torch.zeros_like(mask) if dual_clip is None else mask & (advantages < 0) & (ratio > dual_clip)

    used = torch.where(high, 1 + clip_high, torch.where(low, 1 - clip_low, ratio))
    if dual_clip is not None:
        used = torch.where(dual, dual_clip, used)
    token_loss = -advantages * used
    active = mask & ~(high | low | dual | (raw.abs() > LOG_RATIO_BOUND))  # a NaN is active: it must be seen
    d_logprobs = torch.where(active, -advantages * ratio, 0) * weights
    d_entropy = weights.new_empty(0)
    if entropy is not None:
        d_entropy = torch.where(mask, -entropy_coef * weights, 0)
        entropy = torch.where(mask, entropy.to(dtype), 0)
        token_loss = token_loss - entropy_coef * entropy
    wide = sum_dtype(mask.device)  # float64: one rounding at the end, whatever the number of tokens
    loss = (token_loss * weights).sum(dtype=wide).to(dtype)

    with torch.no_grad():
        d, ratio = d.to(wide), ratio.to(wide)
        count = mask.sum(dtype=wide)
        safe = count.clamp(min=1)
        ratio_mean, ratio_var = _mean_and_variance(ratio, mask, safe)
        k3 = torch.where(mask, torch.expm1(d) - d, 0)
        ratio_max = torch.where(mask, ratio, 0).amax() if mask.numel() else count
        sums = [k3.sum() / safe, -d.sum() / safe]
        sums += [clipped.sum(dtype=wide) / safe for clipped in (low, high, dual)]
        sums += [ratio_mean, ratio_max, ratio_var]
        sums += [(entropy.sum(dtype=wide) if entropy is not None else count * 0) / safe, count]
    return loss, d_logprobs, d_entropy, torch.stack(sums).float()


def value_loss_reference(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss `[]`, dloss/dvalues `[B, T]`, statistics float32 `[len(VALUE_STATS)]`."""
    dtype = weights.dtype
    values, old_values, returns = (torch.where(mask, x.to(dtype), 0) for x in (values, old_values, returns))
    error = values - returns
    squares = error * error
    worse = torch.zeros_like(mask)
    if clip is not None:
        moved = (values - old_values).clamp(-clip, clip)
        clipped_error = old_values + moved - returns
        outside = mask & ((values - old_values).abs() > clip)
        worse = outside & (clipped_error * clipped_error > squares)
        squares = torch.where(worse, clipped_error * clipped_error, squares)
    wide = sum_dtype(mask.device)
    loss = (0.5 * squares * weights).sum(dtype=wide).to(dtype)
    d_values = torch.where(mask & ~worse, error, 0) * weights

    with torch.no_grad():
        error, values, returns = error.to(wide), values.to(wide), returns.to(wide)
        count = mask.sum(dtype=wide)
        safe = count.clamp(min=1)
        return_mean, return_var = _mean_and_variance(returns, mask, safe)
        _, residual_var = _mean_and_variance(error, mask, safe)
        sums = [worse.sum(dtype=wide) / safe, (error * error).sum() / safe, values.sum() / safe]
        sums += [return_mean, return_var, residual_var, explained_variance(return_var, residual_var), count]
    return loss, d_values, torch.stack(sums).float()


def weights_for(
    like: tuple[Tensor | None, ...], mask: Tensor, reduction: str, divisor: float | None, divisor_tensor: Tensor | None
) -> Tensor:
    return token_weights(mask, reduction, divisor, divisor_tensor, compute_dtype(*like))
