"""A case becomes rows: every provider is checked against fp64 first, then all that passed are timed in turns, on two or
three visits."""

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
from bench.method import FEW, VERY_LONG, Clock, Effort, Samples, Spread, clock_for, extra_memory, interleave
from bench.record import Row

Notify = Callable[[str], None]


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
    warm: bool = False  # whether its memory is that of a call after the first


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


@dataclass(slots=True)
class Visited:
    """A case with its rows, one per entry, and the samples of every visit to it."""

    op: Op
    case: Case
    work: Sequence[Entry]
    rows: list[Row]
    samples: list[list[Samples]]  # of each entry, a Samples per visit
    memory: list[list[float]]  # of each entry, the extra MiB of a call at every visit

    @property
    def cost(self) -> float:
        """Milliseconds that one more round takes."""
        return sum(row.median_ms for row in self.rows if row.status == "ok")

    def remember(self, at: int, extra_mib: float) -> None:
        """One more measurement of an entry's memory, into its row."""
        if math.isnan(extra_mib):
            return
        self.memory[at].append(extra_mib)
        known, row = self.memory[at], self.rows[at]
        row.extra_mib, row.extra_low, row.extra_high = Spread.of(known).median, min(known), max(known)


def run_case(
    op: Op,
    case: Case,
    work: Sequence[Entry],
    effort: Effort,
    deadline: Deadline,
    notify: Notify = lambda text: None,
) -> Visited:
    """The first visit to a case: every entry is checked, and timed where it passed."""
    visited = Visited(op, case, work, [], [[] for _ in work], [[] for _ in work])
    if deadline.passed:
        reason = f"the run's {deadline.seconds:g} s were over; run it with --op {op.name} --budget 0"
        visited.rows = [finished(blank(op, case, entry), "skipped", reason) for entry in work]
        return visited
    forget_compiled()
    try:
        problem = op.make(case)
    except (RuntimeError, MemoryError) as error:  # not enough memory for the inputs, say
        visited.rows = [finished(blank(op, case, entry), "failed", f"inputs: {first_line(error)}") for entry in work]
        return visited
    checked = []
    for entry in work:
        notify(f"{op.name} {case}: checking {entry.provider.name}")
        checked.append(check(op, problem, entry, deadline))
    visited.rows = [result.row for result in checked]
    for at, result in enumerate(checked):
        if result.warm:
            visited.remember(at, result.row.extra_mib)
    timed = [(at, entry) for at, entry in enumerate(checked) if entry.call is not None]
    if timed:
        notify(f"{op.name} {case}: timing {len(timed)} providers in turns")
        try:
            measure(problem, visited, timed, effort, clock_for(case.device), deadline)
        except RuntimeError as error:
            for _, passed in timed:
                finished(passed.row, "failed", f"while timing: {first_line(error)}")
    del checked, timed, problem
    free(case)
    return visited


def visit_again(visited: Visited, effort: Effort, deadline: Deadline, notify: Notify = lambda text: None) -> None:
    """A later visit: what passed is timed on inputs made anew. What goes wrong now leaves the rows as they are."""
    op, case = visited.op, visited.case
    again = [at for at, row in enumerate(visited.rows) if row.status == "ok" and visited.samples[at]]
    if not again or deadline.passed:
        return
    notify(f"{op.name} {case}: timing {len(again)} providers again")
    forget_compiled()
    problem, timed = op.make(case), []
    for at in again:
        entry = visited.work[at]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = entry.provider.prepare(problem, entry.plan)
                if entry.provider.name.endswith("compile"):
                    call()  # compiles anew, as everything that was compiled is forgotten
                start = time.perf_counter()
                _, extra = extra_memory(call, case.device, empty=is_ours(op, entry.provider))
                timed.append((at, Checked(visited.rows[at], call, time.perf_counter() - start)))
                visited.remember(at, extra)
        except Exception as error:
            notify(f"{op.name} {case}: {entry.provider.name} failed the second time: {first_line(error)}")
        if deadline.passed:
            break
    if timed:
        measure(problem, visited, timed, effort, clock_for(case.device), deadline)
    del timed, problem
    free(case)


def forget_compiled() -> None:
    """torch.compile gives up on a function after eight shapes, silently: every case starts anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def free(case: Case) -> None:
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()


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
            result, row.extra_mib = extra_memory(call, case.device, empty=is_ours(op, provider))
            seconds = time.perf_counter() - start
            warm = seconds < VERY_LONG or provider.name.endswith("compile")
            if warm:
                # The first call also compiles, loads libraries and fills their caches: that is not the call's memory.
                # That of a very long one is taken at the next visit.
                del result
                start = time.perf_counter()
                result, row.extra_mib = extra_memory(call, case.device, empty=is_ours(op, provider))
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
    return Checked(row, call, seconds, warm)


def is_ours(op: Op, provider: Provider) -> bool:
    """Whether it is this library, in whatever form."""
    return provider.name.startswith(op.ours)


def is_wrong(errors: Errors, gross: float) -> bool:
    """Not finite, or off by more than any rounding explains."""
    return not errors.value <= gross or math.isinf(errors.grad) or math.isinf(errors.weight_grad)


def measure(
    problem: Problem,
    visited: Visited,
    timed: Sequence[tuple[int, Checked]],
    effort: Effort,
    clock: Clock,
    deadline: Deadline,
) -> None:
    """Times the entries in turns with the floor and fills in their rows, from this visit and those before."""
    floor = problem.floor()
    calls = [entry.call for _, entry in timed if entry.call is not None]
    known = [entry.seconds for _, entry in timed]
    bare, samples = interleave(floor.call, calls, effort, clock, known, lambda: deadline.passed)
    for (at, entry), own in zip(timed, samples, strict=True):
        visits = visited.samples[at]
        visits.append(own)
        fill(entry.row, problem, visits)
        entry.row.floor, entry.row.floor_ms = floor.name, Spread.of(bare.seconds).median * 1e3


def fill(row: Row, problem: Problem, visits: Sequence[Samples]) -> None:
    times, ratios = Spread.over([v.seconds for v in visits]), Spread.over([v.ratios for v in visits])
    row.median_ms, row.p20_ms, row.p80_ms = times.median * 1e3, times.p20 * 1e3, times.p80 * 1e3
    row.ratio, row.ratio_p20, row.ratio_p80, row.noisy = ratios.median, ratios.p20, ratios.p80, ratios.noisy
    row.cold_ms = Spread.over([v.cold for v in visits]).median * 1e3
    row.cold_ratio = Spread.over([v.cold_ratios for v in visits]).median
    row.samples = sum(len(v.seconds) for v in visits)
    row.visits = len(visits)
    row.noisy |= row.samples < FEW
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
