#!/usr/bin/env python3
"""Peak memory of whole training runs: four roles in one model against a model each, fused ops against logits.

    python bench/memory.py                                    both sets, on real shapes; the better part of an hour
    python bench/memory.py --set heads --completion 512
    python bench/memory.py --set roles --model smollm2-135m --roles shared separate --completion 32

Each run is a process of its own: it loads its models from a folder, as a user's does, and trains one iteration with
:class:`srppo.SRPPOTrainer`, rollout included. Its figures are the largest resident set that the kernel saw (on a GPU:
the most that torch had allocated), of the whole process, and beyond what it held after importing everything and
training a tiny model. Peaks of each phase are kept too; weights that a model maps from its file count once they are
read. ``shared / this`` is the quotient of the trainer as shipped and the row. The roles' runs give the same scores and
losses, to the last bit where a model each is a copy, and the heads' up to rounding: the CSV file has them.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import record
from bench.choose import device_of
from bench.core import SelectionError
from bench.memory_run import HEADS, HEAPS, MODELS, ROLES, Setting
from bench.report import number

SCRIPT = Path(__file__).with_name("memory_run.py")
PHASES = ("loading", "sampling", "scoring", "updating")
MIB, NAN = float(1 << 20), math.nan
SETS = {
    "roles": "roles over one model against a model for each, in micro-batches of two sequences",
    "heads": "fused ops against materialised logits, in one micro-batch, at a vocabulary of 151936",
}


@dataclass(slots=True)
class Row:
    """A setting with what its process took, in MiB; NaN, ``n/a`` in the file, where there is no figure."""

    setting: Setting
    status: str = "ok"  # ok, failed or skipped
    reason: str = ""
    peak: float = NAN
    beyond: float = NAN  # of what the process held before its run
    before: float = NAN
    models: float = NAN  # held once everything is loaded
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    estimate: float = NAN  # the trainer's own, of the run as shipped
    ratio: float = NAN  # beyond of the trainer as shipped / beyond of this
    whole_ratio: float = NAN  # of the whole processes' peaks
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def cells(self) -> dict[str, object]:
        """The row as columns of the CSV file."""
        figures = {
            "ratio": self.ratio, "whole_ratio": self.whole_ratio, "peak_mib": self.peak, "beyond_mib": self.beyond,
            "before_mib": self.before, "models_mib": self.models, "estimate_mib": self.estimate,
        }  # fmt: skip
        phases = {f"{name}_mib": self.phases.get(name, NAN) for name in PHASES}
        head = {"status": self.status, "reason": self.reason}
        return {**dataclasses.asdict(self.setting), **head, **figures, **phases, **self.metrics}


def default_settings(name: str) -> Iterator[Setting]:
    """The settings of a set; the trainer as shipped comes first in each group."""
    if name == "roles":
        for model, dtype, kinds in (
            ("qwen2.5-0.5b", "bfloat16", ("shared", "two", "separate")),
            ("qwen2.5-0.5b", "float32", ("shared", "separate")),
            ("smollm2-135m", "float32", ("shared", "separate", "full")),
        ):
            yield from (Setting(model, dtype, roles, micro_batch=2) for roles in kinds)
    else:
        for heap in HEAPS:
            yield from (Setting("qwen2.5-0.5b", head=head, heap=heap) for head in HEADS)


def settings(arguments: argparse.Namespace) -> list[Setting]:
    """What to run: the default settings with what was asked for put in their place, each once.

    Raises:
        SelectionError: micro-batches do not make up a batch.
    """
    found = [setting for name in arguments.set for setting in default_settings(name)]
    replaced = {"batch": arguments.batch, "micro_batch": arguments.micro_batch, "prompt": arguments.prompt,
                "completion": arguments.completion, "checkpointing": arguments.checkpointing}  # fmt: skip
    replaced = {name: value for name, value in replaced.items() if value is not None}
    axes = {"model": arguments.model, "dtype": arguments.dtype, "roles": arguments.roles, "head": arguments.head,
            "heap": arguments.heap}  # fmt: skip
    for name, values in axes.items():
        if values:
            found = [dataclasses.replace(setting, **{name: value}) for setting in found for value in values]
    found = list(dict.fromkeys(dataclasses.replace(setting, **replaced) for setting in found))
    for setting in found:
        if setting.batch % setting.micro_batch:
            raise SelectionError(f"--batch {setting.batch} is no multiple of --micro-batch {setting.micro_batch}")
    return found


def available() -> float:
    """Bytes of main memory that a new process can have; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")), math.inf)


def process(what: str, setting: Setting, folder: Path, threads: int | None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if setting.heap == "mapped":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    return subprocess.run(
        [sys.executable, str(SCRIPT), what, json.dumps(dataclasses.asdict(setting)), str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def measure(setting: Setting, folder: Path, threads: int | None = None) -> Row:
    """One setting in a process of its own; whatever goes wrong there is the row's reason."""
    free = available()
    if setting.needs > free:
        return Row(setting, "skipped", f"needs {setting.needs / 2**30:.1f} GiB and more, {free / 2**30:.1f} are free")
    if not (folder / "base").is_dir():
        done = process("prepare", setting, folder, threads)
        if done.returncode:
            return Row(setting, "failed", f"models: {last_line(done)}")
    done = process("run", setting, folder, threads)
    if done.returncode:
        return Row(setting, "failed", last_line(done))
    return row_of(setting, json.loads(done.stdout.splitlines()[-1]))


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}, as when memory runs out"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit status {done.returncode}"


def row_of(setting: Setting, told: dict[str, object]) -> Row:
    peaks: dict[str, int] = told["peaks"]  # type: ignore[assignment]
    sizes = {name: told[name] / MIB for name in ("before", "models", "estimate")}  # type: ignore[operator]
    peak = max(peaks.values()) / MIB
    phases = {name: peaks.get(name, NAN) / MIB for name in PHASES}
    metrics: dict[str, float] = told["metrics"]  # type: ignore[assignment]
    return Row(setting, peak=peak, beyond=peak - sizes["before"], phases=phases, metrics=metrics, **sizes)


def set_against_shipped(rows: Sequence[Row]) -> None:
    """Fills the ratios of every row, from the row that differs from it in roles and head alone."""
    shipped = {row.setting: row for row in rows if row.status == "ok"}
    for row in rows:
        ours = shipped.get(dataclasses.replace(row.setting, roles="shared", head="srppo"))
        if ours is not None and row.status == "ok":
            row.ratio, row.whole_ratio = ours.beyond / row.beyond, ours.peak / row.peak


def table(rows: Sequence[Row]) -> Table:
    result = Table(title="peak memory of one iteration, MiB", title_justify="left", title_style="bold",
                   caption_justify="left")  # fmt: skip
    for name in ("roles", "head", "heap", "peak", "beyond imports", "loaded", *PHASES, "shared / this", "whole"):
        result.add_column(name, justify="left" if name in ("roles", "head", "heap") else "right", no_wrap=True)
    group = None
    for row in rows:
        s = row.setting
        if group != (s.model, s.dtype, s.batch, s.micro_batch, s.prompt, s.completion, s.checkpointing):
            group = (s.model, s.dtype, s.batch, s.micro_batch, s.prompt, s.completion, s.checkpointing)
            result.add_section()
            result.add_row(Text(f"{s.model} {s.dtype}, {s.batch} x ({s.prompt} + {s.completion}) tokens", "bold cyan"))
            checkpointed = ", gradient checkpointing" if s.checkpointing else ""
            result.add_row(Text(f"  in micro-batches of {s.micro_batch}{checkpointed}", "cyan"))
        if row.status != "ok":
            result.add_row(s.roles, s.head, s.heap, Text(row.status, "yellow"))
            continue
        figures = [row.peak, row.beyond, row.models, *(row.phases[name] for name in PHASES)]
        result.add_row(s.roles, s.head, s.heap, *(f"{value:.0f}" for value in figures), number(row.ratio),
                       number(row.whole_ratio))  # fmt: skip
    reasons = [
        f"{r.setting.model} {r.setting.roles} {r.setting.head}: {r.status}: {r.reason}" for r in rows if r.reason
    ]
    result.caption = Text("\n".join(reasons)) if reasons else None
    return result


def write(rows: Sequence[Row], path: Path, about: record.Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {name: getattr(about, name) for name in ("machine", "threads", "date", "commit", "native", "versions")}
    lines = [{**row.cells(), **run} for row in rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([record.to_text(line.get(name, NAN)) for name in names] for line in lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="bench/memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--set", nargs="+", choices=SETS, default=list(SETS), help="; ".join(f"{k}: {v}" for k, v in SETS.items()))
    add("--model", nargs="+", choices=MODELS, help="in place of a set's own")
    add("--dtype", nargs="+", choices=("bfloat16", "float32"), help="of the frozen weights")
    add("--roles", nargs="+", choices=ROLES, help="; ".join(f"{k}: {v}" for k, v in ROLES.items()))
    add("--head", nargs="+", choices=HEADS, help="; ".join(f"{k}: {v}" for k, v in HEADS.items()))
    add("--heap", nargs="+", choices=HEAPS, help="; ".join(f"{k}: {v}" for k, v in HEAPS.items()))
    for name in ("batch", "micro-batch", "prompt", "completion"):
        add(f"--{name}", type=positive, help="sequences" if "batch" in name else "tokens")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="gradient checkpointing; on if absent")
    add("--threads", type=positive, help="of each process; absent: torch's own choice")
    add("--models", type=Path, help="folder to keep the random models in; absent: a temporary one")
    add("--out", type=Path, help="CSV file; absent: bench/results/<device>-<date>-memory.csv")
    return result


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a setting failed; 2 for a wrong selection; 130 where it was interrupted."""
    arguments = parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 180)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)  # for the name of the machine, which says how many
    about = record.Run.here(device_of("auto"))
    path = arguments.out or record.RESULTS / about.file_name.replace(".csv", "-memory.csv")
    try:
        chosen = settings(arguments)
        record.require_writable(path)
    except SelectionError as error:
        Console(stderr=True).print(f"bench/memory.py: {error}", markup=False, soft_wrap=True)
        return 2
    rows, notes = [], Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, suppress(KeyboardInterrupt):  # an hour's rows are worth a file
        for setting in chosen:
            notes.print(f"{time.monotonic() - start:6.0f} s  {setting}")
            rows.append(measure(setting, (arguments.models or Path(temporary)) / setting.model, arguments.threads))
    interrupted = len(rows) < len(chosen)
    if interrupted:
        notes.print(f"bench/memory.py: interrupted after {len(rows)} of {len(chosen)} settings")
    if not rows:
        return 130
    set_against_shipped(rows)
    console.print(table(rows))
    write(rows, path, about)
    console.print(f"{len(rows)} rows in {path}", markup=False, highlight=False, soft_wrap=True)
    return 130 if interrupted else int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
