"""`srppo::log_ratio_reward`: schema, fake, autograd and the choice of backend. `reference.py` has the maths."""

from typing import Any

import torch
from torch import Tensor

from srppo_kernels._arguments import (
    check_backend,
    check_choice,
    check_mask,
    check_rows,
    check_same_shape,
    compute_dtype,
)
from srppo_kernels._extension import native_input, resolve
from srppo_kernels._library import Op
from srppo_kernels.log_ratio import reference

__all__ = ["log_ratio_reward"]

BACKENDS = ("native", "reference")


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
    backend: str,
) -> Tensor:
    tokens = (logprobs_sft, logprobs_base, logprobs_policy, logprobs_ref)
    if resolve("log_ratio_reward", backend, logprobs_sft, compute_dtype(*tokens)) == "native":
        return torch.ops.srppo_native.log_ratio_reward(
            native_input(logprobs_sft),
            native_input(logprobs_base),
            native_input(mask),
            placement == "token",
            normalize == "length",
            1.0 if std is None else std,
            None if std_tensor is None else native_input(std_tensor),
            scale,
            clip,
            None if truncated is None else native_input(truncated),
            0.0 if missing_eos_penalty is None else missing_eos_penalty,
            None if logprobs_policy is None else native_input(logprobs_policy),
            None if logprobs_ref is None else native_input(logprobs_ref),
            kl_coef,
            reference.KL_ESTIMATORS.index(kl_estimator) + 1,
        )
    return reference.log_ratio_reward_reference(
        logprobs_sft,
        logprobs_base,
        mask,
        placement,
        normalize,
        std if std_tensor is None else std_tensor,
        scale,
        clip,
        truncated,
        missing_eos_penalty,
        logprobs_policy,
        logprobs_ref,
        kl_coef,
        kl_estimator,
    )


_log_ratio_reward = Op("log_ratio_reward", _run_log_ratio_reward)


@_log_ratio_reward.register_fake
def _(  # type: ignore[no-untyped-def]
    logprobs_sft, logprobs_base, mask, placement, normalize, std, std_tensor, scale, clip, truncated,
    missing_eos_penalty, logprobs_policy, logprobs_ref, kl_coef, kl_estimator, backend,
):  # fmt: skip
    dtype = compute_dtype(logprobs_sft, logprobs_base, logprobs_policy, logprobs_ref)
    return logprobs_sft.new_empty(logprobs_sft.shape, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sft, base, mask, placement, normalize, std, std_tensor, scale, clip, _, _, policy, ref, kl_coef, estimator, _ = (
        inputs
    )
    ctx.save_for_backward(sft, base, mask, std_tensor, policy, ref)
    ctx.options = (placement, normalize, std, scale, clip, kl_coef, estimator)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
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
    score = ratio if placement == "token" else ratio.sum(-1, keepdim=True, dtype=torch.float64).to(dtype)
    d_score = grad if placement == "token" else torch.where(reference.last_valid(mask), grad, 0).sum(-1, keepdim=True)
    if clip is not None:
        d_score = torch.where((score * factor).abs() <= clip, d_score, 0)
    d_ratio = torch.where(mask, d_score * factor, 0).to(dtype)

    d_policy = d_ref = None
    if policy is not None and ref is not None:
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
    return (d_ratio.to(sft.dtype), (-d_ratio).to(base.dtype), *none, d_policy, d_ref, None, None, None)


_log_ratio_reward.register_autograd(_autograd, setup_context=_setup)


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
    backend: str = "auto",
) -> Tensor:
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
        backend: `"auto"`, `"native"` or `"reference"`.

    Returns:
        `[B, T]` float32 (float64 for float64 inputs), 0 on masked tokens and in rows without valid ones. Gradients
        reach all four log-probs.

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
    if logprobs_sft.dim() != 2:
        raise ValueError(f"{op}: logprobs_sft has shape {tuple(logprobs_sft.shape)}; pass [B, T]")
    check_same_shape(
        op,
        "logprobs_sft",
        logprobs_sft,
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
        std_tensor = running_std.detach().reshape(())
    elif running_std is not None:
        if not running_std > 0:
            raise ValueError(f"{op}: running_std={running_std} must be positive")
        std = float(running_std)
    if clip is not None and not clip > 0:
        raise ValueError(f"{op}: clip={clip} must be positive; pass None to switch it off")
    if missing_eos_penalty is not None and truncated is None:
        raise ValueError(f"{op}: missing_eos_penalty={missing_eos_penalty} needs truncated, a bool tensor [B]")
    if truncated is not None:
        if truncated.dtype != torch.bool:
            raise TypeError(
                f"{op}: truncated has dtype {truncated.dtype}; pass a bool tensor, True on rows without EOS"
            )
        check_rows(op, "truncated", truncated, logprobs_sft.shape[0], logprobs_sft.device)
    if (logprobs_policy is None) != (logprobs_ref is None):
        missing = "logprobs_policy" if logprobs_policy is None else "logprobs_ref"
        raise ValueError(f"{op}: the KL penalty needs logprobs_policy and logprobs_ref; {missing} is missing")
    if kl_coef != 0 and logprobs_policy is None:
        raise ValueError(f"{op}: kl_coef={kl_coef} needs logprobs_policy and logprobs_ref")
    return torch.ops.srppo.log_ratio_reward(
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
        backend,
    )
