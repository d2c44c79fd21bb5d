"""A run against itself reports nothing; a slowed op is reported, and it alone."""

import dataclasses
import math

import pytest
import torch

from bench.compare import changes, context, main
from bench.method import Spread
from bench.record import Row, write


def row(op, provider="srppo", **changes):
    values = {
        "plan": "-", "shape": "64x4096", "dtype": "float32", "mask_density": 1.0, "rows": "random", "device": "cpu",
        "ratio": 2.0, "ratio_p20": 1.95, "ratio_p80": 2.05, "max_error": 1e-6, "grad_error": 1e-6,
        "weight_grad_error": 1e-6, "extra_mib": 100.0, "extra_low": 98.0, "extra_high": 102.0, "visits": 2,
    }  # fmt: skip
    return Row(op=op, provider=provider, **{**values, **changes})


@pytest.fixture
def run():
    return [row("gae"), row("gae", "verl-loop", ratio=150.0, ratio_p20=140.0, ratio_p80=160.0), row("ppo_loss"),
            row("linear_logprob", "verl", status="unavailable", reason="verl is not installed")]  # fmt: skip


def altered(run, index, **changes):
    return [dataclasses.replace(r, **changes) if i == index else r for i, r in enumerate(run)]


def test_a_run_against_itself_reports_nothing(run):
    assert list(changes(run, run)) == []


def test_a_slowed_op_is_reported_and_it_alone(run):
    (found,) = changes(run, altered(run, 2, ratio=3.0, ratio_p20=2.9, ratio_p80=3.1))
    assert (found.row.op, found.what, found.worse) == ("ppo_loss", "slower 1.50x", True)


def test_a_faster_op_is_no_reason_to_fail(run):
    (found,) = changes(run, altered(run, 2, ratio=1.0, ratio_p20=0.9, ratio_p80=1.1))
    assert (found.what, found.worse) == ("faster 2.00x", False)


def test_overlapping_spreads_are_noise(run):
    assert list(changes(run, altered(run, 0, ratio=2.6, ratio_p20=2.0, ratio_p80=2.9))) == []


def test_spreads_that_do_not_touch_may_still_be_noise(run):
    """From 2.05 to 2.2 nothing was seen, and the medians are a fifth apart; but each run saw as much within itself."""
    after = altered(run, 0, ratio=2.4, ratio_p20=2.2, ratio_p80=2.6)
    assert list(changes(run, after)) == []
    (found,) = changes(run, altered(run, 0, ratio=2.4, ratio_p20=2.35, ratio_p80=2.45))
    assert found.what == "slower 1.20x"


def test_a_change_below_the_threshold_is_not_worth_a_line(run):
    after = altered(run, 2, ratio=2.14, ratio_p20=2.13, ratio_p80=2.15)
    assert list(changes(run, after)) == []
    assert [c.what for c in changes(run, after, threshold=0.05)] == ["slower 1.07x"]


@pytest.mark.parametrize("visits", [0, 1])
def test_a_single_visit_knows_no_noise_between_runs(run, visits):
    """A file from before the column has 0."""

    def single(rows, **more):
        return altered(altered(rows, 2, visits=visits), 2, **more)

    assert list(changes(single(run), single(run, ratio=2.9, ratio_p20=2.8, ratio_p80=3.0))) == []
    (found,) = changes(single(run), altered(run, 2, ratio=3.1, ratio_p20=3.0, ratio_p80=3.2))
    assert found.what == "slower 1.55x"
    assert list(changes(single(run), altered(run, 2, ratio=3.1, ratio_p20=3.0, ratio_p80=3.2), threshold=0.6)) == []


def simulated(generator, visits, spread, slow=1.0):
    """2,000 rows as a run makes them: 4 rounds a visit, noise between visits, a third of it between rounds."""
    between = spread * torch.randn(2000, visits, 1, generator=generator)
    ratios = slow * (between + spread / 3 * torch.randn(2000, visits, 4, generator=generator)).exp()
    found = [Spread.over(of_row) for of_row in ratios.tolist()]
    return [row(f"op {n}", ratio=s.median, ratio_p20=s.p20, ratio_p80=s.p80, visits=visits)
            for n, s in enumerate(found)]  # fmt: skip


@pytest.mark.parametrize(("visits", "most"), [(2, 0.05), (3, 0.01)])
def test_two_runs_of_the_same_code_are_nearly_silent_and_a_slowdown_of_a_half_is_not(visits, most):
    generator = torch.Generator().manual_seed(0)
    before, after, slower = (simulated(generator, visits, 0.07, slow) for slow in (1.0, 1.0, 1.5))
    assert len(list(changes(before, after))) < most * 2000
    assert len(list(changes(before, slower))) > 0.8 * 2000
    quiet = [simulated(generator, visits, 0.02, slow) for slow in (1.0, 1.15)]
    assert len(list(changes(*quiet))) > 0.85 * 2000


def test_an_op_with_half_a_millisecond_more_a_call_is_reported_and_it_alone():
    """gae as measured here: 0.08, 0.2 and 0.3 ms, each with the widest spread that a run on an idle machine gave it."""
    floor, calls = 0.03, {"16x512": (0.08, 1.6), "64x4096": (0.3, 1.83), "64x4096 half": (0.2, 2.14)}

    def gae(more):
        return [row("gae", shape=shape, ratio=(ms + more) / floor, ratio_p20=(ms * spread**-0.5 + more) / floor,
                    ratio_p80=(ms * spread**0.5 + more) / floor) for shape, (ms, spread) in calls.items()]  # fmt: skip

    others = [row("ppo_loss"), row("whiten")]
    found = list(changes(gae(0.0) + others, gae(0.5) + others))
    assert [(c.row.op, c.row.shape, c.worse) for c in found] == [("gae", shape, True) for shape in calls]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"max_error": 1e-3}, "error"),
        ({"grad_error": 1e-3}, "gradient error"),
        ({"weight_grad_error": 1e-3}, "dweight error"),
        ({"extra_mib": 200.0, "extra_low": 190.0, "extra_high": 210.0}, "extra MiB"),
        ({"extra_mib": 200.0, "extra_low": math.nan, "extra_high": math.nan}, "extra MiB"),
        ({"status": "failed", "reason": "x"}, "status"),
    ],
)
def test_errors_memory_and_status_are_compared_too(run, change, what):
    (found,) = changes(run, altered(run, 0, **change))
    assert found.what == what
    assert found.worse


def test_what_got_better_is_told_and_is_no_reason_to_fail(run):
    less = {"max_error": 1e-7, "extra_mib": 20.0, "extra_low": 18.0, "extra_high": 22.0}
    found = list(changes(run, altered(run, 0, **less)))
    assert [(c.what, c.worse) for c in found] == [("error", False), ("extra MiB", False)]
    mended = {"status": "ok", "reason": ""}
    assert [(c.what, c.worse) for c in changes(run, altered(run, 3, **mended))] == [("status", False)]
    found = list(changes(run, run[:2]))
    assert [(c.what, c.row.op, c.worse) for c in found] == [
        ("gone", "ppo_loss", True), ("gone", "linear_logprob", False),
    ]  # fmt: skip


def test_what_else_differs_between_two_runs_is_told(run):
    before, after = ([dataclasses.replace(r, machine="a", threads=n) for r in run] for n in (2, 4))
    assert list(context(before, after)) == ["threads differs: 2 | 4"]
    assert list(context(before, before)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"max_error": 1.05e-6},
        {"max_error": 1.9e-6},
        {"extra_mib": 105.0, "extra_low": 104.0, "extra_high": 106.0},
        {"extra_mib": 150.0, "extra_low": 101.0, "extra_high": 190.0},  # one visit took no more than before
        {"extra_mib": 190.0, "extra_low": math.nan, "extra_high": math.nan},  # an old file: it had moves of this size
    ],
)
def test_grains_of_errors_and_memory_are_no_change(run, change):
    assert list(changes(run, altered(run, 0, **change))) == []


def test_rows_that_are_new_or_gone_are_named(run):
    found = list(changes(run, [*run[1:], row("whiten")]))
    assert [(c.what, c.row.op) for c in found] == [("new", "whiten"), ("gone", "gae")]


def test_the_command_line_fails_on_request_and_explains_a_bad_file(run, tmp_path, capsys):
    before, after = tmp_path / "a.csv", tmp_path / "b.csv"
    write(run, before)
    write(altered(run, 2, ratio=3.0, ratio_p20=2.9, ratio_p80=3.1), after)
    assert main([str(before), str(before), "--check"]) == 0
    assert "nothing changed" in capsys.readouterr().out
    assert main([str(before), str(after)]) == 0
    assert "slower 1.50x" in capsys.readouterr().out
    assert main([str(before), str(after), "--check"]) == 1
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(before), str(after), "--threshold", "-2"])
    assert "-2 is not at least 0" in capsys.readouterr().err
    assert main([str(before), str(tmp_path / "missing.csv")]) == 2
    assert "missing.csv" in capsys.readouterr().err
