"""`srppo::log_ratio_reward`: schema, fake, autograd and the choice of backend. `reference.py` has the maths."""

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from srppo_kernels._arguments import (
    check_backend,
    check_choice,
    check_finite,
    check_mask,
    check_number,
    check_rows,
    check_same_shape,
    check_tensor,
    compute_dtype,
    number_or_tensor,
    sum_dtype,
)
from srppo_kernels._extension import native_input, resolve
from srppo_kernels._library import Op
from srppo_kernels.log_ratio import reference

__all__ = ["RewardParts", "log_ratio_reward"]

BACKENDS = ("native", "triton", "reference")


class RewardParts(NamedTuple):
    """A reward and what it is made of, float32 (float64 for float64 inputs); only `reward` carries a gradient."""

    reward: Tensor  # [B, T]
    penalty: Tensor  # [B, T], -kl_coef kl_t: what the KL penalty adds to each token; 0 without one
    score: Tensor  # [B], sum_t log pi_sft - log pi_base, before normalisation, scale and clip
    shaped: Tensor  # [B], the row's sum of rewards before the KL penalty


def _run_log_ratio_reward(
    logprobs_sft: Tensor,
    logprobs_base: Tensor,
    mask: Tensor,
    placement: str,
    normalize: str,
    std: float | None,
    std_tensor: Tensor | None,
    scale: float,
    clip: float | None,
    truncated: Tensor | None,
    missing_eos_penalty: float | None,
    logprobs_policy: Tensor | None,
    logprobs_ref: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    parts: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = (logprobs_sft, logprobs_base, logprobs_policy, logprobs_ref)
    chosen = resolve("log_ratio_reward", backend, logprobs_sft, compute_dtype(*tokens))
    if chosen == "reference":
        reward, penalty, score, shaped = reference.log_ratio_reward_reference(
            logprobs_sft, logprobs_base, mask, placement, normalize, std if std_tensor is None else std_tensor, scale,
            clip, truncated, missing_eos_penalty, logprobs_policy, logprobs_ref, kl_coef, kl_estimator,
        )  # fmt: skip
        if not parts:
            penalty, score, shaped = (reward.new_empty(0) for _ in range(3))
        return reward.contiguous(), penalty.contiguous(), score, shaped  # as the fake says
    run: Any
    inputs: Any = (logprobs_sft, logprobs_base, mask, std_tensor, truncated, logprobs_policy, logprobs_ref)
    if chosen == "triton":
        from srppo_kernels.log_ratio.triton_reward import log_ratio_reward_triton as run
    else:
        run = torch.ops.srppo_native.log_ratio_reward
        inputs = [None if x is None else native_input(x) for x in inputs]
    sft, base, inside, std_input, cut, policy, ref = inputs
    return run(
        sft, base, inside, placement == "token", normalize == "length", 1.0 if std is None else std, std_input, scale,
        clip, cut, missing_eos_penalty or 0.0, policy, ref, kl_coef, reference.KL_ESTIMATORS.index(kl_estimator) + 1,
        parts,
    )  # fmt: skip


_log_ratio_reward = Op("log_ratio_reward", _run_log_ratio_reward)


@_log_ratio_reward.register_fake
def _(  # type: ignore[no-untyped-def]
    logprobs_sft, logprobs_base, mask, placement, normalize, std, std_tensor, scale, clip, truncated,
    missing_eos_penalty, logprobs_policy, logprobs_ref, kl_coef, kl_estimator, parts, backend,
):  # fmt: skip
    dtype = compute_dtype(logprobs_sft, logprobs_base, logprobs_policy, logprobs_ref)
    shape = logprobs_sft.shape
    tokens, rows = (shape, shape[:1]) if parts else ((0,), (0,))
    return tuple(logprobs_sft.new_empty(size, dtype=dtype) for size in (shape, tokens, rows, rows))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sft, base, mask, placement, normalize, std, std_tensor, scale, clip, _, _, policy, ref, kl_coef, estimator, *_ = (
        inputs
    )
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sft, base, mask, std_tensor, policy, ref)
    ctx.options = (placement, normalize, std, scale, clip, kl_coef, estimator)


def _autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 17
    # In plain torch: a reward is rarely differentiated (it never is in PPO), and then this is a handful of launches.
    sft, base, mask, std_tensor, policy, ref = ctx.saved_tensors
    placement, normalize, std, scale, clip, kl_coef, estimator = ctx.options
    dtype = grad.dtype
    grad = torch.where(mask, grad, 0)

    factor: Any = scale
    if normalize == "length":
        factor = scale / mask.sum(-1, keepdim=True).clamp(min=1).to(dtype)
    elif normalize == "running":
        factor = scale / (std if std_tensor is None else std_tensor)
    ratio = torch.where(mask, sft.to(dtype), 0) - torch.where(mask, base.to(dtype), 0)
    score = ratio if placement == "token" else ratio.sum(-1, keepdim=True, dtype=sum_dtype(mask.device)).to(dtype)
    d_score = grad if placement == "token" else torch.where(reference.last_valid(mask), grad, 0).sum(-1, keepdim=True)
    if clip is not None:
        d_score = torch.where((score * factor).abs() <= clip, d_score, 0)
    d_ratio = torch.where(mask, d_score * factor, 0).to(dtype)

    d_policy = d_ref = None
    if policy is not None and ref is not None and kl_coef != 0:
        d = torch.where(mask, policy.to(dtype), 0) - torch.where(mask, ref.to(dtype), 0)
        if estimator == "k1":
            slope = torch.ones_like(d)
        elif estimator == "k2":
            slope = d
        else:
            slope = 1 - torch.where(d.abs() <= reference.KL_BOUND, (-d).exp(), 0)
        d_kl = -kl_coef * grad * slope
        d_policy, d_ref = d_kl.to(policy.dtype), (-d_kl).to(ref.dtype)
    none = (None,) * 9
    return (d_ratio.to(sft.dtype), (-d_ratio).to(base.dtype), *none, d_policy, d_ref, *(None,) * 4)


_log_ratio_reward.register_autograd(_autograd, setup_context=_setup)


@overload
def log_ratio_reward(
    logprobs_sft: Tensor,
    logprobs_base: Tensor,
    mask: Tensor,
    *,
    placement: str = ...,
    normalize: str = ...,
    running_std: float | Tensor | None = ...,
    scale: float = ...,
    clip: float | None = ...,
    truncated: Tensor | None = ...,
    missing_eos_penalty: float | None = ...,
    logprobs_policy: Tensor | None = ...,
    logprobs_ref: Tensor | None = ...,
    kl_coef: float = ...,
    kl_estimator: str = ...,
    parts: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def log_ratio_reward(
    logprobs_sft: Tensor,
    logprobs_base: Tensor,
    mask: Tensor,
    *,
    placement: str = ...,
    normalize: str = ...,
    running_std: float | Tensor | None = ...,
    scale: float = ...,
    clip: float | None = ...,
    truncated: Tensor | None = ...,
    missing_eos_penalty: float | None = ...,
    logprobs_policy: Tensor | None = ...,
    logprobs_ref: Tensor | None = ...,
    kl_coef: float = ...,
    kl_estimator: str = ...,
    parts: Literal[True],
    backend: str = ...,
) -> RewardParts: ...
def log_ratio_reward(
    logprobs_sft: Tensor,
    logprobs_base: Tensor,
    mask: Tensor,
    *,
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
    parts: bool = False,
    backend: str = "auto",
) -> Tensor | RewardParts:
    """The reward `log pi_sft - log pi_base`: summed, normalised, scaled, clipped, penalised, placed, and minus the KL.

    Args:
        logprobs_sft, logprobs_base: `[B, T]`, of the sampled tokens.
        mask: bool `[B, T]`, True on response tokens; may have gaps. What masked places hold, NaN included, is not read.
        placement: `"eos"` gives the row's score at its last valid token, `"token"` gives every token its own ratio.
        normalize: `"none"`; `"length"` divides by the row's valid tokens; `"running"` by `running_std`.
        running_std: the caller's running standard deviation of scores, a positive number or 0-d tensor; a constant.
        scale: factor after normalisation.
        clip: bound on the scaled score (on every scaled ratio under `"token"`), or None.
        truncated: bool `[B]`, rows that ended without EOS.
        missing_eos_penalty: subtracted once from a truncated row, at its last valid token, after the clip.
        logprobs_policy, logprobs_ref: `[B, T]` for the KL penalty; both or neither.
        kl_coef: weight of the KL penalty; 0 for none.
        kl_estimator: `"k1"`, `"k2"` or `"k3"`.
        parts: return what the reward is made of as well, for logs, out of the same pass.
        backend: `"auto"`, `"native"`, `"triton"` or `"reference"`.

    Returns:
        `[B, T]` float32 (float64 for float64 inputs), 0 on masked tokens and in rows without valid ones. Gradients
        reach all four log-probs. With `parts` a `RewardParts`, whose `reward` this is.

    Raises:
        ValueError, TypeError: shapes, dtypes, modes or combinations that do not fit, by the argument's name.

    Source: Self-Rewarding PPO (arXiv 2510.21090); see `reference.py` for the order of operations.
    """
    op = "log_ratio_reward"
    check_backend(op, backend, BACKENDS)
    check_choice(op, "placement", placement, reference.PLACEMENTS)
    check_choice(op, "normalize", normalize, reference.NORMALIZATIONS)
    check_choice(op, "kl_estimator", kl_estimator, reference.KL_ESTIMATORS)
    check_mask(op, mask)
    check_tensor(op, "logprobs_sft", logprobs_sft)
    if logprobs_sft.dim() != 2:
        raise ValueError(f"{op}: logprobs_sft has shape {tuple(logprobs_sft.shape)}; pass [B, T]")
    check_same_shape(
        op,
        "logprobs_sft",
        logprobs_sft,
        optional=("logprobs_policy", "logprobs_ref"),
        logprobs_base=logprobs_base,
        mask=mask,
        logprobs_policy=logprobs_policy,
        logprobs_ref=logprobs_ref,
    )
    if (running_std is not None) != (normalize == "running"):
        raise ValueError(
            f"{op}: running_std goes with normalize='running' and only with it, got normalize={normalize!r}"
        )
    std, std_tensor = None, None
    if isinstance(running_std, Tensor):
        if running_std.numel() != 1:
            raise ValueError(f"{op}: running_std has shape {tuple(running_std.shape)}; pass a number or a 0-d tensor")
        std, std_tensor = number_or_tensor(op, "running_std", running_std, logprobs_sft.device)
        if std_tensor is not None:
            std_tensor = std_tensor.to(compute_dtype(logprobs_sft, logprobs_base, logprobs_policy, logprobs_ref))
    elif running_std is not None:
        check_number(op, "running_std", running_std, lambda x: 0 < x < math.inf, "be positive and finite")
        std = float(running_std)
    check_finite(op, scale=scale, kl_coef=kl_coef)
    if clip is not None:
        check_number(op, "clip", clip, lambda x: x > 0, "be positive; pass None to switch it off")
    if missing_eos_penalty is not None:
        check_finite(op, missing_eos_penalty=missing_eos_penalty)
        if truncated is None:
            raise ValueError(f"{op}: missing_eos_penalty={missing_eos_penalty} needs truncated, a bool tensor [B]")
    if truncated is not None:
        check_tensor(op, "truncated", truncated)
        if truncated.dtype != torch.bool:
            raise TypeError(
                f"{op}: truncated has dtype {truncated.dtype}; pass a bool tensor, True on rows without EOS"
            )
        check_rows(op, "truncated", truncated, logprobs_sft.shape[0], logprobs_sft.device, floating=False)
    if (logprobs_policy is None) != (logprobs_ref is None):
        missing = "logprobs_policy" if logprobs_policy is None else "logprobs_ref"
        raise ValueError(f"{op}: the KL penalty needs logprobs_policy and logprobs_ref; {missing} is missing")
    if kl_coef != 0 and logprobs_policy is None:
        raise ValueError(f"{op}: kl_coef={kl_coef} needs logprobs_policy and logprobs_ref")
    made = torch.ops.srppo.log_ratio_reward(
        logprobs_sft,
        logprobs_base,
        mask,
        placement,
        normalize,
        std,
        std_tensor,
        float(scale),
        clip,
        truncated,
        missing_eos_penalty,
        logprobs_policy,
        logprobs_ref,
        float(kl_coef),
        kl_estimator,
        parts,
        backend,
    )
    return RewardParts(*made) if parts else made[0]
