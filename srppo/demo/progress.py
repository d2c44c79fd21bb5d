"""The demo's progress bars: share done, rate, time left, and a note that the caller keeps up to date."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _RateColumn(ProgressColumn):
    """How many steps a second, averaged over the last half minute by rich."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:.1f} {self._unit}/s", style="progress.data.speed")


def progress(unit: str, *, console: Console | None = None) -> Progress:
    """A bar that counts ``unit``; each of its tasks must be added with ``note=""``."""
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
