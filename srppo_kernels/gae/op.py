"""`srppo::gae`: schema, fake, autograd and the choice of backend. `reference.py` has the maths."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels._arguments import (
    check_backend,
    check_choice,
    check_mask,
    check_number,
    check_rows,
    check_same_shape,
    check_tensor,
    compute_dtype,
    sum_dtype,
)
from srppo_kernels._extension import native_input, resolve
from srppo_kernels._library import Op
from srppo_kernels.gae import reference

__all__ = ["gae"]

MASK_MODES = ("carry", "zero")
BACKENDS = ("native", "triton", "reference")


def _as_rows(tensors: tuple[Tensor, ...], cu_seqlens: Tensor) -> tuple[list[Tensor], Tensor]:
    """Packed tensors as padded ones, and the places that hold a token."""
    padded = [reference.pad_packed(tensor, cu_seqlens) for tensor in tensors]
    return [rows for rows, _ in padded], padded[0][1]


def _check_starts(cu_seqlens: Tensor | None, total: int) -> None:
    """Their values: with a message on the CPU; by an assertion on a device, which is not waited for."""
    if cu_seqlens is None:
        return
    if cu_seqlens.numel() < 2 and total:
        raise ValueError(
            f"gae: cu_seqlens has {cu_seqlens.numel()} entries; it needs the start of each sequence and the end of the "
            f"last, {total}"
        )
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(_starts_fit(cu_seqlens, total), "srppo::gae: cu_seqlens is not 0 <= ... <= total")
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
        raise ValueError(
            f"gae: cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}; "
            f"it must start at 0 and end at the number of packed tokens, {total}"
        )
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"gae: cu_seqlens decreases after position {int((cu_seqlens.diff() < 0).nonzero()[0])}")


def _starts_fit(cu_seqlens: Tensor, total: int) -> Tensor:
    """0-d bool: from 0 to ``total``, and never down."""
    if cu_seqlens.numel() < 2:
        return torch.ones((), dtype=torch.bool, device=cu_seqlens.device)  # no sequence: nothing is read
    return (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all()


def _moments_of(advantages: Tensor, mask: Tensor, backend: str) -> Tensor:
    if backend == "native":
        return torch.ops.srppo_native.whiten_moments(advantages, native_input(mask))
    return reference.whiten_moments(advantages, mask)


def _run_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    gamma_rows: Tensor | None,
    lam_rows: Tensor | None,
    bootstrap: Tensor | None,
    mask_mode: str,
    cu_seqlens: Tensor | None,
    moments: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_starts(cu_seqlens, rewards.shape[0])
    dtype = compute_dtype(rewards, values)
    chosen = resolve("gae", backend, rewards, dtype)
    if chosen == "triton":
        from srppo_kernels.gae.triton_scan import gae_triton

        carry = mask_mode == "carry"
        options = (gamma, lam, gamma_rows, lam_rows, bootstrap, carry, cu_seqlens, moments)
        return gae_triton(rewards, values, mask, *options)
    nothing = torch.empty(0, dtype=sum_dtype(rewards.device), device=rewards.device)
    if chosen == "native":
        rows = [None if row is None else native_input(row) for row in (gamma_rows, lam_rows, bootstrap)]
        starts = None if cu_seqlens is None else cu_seqlens.long().contiguous()
        tokens = native_input(rewards), native_input(values), native_input(mask)
        if rewards.device.type == "cuda":  # the moments come out of the same launch
            with _triton.on_device(rewards):
                finished = _triton.finish_counter(rewards.device) if moments else None
                return torch.ops.srppo_native.gae_cuda(
                    *tokens, gamma, lam, *rows, mask_mode == "carry", starts, finished
                )
        made = torch.ops.srppo_native.gae(*tokens, gamma, lam, *rows, mask_mode == "carry", starts)
        return (*made, _moments_of(made[0], mask, "native") if moments else nothing)
    g = gamma if gamma_rows is None else gamma_rows
    la = lam if lam_rows is None else lam_rows
    if cu_seqlens is None:
        advantages, returns = reference.gae_reference(rewards, values, mask, g, la, bootstrap, mask_mode)
        return advantages, returns, _moments_of(advantages, mask, "reference") if moments else nothing
    (padded_rewards, padded_values, padded_mask), inside = _as_rows((rewards, values, mask), cu_seqlens)
    advantages, returns = reference.gae_reference(
        padded_rewards, padded_values, padded_mask, g, la, bootstrap, mask_mode
    )
    advantages, returns = advantages[inside], returns[inside]
    return advantages, returns, _moments_of(advantages, mask, "reference") if moments else nothing


_gae = Op("gae", _run_gae)


@_gae.register_fake
def _(rewards, values, mask, gamma, lam, gamma_rows, lam_rows, bootstrap, mask_mode, cu_seqlens, moments, backend):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(rewards, values)
    advantages, returns = (rewards.new_empty(rewards.shape, dtype=dtype) for _ in range(2))
    return advantages, returns, rewards.new_empty(3 if moments else 0, dtype=sum_dtype(rewards.device))


def _run_gae_backward(
    grad_advantages: Tensor | None,
    grad_returns: Tensor | None,
    mask: Tensor,
    gamma: float,
    lam: float,
    gamma_rows: Tensor | None,
    lam_rows: Tensor | None,
    mask_mode: str,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(grad_advantages, grad_returns)
    chosen = resolve("gae", backend, mask, dtype)
    carry = mask_mode == "carry"
    if chosen == "triton":
        from srppo_kernels.gae.triton_adjoint import gae_backward_triton

        options = (gamma, lam, gamma_rows, lam_rows, carry, cu_seqlens)
        return gae_backward_triton(grad_advantages, grad_returns, mask, *options)
    da, dr = (
        torch.zeros(mask.shape, dtype=dtype, device=mask.device) if x is None else x
        for x in (grad_advantages, grad_returns)
    )
    if chosen == "native":
        rows = [None if row is None else native_input(row) for row in (gamma_rows, lam_rows)]
        starts = None if cu_seqlens is None else cu_seqlens.long().contiguous()
        tokens = [native_input(x) for x in (da, dr, mask)]
        return torch.ops.srppo_native.gae_backward(*tokens, gamma, lam, *rows, carry, starts)
    g = gamma if gamma_rows is None else gamma_rows
    la = lam if lam_rows is None else lam_rows
    if cu_seqlens is None:
        return reference.gae_backward_reference(da, dr, mask, g, la, mask_mode)
    (da, dr, padded_mask), inside = _as_rows((da, dr, mask), cu_seqlens)
    d_rewards, d_values, d_bootstrap = reference.gae_backward_reference(da, dr, padded_mask, g, la, mask_mode)
    return d_rewards[inside], d_values[inside], d_bootstrap


_gae_backward = Op("gae_backward", _run_gae_backward)


@_gae_backward.register_fake
def _(grad_advantages, grad_returns, mask, gamma, lam, gamma_rows, lam_rows, mask_mode, cu_seqlens, backend):  # type: ignore[no-untyped-def]
    rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = compute_dtype(grad_advantages, grad_returns)
    return tuple(mask.new_empty(shape, dtype=dtype) for shape in (mask.shape, mask.shape, (rows,)))


_gae_backward.differentiate_no_further("gae")


def _gae_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    rewards, values, mask, gamma, lam, gamma_rows, lam_rows, bootstrap, mask_mode, cu_seqlens, _, backend = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # advantages alone, as a rule, have a gradient
    ctx.save_for_backward(mask, gamma_rows, lam_rows, cu_seqlens)
    ctx.options = (gamma, lam, mask_mode, backend)
    ctx.dtypes = (rewards.dtype, values.dtype, None if bootstrap is None else bootstrap.dtype)


def _gae_autograd(ctx: Any, grad_advantages: Tensor | None, grad_returns: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_advantages is None and grad_returns is None:
        return (None,) * 12
    mask, gamma_rows, lam_rows, cu_seqlens = ctx.saved_tensors
    gamma, lam, mask_mode, backend = ctx.options
    d_rewards, d_values, d_bootstrap = torch.ops.srppo.gae_backward(
        grad_advantages, grad_returns, mask, gamma, lam, gamma_rows, lam_rows, mask_mode, cu_seqlens, backend
    )
    rewards_dtype, values_dtype, bootstrap_dtype = ctx.dtypes
    bootstrap_grad = None if bootstrap_dtype is None else d_bootstrap.to(bootstrap_dtype)
    return (d_rewards.to(rewards_dtype), d_values.to(values_dtype), *(None,) * 5, bootstrap_grad, *(None,) * 4)


_gae.register_autograd(_gae_autograd, setup_context=_gae_setup)


@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = ...,
    lam: float | Tensor = ...,
    bootstrap: Tensor | None = ...,
    mask_mode: str = ...,
    cu_seqlens: Tensor | None = ...,
    moments: Literal[False] = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = ...,
    lam: float | Tensor = ...,
    bootstrap: Tensor | None = ...,
    mask_mode: str = ...,
    cu_seqlens: Tensor | None = ...,
    moments: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Tensor | None = None,
    moments: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Generalized advantage estimation: `A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1}`, returns `A + V`.

    Args:
        rewards, values: `[B, T]`, or packed `[total]` with `cu_seqlens`. Any float dtype; computed in float32
            (float64 stays float64). `values[t]` is the critic's value of the state in which token t is chosen.
        mask: bool, same shape, True on valid tokens; may have gaps. What masked places hold, NaN included, is not read.
        gamma, lam: discount and GAE's lambda: a float in [0, 1], or a tensor `[B]` with one value a row (not
            differentiated, and its values not looked at).
        bootstrap: `[B]`, the value after each row's last valid token (for truncated rows); None means 0.
        mask_mode: `"carry"` skips masked tokens (verl, AReaL), `"zero"` treats gaps as steps of value and reward 0
            (OpenRLHF); `reference.py` writes both down.
        cu_seqlens: `[B + 1]` int32 or int64, starts of the packed sequences: `0 = cu[0] <= ... <= cu[B] = total`.
        moments: return the advantages' moments as well, out of the same launch, for `whiten(advantages, mask,
            moments=moments)`.
        backend: `"auto"`, `"native"`, `"triton"` or `"reference"`.

    Returns:
        `(advantages, returns)`, the inputs' shape, both 0 on masked tokens. Gradients reach rewards, values, bootstrap.
        With `moments` a third: float64 `[3]`, count, mean and sum of squared deviations over valid tokens; no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or modes that do not fit, by the argument's name; starts that do not, on a
            GPU by a device-side assertion.

    Source: Schulman et al. 2016 (arXiv 1506.02438), equations 11 to 16.
    """
    check_backend("gae", backend, BACKENDS)
    check_choice("gae", "mask_mode", mask_mode, MASK_MODES)
    check_mask("gae", mask)
    check_same_shape("gae", "rewards", rewards, values=values, mask=mask)
    if cu_seqlens is None:
        if rewards.dim() != 2:
            raise ValueError(
                f"gae: rewards has shape {tuple(rewards.shape)}; pass [B, T], or packed [total] with cu_seqlens"
            )
        rows = rewards.shape[0]
    else:
        if rewards.dim() != 1:
            raise ValueError(f"gae: rewards has shape {tuple(rewards.shape)}; with cu_seqlens pass packed [total]")
        check_tensor("gae", "cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"gae: cu_seqlens has shape {tuple(cu_seqlens.shape)}, dtype {cu_seqlens.dtype}; "
                f"pass int32 or int64 starts of shape [B + 1]"
            )
        if cu_seqlens.device != rewards.device:
            raise ValueError(f"gae: cu_seqlens is on {cu_seqlens.device} but rewards on {rewards.device}")
        rows = cu_seqlens.shape[0] - 1
    if bootstrap is not None:
        check_rows("gae", "bootstrap", bootstrap, rows, rewards.device)
    gamma_rows = lam_rows = None
    if isinstance(gamma, Tensor):
        check_rows("gae", "gamma", gamma, rows, rewards.device)
        gamma_rows = gamma.detach()
    else:
        check_number("gae", "gamma", gamma, lambda x: 0 <= x <= 1, "lie in [0, 1]")
    if isinstance(lam, Tensor):
        check_rows("gae", "lam", lam, rows, rewards.device)
        lam_rows = lam.detach()
    else:
        check_number("gae", "lam", lam, lambda x: 0 <= x <= 1, "lie in [0, 1]")
    made = torch.ops.srppo.gae(
        rewards,
        values,
        mask,
        0.0 if isinstance(gamma, Tensor) else float(gamma),
        0.0 if isinstance(lam, Tensor) else float(lam),
        gamma_rows,
        lam_rows,
        bootstrap,
        mask_mode,
        cu_seqlens,
        moments,
        backend,
    )
    return made if moments else made[:2]
