"""The demo's two pictures, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IN_COLOUR, OUT_COLOUR = "#1f77b4", "#ff7f0e"


def plot_scores(path: Path, scores: Mapping[str, tuple[float, float]]) -> None:
    """Bars of each model's score, in domain and out of domain, to a PNG."""
    figure, (axes,) = new_figure(1, width=7.0, height=1.2 + 0.45 * len(scores))
    places = range(len(scores))
    for offset, colour, label, index in ((-0.2, IN_COLOUR, "in domain", 0), (0.2, OUT_COLOUR, "out of domain", 1)):
        bars = axes.barh([p + offset for p in places], [pair[index] for pair in scores.values()], 0.38, color=colour)
        bars.set_label(label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_yticks(list(places), list(scores))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xlabel("share of held-out prompts answered right, then stopped")
    # Beside the bars: inside, it would cover the ones that reach 1.
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path, dpi=120)


def plot_iterations(path: Path, history: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, float]]) -> None:
    """Score, reward, KL, length and likelihood of held-out demonstrations over SRPPO's iterations, to a PNG.

    Args:
        history: the trainer's metrics, an entry per iteration.
        scores: ``step``, ``in_domain``, ``out_of_domain`` of the iterations at which the score was looked at.
    """
    figure, panels = new_figure(5, width=15.0, height=3.0)
    steps = [entry["step"] for entry in scores]
    panels[0].plot(steps, [entry["in_domain"] for entry in scores], color=IN_COLOUR, label="in domain", marker="o")
    panels[0].plot(
        steps, [entry["out_of_domain"] for entry in scores], color=OUT_COLOUR, label="out of domain", marker="o"
    )
    panels[0].set_ylim(0, 1.03)
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_title("score (held out)")
    curves = {
        "objective/scores": "reward, nats per sequence",
        "objective/kl": "KL to SFT, nats per sequence",
        "completions/mean_length": "length, tokens",
        "eval/demonstrations/logp": "log pi of held-out\ndemonstrations, nats per token",
    }
    for axes, (metric, title) in zip(panels[1:], curves.items(), strict=True):
        points = [(entry["step"], entry[metric]) for entry in history if metric in entry]
        if points:
            axes.plot(*zip(*points, strict=True), color="black", marker="o" if len(points) < 25 else None)
        axes.set_title(title)
    for axes in panels:
        axes.title.set_fontsize(9)
        axes.set_xlabel("SRPPO iteration")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def new_figure(panels: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
