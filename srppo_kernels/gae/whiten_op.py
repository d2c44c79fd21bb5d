"""`srppo::whiten_moments` and `srppo::whiten_apply`: two ops, so that a process group can merge moments in between.

On a GPU each is one launch. The gradient is plain torch, in a dozen launches: advantages are whitened as constants, and
no trainer here differentiates through it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels._arguments import (
    check_backend,
    check_mask,
    check_same_shape,
    check_tensor,
    compute_dtype,
    sum_dtype,
)
from srppo_kernels._extension import native_input, resolve
from srppo_kernels._library import Op
from srppo_kernels.gae import reference

__all__ = ["whiten"]

BACKENDS = ("native", "triton", "reference")


def _run_whiten_moments(x: Tensor, mask: Tensor, backend: str) -> Tensor:
    chosen = resolve("whiten", backend, x, compute_dtype(x))
    if chosen == "triton":
        from srppo_kernels.gae.triton_whiten import whiten_moments_triton

        return whiten_moments_triton(x, mask)
    if chosen == "native" and x.device.type == "cuda":
        with _triton.on_device(x):
            finished = _triton.finish_counter(x.device)
            return torch.ops.srppo_native.whiten_moments_cuda(native_input(x), native_input(mask), finished)
    if chosen == "native":
        return torch.ops.srppo_native.whiten_moments(native_input(x), native_input(mask))
    return reference.whiten_moments(x, mask)


_whiten_moments = Op("whiten_moments", _run_whiten_moments)


@_whiten_moments.register_fake
def _(x, mask, backend):  # type: ignore[no-untyped-def]
    return x.new_empty((3,), dtype=sum_dtype(x.device))


def _moments_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, _ = inputs
    ctx.save_for_backward(x, mask, output)


def _moments_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # d mean / dx = 1/n and d sum (x - mean)^2 / dx = 2 (x - mean): the mean's own move cancels.
    x, mask, moments = ctx.saved_tensors
    count, mean, _ = moments.unbind()
    centred = torch.where(mask, x.to(moments.dtype) - mean, 0)  # a NaN times 0 would be in the second derivative
    dx = grad[1] / count.clamp(min=1) + grad[2] * 2 * centred
    return torch.where(mask, dx, 0).to(x.dtype), None, None


_whiten_moments.register_autograd(_moments_autograd, setup_context=_moments_setup)


def _run_whiten_apply(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, backend: str) -> Tensor:
    chosen = resolve("whiten", backend, x, compute_dtype(x))
    if chosen == "triton":
        from srppo_kernels.gae.triton_whiten import whiten_apply_triton

        return whiten_apply_triton(x, mask, moments, shift_mean, reference.WHITEN_EPS)
    if chosen == "native":
        inputs = native_input(x), native_input(mask), moments.contiguous()
        return torch.ops.srppo_native.whiten_apply(*inputs, shift_mean, reference.WHITEN_EPS)
    return reference.whiten_apply(x, mask, moments, shift_mean).contiguous()  # as the fake says


_whiten_apply = Op("whiten_apply", _run_whiten_apply)


@_whiten_apply.register_fake
def _(x, mask, moments, shift_mean, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=compute_dtype(x))


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mask, moments, shift_mean, _ = inputs
    ctx.save_for_backward(x, mask, moments)
    ctx.shift_mean = shift_mean


def _apply_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, mask, moments = ctx.saved_tensors
    count, mean, squares = moments.unbind()
    freedom = (count - 1).clamp(min=1)
    scale = (squares / freedom + reference.WHITEN_EPS).rsqrt()
    grad = torch.where(mask, grad.to(moments.dtype), 0)
    centred = torch.where(mask, x.to(moments.dtype) - mean, 0)
    total = grad.sum()
    d_mean = (0 if ctx.shift_mean else total) - total * scale
    d_squares = (grad * centred).sum() * (-0.5) * scale**3 / freedom
    d_moments = torch.stack((torch.zeros_like(d_squares), d_mean, d_squares))
    return (grad * scale).to(x.dtype), None, d_moments, None, None


_whiten_apply.register_autograd(_apply_autograd, setup_context=_apply_setup)


def _merge_over_group(moments: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Chan's merge of every rank's (count, mean, squares), in rank order: all ranks get the same bits."""
    gathered = [torch.empty_like(moments) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, moments.contiguous(), group=group)
    counts, means, squares = torch.stack(gathered).unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return torch.stack((count, mean, (squares + counts * (means - mean) ** 2).sum()))


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    moments: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scale valid tokens to mean 0 and (unbiased) variance 1: `(x - mean) / sqrt(var + 1e-8)`; masked places become 0.

    Args:
        x: any shape and float dtype; computed from float64 moments, returned in float32 (float64 stays float64).
            The moments, too, are float32 on Apple's GPUs, which have no float64.
        mask: bool, same shape, True on valid tokens. What masked places hold, NaN included, is not read.
        shift_mean: False adds the mean back, which only rescales around it (used for rewards).
        moments: float64 `[3]`, count, mean and sum of squared deviations of x over its valid tokens, where the caller
            has them already (`gae(..., moments=True)`): one pass less. They carry no gradient: detach x first.
        group: a process group over whose ranks mean and variance are taken; None means this process alone.
            Collective: all ranks call it. It has no gradient: detach x first.
        backend: `"auto"`, `"native"`, `"triton"` or `"reference"`.

    Returns:
        `x.shape`. With a single valid token it is 0 (its value with `shift_mean=False`), without any there is nothing
        to scale.

    Raises:
        ValueError, TypeError: shapes, dtypes or combinations that do not fit, by the argument's name.

    Source: `masked_whiten` as in verl and in TRL's former PPO, from moments that are merged exactly over the group.
    """
    check_backend("whiten", backend, BACKENDS)
    check_mask("whiten", mask)
    check_same_shape("whiten", "x", x, mask=mask)
    if x.requires_grad and torch.is_grad_enabled():
        if group is not None:
            raise ValueError("whiten: x requires grad but whitening over a process group has none; pass x.detach()")
        if moments is not None:
            raise ValueError("whiten: x requires grad but the moments that are given carry none; pass x.detach()")
    if moments is not None:
        check_tensor("whiten", "moments", moments)
    if moments is None:
        moments = torch.ops.srppo.whiten_moments(x, mask, backend)
    elif moments.shape != (3,) or moments.dtype != sum_dtype(x.device) or moments.device != x.device:
        raise ValueError(
            f"whiten: moments has shape {tuple(moments.shape)}, dtype {moments.dtype} on {moments.device}; pass what "
            f"gae(..., moments=True) returns: {sum_dtype(x.device)} [3] on x's device"
        )
    if group is not None:
        moments = _merge_over_group(moments, group)
    return torch.ops.srppo.whiten_apply(x, mask, moments, shift_mean, backend)
