"""From names on the command line to cases; a name that does not exist is an error that lists those that do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from bench.core import DTYPES, HEADS, NO_PLAN, PLANS, ROWS, Case, Op, SelectionError

DENSITIES = (1.0, 0.5, 0.2)


@dataclass(frozen=True, slots=True)
class Selection:
    """What was asked for; an empty tuple means the default."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    densities: tuple[float, ...] = ()
    rows: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    device: str = "auto"
    quick: bool = False

    @property
    def is_default(self) -> bool:
        """Whether the cases are the default set, which has a time budget."""
        return not (self.shapes or self.dtypes or self.densities or self.rows)


def known(what: str, asked: Iterable[str], names: Sequence[str]) -> None:
    """Refuses a name that does not exist.

    Raises:
        SelectionError: it lists the names that do.
    """
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise SelectionError(f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(names)}")


def device_of(name: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes a GPU where there is one."""
    known("device", [name], ("auto", "cpu", "cuda"))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SelectionError("device 'cuda' is not there: torch sees no CUDA device; known here: auto, cpu")
    return name


def parse_shape(text: str) -> tuple[int, ...]:
    """``1024x2048x128256``, or ``1024xllama3.2-1b`` with a head's name for the last two numbers.

    Raises:
        SelectionError: neither.
    """
    numbers: list[int] = []
    # A head's name may hold an x itself, so it is looked for first.
    for name, head in HEADS.items():
        if text.endswith("x" + name):
            text, numbers = text[: -len(name) - 1], list(head)
    try:
        shape = (*(int(part) for part in text.lower().split("x")), *numbers)
    except ValueError:
        raise SelectionError(
            f"{text!r} is no shape; write 1024x576x49152, 64x4096, or 1024x<head> with a head of: {', '.join(HEADS)}"
        ) from None
    if any(number < 1 for number in shape):
        raise SelectionError(f"{text!r} is no shape: sizes are at least 1")
    return shape


def choose(selection: Selection, ops: Sequence[Op]) -> list[tuple[Op, list[Case]]]:
    """The ops with their cases.

    Raises:
        SelectionError: an unknown name, or a combination that leaves nothing to run.
    """
    known("op", selection.ops, [op.name for op in ops])
    known("dtype", selection.dtypes, tuple(DTYPES))
    known("rows", selection.rows, ROWS)
    known("plan", selection.plans, PLANS)
    chosen = [op for op in ops if not selection.ops or op.name in selection.ops]
    if selection.shapes and not selection.ops:
        # N x D x V is no B x P x T, though both are three numbers: a shape goes to the ops that were there first.
        kinds = {len(op.shape_names): op.shape_names for op in reversed(ops)}
        chosen = [op for op in chosen if op.shape_names == kinds[len(op.shape_names)]]
    names = list(dict.fromkeys(provider.name for op in chosen for provider in op.providers))
    known("provider", selection.providers, names)
    for density in selection.densities:
        if not 0 < density <= 1:
            raise SelectionError(f"a mask density is in (0, 1], got {density:g}; the usual ones: {DENSITIES}")
    shapes = [parse_shape(text) for text in selection.shapes]
    for text, shape in zip(selection.shapes, shapes, strict=True):
        if all(len(shape) != len(op.shape_names) for op in chosen):
            wanted = sorted({f"{'x'.join(op.shape_names)} ({op.name})" for op in chosen})
            raise SelectionError(f"shape {text!r} fits none of the ops chosen; they take {', '.join(wanted)}")
    device = device_of(selection.device)
    result = [(op, cases_of(op, selection, shapes, device)) for op in chosen]
    result = [(op, cases) for op, cases in result if cases]
    if selection.providers:
        result = [(op, cases) for op, cases in result if any(p.name in selection.providers for p in op.providers)]
    if selection.plans:
        result = [(op, cases) for op, cases in result if takes_plan(op, selection.plans)]
    if not result:
        raise SelectionError("nothing to run: no op has all that was asked for; --list shows what each one takes")
    return result


def takes_plan(op: Op, plans: Sequence[str]) -> bool:
    """Whether one of the op's providers can be told one of these plans."""
    offered = {plan for provider in op.providers for plan in provider.plans + provider.other_plans}
    return bool((offered - {NO_PLAN}) & set(plans))


def cases_of(op: Op, selection: Selection, shapes: Sequence[tuple[int, ...]], device: str) -> list[Case]:
    """The op's default cases with what was asked for put in their place, each once."""
    defaults = list(op.defaults(device))
    if selection.quick:
        defaults = defaults[:1]
    if not selection.is_default:
        # A chosen value of one axis goes with the first default of the others, not with each of their variants.
        defaults = widen(op, defaults, selection, shapes)
    return list(dict.fromkeys(defaults))


def widen(op: Op, defaults: list[Case], selection: Selection, shapes: Sequence[tuple[int, ...]]) -> list[Case]:
    fitting = [shape for shape in shapes if len(shape) == len(op.shape_names)]
    dtypes = [name for name in selection.dtypes if name in op.dtypes]
    rows = [name for name in selection.rows if name in op.rows]
    if (shapes and not fitting) or (selection.dtypes and not dtypes) or (selection.rows and not rows):
        return []
    first = defaults[0]
    return [
        replace(first, shape=shape, dtype=dtype, mask_density=density, rows=kind)
        for shape in fitting or list(dict.fromkeys(case.shape for case in defaults))
        for dtype in dtypes or [first.dtype]
        for density in selection.densities or [first.mask_density]
        for kind in rows or [first.rows]
    ]
