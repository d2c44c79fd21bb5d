"""The demo, end to end, with the files and the public functions that a user would have.

write data  ->  pretrain the base  ->  SFT (and the same, longer)  ->  SRPPO  ->  judge all of them on held-out prompts

What it lets one see: SFT on a few demonstrations of one task; SRPPO from that SFT model on prompts of every task, none
with a demonstration; and three things that cost less than SRPPO: the same SFT trained longer, logits extrapolated past
SFT at decoding, and SFT sampled from at a lower temperature, at which SRPPO is shown, too. All numbers are measured in
the run, none is selected afterwards.

What to look for where SRPPO comes out worse: the largest log-ratios belong to answers that were all but impossible for
the base and that SFT made a little less so. On some seeds the policy finds such answers to one of the tasks (see
``score_by_task`` in results.json): lower-case letters, which all demonstrations have, under "upper". Reward and KL to
SFT far above those of the SFT rows tell, without any score. Extrapolation at decoding, which takes the same ratio a
token at a time, suffers more.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srppo.checkpoint import atomic_folder, require_new_folder, save_model, write_text
from srppo.commands import examples, quiet_libraries
from srppo.config import PipelineConfig, SRPPOConfig
from srppo.console import Console
from srppo.data import Example
from srppo.models import load_model, load_tokenizer
from srppo.roles import Role, frozen_roles
from srppo.sft import run_sft
from srppo.trainer import SRPPOTrainer

from . import world
from .evaluate import Candidate, Judgement, judge
from .model import ModelSize, Pretraining, build_model, build_tokenizer, pretrain
from .plots import plot_iterations, plot_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DemoSettings:
    """Every number of the demo. They were chosen on seeds 0 and 1, once for all seeds; judge them by other seeds."""

    corpus_size: int = 60_000
    demonstrations: int = 32
    prompts: int = 2048
    held_out_per_task: int = 200
    held_out_demonstrations: int = 64
    model: ModelSize = ModelSize()
    pretraining: Pretraining = Pretraining()
    sft_epochs: int = 10  # about what it takes to answer the demonstrated task right on strings not demonstrated
    longer_sft: tuple[int, ...] = (8, 32)  # how many times longer; 32 times is about as long as SRPPO takes
    sft_batch_size: int = 4
    sft_learning_rate: float = 1e-4
    extrapolation_betas: tuple[float, ...] = (1.0, 1 / 3)
    low_temperature: float = 0.5  # at which SFT and SRPPO are sampled from as well
    iterations: int = 60
    prompts_per_iteration: int = 128
    mini_batches: int = 4
    ppo_epochs: int = 1
    learning_rate: float = 3e-4
    value_learning_rate: float = 3e-4
    kl_coef: float = 1.0
    watch_every: int = 10  # iterations between looks at the score while SRPPO runs
    watch_per_task: int = 40


# Seconds instead of minutes, for the test suite: every stage runs, none long enough to learn its task.
QUICK = DemoSettings(
    corpus_size=2000,
    demonstrations=8,
    prompts=64,
    held_out_per_task=8,
    held_out_demonstrations=8,
    model=ModelSize(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    pretraining=Pretraining(steps=40, batch_size=32, warmup_steps=5),
    sft_epochs=1,
    iterations=3,
    prompts_per_iteration=16,
    mini_batches=2,
    watch_every=2,
    watch_per_task=4,
)


@dataclass
class Stopwatch:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def run_demo(
    output_dir: str | Path,
    seed: int = 0,
    quick: bool = False,
    *,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the demo, write everything to ``output_dir`` and print the table.

    Args:
        output_dir: a new or empty folder. It gets ``data/``, ``base/``, ``sft/``, ``sft-longer-8x/`` (...), ``srppo/``
            (models that ``AutoModelForCausalLM`` loads), ``scores.png``, ``iterations.png`` and ``results.json``.
        seed: of the world, of the weights and of everything sampled.
        quick: a version of a few seconds that learns nothing, for tests.
        settings: in place of the default ones.

    Returns:
        What ``results.json`` holds: ``table`` (a dict per row), ``models`` (every number), ``srppo_scores``, ``seed``,
        ``settings``, ``seconds``.

    Raises:
        UserError: ``output_dir`` is not empty, or the seed is no number that SRPPO takes.
    """
    settings = settings or (QUICK if quick else DemoSettings())
    console = console or Console()
    folder = Path(output_dir)
    SRPPOConfig(seed=seed)  # is refused here, and not after a minute of pretraining
    require_new_folder(folder)
    quiet_libraries()
    with one_thread():
        return run_stages(folder, settings, seed, console)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with a single thread, and as before afterwards.

    The matrices are so small that more threads gain little on idle cores; on busy ones, or on many, waiting for each
    other costs several times what they gain. And sums in one order give one result, however many cores there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_stages(folder: Path, settings: DemoSettings, seed: int, console: Console) -> dict[str, Any]:
    """The stages, in order, into an empty folder; see :func:`run_demo`."""
    stopwatch = Stopwatch()
    with stopwatch.time("data and pretraining"):
        source = world.World(seed)
        corpus = source.corpus(settings.corpus_size)
        write_data(folder / "data", source, corpus, settings)
        write_base(folder / "base", corpus, settings, seed, console)
    tokenizer = load_tokenizer(folder / "base")

    sft_rows = {"SFT": ("sft", settings.sft_epochs)}
    for factor in settings.longer_sft:
        sft_rows[f"SFT, {factor}x as long"] = (f"sft-longer-{factor}x", settings.sft_epochs * factor)
    with stopwatch.time("SFT, all lengths"):
        for name, epochs in sft_rows.values():
            stage = sft_config(folder, name, epochs, settings, seed)
            demonstrations = load(stage, tokenizer, folder / "data" / "demonstrations.jsonl")
            run_sft(stage, train_dataset=demonstrations, output_dir=folder / name, tokenizer=tokenizer, console=console)

    args = srppo_config(folder, settings, seed)
    base, sft = frozen_roles(args, str(folder / "base"), str(folder / "sft"), share=False)
    held_out_prompts = load(args, tokenizer, folder / "data" / "held_out.jsonl")
    with stopwatch.time("SRPPO"):
        watch = ScoreWatch(settings, held_out_prompts, base, sft, tokenizer, seed)
        trainer = SRPPOTrainer(
            str(folder / "sft"),
            str(folder / "base"),
            args,
            load(args, tokenizer, folder / "data" / "prompts.jsonl"),
            load(args, tokenizer, folder / "data" / "held_out_demonstrations.jsonl"),
            processing_class=tokenizer,
            callbacks=[watch],
            console=console,
        )
        trainer.train()

    candidates = [Candidate("base", base)]
    for row, (name, _) in sft_rows.items():
        candidates.append(Candidate(row, sft if name == "sft" else Role(name, load_model(folder / name, args))))
    for beta in settings.extrapolation_betas:
        candidates.append(Candidate(f"extrapolated β={beta:.2g}", sft, beta))
    # Loaded from its folder, as a user would: what is judged is what was written.
    policy = Role("policy", load_model(folder / "srppo", args))
    candidates.append(Candidate("SRPPO", policy))
    for row, role in (("SFT", sft), ("SRPPO", policy)):
        candidates.append(Candidate(f"{row}, T={settings.low_temperature:.2g}", role, None, settings.low_temperature))
    with stopwatch.time("evaluation"):
        judgements = judge_all(candidates, sft, base, held_out_prompts, tokenizer, seed, console)

    results = {
        "table": [table_row(name, judgement) for name, judgement in judgements.items()],
        "models": {name: judgement.as_dict() for name, judgement in judgements.items()},
        "srppo_scores": watch.history,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "seconds": {stage: round(seconds, 1) for stage, seconds in stopwatch.seconds.items()},
    }
    plot_scores(
        folder / "scores.png", {name: (j.in_domain.score, j.out_of_domain.score) for name, j in judgements.items()}
    )
    plot_iterations(folder / "iterations.png", trainer.history, watch.history)
    write_text(folder / "results.json", json.dumps(results, indent=1))
    report(results, judgements, folder, settings, console)
    return results


# -- files ------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, source: world.World, corpus: list[world.Example], settings: DemoSettings) -> None:
    """The generated data as JSON lines, with the columns that ``srppo train`` reads."""
    files = {
        "corpus": corpus,
        "demonstrations": source.demonstrations(settings.demonstrations),
        "prompts": source.prompts(settings.prompts),
        "held_out": source.held_out(settings.held_out_per_task),
        "held_out_demonstrations": source.held_out_demonstrations(settings.held_out_demonstrations),
    }
    for name, rows in files.items():
        lines = []
        for row in rows:
            columns = {"prompt": row.prompt, "completion": row.completion}
            lines.append(json.dumps({key: value for key, value in columns.items() if value is not None}) + "\n")
        write_text(folder / f"{name}.jsonl", "".join(lines))


def load(args: SRPPOConfig, tokenizer: PreTrainedTokenizerBase, path: Path) -> list[Example]:
    """A data file as the trainer takes it."""
    return examples(args, tokenizer, str(path), "train")


def write_base(folder: Path, corpus: list[world.Example], settings: DemoSettings, seed: int, console: Console) -> None:
    """Pretrain the base model and save it with its tokenizer."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, settings.model, seed=seed)
    console.note(
        f"Base: a Llama of {sum(p.numel() for p in model.parameters()):,} parameters, {len(corpus):,} lines of corpus"
    )
    pretrain(model, tokenizer, corpus, settings.pretraining, seed=seed, console=console)
    with atomic_folder(folder) as writing:
        save_model(Role("base", model), tokenizer, writing)


# -- configurations ---------------------------------------------------------------------------------------------------


def limits() -> dict[str, Any]:
    """Longest prompt and completion of the world, in tokens (a byte each), with the stop token."""
    prompt = max(len(world.make_prompt(task, "a" * world.MAX_LETTERS)) for task in world.TASKS)
    return {"max_prompt_length": prompt, "max_completion_length": world.longest_completion() + 1}


def sft_config(folder: Path, name: str, epochs: int, settings: DemoSettings, seed: int) -> PipelineConfig:
    return PipelineConfig(
        base_model_name_or_path=str(folder / "base"),
        dataset_name=str(folder / "data" / "demonstrations.jsonl"),
        output_dir=str(folder / name),
        per_device_train_batch_size=settings.sft_batch_size,
        sft_learning_rate=settings.sft_learning_rate,
        sft_num_train_epochs=epochs,
        report_to=["none"],
        seed=seed,
        **limits(),
    )


def srppo_config(folder: Path, settings: DemoSettings, seed: int) -> SRPPOConfig:
    return SRPPOConfig(
        base_model_name_or_path=str(folder / "base"),
        sft_model_name_or_path=str(folder / "sft"),
        dataset_name=str(folder / "data" / "prompts.jsonl"),
        output_dir=str(folder / "srppo"),
        per_device_train_batch_size=settings.prompts_per_iteration // settings.mini_batches,
        num_mini_batches=settings.mini_batches,
        num_ppo_epochs=settings.ppo_epochs,
        learning_rate=settings.learning_rate,
        value_learning_rate=settings.value_learning_rate,
        kl_coef=settings.kl_coef,
        kl_reference="sft",
        max_steps=settings.iterations,
        eval_steps=settings.watch_every,
        log_completions=settings.iterations // 2,
        report_to=["none"],
        seed=seed,
        **limits(),
    )


# -- judging ----------------------------------------------------------------------------------------------------------


class ScoreWatch:
    """A trainer callback that looks at the score every few iterations, on part of the held-out prompts.

    Only watched: nothing is selected or stopped by it.
    """

    def __init__(
        self,
        settings: DemoSettings,
        held_out: Sequence[Example],
        base: Role,
        sft: Role,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
    ) -> None:
        self.settings, self.base, self.sft, self.tokenizer, self.seed = settings, base, sft, tokenizer, seed
        self.held_out = held_out[: settings.watch_per_task * len(world.TASKS)]
        self.history = [self.look(0, sft)]

    def look(self, step: int, policy: Role) -> dict[str, float]:
        found = judge(
            Candidate("policy", policy), self.sft, self.base, self.held_out, self.tokenizer,
            max_completion_length=limits()["max_completion_length"], seed=self.seed,
        )  # fmt: skip
        return {"step": step, "in_domain": found.in_domain.score, "out_of_domain": found.out_of_domain.score}

    def __call__(self, trainer: SRPPOTrainer, step: int, metrics: dict[str, float]) -> None:
        if step % self.settings.watch_every == 0:
            self.history.append(self.look(step, trainer.roles.policy))


def judge_all(
    candidates: Sequence[Candidate],
    sft: Role,
    base: Role,
    held_out: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    console: Console,
) -> dict[str, Judgement]:
    """Every candidate's judgement, by name, in order."""
    judgements = {}
    with console.progress("Evaluation", len(candidates)) as bar:
        for candidate in candidates:
            bar.status(candidate.name)
            judgements[candidate.name] = judge(
                candidate, sft, base, held_out, tokenizer,
                max_completion_length=limits()["max_completion_length"], seed=seed,
            )  # fmt: skip
            bar.advance(0)
    return judgements


def table_row(name: str, judgement: Judgement) -> dict[str, Any]:
    """A row of the table; "in" is the task with demonstrations, "out" the five others."""
    row: dict[str, Any] = {"model": name}
    for metric in ("score", "reward", "kl_to_sft", "length"):
        row[f"{metric}_in"] = getattr(judgement.in_domain, metric)
        row[f"{metric}_out"] = getattr(judgement.out_of_domain, metric)
    return row


def shown_row(row: dict[str, Any]) -> dict[str, str]:
    """The same for a terminal of 80 columns, "in / out"."""

    def pair(metric: str, digits: int) -> str:
        return f"{row[f'{metric}_in']:.{digits}f} / {row[f'{metric}_out']:.{digits}f}"

    return {
        "model": row["model"],
        "score": pair("score", 2),
        "reward": pair("reward", 1),
        "KL to SFT": pair("kl_to_sft", 2),
        "length": pair("length", 1),
    }


def report(
    results: dict[str, Any], judgements: dict[str, Judgement], folder: Path, settings: DemoSettings, console: Console
) -> None:
    """What the run found, for a person: samples, the table, how to read it, and where the files are."""
    samples = [
        {"prompt": prompt, "base": base[1], "SFT": sft[1], "SRPPO": tuned[1]}
        for (prompt, _), base, sft, tuned in zip(
            judgements["base"].samples, judgements["base"].samples, judgements["SFT"].samples,
            judgements["SRPPO"].samples, strict=True,
        )
    ]  # fmt: skip
    console.table("One sample per task", samples)
    console.table(
        f"Held-out prompts, in domain / out of domain (seed {results['seed']})",
        [shown_row(row) for row in results["table"]],
    )
    console.note(
        f"score: share of {settings.held_out_per_task} held-out prompts per task answered right, then stopped. In "
        f"domain is '{world.DEMONSTRATED_TASK}', the task of the {settings.demonstrations} demonstrations; out of "
        "domain are the five others. Reward (log pi_sft - log pi_base) and KL to SFT are in nats per completion, "
        "length in tokens. Extrapolated: the SFT model, decoded from (1 + 1/β) log pi_sft - 1/β log pi_base. T: the "
        "temperature of sampling, 1 where none is said."
    )
    console.note(f"Models, plots (scores.png, iterations.png) and every number (results.json) are in {folder}")
    total = sum(results["seconds"].values())
    parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items())
    console.note(f"{total:.0f} s in all: {parts}")
