"""Progress in a log: a line now and then, as a bar cannot move there."""

from __future__ import annotations

import pytest

from srppo import console


def test_progress_in_a_log_is_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with console.Console().progress("SRPPO", 3) as bar:
        for step in range(3):
            bar.advance(10, f"reward [{step}]")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["SRPPO", f"{step}/3"] for step in (1, 2, 3)]
    assert lines[1].endswith("reward [1]")


def test_fast_steps_do_not_fill_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Console().progress("SFT", 100) as bar:
        for _ in range(100):
            bar.advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with console.Console(quiet=True).progress("SFT", 2) as bar:
        bar.advance(1, "loss 1")
    assert capsys.readouterr().err == ""
