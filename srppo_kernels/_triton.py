"""The Triton backends: whether they can run here, why not, how a kernel is launched, and what a kernel must compile as.

A Triton kernel lives in its op's room in a module `triton_*.py`, which alone imports triton and is itself imported only
where such a kernel runs: `import srppo_kernels` costs no triton. Every such module is listed in `KERNEL_MODULES` and
has a function `compile_cases()`, so that `bench/compile.py` can compile each kernel as it is used in production, on a
machine without a GPU.

Kernels run on a CUDA device, or, for tests, in Triton's interpreter on CPU tensors: with `TRITON_INTERPRET=1` set
before triton is first imported, as triton reads it when it decorates a function. "auto" never takes the interpreter.
The interpreter computes `tl.dot` of bf16 operands wrongly (Triton 3.6 to 3.7): cast them to fp32 first under it.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "KERNEL_MODULES",
    "CompileCase",
    "available",
    "compile_cases",
    "finish_counter",
    "interpreted",
    "obstacle",
    "on_device",
    "require",
    "why",
]

KERNEL_MODULES: tuple[str, ...] = (
    "srppo_kernels.gae.triton_scan",
    "srppo_kernels.gae.triton_adjoint",
    "srppo_kernels.gae.triton_whiten",
    "srppo_kernels.linear_logprob.triton_dz",
    "srppo_kernels.linear_logprob.triton_passes",
    "srppo_kernels.linear_logprob.triton_products",
    "srppo_kernels.linear_logprob.triton_reference",
    "srppo_kernels.linear_logprob.triton_scan",
    "srppo_kernels.log_ratio.triton_reward",
    "srppo_kernels.ppo_loss.triton_losses",
)
ARCHITECTURES = (80, 90, 100)
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One kernel in one production configuration, for `bench/compile.py`."""

    name: str  # "kernel: configuration", as the table prints it
    kernel: Any  # the function that triton.jit made
    signature: Mapping[
        str, str
    ]  # argument -> Triton type ("*bf16", "i64", "fp32", "tensordesc<...>"), constexprs left out
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    gemm: bool = False  # whether it must use the architecture's tensor-core instruction
    architectures: tuple[int, ...] = ARCHITECTURES
    # Arguments that a launch finds divisible by 16; every pointer is taken to be one that is aligned to 16 bytes.
    multiples_of_16: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # further launch options, such as maxnreg


def compile_cases(modules: tuple[str, ...] = KERNEL_MODULES) -> Iterator[tuple[str, int, CompileCase]]:
    """`(module, place in it, case)` of all kernels; imports triton."""
    for module in modules:
        yield from ((module, at, case) for at, case in enumerate(importlib.import_module(module).compile_cases()))


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Whether kernels are interpreted on the CPU; imports triton only if the variable asks for that."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on") or not _installed():
        return False
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.sum, InterpretedFunction)  # not if it was imported before the variable was set


@cache
def _device_obstacle(index: int) -> str:
    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < LEAST_CAPABILITY:
        return f"the device has compute capability {major}.{minor} and the kernels need 8.0"
    return ""


def obstacle(device: torch.device, explicit: bool = True) -> str:
    """Why no Triton kernel can run on tensors of `device`, in a clause; "" where one can.

    Args:
        device: of the inputs.
        explicit: False for backend "auto", which never takes the interpreter.
    """
    if not _installed():
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        return _device_obstacle(torch.cuda.current_device() if device.index is None else device.index)
    if device.type != "cpu":
        return f"Triton has no kernels for device {device.type!r}"
    if explicit and interpreted():
        return ""
    return "Triton kernels need a CUDA device; on CPU tensors only TRITON_INTERPRET=1, set before the start, runs them"


def available() -> bool:
    """Whether Triton kernels can run on this machine's GPU, or are interpreted."""
    return not why().startswith("off")


def why() -> str:
    """One line for `srppo env`: `on` or `off`, and the reason."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = obstacle(device)
    if not reason:
        return "on: interpreted on the CPU, for tests" if device.type == "cpu" else "on"
    return f"off: {reason if device.type == 'cuda' or not _installed() else 'no CUDA device'}"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch inside this: Triton takes the *current* device and its current stream, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def require(op: str, device: torch.device) -> None:
    """Refuse `backend="triton"` in words where it cannot run.

    Raises:
        ValueError: with the obstacle and what to pass instead.
    """
    reason = obstacle(device)
    if reason:
        raise ValueError(f"{op}: backend='triton' cannot run: {reason}; pass backend='auto'")


_counters: dict[tuple[int, int], Tensor] = {}


def finish_counter(device: torch.device) -> Tensor:
    """An int32 that is 0 whenever a kernel starts, for `_triton_language.arrived_last`; call it on the current device.

    One a stream, as launches of a stream follow each other and each leaves 0 behind: no launch just to clear it. While
    a CUDA graph is captured it is a fresh one, cleared by the graph itself: replays may overlap with anything.
    """
    zero = partial(torch.zeros, 1, dtype=torch.int32, device=device)
    key = (-1, 0)  # the interpreter's
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return zero()
        stream = torch.cuda.current_stream(device)
        key, zero = (stream.device_index, stream.cuda_stream), partial(_apart, stream, zero)
    if key not in _counters:
        _counters[key] = zero()
    return _counters[key]


def _apart(stream: torch.cuda.Stream, make: Callable[[], Tensor]) -> Tensor:
    """A tensor that stays, made on `stream` by a thread of its own.

    Before torch.compile's "reduce-overhead" captures a graph it runs the call once, with all that this thread allocates
    in the graph's memory, and refuses what stays there and is no output.
    """

    def on_stream() -> Tensor:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_stream).result()
