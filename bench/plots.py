"""Pictures of rows: ratio to the floor, peak extra memory, and error, by case and provider."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import Row
from bench.report import case_text, number, provider_name

OURS_COLOUR = "#d1495b"
# A provider has its colour in every picture, whatever else is in it.
COLOURS = {
    "torch": "#30638e", "torch-compile": "#00798c", "torch-compacted": "#5fa8d3", "F.linear_cross_entropy": "#edae49",
    "F.linear_cross_entropy-chunked": "#b08968", "liger-selective": "#6a4c93", "liger-grpo": "#a084ca",
    "liger-flce": "#a084ca", "trl-chunked": "#8ac926", "trl-loop": "#8ac926", "verl": "#222222", "verl-loop": "#222222",
    "cce": "#8d96a3", "quack": "#c77dff", "logits": "#30638e",
}  # fmt: skip
OTHER_COLOUR = "#bbbbbb"


@dataclass(frozen=True, slots=True)
class Picture:
    """One kind of plot."""

    name: str
    label: Callable[[Row], str]
    value: Callable[[Row], float]
    spread: Callable[[Row], tuple[float, float]] | None = None
    least: float = 0.0  # values below it are drawn at it: a logarithmic axis has no 0
    line_at: float | None = None


PICTURES = (
    Picture(
        "ratio",
        lambda row: f"time / {row.floor}",
        lambda row: row.ratio,
        lambda row: (row.ratio_p20, row.ratio_p80),
        line_at=1.0,
    ),
    Picture("memory", lambda row: "peak memory beyond inputs and results, MiB", lambda row: row.extra_mib, least=0.1),
    Picture("error", lambda row: f"{row.error_of} (against fp64)", lambda row: row.max_error, least=1e-10),
    Picture("gradient_error", lambda row: "relative gradient error (worst row, against fp64)",
            lambda row: row.grad_error, least=1e-10),
)  # fmt: skip


def draw(rows: Sequence[Row], folder: Path, stem: str = "", titles: Mapping[str, str] | None = None) -> list[Path]:
    """``<stem><op>-<picture>.png`` for every op and picture that has at least two values; returns the files.

    Args:
        titles: of ops, in place of their names.
    """
    written = []
    for op in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == op and row.status == "ok"]
        for picture in PICTURES:
            shown = [row for row in own if not math.isnan(picture.value(row))]
            if len(shown) < 2:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{stem}{op}-{picture.name}.png"
            draw_one((titles or {}).get(op, op), shown, picture, path)
            written.append(path)
    return written


def draw_one(title: str, rows: Sequence[Row], picture: Picture, path: Path) -> None:
    """Horizontal bars, a group for each case, the provider's name and the figure beside its bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(case_text(row), []).append(row)
    count = len(rows) + 1.6 * len(groups)
    figure = Figure(figsize=(8.4, 1.3 + 0.23 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    position = 0.0
    ticks: list[tuple[float, str]] = []
    values = [max(picture.value(row), picture.least) for row in rows]
    logarithmic = max(values) > 8 * max(min(values), 1e-300)
    for case, members in groups.items():
        axes.text(0.0, position + 0.1, f" {case}", transform=axes.get_yaxis_transform(), fontsize=8, weight="bold",
                  va="center", zorder=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
        position += 1
        for row in members:
            name = provider_name(row)
            value = max(picture.value(row), picture.least)
            colour = OURS_COLOUR if name.startswith("srppo") else COLOURS.get(name, OTHER_COLOUR)
            axes.barh(position, value, height=0.78, color=colour, xerr=error_bar(row, value, picture),
                      error_kw={"elinewidth": 0.8, "ecolor": "#555555"})  # fmt: skip
            end = picture.spread(row)[1] if picture.spread else value
            noisy = "~" if picture.spread and row.noisy else ""
            axes.annotate(noisy + figure_text(picture.value(row)), (max(end, value), position), xytext=(3, 0),
                          textcoords="offset points", va="center", fontsize=7)  # fmt: skip
            ticks.append((position, name))
            position += 1
        position += 0.6
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7.5)
    axes.set_ylim(position - 0.6, -0.7)
    if logarithmic:
        axes.set_xscale("log")
        lows = [picture.spread(row)[0] for row in rows] if picture.spread else values
        axes.set_xlim(min(*lows, *values) / 2, max(values) * 2.5)
        label_decades(axes)
    else:
        highs = [picture.spread(row)[1] for row in rows] if picture.spread else values
        axes.set_xlim(0, max(*highs, *values) * 1.18)
    if picture.line_at is not None:
        axes.axvline(picture.line_at, color="#444444", linewidth=0.9, linestyle="--")
    remarks = (", logarithmic" if logarithmic else "") + (
        "; ~ noisy" if picture.spread and any(row.noisy for row in rows) else ""
    )
    decorate(axes, title, picture.label(rows[0]) + remarks)
    figure.savefig(path, dpi=130)


def label_decades(axes: Any) -> None:
    """1, 2, 5, 10, 20, ... where an axis has few decades, which powers of ten alone would leave without figures."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    if low < 1e-3:
        return
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def decorate(axes: Any, title: str, label: str) -> None:
    axes.set_xlabel(label, fontsize=8.5)
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def error_bar(row: Row, value: float, picture: Picture) -> list[list[float]] | None:
    if picture.spread is None:
        return None
    low, high = picture.spread(row)
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def figure_text(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else number(value)
