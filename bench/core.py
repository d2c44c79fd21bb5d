"""What a benchmark is made of: an op poses problems, providers solve them, a problem knows its floor and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Result = dict[str, Tensor]
Call = Callable[[], Result]

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
ROWS = ("random", "peaked")
PLANS = ("auto", "score", "precompute", "cache", "recompute")
NO_PLAN = "-"

# Real language-model heads, hidden size and vocabulary, from the models' published configurations.
HEADS = {
    "smollm2-135m": (576, 49152),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "qwen3-0.6b": (1024, 151936),
    "qwen3-8b": (4096, 151936),
    "qwen3-32b": (5120, 151936),
    "llama3.2-1b": (2048, 128256),
    "llama3-8b": (4096, 128256),
    "gemma2-2b": (2304, 256000),
}


class Unavailable(Exception):
    """This provider cannot run here; the text says why, and becomes its row."""


class SelectionError(Exception):
    """The command line names something that does not exist; the text lists what does."""


@dataclass(frozen=True, slots=True)
class Case:
    """One problem: two cases that are equal have the same inputs."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    mask_density: float = 1.0
    rows: str = "random"
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        mask = "" if self.mask_density == 1 else f", {self.mask_density:g} of the tokens live"
        rows = "" if self.rows == "random" else f", {self.rows} rows"
        return f"{self.shape_text} {self.dtype}{mask}{rows}"


@dataclass(frozen=True, slots=True)
class Errors:
    """Against fp64. ``value`` is in the op's own unit; gradients are relative; NaN where nothing is compared."""

    value: float
    grad: float = math.nan  # worst row of dhidden, or of the input that the loss is differentiated in
    weight_grad: float = math.nan  # dweight, in the Frobenius norm


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that the hardware must do for the problem, as a call to time."""

    name: str
    call: Callable[[], Any]


class Problem(Protocol):
    """Inputs with what is known about them."""

    @property
    def case(self) -> Case: ...

    @property
    def useful_flops(self) -> float:
        """Floating-point operations that no exact algorithm saves; recomputation earns nothing. 0 where bytes count."""
        ...

    @property
    def useful_bytes(self) -> float:
        """Bytes that must be read and written once. 0 where operations count."""
        ...

    def floor(self) -> Floor: ...

    def errors(self, result: Result) -> Errors: ...


@dataclass(frozen=True, slots=True)
class Provider:
    """An implementation under test.

    ``prepare(problem, plan)`` does everything that a trainer does once, and returns the call to time; it raises
    :class:`Unavailable` with the reason where it cannot.
    """

    name: str
    note: str
    prepare: Callable[[Any, str], Call]
    plans: tuple[str, ...] = (NO_PLAN,)  # run by default
    other_plans: tuple[str, ...] = ()  # run on request
    default: bool = True
    applies: Callable[[Case], bool] = lambda case: True
    resolve: Callable[[Any, str], str] = lambda problem, plan: ""  # what "auto" came to
    detail: Callable[[Any, str], str] = lambda problem, plan: ""  # a finding that takes time: not on a time budget


@dataclass(frozen=True, slots=True)
class Op:
    """An operation with its problems and providers."""

    name: str
    title: str
    shape_names: tuple[str, ...]
    error_of: str  # what Errors.value measures, with its unit
    make: Callable[[Case], Problem]
    providers: tuple[Provider, ...]
    defaults: Callable[[str], Sequence[Case]]  # device -> cases, the most telling first
    gross_error: float = math.inf  # a value error above it is a wrong result, not an inexact one: it is not timed
    dtypes: tuple[str, ...] = tuple(DTYPES)
    rows: tuple[str, ...] = ("random",)
    ours: str = "srppo"  # whose time the others' are set against in the table

    def provider(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)


def live_bytes(result: Result) -> int:
    """Bytes of the results, each storage once: what a call hands out is not its workspace."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in result.values()}
    return sum(storages.values())


def copy_floor(n_bytes: float, device: str) -> Floor:
    """A copy that reads and writes ``n_bytes`` in all: the floor of an op that touches each byte once."""
    numbers = max(1, int(n_bytes) // 8)
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    return Floor("copy of its bytes", lambda: target.copy_(source))


def relative(value: Tensor, exact: Tensor) -> float:
    """``|value - exact| / |exact|`` in the Frobenius norm, in fp64; absolute where the exact result is 0."""
    exact = exact.double()
    norm = exact.norm().item()
    difference = (value.double() - exact).norm().item()
    return difference / norm if norm > 0 else difference
