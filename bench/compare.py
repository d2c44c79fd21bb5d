#!/usr/bin/env python3
"""What changed between two CSV files of bench/run.py beyond their noise.

    python bench/compare.py before.csv after.csv

A row's figure is its ratio to the floor of its own process, which a slower machine leaves alone. Its interval spans
what every visit of the run saw, from p20 to p80. It changed where the medians differ, as logarithms, by more than the
widths of both intervals together, and by more than ``--threshold``.

Why so much: visits on an idle machine differ by more than the rounds within one do, so two runs are two small samples.
Of two that come from the same distribution, all of one lie below all of the other, or above, by chance in a third of
the rows with two visits a run, and in a tenth with three: intervals that do not touch are no finding. By simulation (4
rounds a visit, visits that differ by 7 %, rounds by a third of it, normal) the rule above errs on 2.9 % and 0.1 % of
such rows. A single visit cannot know: its rows must differ by half.

Peak memory changed where the ranges over the visits do not touch and the medians differ by a tenth and 8 MiB. Files
from before these ranges were kept are noisier, and need 96 MiB. Errors and status are compared too. A run against
itself reports nothing.
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

THRESHOLD = 0.10
ONE_VISIT = 0.5  # threshold of rows from a single visit: they moved by up to 1.41 times between idle runs of one code
ERROR_FACTOR, ERROR_GRAIN = 2.0, 1e-7  # last-bit differences of fp32 are not news
MEMORY_FACTOR, MEMORY_GRAIN = 1.10, 8.0  # MiB; page-wise noise
MEMORY_GRAIN_WITHOUT_RANGE = 96.0  # MiB; peaks of one measurement moved by up to 84 between idle runs of the same code


@dataclass(frozen=True, slots=True)
class Change:
    """One finding about one row."""

    row: Row
    what: str  # slower, faster, error, memory, status, gone, new
    before: str
    after: str
    worse: bool


def time_change(a: Row, b: Row, threshold: float) -> Change | None:
    if not all(row.ratio > 0 and row.ratio_p20 > 0 for row in (a, b)):
        return None
    change = math.log(b.ratio / a.ratio)
    own = sum(math.log(row.ratio_p80 / row.ratio_p20) for row in (a, b))
    if min(a.visits, b.visits) < 2:
        threshold = max(threshold, ONE_VISIT)
    if abs(change) <= max(math.log1p(threshold), own):
        return None
    then, now = (f"{row.ratio:.3g} ({row.ratio_p20:.3g} to {row.ratio_p80:.3g})" for row in (a, b))
    what = f"{'slower' if change > 0 else 'faster'} {math.exp(abs(change)):.2f}x"
    return Change(b, what, then, now, worse=change > 0)


def memory_change(a: Row, b: Row) -> Change | None:
    ranged = not any(map(math.isnan, (a.extra_low, a.extra_high, b.extra_low, b.extra_high)))
    if ranged and not (a.extra_high < b.extra_low or b.extra_high < a.extra_low):
        return None
    grain = MEMORY_GRAIN if ranged else MEMORY_GRAIN_WITHOUT_RANGE
    return grown("extra MiB", lambda row: row.extra_mib, MEMORY_FACTOR, grain)(a, b)


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
    memory_change,
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


def fraction(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 with ``--check`` where something got worse; 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="bench/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=fraction, default=THRESHOLD, help="least relative change of a time (%(default)s)"
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
