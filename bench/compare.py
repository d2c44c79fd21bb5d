#!/usr/bin/env python3
"""What changed between two CSV files of bench/run.py beyond their noise.

    python bench/compare.py before.csv after.csv

A row's figure is its ratio to the floor of its own process, which a slower machine leaves alone. It changed where the
two intervals from p20 to p80 do not touch and the medians differ by more than ``--threshold``. Errors, memory and
status are compared too. A run against itself reports nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.record import Row, read
from bench.report import provider_name

THRESHOLD = 0.05
ERROR_FACTOR, ERROR_GRAIN = 2.0, 1e-7  # last-bit differences of fp32 are not news
MEMORY_FACTOR, MEMORY_GRAIN = 1.10, 8.0  # MiB; the heap's own page-wise noise


@dataclass(frozen=True, slots=True)
class Change:
    """One finding about one row."""

    row: Row
    what: str  # slower, faster, error, memory, status, gone, new
    before: str
    after: str
    worse: bool


def disjoint(a: Row, b: Row) -> bool:
    return a.ratio_p80 < b.ratio_p20 or b.ratio_p80 < a.ratio_p20


def time_change(a: Row, b: Row, threshold: float) -> Change | None:
    if not (a.ratio > 0 and b.ratio > 0 and disjoint(a, b)):
        return None
    factor = b.ratio / a.ratio
    if max(factor, 1 / factor) - 1 <= threshold:
        return None
    slower = factor > 1
    then, now = (f"{row.ratio:.3g} ({row.ratio_p20:.3g} to {row.ratio_p80:.3g})" for row in (a, b))
    return Change(b, f"{'slower' if slower else 'faster'} {max(factor, 1 / factor):.2f}x", then, now, worse=slower)


def grown(name: str, value: Callable[[Row], float], factor: float, grain: float) -> Callable[[Row, Row], Change | None]:
    """A quantity that should not grow, nor shrink unnoticed."""

    def compare(a: Row, b: Row) -> Change | None:
        x, y = value(a), value(b)
        if math.isnan(x) or math.isnan(y) or abs(x - y) <= grain or max(x, y) <= factor * min(x, y):
            return None
        return Change(b, name, f"{x:.3g}", f"{y:.3g}", worse=y > x)

    return compare


QUANTITIES = (
    grown("error", lambda row: row.max_error, ERROR_FACTOR, ERROR_GRAIN),
    grown("gradient error", lambda row: row.grad_error, ERROR_FACTOR, ERROR_GRAIN),
    grown("dweight error", lambda row: row.weight_grad_error, ERROR_FACTOR, ERROR_GRAIN),
    grown("extra MiB", lambda row: row.extra_mib, MEMORY_FACTOR, MEMORY_GRAIN),
)


def changes(before: Sequence[Row], after: Sequence[Row], threshold: float = THRESHOLD) -> Iterator[Change]:
    """All findings, in the order of the rows of ``after``; rows that are gone come last."""
    old = {row.key: row for row in before}
    for row in after:
        then = old.pop(row.key, None)
        if then is None:
            yield Change(row, "new", "", row.status, worse=False)
        elif then.status != row.status:
            was, now = (f"{r.status}: {r.reason}" if r.reason else r.status for r in (then, row))
            yield Change(row, "status", was, now, worse=then.status == "ok")
        elif row.status == "ok":
            found = [time_change(then, row, threshold), *(compare(then, row) for compare in QUANTITIES)]
            yield from (change for change in found if change is not None)
    for row in old.values():
        yield Change(row, "gone", row.status, "", worse=row.status == "ok")


def context(before: Sequence[Row], after: Sequence[Row]) -> Iterator[str]:
    """What else differs between the runs: the reader must know before blaming the code."""
    for name in ("machine", "threads", "versions", "native"):
        values = [getattr(rows[0], name) if rows else "" for rows in (before, after)]
        if values[0] != values[1]:
            yield f"{name} differs: {values[0]} | {values[1]}"


def show(console: Console, found: Sequence[Change]) -> None:
    table = Table(title="beyond the noise", title_justify="left")
    for name in ("op", "provider", "case", "what", "before", "after"):
        table.add_column(name, overflow="fold")
    for change in found:
        row = change.row
        case = f"{row.shape} {row.dtype}, {row.mask_density:g} live, {row.rows}, {row.device}"
        cells = (row.op, provider_name(row), case, change.what, change.before, change.after)
        table.add_row(*map(Text, cells), style="red" if change.worse else "green")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 with ``--check`` where something got worse; 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="bench/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="least relative change of a time (%(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 where something got worse")
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 170)
    try:
        before, after = read(arguments.before), read(arguments.after)
    except (OSError, ValueError) as error:
        Console(stderr=True).print(f"bench/compare.py: {error}", markup=False, soft_wrap=True)
        return 2
    for line in context(before, after):
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    found = list(changes(before, after, arguments.threshold))
    if found:
        show(console, found)
    else:
        console.print(f"nothing changed beyond the noise, in {len(after)} rows")
    return int(arguments.check and any(change.worse for change in found))


if __name__ == "__main__":
    sys.exit(main())
