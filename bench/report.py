"""Tables of rows: one per op, on a terminal or wherever the output goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.core import Op
from bench.record import Row, Run

STATUS_STYLE = {"wrong": "bold red"}
WITHOUT_FIGURES = ("unavailable", "skipped", "failed")


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, without an exponent where a person would write none."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "inf"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.1e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 4)}f}"


def header(console: Console, run: Run) -> None:
    console.print(Text(f"{run.machine}; commit {run.commit}"))
    console.print(Text(f"srppo's native kernels: {run.native}"))
    console.print(Text(run.versions, style="dim"))


def tables(console: Console, rows: Sequence[Row], ops: Sequence[Op]) -> None:
    """Every op's rows, cases in the order in which they ran."""
    for op in ops:
        own = [row for row in rows if row.op == op.name]
        if own:
            console.print(table(op, own))


def table(op: Op, rows: Sequence[Row]) -> Table:
    """Columns that say nothing in any row are left out; providers without a result go below, with their reason."""
    caption = list(dict.fromkeys(filter(None, map(note, rows))))
    rows = [row for row in rows if row.status not in WITHOUT_FIGURES]
    floor = next((row.floor for row in rows if row.floor), "")
    result = Table(title=f"{op.name}: {op.title}", title_justify="left", title_style="bold", caption_justify="left")
    unmasked = {(*row.case_key[:3], row.provider, row.plan): row.median_ms for row in rows
                if row.mask_density == 1 and row.rows == "random"}  # fmt: skip
    columns = {
        "provider": [Text(provider_name(row)) for row in rows],
        f"/ {floor}" if floor else "ratio": [ratio_cell(row) for row in rows],
        "p20 to p80": [spread_cell(row) for row in rows],
        "cold": [Text(number(row.cold_ratio)) for row in rows],
        f"/ {op.ours}": [Text(number(row.times_ours)) for row in rows],
        "/ unmasked": [unmasked_cell(row, unmasked) for row in rows],
        op.error_of: [Text(number(row.max_error, 2)) for row in rows],
        "gradient error": [Text(number(row.grad_error, 2)) for row in rows],
        "dweight error": [Text(number(row.weight_grad_error, 2)) for row in rows],
        "extra MiB": [Text(number(row.extra_mib)) for row in rows],
        "useful TFLOP/s": [Text(number(row.useful_tflops)) for row in rows],
        "useful GB/s": [Text(number(row.useful_gbs)) for row in rows],
    }
    kept = {name: cells for name, cells in columns.items() if any(cell.plain for cell in cells)}
    for name in kept:
        result.add_column(fill(name, 10), justify="left" if name == "provider" else "right", no_wrap=True)
    case = None
    for index, row in enumerate(rows):
        if row.case_key != case:
            case = row.case_key
            result.add_section()
            result.add_row(Text(case_text(row), style="bold cyan"))
        result.add_row(*(cells[index] for cells in kept.values()), style=STATUS_STYLE.get(row.status))
    if any(row.noisy for row in rows):
        caption.insert(0, "~ noisy: the row's own p80 is more than 10 % above its p20, or it has fewer than 3 samples")
    result.caption = Text("\n".join(caption)) if caption else None
    return result


def case_text(row: Row) -> str:
    mask = "" if row.mask_density == 1 else f", {row.mask_density:g} live"
    rows = "" if row.rows == "random" else f", {row.rows}"
    return f"{row.shape} {row.dtype}{mask}{rows}"


def ratio_cell(row: Row) -> Text:
    text = number(row.ratio)
    return Text(f"~{text}" if row.noisy and text else text)


def spread_cell(row: Row) -> Text:
    return Text("" if math.isnan(row.ratio) else f"{number(row.ratio_p20)} to {number(row.ratio_p80)}")


def unmasked_cell(row: Row, unmasked: dict[tuple[str, ...], float]) -> Text:
    """A masked row's time in units of the same provider's without a mask: what skipping rows has brought."""
    if row.mask_density == 1:
        return Text("")
    full = unmasked.get((*row.case_key[:3], row.provider, row.plan), math.nan)
    return Text(number(row.median_ms / full) if full > 0 else "")


def provider_name(row: Row) -> str:
    return row.provider if row.plan in ("-", "auto") else f"{row.provider} ({row.plan})"


def note(row: Row) -> str:
    """A line below the table: why there is no figure, or what "auto" came to."""
    if row.status != "ok":
        return f"{provider_name(row)}: {row.status}: {row.reason}"
    found = "; ".join(part for part in (row.resolved, row.detail) if part)
    return f"{provider_name(row)}: {found}" if found else ""


def listing(console: Console, ops: Sequence[Op], device: str) -> None:
    """What ``--list`` shows: ops with their shapes, default cases and providers."""
    for op in ops:
        console.print(Text.assemble((op.name, "bold"), f"  {'x'.join(op.shape_names)}  {op.title}"))
        console.print(Text(f"  dtypes: {', '.join(op.dtypes)}; rows: {', '.join(op.rows)}"))
        for case in op.defaults(device):
            console.print(Text(f"  case: {case}"))
        for provider in op.providers:
            plans = [plan for plan in (*provider.plans, *provider.other_plans) if plan != "-"]
            more = f"; plans {', '.join(plans)}" if plans else ""
            on_request = "" if provider.default else "; on request"
            console.print(Text(f"  provider {provider.name}: {provider.note}{more}{on_request}"))
