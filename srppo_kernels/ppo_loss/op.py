"""`srppo::ppo_loss` and `srppo::value_loss`: schema, fake, autograd and the choice of backend.

Each forward returns the loss, its gradient and all statistics from one pass; backward only scales the saved gradient.

On a GPU a divisor that is a count of the mask is known at the end of that pass. The gradient then comes undivided, with
the `weight` that it is still to be multiplied by; the backward does so, in the launch that multiplies by the upstream
gradient. Elsewhere the weight is empty: it is in the gradient already.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels._arguments import (
    check_backend,
    check_choice,
    check_finite,
    check_mask,
    check_number,
    check_same_shape,
    compute_dtype,
    number_or_tensor,
)
from srppo_kernels._extension import native_input, resolve
from srppo_kernels._library import Op, differentiable_once
from srppo_kernels.ppo_loss import reference
from srppo_kernels.ppo_loss.stats import PPOStats, ValueStats

__all__ = ["PPOTerms", "ppo_loss", "ppo_terms", "value_loss"]

BACKENDS = ("native", "triton", "reference")


def _waits(
    chosen: str, device: torch.device, reduction: str, divisor: float | None, divisor_tensor: Tensor | None
) -> bool:
    """Whether gradients come undivided, with a weight: a GPU's kernel knows the count at its end."""
    counted = reduction in ("token_mean", "sequence_mean") and divisor is None and divisor_tensor is None
    return counted and (chosen == "triton" or (chosen == "native" and device.type == "cuda"))


def _run_ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    reduction: str,
    divisor: float | None,
    divisor_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (logprobs, old_logprobs, advantages, entropy)
    chosen = resolve("ppo_loss", backend, logprobs, compute_dtype(*inputs))
    if chosen == "triton":
        from srppo_kernels.ppo_loss.triton_losses import ppo_loss_triton

        options = (clip_low, clip_high, dual_clip, entropy_coef, reduction, divisor, divisor_tensor)
        return ppo_loss_triton(logprobs, old_logprobs, advantages, mask, entropy, *options)
    applied = logprobs.new_empty(0, dtype=torch.float32)
    if chosen == "native":
        tokens = [None if x is None else native_input(x) for x in (logprobs, old_logprobs, advantages, mask, entropy)]
        total = None if divisor_tensor is None else native_input(divisor_tensor)
        bounds = (clip_low, clip_high, dual_clip, entropy_coef, reference.REDUCTIONS.index(reduction), divisor, total)
        if logprobs.device.type == "cuda":
            with _triton.on_device(logprobs):
                finished = _triton.finish_counter(logprobs.device)
                return torch.ops.srppo_native.ppo_loss_cuda(*tokens, *bounds, finished)
        return (*torch.ops.srppo_native.ppo_loss(*tokens, *bounds), applied)
    weights = reference.weights_for(inputs, mask, reduction, divisor, divisor_tensor)
    loss, d_logprobs, d_entropy, stats = reference.ppo_loss_reference(
        logprobs, old_logprobs, advantages, mask, entropy, clip_low, clip_high, dual_clip, entropy_coef, weights
    )  # fmt: skip
    return loss, d_logprobs.contiguous(), d_entropy.contiguous(), stats, applied  # as the fake says


_ppo_loss = Op("ppo_loss", _run_ppo_loss)


@_ppo_loss.register_fake
def _(logprobs, old_logprobs, advantages, mask, entropy, *options):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(logprobs, old_logprobs, advantages, entropy)
    *_, reduction, divisor, divisor_tensor, backend = options
    chosen = resolve("ppo_loss", backend, logprobs, dtype)
    waits = _waits(chosen, logprobs.device, reduction, divisor, divisor_tensor)
    return (
        logprobs.new_empty((), dtype=dtype),
        logprobs.new_empty(logprobs.shape, dtype=dtype),
        logprobs.new_empty((0,) if entropy is None else logprobs.shape, dtype=dtype),
        logprobs.new_empty((len(reference.POLICY_STATS),), dtype=torch.float32),
        logprobs.new_empty(() if waits else (0,), dtype=torch.float32),
    )


def _run_scaled_gradients(
    upstream: Tensor, weight: Tensor, first: Tensor, second: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = resolve("scaled_gradients", backend, first, compute_dtype(first))
    if chosen == "triton":
        from srppo_kernels.ppo_loss.triton_losses import scale_triton

        return scale_triton(upstream, weight, first, second)
    if chosen == "native" and first.device.type == "cuda":
        return torch.ops.srppo_native.scaled_gradients_cuda(native_input(upstream), weight, first, second)
    by = upstream * weight if weight.numel() else upstream
    return by * first, by * second


_scaled_gradients = Op("scaled_gradients", _run_scaled_gradients)


@_scaled_gradients.register_fake
def _(upstream, weight, first, second, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(first), torch.empty_like(second)


def _scaled(grad: Tensor, weight: Tensor, first: Tensor, second: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """One launch on a GPU; on a CPU, where a product costs less than an op, two products."""
    if weight.numel() or backend == "triton" or first.device.type == "cuda":
        return torch.ops.srppo.scaled_gradients(grad, weight, first, second, backend)
    return grad * first, grad * second if second.numel() else second


def _ppo_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, d_logprobs, d_entropy, _, weight = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_logprobs, d_entropy, weight)
    ctx.dtypes = (inputs[0].dtype, None if inputs[4] is None else inputs[4].dtype)
    ctx.backend = inputs[-1]


@differentiable_once
def _ppo_autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 13
    d_logprobs, d_entropy, weight = ctx.saved_tensors
    logprobs_dtype, entropy_dtype = ctx.dtypes
    for_logprobs, for_entropy = _scaled(grad, weight, d_logprobs, d_entropy, ctx.backend)
    entropy_grad = None if entropy_dtype is None else for_entropy.to(entropy_dtype)
    return (for_logprobs.to(logprobs_dtype), None, None, None, entropy_grad, *(None,) * 8)


_ppo_loss.register_autograd(_ppo_autograd, setup_context=_ppo_setup)


def _run_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    divisor: float | None,
    divisor_tensor: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = resolve("value_loss", backend, values, compute_dtype(values, old_values, returns))
    if chosen == "triton":
        from srppo_kernels.ppo_loss.triton_losses import value_loss_triton

        return value_loss_triton(values, old_values, returns, mask, clip, divisor, divisor_tensor)
    applied = values.new_empty(0, dtype=torch.float32)
    if chosen == "native":
        tokens = [native_input(x) for x in (values, old_values, returns, mask)]
        total = None if divisor_tensor is None else native_input(divisor_tensor)
        if values.device.type == "cuda":
            with _triton.on_device(values):
                finished = _triton.finish_counter(values.device)
                return torch.ops.srppo_native.value_loss_cuda(*tokens, clip, divisor, total, finished)
        return (*torch.ops.srppo_native.value_loss(*tokens, clip, divisor, total), applied)
    weights = reference.weights_for((values, old_values, returns), mask, "token_mean", divisor, divisor_tensor)
    loss, d_values, stats = reference.value_loss_reference(values, old_values, returns, mask, clip, weights)
    return loss, d_values.contiguous(), stats, applied


_value_loss = Op("value_loss", _run_value_loss)


@_value_loss.register_fake
def _(values, old_values, returns, mask, clip, divisor, divisor_tensor, backend):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(values, old_values, returns)
    chosen = resolve("value_loss", backend, values, dtype)
    waits = _waits(chosen, values.device, "token_mean", divisor, divisor_tensor)
    return (
        values.new_empty((), dtype=dtype),
        values.new_empty(values.shape, dtype=dtype),
        values.new_empty((len(reference.VALUE_STATS),), dtype=torch.float32),
        values.new_empty(() if waits else (0,), dtype=torch.float32),
    )


def _value_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[3])
    ctx.dtype, ctx.backend = inputs[0].dtype, inputs[-1]


@differentiable_once
def _value_autograd(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    d_values, weight = ctx.saved_tensors
    for_values = _scaled(grad, weight, d_values, d_values.new_empty(0), ctx.backend)[0]
    return (for_values.to(ctx.dtype), *(None,) * 7)


_value_loss.register_autograd(_value_autograd, setup_context=_value_setup)


def check_normalizer(op: str, normalizer: float | Tensor, *, zero: bool = False) -> None:
    """A divisor that makes sense, for every op that takes one; `zero`: so does 0, of a batch without tokens."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"{op}: normalizer has shape {tuple(normalizer.shape)}; pass a number or a 0-d tensor")
        return
    wanted = "be positive; it is what the sum is divided by"
    check_number(op, "normalizer", normalizer, lambda x: x > 0 or (zero and x == 0), wanted)


def _split_normalizer(
    op: str, normalizer: float | Tensor | None, device: torch.device
) -> tuple[float | None, Tensor | None]:
    if normalizer is None:
        return None, None
    check_normalizer(op, normalizer)
    if isinstance(normalizer, Tensor):
        number, divisor = number_or_tensor(op, "normalizer", normalizer, device)
        if divisor is None:
            return number or 1.0, None  # a count of 0 counts as 1
        return None, divisor if divisor.is_floating_point() else divisor.float()  # a count of tokens is whole
    return float(normalizer), None


def check_clips(op: str, clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    """Bounds of the ratio that make sense, for every op that takes them."""
    check_number(op, "clip_low", clip_low, lambda x: 0 <= x <= 1, "lie in [0, 1]: ratios are kept above 1 - clip_low")
    check_number(op, "clip_high", clip_high, lambda x: x >= 0, "not be negative: ratios are kept below 1 + clip_high")
    if dual_clip is not None:
        check_number(op, "dual_clip", dual_clip, lambda x: x > 1, "be above 1, or None to switch it off")


def _check_policy(
    op: str,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    backend: str,
) -> None:
    check_backend(op, backend, BACKENDS)
    check_mask(op, mask)
    check_same_shape(
        op, "logprobs", logprobs, optional=("entropy",), old_logprobs=old_logprobs, advantages=advantages, mask=mask,
        entropy=entropy,
    )  # fmt: skip
    if logprobs.dim() == 0:
        raise ValueError(f"{op}: logprobs is 0-d; pass [B, T] or [N]")
    check_clips(op, clip_low, clip_high, dual_clip)
    check_finite(op, entropy_coef=entropy_coef)
    if entropy is None and entropy_coef != 0:
        raise ValueError(f"{op}: entropy_coef={entropy_coef} needs entropy; pass the per-token entropy")


class PPOTerms(NamedTuple):
    """What a fused caller needs of some tokens: the *sum* of their losses, its gradients and its statistics."""

    loss: Tensor  # 0-d, sum over valid tokens, no divisor
    d_logprobs: Tensor  # dloss/dlogprob, the input's shape, 0 where masked or clipped
    d_entropy: Tensor | None  # dloss/dentropy, likewise; None where no entropy was given
    stats: PPOStats  # join those of several calls with PPOStats.merge


def ppo_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    entropy: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    backend: str = "auto",
) -> PPOTerms:
    """`ppo_loss` with reduction "sum", its per-token gradient handed out instead of kept for autograd.

    For losses that are computed chunk by chunk (`linear_ppo_loss`). Arguments and errors as in `ppo_loss`; nothing of
    what it returns carries an autograd graph.
    """
    _check_policy(
        "ppo_terms",
        logprobs,
        old_logprobs,
        advantages,
        mask,
        entropy,
        clip_low,
        clip_high,
        dual_clip,
        entropy_coef,
        backend,
    )
    with torch.no_grad():
        loss, d_logprobs, d_entropy, vector, _ = torch.ops.srppo.ppo_loss(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            entropy,
            clip_low,
            clip_high,
            dual_clip,
            entropy_coef,
            "sum",
            None,
            None,
            backend,
        )
    given = entropy is not None
    return PPOTerms(loss, d_logprobs, d_entropy if given else None, PPOStats.from_vector(vector, given))


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    entropy: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, PPOStats]:
    """The clipped policy loss `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) - entropy_coef H` and statistics.

    Args:
        logprobs: `[B, T]` (the last dimension is time; `[N]` is one sequence) of the policy being trained.
        old_logprobs, advantages: same shape, constants: they get no gradient.
        mask: bool, same shape, True on valid tokens. What masked places hold, NaN included, is not read.
        entropy: same shape, per-token entropy in nats; gets gradient `-entropy_coef`.
        clip_low, clip_high: the ratio is kept in `[1 - clip_low, 1 + clip_high]`.
        dual_clip: bound above 1 on the ratio of tokens with negative advantage, or None.
        entropy_coef: weight of the entropy bonus.
        reduction: `"token_mean"`, `"sequence_mean"`, `"sum"` or `"constant_length"` (divides by B T).
        normalizer: replaces the reduction's divisor: a number or a 0-d tensor, which the caller took over the global
            batch.
        backend: `"auto"`, `"native"`, `"triton"` or `"reference"`.

    Returns:
        `(loss, PPOStats)`; the loss is a float32 0-d tensor (float64 for float64 inputs), differentiable once.
        Log-ratios are clamped to [-20, 20], with gradient 0 outside.

    Raises:
        ValueError, TypeError: shapes, dtypes, modes or coefficients that do not fit, by the argument's name.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; see `reference.py`.
    """
    _check_policy(
        "ppo_loss",
        logprobs,
        old_logprobs,
        advantages,
        mask,
        entropy,
        clip_low,
        clip_high,
        dual_clip,
        entropy_coef,
        backend,
    )
    check_choice("ppo_loss", "reduction", reduction, reference.REDUCTIONS)
    if reduction == "sequence_mean" and logprobs.dim() < 2:
        raise ValueError("ppo_loss: reduction='sequence_mean' needs [B, T]; a packed [N] has no rows")
    divisor, divisor_tensor = _split_normalizer("ppo_loss", normalizer, logprobs.device)
    loss, _, _, vector, _ = torch.ops.srppo.ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        entropy,
        clip_low,
        clip_high,
        dual_clip,
        entropy_coef,
        reduction,
        divisor,
        divisor_tensor,
        backend,
    )
    return loss, PPOStats.from_vector(vector, entropy is not None)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ValueStats]:
    """The clipped critic loss `0.5 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)`, mean over valid tokens.

    Args:
        values: `[B, T]` or `[N]`, of the critic being trained.
        old_values, returns: same shape, constants: they get no gradient.
        mask: bool, same shape, True on valid tokens. What masked places hold, NaN included, is not read.
        clip: half-width of the range around `old_values`; None switches clipping off.
        normalizer: replaces the number of valid tokens as divisor, as in `ppo_loss`.
        backend: `"auto"`, `"native"`, `"triton"` or `"reference"`.

    Returns:
        `(loss, ValueStats)`; the loss is a float32 0-d tensor (float64 for float64 inputs), differentiable once.

    Raises:
        ValueError, TypeError: shapes, dtypes or coefficients that do not fit, by the argument's name.

    Source: the value clipping of PPO's reference implementation, with its factor of 0.5; see `reference.py`.
    """
    check_backend("value_loss", backend, BACKENDS)
    check_mask("value_loss", mask)
    check_same_shape("value_loss", "values", values, old_values=old_values, returns=returns, mask=mask)
    if values.dim() == 0:
        raise ValueError("value_loss: values is 0-d; pass [B, T] or [N]")
    if clip is not None:
        check_number("value_loss", "clip", clip, lambda x: x >= 0, "not be negative; pass None to switch clipping off")
    divisor, divisor_tensor = _split_normalizer("value_loss", normalizer, values.device)
    loss, _, vector, _ = torch.ops.srppo.value_loss(
        values, old_values, returns, mask, clip, divisor, divisor_tensor, backend
    )
    return loss, ValueStats.from_vector(vector)
