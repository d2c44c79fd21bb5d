"""What a person sees: notes on standard error, progress in a log, tables that show text as it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as RichConsole

from srppo import console as module
from srppo.console import Console, shown


@pytest.fixture
def log() -> tuple[Console, io.StringIO]:
    """A console whose output is no terminal, as in a batch job."""
    console, text = Console(), io.StringIO()
    console.rich = RichConsole(file=text, width=100, highlight=False)
    return console, text


def test_output_goes_to_standard_error_and_quiet_says_nothing(capfd):
    Console().note("hello [bold]")
    Console().warn("careful")
    Console(quiet=True).note("never")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == "hello [bold]\nwarning: careful\n"


def test_progress_in_a_log_is_a_line_now_and_then_and_not_one_a_step(log, monkeypatch):
    console, text = log
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with console.progress("SRPPO", 100) as bar:
        for _ in range(25):
            clock[0] += 1.0
            bar.advance(7, "reward 1.00")
    lines = [line for line in text.getvalue().splitlines() if line.startswith("SRPPO") and "reward" in line]
    steps = [line.split()[1] for line in lines if "left" not in line]
    assert steps == ["10/100", "20/100"]


def test_progress_counts_tokens_and_keeps_what_it_was_told(log):
    console, _ = log
    with console.progress("SFT", 3) as bar:
        bar.advance(5, steps=2)
        bar.advance(6)
        bar.status("saving")
        task = bar.rich.tasks[0]
        assert (bar.tokens, task.completed, task.fields["status"]) == (11, 3, "saving")


def test_a_table_shows_markup_and_line_breaks_as_they_are_and_stops_at_its_limit(log):
    console, text = log
    rows = [{"completion": "[red]a\nb[/red]", "score": 1.23456}, {"completion": "second", "score": 2.0}]
    console.table("samples", rows, limit=1)
    assert "[red]a⏎b[/red]" in text.getvalue() and "1.235" in text.getvalue()
    assert "second" not in text.getvalue()
    console.table("nothing", [])
    assert "nothing" not in text.getvalue()
    assert shown(3) == "3"


def test_a_table_shows_control_characters_instead_of_obeying_them(log):
    console, text = log
    console.table("samples", [{"completion": "\x1b[2J\x1b[31mred\x07\u202e"}])
    assert "\x1b" not in text.getvalue()
    assert "\x07" not in text.getvalue()
    assert "\\x1b[2J\\x1b[31mred\\x07\\u202e" in text.getvalue()
