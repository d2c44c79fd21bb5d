#!/usr/bin/env python3
"""Every kernel against its peers and against the hardware's floor.

    python bench/run.py                                   all ops on their default cases, within five minutes
    python bench/run.py --list                            ops, shapes, providers
    python bench/run.py --op linear_logprob --shape 1024xllama3.2-1b --mask-density 1 0.5
    python bench/run.py --op linear_ppo_loss --provider srppo torch --rows peaked --dtype float32

Every result is checked against fp64 before it is timed; the error is printed. Figures are ratios to bare GEMMs, or to a
bare copy of the bytes that must move, timed in turns in the same process. Writes a CSV file and PNG plots.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    # The folder of this script holds modules that are called like the ops. The checkout comes last: where srppo is
    # installed, that is what is measured.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console

from bench import gae, linear_logprob, log_ratio, plots, ppo_loss, record, report, runner, training_step
from bench.choose import DENSITIES, Selection, choose, device_of
from bench.core import DTYPES, HEADS, PLANS, ROWS, Case, Op, SelectionError
from bench.method import Effort

OPS: tuple[Op, ...] = (*linear_logprob.OPS, *log_ratio.OPS, *gae.OPS, *ppo_loss.OPS, *training_step.OPS)
OURS = {op.name: op.ours for op in OPS}
BUDGET = 255.0  # seconds of the default set after which no further provider is started: it ends well within 300
QUICK = Effort(seconds=0.1, least=3, samples=10)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="bench/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--op", nargs="+", default=[], metavar="OP", help=f"of: {', '.join(op.name for op in OPS)}")
    add(
        "--shape",
        nargs="+",
        default=[],
        metavar="SHAPE",
        help=f"1024x576x49152 (tokens, hidden, vocabulary), 1024x<head>, 64x4096; heads: {', '.join(HEADS)}",
    )
    add("--dtype", nargs="+", default=[], metavar="DTYPE", help=f"of: {', '.join(DTYPES)}")
    add("--provider", nargs="+", default=[], metavar="NAME", help="--list shows each op's")
    add(
        "--mask-density",
        nargs="+",
        type=float,
        default=[],
        metavar="X",
        help=f"fractions of live tokens, usually {', '.join(f'{d:g}' for d in DENSITIES)}",
    )
    add("--rows", nargs="+", default=[], metavar="KIND", help=f"of: {', '.join(ROWS)}")
    add("--plan", nargs="+", default=[], metavar="PLAN", help=f"of srppo's ops: {', '.join(PLANS)}")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=int, help="torch's thread count; absent: torch's own choice")
    add(
        "--seconds",
        type=float,
        default=Effort().seconds,
        help="time for each provider on each visit to a case, at least 2 samples unless a call takes long",
    )
    add(
        "--budget",
        type=float,
        help=f"seconds for the whole run, 0 for no limit; absent: {BUDGET:g} for the default set",
    )
    add("--quick", action="store_true", help="one case an op, few samples")
    add("--out", type=Path, help="CSV file; absent: bench/results/<device>-<date>.csv")
    add("--plot", type=Path, help="folder of the plots; absent: that of the CSV file")
    add("--no-plot", action="store_true", help="no plots")
    add("--list", action="store_true", help="show what there is, and end")
    return result  # fmt: skip


def in_order(chosen: Sequence[tuple[Op, list[Case]]]) -> list[tuple[Op, Case]]:
    """The first case of every op first, so that a slow machine leaves out variants and not whole ops; those that cost
    milliseconds before those with a head; the training step last. Cases that share inputs stay together."""
    pairs = [(index, op, case) for op, cases in chosen for index, case in enumerate(cases)]
    order = {
        key: n for n, key in enumerate(dict.fromkeys((c.shape, c.dtype, c.mask_density, c.rows) for _, _, c in pairs))
    }
    step = training_step.OPS[0].name

    def key(pair: tuple[int, Op, Case]) -> tuple[bool, bool, int, int]:
        index, op, case = pair
        inputs = order[case.shape, case.dtype, case.mask_density, case.rows]
        return op.name == step, index > 0, len(case.shape), inputs

    return [(op, case) for _, op, case in sorted(pairs, key=key)]


@contextmanager
def progress(console: Console) -> Iterator[runner.Notify]:
    """A line that changes on a terminal; elsewhere a line a step on standard error, with the seconds so far."""
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
        return
    start, errors = time.monotonic(), Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    yield lambda text: errors.print(f"{time.monotonic() - start:6.1f} s  {text}")


def run(arguments: argparse.Namespace, console: Console) -> list[record.Row]:
    """All rows of a run; tables go to ``console``, files to where the arguments say.

    Raises:
        SelectionError: a name that does not exist, nothing to run, or a file that cannot be written.
        KeyboardInterrupt: after everything that was measured before it is written.
    """
    selection = Selection(
        ops=tuple(arguments.op), shapes=tuple(arguments.shape), dtypes=tuple(arguments.dtype),
        providers=tuple(arguments.provider), densities=tuple(arguments.mask_density), rows=tuple(arguments.rows),
        plans=tuple(arguments.plan), device=arguments.device, quick=arguments.quick,
    )  # fmt: skip
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise SelectionError(f"--threads {arguments.threads}: at least 1")
        torch.set_num_threads(arguments.threads)
    if arguments.budget is not None and arguments.budget < 0:
        raise SelectionError(f"--budget {arguments.budget:g}: at least 0, which is no limit")
    chosen = choose(selection, OPS)
    about = record.Run.here(device_of(selection.device))
    path = arguments.out or record.RESULTS / about.file_name
    record.require_writable(path)
    if arguments.plot is not None and not arguments.no_plot:
        record.require_writable(arguments.plot / "plot.png")
    report.header(console, about)
    effort = QUICK if arguments.quick else Effort(seconds=arguments.seconds)
    budget = arguments.budget if arguments.budget is not None else BUDGET if selection.is_default else 0.0
    deadline = runner.Deadline(budget or float("inf"))
    visited: list[runner.Visited] = []
    interruption: KeyboardInterrupt | None = None
    with progress(console) as notify:
        try:
            for op, case in in_order(chosen):
                work = list(runner.entries(op, case, selection.providers, selection.plans))
                visited.append(runner.run_case(op, case, work, effort, deadline, notify))
            if not arguments.quick:
                for again in (list(visited), sorted(visited, key=lambda visit: visit.cost)):
                    for visit in again:
                        runner.visit_again(visit, effort, deadline, notify)
        except KeyboardInterrupt as error:  # what was measured so far is worth its file
            interruption = error
    rows = [row for visit in visited for row in visit.rows]
    record.set_against_ours(rows, OURS)
    rows = [about.stamp(row) for row in rows]
    report.tables(console, rows, OPS)
    record.write(rows, path)
    console.print(f"{len(rows)} rows in {path}", markup=False, highlight=False, soft_wrap=True)
    if not arguments.no_plot:
        titles = {op.name: f"{op.name}: {op.title} ({' x '.join(op.shape_names)})" for op in OPS}
        drawn = plots.draw(rows, arguments.plot or path.parent, "" if arguments.plot else f"{path.stem}-", titles)
        console.print(f"{len(drawn)} plots in {arguments.plot or path.parent}", markup=False, soft_wrap=True)
    if interruption is not None:
        raise interruption
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a provider of ours gave a wrong or no result; 2 for a wrong selection; 130 if interrupted."""
    arguments = parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 170)  # a file has room, and no width to be asked
    try:
        if arguments.list:
            report.listing(console, OPS, device_of(arguments.device))
            return 0
        rows = run(arguments, console)
    except SelectionError as error:
        Console(stderr=True).print(f"bench/run.py: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        print("bench/run.py: interrupted; the file has the cases that were done", file=sys.stderr)
        return 130
    return int(any(row.provider == OURS[row.op] and row.status in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
