"""PNG plots of a run, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUN_PLOTS = {
    "reward": ["objective/scores", "objective/rlhf_reward", "eval/objective/scores"],
    "reward_per_token": ["objective/scores_per_token", "eval/objective/scores_per_token"],
    "kl": ["objective/kl", "eval/objective/kl"],
    "length": ["completions/mean_length", "eval/completions/mean_length"],
    "demonstrations": ["eval/demonstrations/logp", "eval/demonstrations/logp_sft"],
    "losses": ["loss/policy_avg", "loss/value_avg"],
}
UNITS = {
    "reward": "nats per sequence",
    "reward_per_token": "nats per token",
    "kl": "nats per sequence",
    "length": "tokens",
    "demonstrations": "nats per token",
    "losses": "loss per token",
    "sft_loss": "nats per token",
}


def plot_history(
    history: Sequence[Mapping[str, Any]], folder: Path, plots: Mapping[str, Sequence[str]] = RUN_PLOTS
) -> list[Path]:
    """Draws each plot whose metrics occur in ``history`` (entries with a ``step``) to ``folder/<name>.png``."""
    from matplotlib.figure import Figure

    written = []
    for name, metrics in plots.items():
        curves = {m: [(e["step"], e[m]) for e in history if m in e] for m in metrics}
        curves = {m: points for m, points in curves.items() if points}
        if not curves:
            continue
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for metric, points in curves.items():
            few = len(points) < 25
            axes.plot(
                *zip(*points, strict=True), label=metric, linewidth=1.5, marker="o" if few else None, markersize=3
            )
        axes.set_xlabel("step")
        axes.set_ylabel(UNITS.get(name, ""))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written
