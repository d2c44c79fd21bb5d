"""A row of results, the CSV file that it is kept in, and the versions that it was measured with."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import math
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from bench.core import SelectionError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("liger-kernel", "trl", "cut-cross-entropy", "quack-kernels", "verl")
PACKAGES = ("srppo", "torch", "triton", "transformers", "peft", *PEERS)
NAN = math.nan
NOT_APPLICABLE = "n/a"


@dataclass(slots=True)
class Row:
    """One provider on one case. Numbers that do not apply are NaN, ``n/a`` in the file."""

    op: str
    provider: str
    plan: str
    shape: str
    dtype: str
    mask_density: float
    rows: str
    device: str
    status: str = "ok"  # ok, unavailable, failed, wrong (its error is gross) or skipped (out of time)
    reason: str = ""
    resolved: str = ""  # backend and plan that "auto" came to
    ratio: float = NAN  # to the floor, in turns with it
    ratio_p20: float = NAN
    ratio_p80: float = NAN
    noisy: bool = False
    times_ours: float = NAN  # this provider's time in units of srppo's on the same case
    max_error: float = NAN  # against fp64
    error_of: str = ""
    grad_error: float = NAN
    weight_grad_error: float = NAN
    extra_mib: float = NAN  # median over visits
    extra_low: float = NAN  # of the visit that took least; absent in files before these columns
    extra_high: float = NAN
    median_ms: float = NAN
    p20_ms: float = NAN
    p80_ms: float = NAN
    cold_ms: float = NAN
    cold_ratio: float = NAN
    samples: int = 0
    visits: int = 0  # that these samples are from; 0 in files before this column
    floor: str = ""
    floor_ms: float = NAN
    useful_tflops: float = NAN
    useful_gbs: float = NAN
    detail: str = ""
    # The run
    machine: str = ""
    threads: int = 0
    date: str = ""
    commit: str = ""
    native: str = ""
    versions: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies a row from run to run."""
        return (
            self.op,
            self.provider,
            self.plan,
            self.shape,
            self.dtype,
            f"{self.mask_density:g}",
            self.rows,
            self.device,
        )

    @property
    def case_key(self) -> tuple[str, ...]:
        """What rows of different providers share."""
        return (self.op, self.shape, self.dtype, f"{self.mask_density:g}", self.rows, self.device)


@dataclass(frozen=True, slots=True)
class Run:
    """What all rows of a run have in common."""

    device: str
    machine: str
    threads: int
    date: str
    commit: str
    native: str
    versions: str
    started: datetime.datetime = field(repr=False)

    @classmethod
    def here(cls, device: str) -> Run:
        now = datetime.datetime.now().astimezone()
        return cls(
            device=device,
            machine=machine(device),
            threads=torch.get_num_threads(),
            date=now.isoformat(timespec="seconds"),
            commit=commit(),
            native=native_kernels(),
            versions=versions(),
            started=now,
        )

    def stamp(self, row: Row) -> Row:
        for name in ("machine", "threads", "date", "commit", "native", "versions"):
            setattr(row, name, getattr(self, name))
        return row

    @property
    def file_name(self) -> str:
        """``<device>-<date>.csv``; the time too, so that a second run of a day does not overwrite the first."""
        return f"{slug(self.machine)}-{self.started:%Y-%m-%d-%H%M}.csv"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def machine(device: str) -> str:
    """The device's name, and for a CPU its number of threads: ratios depend on both."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # no Linux: the architecture's name has to do
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu {name} {capability} {torch.get_num_threads()} threads"


def native_kernels() -> str:
    """Whether srppo's compiled kernels are on; without them its rows measure the plain-torch path."""
    from srppo.environment import describe

    return next((line.partition(": ")[2] for line in describe() if line.startswith("native kernels")), "unknown")


def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def commit() -> str:
    """The checkout's commit, ``+changes`` where the measured code differs from it; ``unknown`` outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+changes" if changed else "")


# -- files ------------------------------------------------------------------------------------------------------------


def to_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return NOT_APPLICABLE if math.isnan(value) else f"{value:.6g}"
    return str(value)


def require_writable(path: Path) -> None:
    """Refuses a file that cannot be written before anything is measured for it.

    Raises:
        SelectionError: the path, and what is in the way.
    """
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise SelectionError(f"cannot write {path}: {error.strerror}") from None


def write(rows: Sequence[Row], path: Path) -> None:
    """All rows to a CSV file. ``max_error`` of a provider that gave no result is its status: no column is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(Row)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            texts = {name: to_text(getattr(row, name)) for name in names}
            if math.isnan(row.max_error):
                texts["max_error"] = row.status if row.status != "ok" else NOT_APPLICABLE
            writer.writerow([texts[name] for name in names])


def read(path: Path) -> list[Row]:
    """Rows of a file that :func:`write` wrote.

    Raises:
        ValueError: a file without this project's columns, or that ends within a row.
    """
    kinds = {f.name: str(f.type) for f in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("op", "provider", "shape", "ratio") if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}: is it a file of bench/run.py?")
        rows = []
        for line in reader:
            if None in line.values():
                raise ValueError(f"{path}, line {reader.line_num} is cut off: was it copied while it was written?")
            rows.append(Row(**{n: from_text(t, kinds[n]) for n, t in line.items() if n in kinds}))
        return rows


def from_text(text: str, kind: str) -> Any:
    if kind == "bool":
        return text == "yes"
    if kind == "int":
        return int(text)
    if kind == "float":
        try:
            return float(text)
        except ValueError:
            return NAN
    return text


def set_against_ours(rows: Iterable[Row], ours: dict[str, str]) -> None:
    """Fills ``times_ours``: the quotient of the ratios, as both were taken against the same floor."""
    rows = list(rows)
    base = {}
    for row in rows:
        if row.status == "ok" and row.provider == ours.get(row.op) and row.plan in ("auto", "-"):
            base[row.case_key] = row.ratio
    for row in rows:
        reference = base.get(row.case_key, NAN)
        if row.status == "ok" and reference > 0:
            row.times_ours = row.ratio / reference
