"""What a person sees: notes on standard error, progress in a log, tables that show text as it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as RichConsole

from srppo import console as module
from srppo.console import Console, shown


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The one number in it is the time, for the bar and for rich."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def log(clock) -> tuple[Console, io.StringIO]:
    """A console whose output is no terminal, as in a batch job."""
    console, text = Console(), io.StringIO()
    console.rich = RichConsole(file=text, width=100, highlight=False, get_time=lambda: clock[0])
    return console, text


def test_output_goes_to_standard_error_and_quiet_says_nothing(capfd):
    """As it is given: no markup, and a long line is one line, for a terminal or a file to break."""
    long = "[bold]" + 40 * " word"
    Console().note(f"hello {long}")
    Console().warn(f"careful {long}")
    Console(quiet=True).note("never")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == f"hello {long}\nwarning: careful {long}\n"


def test_on_a_terminal_a_warning_is_yellow_and_a_note_plain(monkeypatch, capfd):
    """Rich would colour every number and name."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    Console().note("step 3 of 'run'")
    Console().warn("at 3")
    printed = capfd.readouterr().err.replace("\x1b[33m\n\x1b[0m", "\n")  # rich before 14.3 colours the line's end, too
    assert printed == "step 3 of 'run'\n\x1b[33mwarning: at 3\x1b[0m\n"


def test_progress_in_a_log_is_a_line_now_and_then_and_not_one_a_step(log, clock):
    console, text = log
    status = "[b] reward 1.00 " + 20 * "word "
    with console.progress("SRPPO", 100) as bar:
        for _ in range(25):
            clock[0] += 1.0
            bar.advance(1400, status)
        clock[0] += 10.0
        bar.advance(0)
    lines = [line for line in text.getvalue().splitlines() if "/100 1,400 tok/s " in line or "/100 1,000" in line]
    assert lines[:2] == [f"SRPPO {step}/100 1,400 tok/s {status}".rstrip() for step in (10, 20)]
    assert lines[2:] == ["SRPPO 26/100 1,000 tok/s"]


def test_progress_on_a_terminal_is_the_bar_alone(log, clock):
    console, text = log
    console.rich = RichConsole(file=text, width=100, force_terminal=True, highlight=False, get_time=lambda: clock[0])
    with console.progress("SRPPO", 100) as bar:
        clock[0] += 25.0
        bar.advance(0, "reward 1.00")
    assert "SRPPO 1/100" not in text.getvalue()


def test_progress_counts_tokens_and_keeps_what_it_was_told(log, clock):
    console, _ = log
    with console.progress("SFT", 4) as bar:
        task = bar.rich.tasks[0]
        bar.advance(5, steps=2)
        assert task.fields == {"rate": "", "status": ""}  # no time has passed
        clock[0] += 2.0
        bar.advance(6, "loss 1.00")
        assert (bar.tokens, task.completed, task.fields["rate"]) == (11, 3, "6 tok/s")
        assert task.fields["status"] == "loss 1.00"
        bar.status("saving")
        assert task.fields["status"] == "saving"
    with console.progress("samples", 3) as bar:
        clock[0] += 2.0
        bar.advance(0)  # whoever counts no tokens has no rate of them
        assert bar.rich.tasks[0].fields["rate"] == ""


def test_a_table_shows_markup_and_line_breaks_as_they_are(log):
    console, text = log
    console.table("samples", [{"completion": "[red]a\nb[/red]", "score": 1.23456}])
    assert "[red]a⏎b[/red]" in text.getvalue() and "1.235" in text.getvalue()
    console.table("nothing", [])
    assert "nothing" not in text.getvalue()
    assert shown(3) == "3"


def test_a_table_folds_long_text_and_parts_such_rows(log):
    """Numbers are on the right of their column; of a text that is wider than the page nothing is left out."""
    console, text = log
    console.rich.width = 60
    console.table("samples", [{"completion": 80 * "x", "score": 1.0}, {"completion": "short", "score": 22.0}])
    printed = text.getvalue()
    assert printed.count("x") == 80 and "  1.000 │" in printed
    assert "├" in printed.splitlines()[-3]
    console.table("short ones", [{"completion": 40 * "a"}, {"completion": "b"}])
    assert "├" not in text.getvalue()[len(printed) :].splitlines()[-3]


def test_a_table_shows_control_characters_instead_of_obeying_them(log):
    console, text = log
    console.table("samples", [{"completion": "\x1b[2J\x1b[31mred\x07\u202e"}])
    assert "\x1b" not in text.getvalue()
    assert "\x07" not in text.getvalue()
    assert "\\x1b[2J\\x1b[31mred\\x07\\u202e" in text.getvalue()
