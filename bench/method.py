"""How a call is timed and its memory measured.

*Turns.* Machines drift: a neighbour, a clock that drops, a page cache. So a round times the floor once and then every
provider once, in an order that rotates; what is reported is the median over rounds of a provider's time divided by the
floor's in the same round, with p20 and p80 of the same quotients as the row's own noise.

*Power.* At its power limit a GPU runs a call at the clock that the calls before it have left: on an H100 at 700 W one
GEMM took 12.9 ms after calls that draw less, and 13.9 to 14.3 ms after itself. So on a GPU a round times the floor for
every provider, right before it and after a floor that nobody times: both parts of a quotient follow a floor.

*Visits.* What differs from run to run (where the inputs lie in memory, what the neighbour does for a minute) is the
same for all rounds of one sitting, which therefore understate the noise. So a run comes to every case twice, and a
third time where its budget allows, the shortest calls first, with everything else in between and inputs made anew; a
row's interval spans those of all visits. Of calls that take long a visit times one: visits tell more than rounds do.

*Short calls.* A sample repeats a call until it lasts ``MIN_SAMPLE``, so that the clock's grain does not show; on a GPU
no more often than its host is done with in time.

*GPU.* CUDA events around the repeats, warm L2; and single calls after a write of twice the L2 size, cold L2. A trainer
calls these ops between transformer layers, so cold is what it sees; warm is what most benchmarks print. The device is
given something to wait for first, so that it never waits for the host within a turn: what is timed is its work, as
where a trainer's host runs ahead. A call that waits for the device itself is timed with its waiting.

*Memory.* Peak during one call beyond what was held before it and beyond what it returns, once a visit. On a GPU the
allocator knows; on Linux the kernel keeps a resettable peak of the resident set, which also counts what C++ allocates.
glibc would blur it: how large a freed buffer it keeps depends on what was freed before, so that one call had a peak of
48 or 97 MiB by chance. During the measured call it gives every large buffer back at once (:func:`exact_heap`).
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import srppo_kernels
from bench.core import Call, Result, live_bytes

MIN_SAMPLE = 2e-3  # seconds
LONG = 0.05  # seconds of a call that is not run again to be sized
VERY_LONG = 0.3  # seconds of a call that a visit times once
LEAD = 0.05  # seconds that a device waits at most for its host to get ahead
MARGIN = 1.5  # by which a host may be slower than the last time
CYCLES = 2e9  # of a GPU in a second, about
FEW = 3  # samples, below which a row does not know its spread
NOISE_LIMIT = 0.10  # a row whose p80 is further than this above its p20 is marked noisy


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median with p20 and p80."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(quantile(values, 0.5), quantile(values, 0.2), quantile(values, 0.8))

    @classmethod
    def over(cls, visits: Sequence[Sequence[float]]) -> Spread:
        """The median of all samples, and an interval that spans every visit's own."""
        spreads = [cls.of(values) for values in visits if values]
        if not spreads:
            return cls.of(())
        pooled = [value for values in visits for value in values]
        return cls(quantile(pooled, 0.5), min(s.p20 for s in spreads), max(s.p80 for s in spreads))

    @property
    def noisy(self) -> bool:
        return not self.p80 <= self.p20 * (1 + NOISE_LIMIT)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a visit measures: each provider until it has ``samples``, or ``least`` and ``seconds`` of its own, in
    which a floor of its own counts."""

    seconds: float = 0.25
    least: int = 2
    samples: int = 15


Work = tuple[Callable[[], Any], int]  # a call, and how often it is repeated


class CpuClock:
    """Wall time."""

    paired = False  # whether each call has a floor of its own, right before it

    def repeats(self, call: Callable[[], Any]) -> int:
        (once,) = self.turn([(call, 1)])
        return max(1, math.ceil(MIN_SAMPLE / max(once, 1e-7)))

    def turn(self, work: Sequence[Work], cold: bool = False) -> list[float]:
        """Seconds of a call of each. Cold is not measured: a CPU's caches hold less than one weight tile of the heads
        here, so every call is cold."""
        seconds = [math.nan] * len(work)
        for i, (call, repeats) in enumerate([] if cold else work):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds[i] = (time.perf_counter() - start) / repeats
        return seconds


class CudaClock:
    """Time on the device between two events."""

    paired = True

    def __init__(self) -> None:
        size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(max(size, 1 << 26), dtype=torch.int8, device="cuda")
        self.host: dict[Callable[[], Any], float] = {}  # seconds in which the host last made a call

    def repeats(self, call: Callable[[], Any]) -> int:
        self.turn([(call, 1)])  # from which the next one knows how far the host has to get ahead
        (first,) = self.turn([(call, 1)])
        in_time = LEAD / (2 * MARGIN) / max(self.host[call], 1e-6)  # the other half is the floors'
        return max(1, math.floor(min(math.ceil(MIN_SAMPLE / max(first, 1e-6)), in_time)))

    def turn(self, work: Sequence[Work], cold: bool = False) -> list[float]:
        """Seconds of a call of each, repeated as often as it says, one after the other on the device."""
        lead = MARGIN * sum(self.host.get(call, 0.0) * repeats for call, repeats in work)
        torch.cuda._sleep(int(min(lead, LEAD) * CYCLES))
        marks = []
        for call, repeats in work:
            if cold:
                self.flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            self.host[call] = (time.perf_counter() - began) / repeats
            end.record()
            marks.append((start, end, repeats))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / repeats for start, end, repeats in marks]


Clock = CpuClock | CudaClock


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


@dataclass(slots=True)
class Samples:
    """Times of one participant, and its quotients with the floor of the same round, or of its own where clocks pair."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    cold_ratios: list[float] = field(default_factory=list)
    spent: float = 0.0

    def add(self, seconds: float, cold: float) -> None:
        self.seconds.append(seconds)
        self.cold.append(cold)

    def done(self, effort: Effort, late: bool = False) -> bool:
        count = len(self.seconds)
        if late or (count and self.seconds[0] > VERY_LONG):
            return count >= 1
        return count >= effort.samples or (count >= effort.least and self.spent >= effort.seconds)


def interleave(
    floor: Callable[[], Any],
    calls: Sequence[Callable[[], Any]],
    effort: Effort,
    clock: Clock,
    known: Sequence[float] = (),
    late: Callable[[], bool] = lambda: False,
) -> tuple[Samples, list[Samples]]:
    """Times all calls in turns, see above. Returns the floor's samples and each call's.

    Args:
        late: whether the run's time is over: then each call gets one sample, and those that have one get no more.
            So do very long calls.
        known: seconds that each call took before, which was its warm-up; a long one is not run again to be sized.
    """
    floor()
    floor_repeats = clock.repeats(floor)
    known = known or [0.0] * len(calls)
    repeats = [1 if seconds > LONG else clock.repeats(call) for call, seconds in zip(calls, known, strict=True)]
    floor_samples, results = Samples(), [Samples() for _ in calls]
    turn = 0

    while not all(samples.done(effort, late()) for samples in results):
        if not clock.paired:
            (beside,) = clock.turn([(floor, floor_repeats)])
            floor_samples.add(beside, math.nan)
        for step in range(len(calls)):
            index = (turn + step) % len(calls)
            samples = results[index]
            if samples.done(effort, late()):
                continue
            start = time.perf_counter()
            work = [(floor, floor_repeats)] * (2 if clock.paired else 0) + [(calls[index], repeats[index])]
            warm, cold = clock.turn(work), clock.turn([(call, 1) for call, _ in work], cold=True)
            if clock.paired:
                floor_samples.add(warm[1], cold[1])
            samples.add(warm[-1], cold[-1])
            samples.spent += time.perf_counter() - start
            samples.ratios.append(warm[-1] / floor_samples.seconds[-1])
            samples.cold_ratios.append(cold[-1] / floor_samples.cold[-1])
        turn += 1
    return floor_samples, results


# -- memory -----------------------------------------------------------------------------------------------------------

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MIB = float(1 << 20)


def extra_memory(call: Call, device: str, *, empty: bool = True) -> tuple[Result, float]:
    """``call()`` and its peak extra memory in MiB, beyond inputs and results; NaN where it cannot be measured.

    ``empty``: what this library keeps for later calls is handed back before, or it would hide in that. A call of
    another's leaves it, so that ours has it when it is timed, as in training.
    """
    if empty:
        srppo_kernels.empty_cache()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    elif STATUS.exists():
        trim_heap()
        reset = reset_resident_peak()
        before = resident("VmRSS")
        with exact_heap():
            if reset:
                result = call()
                peak = resident("VmHWM")
            else:
                result, peak = watched(call)
    else:
        return call(), math.nan
    return result, max(0.0, (peak - before - live_bytes(result)) / MIB)


def resident(name: str) -> int:
    """A size of this process that the kernel keeps, in bytes: VmRSS now, VmHWM the peak."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def reset_resident_peak() -> bool:
    """Whether the kernel lets this process reset its peak; a hardened container may not."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def trim_heap() -> None:
    """Gives freed heap back, so that a call cannot hide its peak in what an earlier one left behind."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc: its allocator decides, and the figure may be too small


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, from <malloc.h>
EAGER, LAZY = 128 << 10, 32 << 20  # bytes; glibc's threshold at its start, and the most that it raises it to


class HeapInfo(ctypes.Structure):
    """struct mallinfo2 of glibc 2.33; ``hblks`` is the number of buffers that are mapped on their own."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                          "fsmblks", "uordblks", "fordblks", "keepcost"))  # fmt: skip


@contextmanager
def exact_heap() -> Iterator[None]:
    """glibc maps every buffer of 128 KiB or more on its own, and unmaps it when it is freed; other allocators are left
    as they are. Afterwards the thresholds are those that glibc's own adaptation ends at."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = HeapInfo
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, EAGER)
    libc.mallopt(M_TRIM_THRESHOLD, EAGER)
    held, size = [], LAZY
    while size >= EAGER:  # a hole in the heap would be preferred to a mapping: take all of them, without touching them
        before = libc.mallinfo2().hblks
        held.append(libc.malloc(size))
        if libc.mallinfo2().hblks > before:  # no hole of this size is left
            libc.free(held.pop())
            size //= 2
    try:
        yield
    finally:
        for block in held:
            libc.free(block)
        libc.mallopt(M_MMAP_THRESHOLD, LAZY)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LAZY)


def watched(call: Call) -> tuple[Result, int]:
    """The call, and the largest resident size that a thread saw every millisecond meanwhile."""
    peak, over = resident("VmRSS"), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(1e-3):
            peak = max(peak, resident("VmRSS"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        result = call()
    finally:
        over.set()
        thread.join()
    return result, max(peak, resident("VmRSS"))
