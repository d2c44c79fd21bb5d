"""Argument checks of the ops in this room: each error names the argument and says what to do."""

import math

import torch
from torch import Tensor

from srppo_kernels._arguments import (
    check_finite,
    check_mask,
    check_number,
    check_tensor,
    refuse_gradient,
    refuse_tangents,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    grad_weight_out: Tensor | None = None,
    hidden_name: str = "hidden",
    weight_name: str = "weight",
    bias_name: str = "bias",
) -> None:
    """Shapes, dtypes, devices and ranges of what makes up the logits.

    Raises:
        NotImplementedError: a tangent, of differentiation in forward mode.
        TypeError: a dtype that does not fit.
        ValueError: a shape, device or number that does not fit.
    """
    refuse_tangents(op, hidden, weight, bias)
    tensors = [(hidden_name, hidden), (weight_name, weight), *([] if bias is None else [(bias_name, bias)])]
    for name, tensor in tensors:
        check_tensor(op, name, tensor)
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{op}: {name} is a DTensor; pass it through srppo_kernels.parallel first: vocab_parallel_head(...) "
                f"if its shards are vocabulary-parallel, full_head(...) if they are FSDP's"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} is laid out as {tensor.layout}; pass {name}.to_dense()")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; pass float32, bfloat16, float16 or float64")
        if tensor.device != hidden.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {hidden_name} on {hidden.device}; move one of them"
            )
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(
            f"{op}: {weight_name} has shape {tuple(weight.shape)}; pass [vocabulary, hidden size], at least 1 wide"
        )
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {hidden_name} has shape {tuple(hidden.shape)} but {weight_name} {tuple(weight.shape)}; "
            f"their last dimensions, the hidden size, must be equal"
        )
    check_tensor(op, "targets", targets)
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: targets has dtype {targets.dtype}; pass int64 or int32 token ids")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"{op}: targets has shape {tuple(targets.shape)} but {hidden_name} {tuple(hidden.shape)}; "
            f"pass one target for every hidden state"
        )
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"{op}: {hidden_name} is {hidden.dtype} and {weight_name} {weight.dtype}; float64 takes both or none"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: {bias_name} has shape {tuple(bias.shape)}; pass one number a vocabulary entry, {weight.shape[0]}"
        )
    _check_like_targets(op, "targets", targets, targets, hidden)
    if mask is not None:
        check_mask(op, mask)
        _check_like_targets(op, "mask", mask, targets, hidden)
    if isinstance(temperature, Tensor):
        _check_like_targets(op, "temperature", temperature, targets, hidden)
        refuse_gradient(op, "temperature", temperature)
    else:
        check_number(op, "temperature", temperature, lambda x: 0 < x < math.inf, "be positive and finite")
    check_finite(op, logit_scale=logit_scale)
    if softcap is not None:
        check_number(op, "softcap", softcap, lambda x: 0 < x < math.inf, "be positive, or None to switch it off")
    if grad_weight_out is not None:
        check_tensor(op, "grad_weight_out", grad_weight_out)
        if grad_weight_out.device != weight.device:
            raise ValueError(
                f"{op}: grad_weight_out is on {grad_weight_out.device} but {weight_name} on {weight.device}; "
                f"move one of them"
            )
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if grad_weight_out.shape != weight.shape or grad_weight_out.dtype != wide:
            raise ValueError(
                f"{op}: grad_weight_out has shape {tuple(grad_weight_out.shape)} and dtype {grad_weight_out.dtype}; "
                f"pass a {wide} buffer of {weight_name}'s shape {tuple(weight.shape)}"
            )
        if not weight.requires_grad:
            raise ValueError(f"{op}: grad_weight_out is given but {weight_name} needs no gradient; drop one of the two")


def _check_like_targets(op: str, name: str, tensor: Tensor, targets: Tensor, hidden: Tensor) -> None:
    if tensor.shape != targets.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)} but targets {tuple(targets.shape)}; give both the same"
        )
    if tensor.device != hidden.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} but the hidden states on {hidden.device}; move one of them"
        )


def cache_does_not_fit(op: str, kept: int, allowed: int) -> ValueError:
    """Of plan cache that was asked for, in bytes."""
    return ValueError(
        f"{op}: plan='cache' keeps {kept} bytes and workspace_bytes allows {allowed}; pass workspace_bytes={kept} or "
        f"more, or plan='recompute'"
    )


def check_targets(op: str, targets: Tensor, live: Tensor, vocab: int | Tensor, shape: torch.Size) -> None:
    """Live targets lie in ``[0, vocab)``: an error that names the first bad one, asynchronous on a GPU.

    Raises:
        ValueError: on a CPU, with the index in the caller's ``shape``.
    """
    bad = live & ((targets < 0) | (targets >= vocab))
    if targets.device.type != "cpu":
        assert_targets(~bad.any())
        return
    if bad.any():
        raise ValueError(
            f"{op}: {_first_of('targets', targets, bad, shape)}, outside the vocabulary [0, {int(vocab)}); "
            f"mask that token, or set it to ignore_index"
        )


def check_temperatures(op: str, temperature: Tensor, live: Tensor, shape: torch.Size) -> None:
    """Live rows' are positive and finite: looked at on a CPU only, as a device would have to be waited for.

    Raises:
        ValueError: with the index in the caller's ``shape``.
    """
    if temperature.device.type != "cpu":
        return
    bad = live & ~((temperature > 0) & (temperature < math.inf))
    if bad.any():
        raise ValueError(f"{op}: {_first_of('temperature', temperature, bad, shape)}; it must be positive and finite")


def _first_of(name: str, values: Tensor, bad: Tensor, shape: torch.Size) -> str:
    """``name[i, j] is x`` for the first place of ``bad``, flat, of a tensor of ``shape``."""
    position = int(bad.nonzero()[0, 0])
    index = [int(i) for i in torch.unravel_index(torch.tensor(position), shape)]
    return f"{name}{index} is {values[position].item()}"


def assert_targets(fit: Tensor) -> None:
    """A device-side assertion, unless ``fit``."""
    torch._assert_async(fit, "srppo::linear_logprob: a live target is outside the vocabulary")
