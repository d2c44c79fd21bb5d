"""A row survives its file, and no error column is empty."""

import csv
import dataclasses
import math
import re
import subprocess

import pytest

from bench import record
from bench.core import SelectionError
from bench.record import Row, Run, read, require_writable, set_against_ours, slug, write


def row(**changes):
    values = {
        "op": "gae", "provider": "srppo", "plan": "-", "shape": "64x4096", "dtype": "float32", "mask_density": 1.0,
        "rows": "random", "device": "cpu", "ratio": 2.0, "ratio_p20": 1.9, "ratio_p80": 2.1, "max_error": 1e-7,
        "samples": 9,
    }  # fmt: skip
    return Row(**{**values, **changes})


def test_a_file_gives_back_its_rows(tmp_path):
    rows = [row(noisy=True, reason='a "quoted", text'), row(provider="verl-loop", mask_density=0.5, max_error=math.inf)]
    write(rows, tmp_path / "folder" / "a.csv")
    for then, now in zip(rows, read(tmp_path / "folder" / "a.csv"), strict=True):
        for field in dataclasses.fields(Row):
            a, b = getattr(then, field.name), getattr(now, field.name)
            assert a == b or (math.isnan(a) and math.isnan(b)), field.name


def test_no_error_column_is_empty_even_without_a_result(tmp_path):
    write([row(), row(provider="verl", status="unavailable", reason="verl is not installed", max_error=math.nan)],
          tmp_path / "a.csv")  # fmt: skip
    lines = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [line["max_error"] for line in lines] == ["1e-07", "unavailable"]
    assert all(line["grad_error"] for line in lines)


def test_a_foreign_file_is_refused_with_what_is_missing(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("name,value\na,1\n")
    with pytest.raises(ValueError, match="has no column op, provider, shape, ratio"):
        read(path)


def test_a_file_that_ends_within_a_row_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    write([row(), row(provider="verl-loop")], path)
    path.write_text(path.read_text()[:-60])
    with pytest.raises(ValueError, match=r"a\.csv, line 3 is cut off"):
        read(path)


def test_a_file_that_cannot_be_written_is_refused_before_a_run_and_one_that_can_is_left_as_it_is(tmp_path):
    there = tmp_path / "there.csv"
    there.write_text("old")
    require_writable(there)
    require_writable(tmp_path / "new" / "a.csv")
    assert there.read_text() == "old" and not list((tmp_path / "new").iterdir())
    for path in (tmp_path, there / "a.csv"):
        with pytest.raises(SelectionError, match=f"cannot write {re.escape(str(path))}: "):
            require_writable(path)


def test_times_ours_compares_within_a_case_only():
    rows = [row(), row(provider="verl-loop", ratio=100.0), row(plan="recompute", ratio=5.0),
            row(provider="verl-loop", ratio=7.0, shape="1x1"),
            row(provider="verl", status="unavailable", ratio=math.nan)]  # fmt: skip
    set_against_ours(rows, {"gae": "srppo"})
    assert [r.times_ours for r in rows[:3]] == [1.0, 50.0, 2.5]
    assert math.isnan(rows[3].times_ours)
    assert math.isnan(rows[4].times_ours)


def test_what_tells_rows_and_cases_apart():
    changed = {"op": "whiten", "shape": "1x1", "dtype": "bfloat16", "mask_density": 0.5, "rows": "peaked",
               "device": "cuda", "provider": "verl-loop", "plan": "cache"}  # fmt: skip
    for name, value in changed.items():
        other = row(**{name: value})
        assert other.key != row().key, name
        assert (other.case_key == row().case_key) is (name in ("provider", "plan")), name


def test_the_commit_says_where_the_measured_code_differs_from_it(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() == "unknown"
    for file in ("code.py", "bench/results/a.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = record.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "bench" / "results" / "a.csv").write_text("2")
    (tmp_path / "notes.txt").write_text("untracked")
    assert record.commit() == clean
    (tmp_path / "code.py").write_text("2")
    assert record.commit() == f"{clean}+changes"


def test_a_run_knows_what_it_was_measured_with():
    run = Run.here("cpu")
    assert "torch " in run.versions
    assert run.commit
    assert run.native
    assert run.threads >= 1
    assert run.machine.startswith("cpu ") and run.machine.endswith(f" {run.threads} threads")
    assert re.fullmatch(rf"{slug(run.machine)}-\d{{4}}-\d\d-\d\d-\d{{4}}\.csv", run.file_name)


def test_a_slug_is_fit_for_a_file_name():
    assert slug("cpu AMD EPYC(TM) 2 threads") == "cpu-amd-epyc-tm-2-threads"
