"""SmolLM2-135M, 64 demonstrations, many prompts: from nothing to an SRPPO-tuned model and a table, on a CPU.

    python examples/smollm2/run.py

fetches and converts (see prepare.py), runs ``srppo train`` with config.yaml, and judges base, SFT and SRPPO model with
``srppo eval``. Settings given here go to ``srppo train`` and win over config.yaml: ``run.py --max_steps 4`` is a quick
look. With ``--results FOLDER``, what the results page of a run needs is copied there: metrics, plots, table.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srppo.checkpoint import require_new_folder, write_text
from srppo.cli import main as srppo
from srppo.config import read_yaml
from srppo.errors import UserError

HERE = Path(os.path.relpath(Path(__file__).parent))  # relative, so that a log can be shared as it is
CONFIG = HERE / "config.yaml"
QUESTIONS = HERE / "questions.jsonl"
COLUMNS = {
    "reward": "eval/objective/scores",
    "reward per token": "eval/objective/scores_per_token",
    "KL to SFT": "eval/objective/kl",
    "length": "eval/completions/mean_length",
    "cut": "eval/completions/clipped_ratio",
    "held-out log-likelihood": "eval/demonstrations/logp",
    "right number": "eval/exact_match",
}


def run(work_dir: Path, options: Sequence[str], results: Path | None) -> None:
    """The whole example; each step is an ``srppo`` command, printed as one would type it."""
    from prepare import prepare

    output = work_dir / "run"
    if not given("--resume_from_checkpoint", options):
        require_new_folder(output, "the run's folder")
    prepare(work_dir)
    paths = ["--base_model_name_or_path", str(work_dir / "model"), "--dataset_name", str(work_dir / "data"),
             "--output_dir", str(output)]  # fmt: skip
    command("train", "--config", str(CONFIG), *paths, *options)
    judged = judge(work_dir, output)
    table = results_table(judged, read_metrics(output / "metrics.jsonl"))
    write_text(output / "table.md", table)
    if results is not None:
        collect(output, results)
    print(table)


@contextmanager
def errors_told(script: str) -> Iterator[None]:
    """Ends the script with a line for what a user can mend, and for Ctrl-C."""
    try:
        yield
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{script}: interrupted; what was downloaded and converted is kept for the next run", file=sys.stderr)
        raise SystemExit(130) from None


def given(name: str, options: Sequence[str]) -> bool:
    return any(option.split("=", 1)[0] == name for option in options)


def require_own_paths(options: Sequence[str]) -> None:
    for option in ("--base_model_name_or_path", "--dataset_name", "--output_dir"):
        if given(option, options):
            raise UserError(f"{option} is set by this script, to a folder in --work_dir")


def command(*arguments: str) -> None:
    """Runs an ``srppo`` command in this process, which spares importing torch and transformers each time."""
    print("$ srppo " + " ".join(arguments), file=sys.stderr, flush=True)
    code = srppo(arguments)
    if code != 0:
        raise SystemExit(code)


def judge(work_dir: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Metrics on the held-out problems and samples for our own questions, of each model by name.

    The extrapolated SFT model is the baseline that needs no training: the policy that PPO with this KL penalty would
    reach if every token could be chosen on its own.
    """
    settings = read_yaml(output / "srppo_config.yaml")
    base, sft = str(work_dir / "model"), settings["sft_model_name_or_path"] or str(output / "sft")
    beta = str(settings["kl_coef"])
    models = {
        "base": ("--model_name_or_path", base),
        "SFT": (),
        "SFT, logits extrapolated": ("--extrapolate", beta),
        "SRPPO": ("--model_name_or_path", str(output)),
    }
    if float(beta) <= 0:
        del models["SFT, logits extrapolated"]  # it is the optimum at a KL coefficient, and there is none at 0
    common = ["--config", str(output / "srppo_config.yaml"), "--sft_model_name_or_path", sft]
    judged = {}
    for name, options in models.items():
        judged[name] = {"samples": []}
        for key, data in {"metrics": work_dir / "data", "samples": QUESTIONS}.items():
            place = output / "eval" / f"{slug(name)}-{key}.jsonl"
            metrics, rows = evaluated(place, *common, *options, "--dataset_name", str(data))
            judged[name][key] = metrics if key == "metrics" else [row["completion"] for row in rows]
    return judged


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def evaluated(place: Path, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of an ``srppo eval``, and its row for each prompt, which are kept in ``place``."""
    command("eval", *options, "--output_file", str(place))
    first, *rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    return first["metrics"], rows


def read_metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results_table(judged: dict[str, dict[str, Any]], history: list[dict[str, float]]) -> str:
    """Markdown: the models side by side, the run's course, and what each model says to our own questions."""
    lines = ["## Held-out problems", "", row("model", *COLUMNS), rule(len(COLUMNS) + 1)]
    for name, result in judged.items():
        numbers = (result["metrics"].get(metric) for metric in COLUMNS.values())
        lines.append(row(name, *("-" if number is None else f"{number:.3f}" for number in numbers)))
    lines += ["", *course(history), "", "## Samples", "", row("prompt", *judged), rule(len(judged) + 1)]
    prompts = [json.loads(line)["prompt"][0]["content"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    for place, prompt in enumerate(prompts):
        lines.append(row(prompt, *(result["samples"][place].replace("\n", " ⏎ ") for result in judged.values())))
    return "\n".join(lines) + "\n"


def course(history: list[dict[str, float]]) -> list[str]:
    """First against last iterations, and where the time went."""
    steps = [entry for entry in history if "objective/scores" in entry]
    if not steps:
        return ["No iteration was run."]
    span = min(5, len(steps))
    shown = {
        "reward": "objective/scores",
        "reward per token": "objective/scores_per_token",
        "KL to SFT": "objective/kl",
        "length": "completions/mean_length",
        "seconds, sampling": "time/rollout",
        "seconds, scoring": "time/score",
        "seconds, update": "time/update",
    }
    lines = [f"## {len(steps)} iterations", "", row("mean of", f"first {span}", f"last {span}"), rule(3)]
    for name, metric in shown.items():
        means = (sum(entry[metric] for entry in part) / span for part in (steps[:span], steps[-span:]))
        lines.append(row(name, *(f"{mean:.3f}" for mean in means)))
    return lines


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rule(columns: int) -> str:
    return "|" + "---|" * columns


def collect(output: Path, folder: Path) -> None:
    """Copies what may be published: measurements, but neither weights nor the data's own texts."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    shutil.copy(output / "metrics.jsonl", folder / "metrics.jsonl")
    if (output / "sft").is_dir():  # else the SFT model was given, and is another run's
        shutil.copy(output / "sft" / "metrics.jsonl", folder / "sft_metrics.jsonl")
    for name in ("table.md", "srppo_config.yaml"):
        shutil.copy(output / name, folder / name)
    for plot in [*(output / "plots").glob("*.png"), *(output / "sft" / "plots").glob("*.png")]:
        shutil.copy(plot, folder / "plots" / plot.name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="every other option goes to srppo train",
        allow_abbrev=False,
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/smollm2"), help="default: %(default)s")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="copy metrics, plots and table there")
    known, options = parser.parse_known_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model may say what a terminal's encoding lacks
    with errors_told("run"):
        require_own_paths(options)
        run(known.work_dir, options, known.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
