"""A case becomes rows: every provider is checked against fp64 first, then all that passed are timed in turns."""

from __future__ import annotations

import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench.core import NO_PLAN, Call, Case, Errors, Op, Problem, Provider, Unavailable
from bench.method import Clock, Effort, Samples, Spread, clock_for, extra_memory, interleave
from bench.record import Row

Notify = Callable[[str], None]
SLOW = 4.0  # seconds of a first call beyond which its memory is taken as it is, instead of from a second one


@dataclass(frozen=True, slots=True)
class Entry:
    """A provider with a plan, to run on a case."""

    provider: Provider
    plan: str


@dataclass(slots=True)
class Checked:
    """What is known about an entry before it is timed."""

    row: Row
    call: Call | None = None
    seconds: float = 0.0  # of the last call made while checking


class Deadline:
    """The time that a run may take. What comes after it becomes rows that say so."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.end


def entries(op: Op, case: Case, providers: Sequence[str], plans: Sequence[str]) -> Iterator[Entry]:
    """What to run on a case: the default providers and plans, or those that were asked for."""
    for provider in op.providers:
        asked = provider.name in providers
        if not (asked if providers else provider.default) or not (asked or provider.applies(case)):
            continue
        known = provider.plans + provider.other_plans
        if plans and known != (NO_PLAN,):
            yield from (Entry(provider, plan) for plan in known if plan in plans)
        else:
            yield from (Entry(provider, plan) for plan in provider.plans)


def run_case(
    op: Op,
    case: Case,
    work: Sequence[Entry],
    effort: Effort,
    deadline: Deadline,
    notify: Notify = lambda text: None,
) -> list[Row]:
    """Rows of one case, one per entry."""
    if deadline.passed:
        reason = f"the run's {deadline.seconds:g} s were over; run it with --op {op.name} --budget 0"
        return [finished(blank(op, case, entry), "skipped", reason) for entry in work]
    if "torch._dynamo" in sys.modules:
        # torch.compile gives up on a function after eight shapes, silently: every case starts anew.
        torch.compiler.reset()
    try:
        problem = op.make(case)
    except (RuntimeError, MemoryError) as error:  # not enough memory for the inputs, say
        return [finished(blank(op, case, entry), "failed", f"inputs: {first_line(error)}") for entry in work]
    checked = []
    for entry in work:
        notify(f"{op.name} {case}: checking {entry.provider.name}")
        checked.append(check(op, problem, entry, deadline))
    timed = [entry for entry in checked if entry.call is not None]
    if timed:
        notify(f"{op.name} {case}: timing {len(timed)} providers in turns")
        try:
            measure(problem, timed, effort, clock_for(case.device), deadline)
        except RuntimeError as error:
            for passed in timed:
                finished(passed.row, "failed", f"while timing: {first_line(error)}")
    rows = [result.row for result in checked]
    del checked, timed, problem
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def check(op: Op, problem: Problem, entry: Entry, deadline: Deadline) -> Checked:
    """Runs an entry once and compares it with fp64; a failure of any kind becomes its row's reason."""
    case, provider = problem.case, entry.provider
    row = blank(op, case, entry)
    if deadline.passed:
        return Checked(finished(row, "skipped", f"the run's {deadline.seconds:g} s were over"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peers' deprecations; a provider that misbehaves shows in its error
            call = provider.prepare(problem, entry.plan)
            start = time.perf_counter()
            result, row.extra_mib = extra_memory(call, case.device)
            seconds = time.perf_counter() - start
            if seconds < SLOW or provider.name.endswith("compile"):
                # The first call also compiles, loads libraries and fills their caches: that is not the call's memory.
                del result
                start = time.perf_counter()
                result, row.extra_mib = extra_memory(call, case.device)
                seconds = time.perf_counter() - start
            errors = problem.errors(result)
            del result
    except Unavailable as reason:
        return Checked(finished(row, "unavailable", str(reason)))
    except Exception as error:  # another library's failure is a finding about it, not ours to stop for
        return Checked(finished(row, "failed", f"{type(error).__name__}: {first_line(error)}"))
    row.max_error, row.grad_error, row.weight_grad_error = errors.value, errors.grad, errors.weight_grad
    if is_wrong(errors, op.gross_error):
        return Checked(finished(row, "wrong", f"its {op.error_of} is {errors.value:.2g} against fp64; not timed"))
    row.resolved = provider.resolve(problem, entry.plan)
    if math.isinf(deadline.seconds):
        row.detail = provider.detail(problem, entry.plan)
    return Checked(row, call, seconds)


def is_wrong(errors: Errors, gross: float) -> bool:
    """Not finite, or off by more than any rounding explains."""
    return not errors.value <= gross or math.isinf(errors.grad) or math.isinf(errors.weight_grad)


def measure(problem: Problem, checked: Sequence[Checked], effort: Effort, clock: Clock, deadline: Deadline) -> None:
    """Times the entries in turns with the floor and fills in their rows."""
    floor = problem.floor()
    calls = [entry.call for entry in checked if entry.call is not None]
    bare, samples = interleave(
        floor.call, calls, effort, clock, [entry.seconds for entry in checked], lambda: deadline.passed
    )
    floor_ms = Spread.of(bare.seconds).median * 1e3
    for entry, own in zip(checked, samples, strict=True):
        fill(entry.row, problem, own)
        entry.row.noisy |= len(own.seconds) < effort.least  # cut short: too few to know its spread
        entry.row.floor, entry.row.floor_ms = floor.name, floor_ms


def fill(row: Row, problem: Problem, samples: Samples) -> None:
    times, ratios = Spread.of(samples.seconds), Spread.of(samples.ratios)
    row.median_ms, row.p20_ms, row.p80_ms = times.median * 1e3, times.p20 * 1e3, times.p80 * 1e3
    row.ratio, row.ratio_p20, row.ratio_p80, row.noisy = ratios.median, ratios.p20, ratios.p80, ratios.noisy
    row.cold_ms = Spread.of(samples.cold).median * 1e3
    row.cold_ratio = Spread.of(samples.cold_ratios).median
    row.samples = len(samples.seconds)
    if problem.useful_flops:
        row.useful_tflops = problem.useful_flops / times.median / 1e12
    if problem.useful_bytes:
        row.useful_gbs = problem.useful_bytes / times.median / 1e9


def blank(op: Op, case: Case, entry: Entry) -> Row:
    return Row(
        op=op.name,
        provider=entry.provider.name,
        plan=entry.plan,
        shape=case.shape_text,
        dtype=case.dtype,
        mask_density=case.mask_density,
        rows=case.rows,
        device=case.device,
        error_of=op.error_of,
    )


def finished(row: Row, status: str, reason: str) -> Row:
    row.status, row.reason = status, reason
    return row


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
