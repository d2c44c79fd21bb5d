"""Generalized advantage estimation and masked whitening in plain torch: the maths, and the tests' oracle.

GAE (Schulman et al. 2016, arXiv 1506.02438, eq. 16). With the TD residual `delta_t = r_t + gamma V_{t+1} - V_t`,

    A_t = sum_k (gamma lambda)^k delta_{t+k}    so    A_t = delta_t + gamma lambda A_{t+1},    R_t = A_t + V_t,

a scan of affine maps from right to left. What "t + 1" means beside masked tokens is `mask_mode`:

- `"carry"` (verl, AReaL): masked tokens do not exist. The next value and the running advantage of a valid token are
  those of the next *valid* token, as if the row had been compacted first.
- `"zero"` (OpenRLHF): a masked token between two valid ones is a time step with reward 0 and value 0: the running
  advantage decays through it by `gamma lambda`, its own residual is `gamma V_{t+1}`, and a valid token before it sees
  next value 0.

In both, `bootstrap` is the value of the state after the row's last valid token (0 if None: the sequence ended), and
masked tokens after that last one are no time steps at all, so further padding changes no bit. Both outputs are 0 on
masked tokens. Without gaps the two modes agree. TRL's PPO, while there was one, kept the value after the last token as
a step of its own and paid the score there: a mask and rewards that are a token longer give the same.

The op is linear in rewards, values and bootstrap; its adjoint is the same scan from left to right. With `g` the
gradient of A plus that of R, and t- the previous valid token (carry mode): `G_t = g_t + gamma lambda G_{t-}`, then
`dr_t = G_t`, `dV_t = gamma G_{t-} - G_t + dR_t`, `dbootstrap = gamma G_last`.

Whitening: `(x - mean) / sqrt(var + 1e-8)` over valid tokens, var unbiased (n - 1), plus `mean` again without
`shift_mean`; the formula of verl's `masked_whiten`, and of TRL's when it had PPO. With one valid token or none var
counts as 0.
"""

import torch
from torch import Tensor

from srppo_kernels._arguments import compute_dtype, sum_dtype

__all__ = [
    "WHITEN_EPS",
    "gae_backward_reference",
    "gae_reference",
    "whiten_apply",
    "whiten_moments",
    "whiten_reference",
]

WHITEN_EPS = 1e-8


def _per_row(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return like.new_full((like.shape[0],), value)


def pad_packed(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`[total]` -> (`[B, T_max]` padded with 0, the places `[B, T_max]` that hold a token)."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    steps = torch.arange(longest, device=packed.device)
    inside = steps[None, :] < lengths[:, None]
    padded = packed.new_zeros(inside.shape)
    padded[inside] = packed
    return padded, inside


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    mask_mode: str = "carry",
) -> tuple[Tensor, Tensor]:
    """`[B, T]` -> (advantages, returns), one Python step per time step; differentiable by autograd."""
    dtype = compute_dtype(rewards, values)
    rewards = torch.where(mask, rewards.to(dtype), 0)
    values = torch.where(mask, values.to(dtype), 0)
    gamma, lam = _per_row(gamma, rewards), _per_row(lam, rewards)
    decay = gamma * lam

    advantage = rewards.new_zeros(rewards.shape[0])
    next_value = advantage if bootstrap is None else bootstrap.to(dtype)
    started = mask.new_zeros(mask.shape[0])  # whether a valid token was met, from the right
    advantages = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        valid = mask[:, t]
        step = rewards[:, t] + gamma * next_value - values[:, t] + decay * advantage
        if mask_mode == "zero":
            started = started | valid
            advantage = torch.where(started, step, advantage)
            next_value = torch.where(started, values[:, t], next_value)
        else:
            advantage = torch.where(valid, step, advantage)
            next_value = torch.where(valid, values[:, t], next_value)
        advantages.append(torch.where(valid, advantage, 0))
    stacked = torch.stack(advantages[::-1], dim=1) if advantages else torch.zeros_like(rewards)
    return stacked, stacked + values


def gae_backward_reference(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask_mode: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint scan -> gradients of (rewards `[B, T]`, values `[B, T]`, bootstrap `[B]`)."""
    grad_returns = torch.where(mask, grad_returns, 0)
    grad = torch.where(mask, grad_advantages, 0) + grad_returns
    gamma, lam = _per_row(gamma, grad), _per_row(lam, grad)
    decay = gamma * lam

    running = grad.new_zeros(grad.shape[0])  # G of the previous step
    last = running  # G at the last valid token so far
    grad_rewards, grad_values = [], []
    for t in range(grad.shape[1]):
        valid = mask[:, t]
        step = grad[:, t] + decay * running
        grad_rewards.append(torch.where(valid, step, 0))
        grad_values.append(torch.where(valid, gamma * running - step + grad_returns[:, t], 0))
        running = step if mask_mode == "zero" else torch.where(valid, step, running)
        last = torch.where(valid, running, last)
    if not grad_rewards:
        return torch.zeros_like(grad), torch.zeros_like(grad), running
    return torch.stack(grad_rewards, dim=1), torch.stack(grad_values, dim=1), gamma * last


def whiten_moments(x: Tensor, mask: Tensor) -> Tensor:
    """-> `[3]` in `sum_dtype`: count, mean and sum of squared deviations over valid tokens; two passes."""
    wide = sum_dtype(x.device)
    x = torch.where(mask, x.to(wide), 0)
    count = mask.sum(dtype=wide)
    mean = x.sum() / count.clamp(min=1)
    deviation = torch.where(mask, x - mean, 0)
    return torch.stack((count, mean, (deviation * deviation).sum()))


def whiten_apply(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    """Whiten with given moments; the subtraction is float64, so a constant x gives 0 and not amplified rounding."""
    count, mean, squares = moments.unbind()
    scale = (squares / (count - 1).clamp(min=1) + WHITEN_EPS).rsqrt()
    whitened = (torch.where(mask, x.to(moments.dtype), 0) - mean) * scale
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0).to(compute_dtype(x))


def whiten_reference(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    return whiten_apply(x, mask, whiten_moments(x, mask), shift_mean)
