"""What each command of the command line does, as functions of a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srppo import distributed
from srppo.checkpoint import (
    checkpoints,
    claimed,
    current_checkpoints,
    require_checkpoint,
    require_file,
    require_latest,
    require_new_folder,
)
from srppo.config import PipelineConfig, SRPPOConfig
from srppo.console import Console
from srppo.data import Example, as_examples, filler_token, load_rows, stop_tokens
from srppo.errors import UserError
from srppo.models import check_positions, check_prompts, check_tokens, config_of, tokenizer_for
from srppo.roles import frozen_roles, policy_to_judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def quiet_libraries() -> None:
    """Other libraries' progress bars and deprecation notes are for their developers, not for a run's log."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")


def shared_console() -> Console:
    """Joins the other processes, where there are any; the first of them alone prints."""
    distributed.start()
    return Console(quiet=not distributed.is_main())


def require(args: PipelineConfig, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise UserError(f"--{name} is needed: {PipelineConfig.__dataclass_fields__[name].metadata['help']}")


def examples(
    args: SRPPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    split: str,
    *,
    missing_split_ok: bool = False,
    prompts_only: bool = False,
) -> list[Example]:
    rows = load_rows(source, split, missing_split_ok=missing_split_ok)
    return as_examples(rows, tokenizer, stop_tokens(tokenizer, args.stop_token_ids), args, prompts_only=prompts_only)


def load_data(
    args: PipelineConfig, tokenizer: PreTrainedTokenizerBase, console: Console, *, prompts_only: bool = False
) -> tuple[list[Example], list[Example]]:
    """Training and evaluation rows; what is missing is said in one line.

    Args:
        prompts_only: completions of training rows, which only SFT reads, are left out, however long.
    """
    assert args.dataset_name is not None
    train = examples(args, tokenizer, args.dataset_name, args.dataset_train_split, prompts_only=prompts_only)
    if args.prompt_dataset_name is not None:
        train += examples(args, tokenizer, args.prompt_dataset_name, args.dataset_train_split, prompts_only=True)
    if not train:
        raise UserError(f"{args.dataset_name} has no rows: there is nothing to train on")
    held_out = examples(args, tokenizer, args.dataset_name, args.dataset_test_split, missing_split_ok=True)
    if not held_out:
        console.note(
            f"{args.dataset_name} has no rows in a split {args.dataset_test_split!r}: training goes without evaluation"
        )
    return train, held_out


def sft(args: PipelineConfig, options: argparse.Namespace) -> None:
    from srppo.sft import run_sft

    console = shared_console()
    require(args, "base_model_name_or_path", "dataset_name")
    distributed.on_main(lambda: require_new_folder(Path(args.output_dir)))
    tokenizer = tokenizer_for(None, args.base_model_name_or_path, args)
    without_prompts = dataclasses.replace(args, prompt_dataset_name=None)  # of a file for train: SFT reads none
    train, held_out = load_data(without_prompts, tokenizer, console)
    run_sft(
        args,
        train_dataset=train,
        eval_dataset=held_out,
        output_dir=args.output_dir,
        tokenizer=tokenizer,
        console=console,
    )
    distributed.finish()


def require_new_run(output: Path, *, makes_sft: bool) -> None:
    """Stops where a run would write over another. If all that this one has done is its SFT stage, or less, the message
    says how to go on from there."""
    made = output / "sft"
    whole = any((made / name).is_file() for name in ("config.json", "adapter_config.json"))
    hint, there = "", list(output.iterdir()) if output.is_dir() else []
    left = [entry for entry in there if entry.name.startswith(".writing-")]  # by a process that was killed
    if makes_sft and whole and there == [made]:
        hint = "; --resume_from_checkpoint latest goes on from the SFT model in it"
    elif makes_sft and there == left:
        hint = "; all in it is what a killed run was writing: --resume_from_checkpoint latest begins again"
    require_new_folder(output, hint=hint)


def train(args: PipelineConfig, options: argparse.Namespace) -> None:
    from srppo.engines import Sampling, VLLMEngine, make_engine
    from srppo.rollout_store import require_folders
    from srppo.sft import run_sft
    from srppo.trainer import SRPPOTrainer

    console = shared_console()
    require(args, "base_model_name_or_path", "dataset_name")
    output, resume = Path(args.output_dir), args.resume_from_checkpoint
    made = (output if resume is None or resume == "latest" else Path(resume).parent) / "sft"  # by this run's SFT stage
    model = args.sft_model_name_or_path
    if resume is None and not (model is not None and Path(model).resolve() == made.resolve()):
        # with the SFT model that is there, a run goes on after its first stage
        distributed.on_main(lambda: require_new_run(output, makes_sft=model is None))
    elif resume == "latest":
        distributed.on_main(lambda: require_latest(output, args.save_rollouts))
    elif resume is not None:
        named = Path(resume)
        distributed.on_main(lambda: require_checkpoint(named))
    if resume is None:  # before SFT
        require_folders(args.save_rollouts, args.from_rollouts, range(1, args.max_steps + 1))
    tokenizer = tokenizer_for(model, args.base_model_name_or_path, args)
    train_examples, held_out = load_data(args, tokenizer, console, prompts_only=model is not None)
    assert args.base_model_name_or_path is not None
    stops = stop_tokens(tokenizer, args.stop_token_ids)
    engine = make_engine(args, Sampling.of(args, stops, filler_token(tokenizer, stops)))
    if model is None:
        model = str(made)
        begins = resume == "latest" and distributed.on_main(lambda: not made.exists() and not checkpoints(output))
        if resume is None or begins:
            # What would stop PPO and can be known now. Without demonstrations SFT does not begin.
            demonstrated = any(example.completion_ids is not None for example in train_examples)
            if demonstrated and (config := config_of(args.base_model_name_or_path, args)) is not None:
                check_prompts(config, [*train_examples, *held_out], args)
            if isinstance(engine, VLLMEngine) and args.from_rollouts is None:
                distributed.on_main(lambda: engine.models(adapters=args.use_peft))
            with distributed.held_by_main(claimed(output)):
                run_sft(args, train_dataset=train_examples, eval_dataset=held_out, output_dir=model,
                        tokenizer=tokenizer, console=console)  # fmt: skip
        elif not distributed.on_main(made.is_dir):
            raise UserError(f"there is no SFT model in {made}: give the run's own with --sft_model_name_or_path")
    trainer = SRPPOTrainer(
        model, args.base_model_name_or_path, args, train_examples, held_out, processing_class=tokenizer,
        console=console, engine=engine,
    )  # fmt: skip
    try:
        trainer.train()
        distributed.finish()
    except KeyboardInterrupt:
        saved = current_checkpoints(trainer.output_dir)
        if saved:
            resume = f"resume with --resume_from_checkpoint {saved[-1]}"
        else:
            place = " from its SFT model" if args.sft_model_name_or_path is None else ""
            resume = f"no checkpoint was due yet (save_steps); start again{place} with --resume_from_checkpoint latest"
        done = f"after iteration {trainer.step}: metrics up to there are in {trainer.output_dir}"
        console.note(f"stopped {done if trainer.step else 'before the first iteration was done'}; {resume}")
        raise


def training_nothing(args: PipelineConfig) -> PipelineConfig:
    """The settings where all weights are frozen, and may be in 16 or 4 bit on a GPU as those under adapters are."""
    return dataclasses.replace(args, use_peft=True)


def score(args: PipelineConfig, options: argparse.Namespace) -> None:
    """JSON lines with the log-ratio of each given completion."""
    from srppo.cli import lines_to
    from srppo.ppo import logprobs
    from srppo.rollout import collate_demonstrations

    console, args = Console(), training_nothing(args)
    require(args, "base_model_name_or_path", "sft_model_name_or_path", "dataset_name")
    require_file(options.output_file)
    assert args.base_model_name_or_path and args.sft_model_name_or_path and args.dataset_name
    tokenizer = tokenizer_for(args.sft_model_name_or_path, args.base_model_name_or_path, args)
    stops = stop_tokens(tokenizer, args.stop_token_ids)
    rows = examples(args, tokenizer, args.dataset_name, args.dataset_train_split)
    if not rows:
        raise UserError(f"{args.dataset_name} has no rows: there is nothing to score")
    scorable = [row for row in rows if row.completion_ids is not None]
    if not scorable:
        raise UserError(f"{args.dataset_name} has no row with a completion: there is nothing to score")
    if len(scorable) < len(rows):
        console.note(f"{len(rows) - len(scorable)} of {len(rows)} rows have no completion and are skipped")
    rows = scorable
    base, sft_model = frozen_roles(args, args.base_model_name_or_path, args.sft_model_name_or_path)
    check_positions(base.causal_lm.config, [len(r.prompt_ids) + len(r.completion_ids or ()) for r in rows])
    pad = filler_token(tokenizer, stops)
    check_tokens(base.causal_lm, rows, [*stops, pad])
    scores = []
    texts = functools.cache(lambda token: tokenizer.decode([token]))  # 5 microseconds each
    with lines_to(options.output_file) as write, console.progress("scoring", len(rows)) as progress:
        for start in range(0, len(rows), args.per_device_train_batch_size):
            part = rows[start : start + args.per_device_train_batch_size]
            rollout = collate_demonstrations(part, pad_token_id=pad, stop_token_ids=stops, device=base.device)
            pair = [logprobs(role, rollout, temperature=args.score_temperature)[0].cpu() for role in (sft_model, base)]
            for example, logp_sft, logp_base in zip(part, *pair, strict=True):
                result = scored(example, tokenizer, logp_sft, logp_base, texts)
                scores.append(result["score"])
                write(result)
            progress.advance(int(rollout.completion_mask.sum()), steps=len(part))
    console.note(f"{len(scores)} completions, mean score {sum(scores) / len(scores):.4f} nats")


def scored(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    logp_sft: torch.Tensor,
    logp_base: torch.Tensor,
    text_of: Callable[[int], str],
) -> dict[str, Any]:
    ids = example.completion_ids
    assert ids is not None
    logp_sft, logp_base = logp_sft[: len(ids)], logp_base[: len(ids)]
    rewards = logp_sft - logp_base
    return {
        **example.key,
        "prompt": tokenizer.decode(example.prompt_ids),
        "completion": tokenizer.decode(ids),
        "score": rewards.sum().item(),
        "score_per_token": rewards.mean().item(),
        "logp_sft": logp_sft.sum().item(),
        "logp_base": logp_base.sum().item(),
        "tokens": [text_of(token) for token in ids],
        "token_ids": ids,
        "rewards": rewards.tolist(),
        "logps_sft": logp_sft.tolist(),
        "logps_base": logp_base.tolist(),
    }


def eval(args: PipelineConfig, options: argparse.Namespace) -> None:
    """Metrics of a model on the test split (the train split of a single file), and its completions as JSON lines."""
    from srppo.cli import lines_to
    from srppo.evaluation import evaluate_policy

    console, args = shared_console(), training_nothing(args)
    require(args, "base_model_name_or_path", "sft_model_name_or_path", "dataset_name")
    require_file(options.output_file)
    if options.extrapolate is not None and not options.extrapolate > 0:
        raise UserError(f"--extrapolate must be above 0; got {options.extrapolate}")
    assert args.base_model_name_or_path and args.sft_model_name_or_path and args.dataset_name
    tokenizer = tokenizer_for(args.sft_model_name_or_path, args.base_model_name_or_path, args)
    rows = examples(args, tokenizer, args.dataset_name, args.dataset_test_split, missing_split_ok=True)
    if not rows:
        console.note(
            f"{args.dataset_name} has no rows in a split {args.dataset_test_split!r}: judging on "
            f"{args.dataset_train_split!r}"
        )
        rows = examples(args, tokenizer, args.dataset_name, args.dataset_train_split)
    if not rows:
        raise UserError(f"{args.dataset_name} has no rows: there is nothing to evaluate on")
    base, sft_model = frozen_roles(args, args.base_model_name_or_path, args.sft_model_name_or_path)
    policy = sft_model
    if options.model_name_or_path is not None:
        base, sft_model, policy = policy_to_judge(args, base, sft_model, options.model_name_or_path)
    check_prompts(policy.causal_lm.config, rows, args)
    stops = stop_tokens(tokenizer, args.stop_token_ids)
    check_tokens(policy.causal_lm, rows, [*stops, filler_token(tokenizer, stops)])
    with console.progress("sampling", len(distributed.even_share(rows))) as progress:
        metrics, completions = evaluate_policy(
            policy, sft_model, base, rows, args, tokenizer,
            stop_token_ids=stops, extrapolate=options.extrapolate,
            on_batch=lambda done: progress.advance(0, steps=done),
        )  # fmt: skip
    console.table("evaluation", [{"metric": name, "value": value} for name, value in metrics.items()])
    if distributed.is_main():
        with lines_to(options.output_file) as write:
            for row in ({"metrics": metrics}, *completions):
                write(row)
    distributed.finish()


def demo(options: argparse.Namespace) -> None:
    from srppo.demo.run import run_demo

    run_demo(Path(options.output_dir), seed=options.seed, quick=options.quick)


def env(options: argparse.Namespace) -> None:
    from srppo.environment import describe

    for line in describe():
        print(line)
