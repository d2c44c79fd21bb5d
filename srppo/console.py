"""What a person sees: notes, progress bars with rates, and tables of samples, through rich."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

LINE_SECONDS = 10.0  # between lines of progress in a log


class Bar:
    """A running progress bar that counts steps and tokens. In a log, where a bar cannot move, a line now and then."""

    def __init__(self, progress: Any, task: Any) -> None:
        self.rich, self.task, self.tokens = progress, task, 0
        self.said = time.monotonic()

    def advance(self, tokens: int, status: str = "", *, steps: int = 1) -> None:
        """``steps`` done, in which ``tokens`` were trained on or sampled."""
        self.tokens += tokens
        elapsed = self.rich.tasks[0].elapsed or 0.0
        rate = f"{self.tokens / elapsed:,.0f} tok/s" if elapsed > 0 and self.tokens else ""
        self.rich.update(self.task, advance=steps, rate=rate, status=status)
        if not self.rich.console.is_terminal and time.monotonic() - self.said >= LINE_SECONDS:
            self.said = time.monotonic()
            done = self.rich.tasks[0]
            text = f"{done.description} {done.completed:.0f}/{done.total:.0f} {rate} {status}"
            self.rich.console.print(text.rstrip(), markup=False, soft_wrap=True)

    def status(self, text: str) -> None:
        """What is being done inside the current step."""
        self.rich.update(self.task, status=text)


class Console:
    """Prints to standard error, so that a command's output can go into a pipe; ``quiet`` says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.rich = RichConsole(stderr=True, quiet=quiet, highlight=False)

    def note(self, text: str) -> None:
        self.rich.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.rich.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """A bar with steps, time left and tokens per second."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=self.rich) as progress:
            yield Bar(progress, progress.add_task(title, total=total, rate="", status=""))

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of equal keys as a table; floats with three digits, control characters as visible escapes."""
        from rich.table import Table
        from rich.text import Text

        if not rows:
            return
        table = Table(
            title=title, show_lines=any(isinstance(v, str) and len(v) > 40 for row in rows for v in row.values())
        )
        for name, value in rows[0].items():
            table.add_column(name, justify="left" if isinstance(value, str) else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(shown(value)) for value in row.values()))
        self.rich.print(table)


def shown(value: Any) -> str:
    """One cell. A model may sample any character, and a terminal would obey some of them: those are escaped."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "".join("⏎" if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in str(value))
