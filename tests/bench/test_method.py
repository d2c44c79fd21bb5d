"""Statistics, turns and memory: what the figures rest on. Nothing here depends on how fast this machine is."""

import math
import time
from pathlib import Path

import pytest
import torch

from bench import method
from bench.core import live_bytes
from bench.method import (
    LEAD,
    LONG,
    MARGIN,
    VERY_LONG,
    CpuClock,
    CudaClock,
    Effort,
    Samples,
    Spread,
    extra_memory,
    interleave,
    quantile,
)


class FakeClock:
    """Time as a script tells it: every sample of a call lasts what the call returns."""

    def __init__(self, paired=False):
        self.paired = paired
        self.order = []

    def repeats(self, call):
        return 1

    def sample(self, call):
        name, seconds = call()
        self.order.append(name)
        return seconds

    def turn(self, work, cold=False):
        return [math.nan if cold else self.sample(call) for call, _ in work]


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([3.0], 0.2, 3.0), ([1, 2], 0.5, 1.5), ([4, 1, 3, 2, 5], 0.5, 3.0), ([0, 10], 0.8, 8.0), ([5, 1, 3], 0.2, 1.8)],
)
def test_quantile_interpolates_between_order_statistics(values, q, expected):
    assert quantile(values, q) == pytest.approx(expected)


def test_quantile_agrees_with_torch():
    values = torch.randn(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert quantile(values.tolist(), q) == pytest.approx(torch.quantile(values, q).item())


def test_quantile_of_nothing_is_no_number():
    assert math.isnan(quantile([], 0.5))


@pytest.mark.parametrize(("p20", "p80", "noisy"), [(1.0, 1.09, False), (1.0, 1.11, True), (math.nan, math.nan, True)])
def test_a_row_is_noisy_by_its_own_spread(p20, p80, noisy):
    assert Spread(1.0, p20, p80).noisy is noisy


def test_a_spread_is_the_median_with_p20_and_p80():
    assert Spread.of([10.0, 1.0, 2.0]) == Spread(2.0, pytest.approx(1.4), pytest.approx(6.8))


def test_a_cpus_clock_repeats_short_calls_and_tells_the_time_of_one(monkeypatch):
    now, made = [0.0], []

    def lasting(seconds):
        def call():
            now[0] += seconds
            made.append(seconds)

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    short, long, clock = lasting(3e-4), lasting(0.5), CpuClock()
    assert [clock.repeats(call) for call in (short, long)] == [7, 1]  # 2.1 ms
    made.clear()
    assert clock.turn([(short, 7), (long, 1)]) == pytest.approx([3e-4, 0.5])
    assert made == [3e-4] * 7 + [0.5]
    assert all(map(math.isnan, clock.turn([(short, 7), (long, 1)], cold=True)))
    assert len(made) == 8


class Sizing(FakeClock):
    """Every call is worth five repeats."""

    def repeats(self, call):
        self.order.append("size")
        call()
        return 5

    def turn(self, work, cold=False):
        self.order.append([(call()[0], repeats, cold) for call, repeats in work])
        return [1.0 for _ in work]


@pytest.mark.parametrize("paired", [False, True])
def test_calls_are_sized_once_and_long_ones_and_cold_ones_made_once(paired):
    clock, made = Sizing(paired), []

    def named(name):
        return lambda: (name, made.append(name))

    effort, floor = Effort(seconds=0, least=1, samples=1), named("floor")
    interleave(floor, [named("long"), named("short")], effort, clock, [2 * LONG, LONG / 2])
    assert made[:3] == ["floor", "floor", "short"]  # the floor's warm-up, and one of each that is sized
    pair = [("floor", 5), ("floor", 5)] if paired else []
    turns = [] if paired else [[("floor", 5, False)]]
    for name, repeats in (("long", 1), ("short", 5)):
        work = [*pair, (name, repeats)]
        turns += [[(n, times, False) for n, times in work], [(n, 1, True) for n, _ in work]]
    assert clock.order == ["size", "size", *turns]


def test_cold_calls_are_set_against_the_cold_floor():
    class Flushed(FakeClock):
        def turn(self, work, cold=False):
            return [call()[1] * (3.0 if cold and call()[0] == "floor" else 1.0) for call, _ in work]

    effort = Effort(seconds=0, least=1, samples=1)
    _, (samples,) = interleave(lambda: ("floor", 1.0), [lambda: ("a", 6.0)], effort, Flushed(paired=True))
    assert (samples.ratios, samples.cold_ratios) == ([6.0], [2.0])


def test_providers_take_turns_in_a_rotating_order_with_the_floor_first():
    clock = FakeClock()
    calls = [lambda name=name: (name, 0.2) for name in "abc"]
    interleave(lambda: ("floor", 1.0), calls, Effort(seconds=0, least=3, samples=3), clock)
    assert clock.order == ["floor", "a", "b", "c", "floor", "b", "c", "a", "floor", "c", "a", "b"]


def test_clocks_that_pair_time_a_floor_of_its_own_before_every_call():
    clock = FakeClock(paired=True)
    calls = [lambda name=name: (name, 0.2) for name in "ab"]
    bare, _ = interleave(lambda: ("floor", 1.0), calls, Effort(seconds=0, least=2, samples=2), clock)
    each = ["floor", "floor"]
    assert clock.order == [*each, "a", *each, "b", *each, "b", *each, "a"]
    assert len(bare.seconds) == 4  # the first floor of each two only sets the clock


@pytest.mark.gpu
def test_a_device_s_clock_does_not_time_the_host():
    x = torch.zeros(1 << 20, device="cuda")

    def call():
        time.sleep(0.004)
        x.add_(1)

    clock = CudaClock()
    clock.turn([(call, 1)])
    warm, cold = clock.turn([(call, 3), (call, 1)]), clock.turn([(call, 1)], cold=True)
    assert max(*warm, *cold) < 0.002


class SlowHost(CudaClock):
    """A device that does in 14 us what its host takes ``seconds`` to launch."""

    def __init__(self, seconds):
        self.host, self.seconds = {}, seconds

    def turn(self, work, cold=False):
        self.host.update((call, self.seconds) for call, _ in work)
        return [14e-6] * len(work)


@pytest.mark.parametrize(("seconds", "repeats"), [(1e-6, 143), (5e-5, 143), (3e-4, 55), (1.0, 1)])
def test_a_sample_is_no_longer_than_its_host_can_get_ahead_of(seconds, repeats):
    """Even where the host is slower by the margin: ppo_loss took 12 to 460 us on a busy one."""
    assert SlowHost(seconds).repeats(lambda: None) == repeats
    assert repeats * seconds * MARGIN <= LEAD / 2 or repeats == 1


def test_which_clocks_pair():
    assert CudaClock.paired
    assert not CpuClock.paired


class PowerLimited(FakeClock):
    """A call takes a tenth longer after one that draws a GPU's limit; "idle" does not."""

    def sample(self, call):
        hot = bool(self.order) and self.order[-1] != "idle"
        return super().sample(call) * (1.1 if hot else 1.0)

    def turn(self, work, cold=False):
        return [self.sample(call) for call, _ in work]


@pytest.mark.parametrize("paired", [True, False])
def test_power_that_the_call_before_drew_leaves_the_ratio_alone_where_clocks_pair(paired):
    """The floor beside itself is 1, whatever else takes turns with it."""
    floor, idle, effort = lambda: ("floor", 0.1), lambda: ("idle", 0.2), Effort(seconds=0, least=4, samples=4)
    bare, (same, other) = interleave(floor, [floor, idle], effort, PowerLimited(paired=paired))
    assert (same.ratios == pytest.approx([1.0] * 4)) is paired
    if paired:
        assert other.ratios == pytest.approx([2.0] * 4)
        assert bare.seconds == pytest.approx([0.11] * 8)


def test_an_interval_spans_every_visit():
    """Two quiet sittings that differ by a third are one noisy row."""
    spread = Spread.over([[1.0, 1.0, 1.02], [1.3, 1.31, 1.31], []])
    assert (spread.p20, spread.p80) == (1.0, 1.31)
    assert spread.noisy
    assert spread.median == pytest.approx(1.16)
    assert math.isnan(Spread.over([[]]).median)


def test_a_ratio_is_taken_within_its_round():
    """A machine that slows down by half and half again leaves the ratio alone."""
    drift = iter([1.0, 1.5, 2.25])
    now = {"factor": 1.0}

    def floor():
        return "floor", now["factor"]

    class Drifting(FakeClock):
        def sample(self, call):
            if call is floor:
                now["factor"] = next(drift)
            return super().sample(call)

    bare, (samples,) = interleave(
        floor, [lambda: ("a", 0.0625 * now["factor"])], Effort(seconds=0, least=3, samples=3), Drifting()
    )
    assert bare.seconds == [1.0, 1.5, 2.25]
    assert samples.ratios == [0.0625, 0.0625, 0.0625]


def test_a_provider_is_done_after_its_time_but_not_before_the_least_number_of_samples():
    effort = Effort(seconds=1.0, least=3, samples=25)
    assert not Samples(seconds=[0.2] * 2, spent=9.0).done(effort)
    assert Samples(seconds=[0.2] * 3, spent=9.0).done(effort)
    assert Samples(seconds=[2 * VERY_LONG], spent=0.6).done(effort)
    assert not Samples(seconds=[0.1] * 9, spent=0.9).done(effort)
    assert Samples(seconds=[0.1] * 25, spent=0.0).done(effort)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_extra_memory_counts_the_workspace_and_not_the_result():
    mib = 1 << 20

    def call():
        workspace = torch.ones(64 * mib // 4)
        return {"out": torch.full((16 * mib // 4,), workspace.sum().item())}

    call()
    result, extra = extra_memory(call, "cpu")
    assert live_bytes(result) == 16 * mib
    assert 56 <= extra <= 72


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_where_the_peak_cannot_be_reset_it_is_watched(monkeypatch):
    def call():
        workspace = torch.ones(64 << 18)
        time.sleep(0.05)
        return {"out": workspace[:1].clone()}

    monkeypatch.setattr(method, "reset_resident_peak", lambda: False)
    assert 56 <= extra_memory(call, "cpu")[1] <= 72


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the resident set is read from /proc")
def test_extra_memory_does_not_depend_on_what_was_freed_before():
    """glibc keeps freed buffers of up to 64 MiB, once it has seen buffers of that size freed."""

    def call():
        for numbers in (24 << 18, 20 << 18, 28 << 18):
            torch.ones(numbers)
        return {}

    peaks = []
    for size in (0, 8, 16, 30):
        torch.ones(size << 18)
        peaks.append(extra_memory(call, "cpu")[1])
    assert all(27 <= peak <= 32 for peak in peaks), peaks


def test_results_that_share_a_storage_count_once():
    tensor = torch.zeros(100)
    assert live_bytes({"a": tensor, "b": tensor.view(10, 10)}) == 400


def test_when_the_run_is_over_every_call_gets_one_sample_and_no_more():
    clock = FakeClock()
    interleave(lambda: ("floor", 1.0), [lambda: ("a", 2.0), lambda: ("b", 2.0)], Effort(), clock, late=lambda: True)
    assert clock.order == ["floor", "a", "b"]
