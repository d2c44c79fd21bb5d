"""Argument checks that the ops share: every error names the argument and says what to do. And arithmetic of theirs."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_choice(op: str, name: str, value: str, known: Sequence[str]) -> None:
    """Refuse an unknown mode and list the known ones."""
    if value not in known:
        listed = ", ".join(repr(choice) for choice in known)
        raise ValueError(f"{op}: {name}={value!r} is unknown; choose one of {listed}")


def check_backend(op: str, backend: str, known: Sequence[str]) -> None:
    check_choice(op, "backend", backend, ("auto", *known))


def check_mask(op: str, mask: Tensor) -> None:
    """A mask is boolean: an integer or float one is usually an attention mask with another meaning, or a weight."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask must be a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}; pass a bool tensor (mask.bool()), True on valid tokens")


def refuse_gradient(op: str, name: str, value: Any) -> None:
    """Refuse a tensor that would get no gradient, silently."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient, which the op does not give; pass {name}.detach()")


def check_number(op: str, name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    """Refuse what is no number, or one that does not fit, as NaN does not; `wanted` says what it "must" be."""
    refuse_gradient(op, name, value)
    try:
        fitting = bool(fits(value))
    except (TypeError, ValueError, RuntimeError):  # the last two of an array and a tensor of several numbers
        raise TypeError(f"{op}: {name}={value!r} must be a number, got {type(value).__name__}") from None
    if not fitting:
        raise ValueError(f"{op}: {name}={value} must {wanted}")


def check_finite(op: str, **numbers: Any) -> None:
    for name, value in numbers.items():
        check_number(op, name, value, lambda x: -math.inf < x < math.inf, "be finite")


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        hint = ": pass its weight" if isinstance(value, torch.nn.Module) else ""
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}{hint}")


def refuse_tangents(op: str, *values: object) -> None:
    """No op here has a derivative in forward mode, and torch takes one that is not there for 0."""
    if forward_ad._current_level >= 0 and any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values
    ):
        raise NotImplementedError(f"{op}: there is no derivative in forward mode (jvp, dual numbers); use reverse mode")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; pass a floating-point tensor")


def check_same_shape(
    op: str, like_name: str, like: Tensor, *, optional: Collection[str] = (), **others: Tensor | None
) -> None:
    """Each tensor of `others` is floating point (masks aside), of `like`'s shape and on its device; those whose names
    are `optional` may be None."""
    check_tensor(op, like_name, like)
    check_floating(op, like_name, like)
    for name, tensor in others.items():
        if tensor is None and name in optional:
            continue
        check_tensor(op, name, tensor)
        assert tensor is not None
        if tensor.shape != like.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)} but {like_name} has {tuple(like.shape)}; "
                f"give both one value a token"
            )
        if tensor.device != like.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {like_name} on {like.device}; move one to the other's device"
            )
        if name != "mask":
            check_floating(op, name, tensor)


def check_rows(op: str, name: str, tensor: Tensor, rows: int, device: torch.device, *, floating: bool = True) -> None:
    """A per-row argument has shape [B] and lies with the others; floating point, unless it is a mask."""
    check_tensor(op, name, tensor)
    if floating:
        check_floating(op, name, tensor)
    if tensor.shape != (rows,):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; pass one value a row, shape ({rows},)")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device} but the other inputs on {device}")


def number_or_tensor(op: str, name: str, scalar: Tensor, device: torch.device) -> tuple[float | None, Tensor | None]:
    """A constant of one element: its value where it lies on the CPU beside inputs on a device, which waits for nothing
    and which a kernel could not read there; else the tensor, 0-d, which must be on the inputs' device."""
    scalar = scalar.detach().reshape(())
    if scalar.device.type == "cpu" and device.type != "cpu":
        return float(scalar), None
    if scalar.device != device:
        raise ValueError(
            f"{op}: {name} is on {scalar.device} but the other inputs on {device}; move it, or pass a number"
        )
    return None, scalar


WITHOUT_FLOAT64 = ("mps",)  # the types of devices that have none


def sum_dtype(device: torch.device) -> torch.dtype:
    """What is added up in: float64, or float32 on a device that has no other."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64, else float32: half precision is read, never computed in."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def bounded(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """``x`` clamped, with gradient 1 from bound to bound, both included, and 0 beyond. At a bound autograd of torch's
    own clamp gives 1 up to torch 2.13, and 0 from 2.14 on."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))
