"""A run against itself reports nothing; a slowed op is reported, and it alone."""

import dataclasses

import pytest

from bench.compare import changes, main
from bench.record import Row, write


def row(op, provider="srppo", **changes):
    values = {
        "plan": "-", "shape": "64x4096", "dtype": "float32", "mask_density": 1.0, "rows": "random", "device": "cpu",
        "ratio": 2.0, "ratio_p20": 1.95, "ratio_p80": 2.05, "max_error": 1e-6, "grad_error": 1e-6, "extra_mib": 100.0,
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


def test_a_change_below_the_threshold_is_not_worth_a_line(run):
    after = altered(run, 0, ratio=2.08, ratio_p20=2.07, ratio_p80=2.09)
    assert list(changes(run, after)) == []
    assert [c.what for c in changes(run, after, threshold=0.01)] == ["slower 1.04x"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"max_error": 1e-3}, "error"),
        ({"grad_error": 1e-3}, "gradient error"),
        ({"extra_mib": 200.0}, "extra MiB"),
        ({"status": "failed", "reason": "x"}, "status"),
    ],
)
def test_errors_memory_and_status_are_compared_too(run, change, what):
    (found,) = changes(run, altered(run, 0, **change))
    assert found.what == what
    assert found.worse


@pytest.mark.parametrize("change", [{"max_error": 1.05e-6}, {"extra_mib": 105.0}])
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
    assert main([str(before), str(tmp_path / "missing.csv")]) == 2
    assert "missing.csv" in capsys.readouterr().err
