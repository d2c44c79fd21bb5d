"""The first stage: fine-tuning the base model on the demonstrations, with the fused cross-entropy.

The loss is the mean of ``-log pi(y_t)`` over the completion tokens of a mini-batch, stop token included; prompts carry
no loss. The result is an adapter folder with LoRA, a full model otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo import distributed, sharding
from srppo.checkpoint import atomic_folder, require_new_folder, save_model
from srppo.config import PipelineConfig, SRPPOConfig
from srppo.console import Console
from srppo.data import Dataset, Example, as_examples, digest, filler_token, stop_tokens
from srppo.errors import UserError
from srppo.learner import Learner
from srppo.metrics import MetricsWriter
from srppo.models import (
    check_positions,
    check_tokens,
    has_adapter_layers,
    keep_unpacked,
    load_model,
    load_tokenizer,
    recompute_activations,
    require_full_precision,
)
from srppo.packing import layout_of
from srppo.plots import plot_history
from srppo.ppo import split_micro_batches
from srppo.roles import Role, check_head, new_adapter
from srppo.rollout import Rollout, collate_demonstrations
from srppo_kernels import linear_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SFT_METRICS = {
    "sft/loss": "cross-entropy of the mini-batch before its step, mean over completion tokens",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
    "eval/loss": "cross-entropy of held-out demonstrations at the end of an epoch, mean over their completion tokens",
}


def token_nll(logprob: Tensor, entropy: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of negative log-probs; masked rows are 0 already."""
    return -logprob.sum(), {}


def demonstration_loss(role: Role, rollout: Rollout, normalizer: int) -> Tensor:
    """Cross-entropy of a batch of demonstrations, summed over tokens and divided by ``normalizer``."""
    hidden, head = role.hidden(rollout), role.head  # in this order: a sharded head is whole after the hidden states
    loss, _ = linear_loss(hidden, head.weight, rollout.tokens, token_nll, **head.options)
    return loss / normalizer


def run_sft(
    args: PipelineConfig,
    *,
    train_dataset: Dataset,
    eval_dataset: Dataset = (),
    output_dir: str | Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    console: Console | None = None,
) -> Path:
    """Fine-tunes on the rows that have a completion and writes the SFT model to ``output_dir``.

    Args:
        args: reads the base model, LoRA, optimisation and ``sft_*`` settings.
        train_dataset, eval_dataset: rows with the columns of :mod:`srppo.data`, or what :func:`srppo.data.prepare`
            gives; those without a completion are ignored.
        output_dir: becomes the model folder, all at once, when training has ended.
        model, tokenizer: already loaded ones, else those of ``args.base_model_name_or_path``. ``model`` is trained in
            place.
        console: where lines and tables go; if absent, the terminal, from the first process alone.

    Returns:
        ``output_dir``, as a path.

    Raises:
        UserError: there is no demonstration, the model cannot be loaded or has adapters in it, or ``fsdp`` has nothing
            to cut.
    """
    if not isinstance(args, PipelineConfig):
        raise UserError(f"run_sft reads sft_* settings: args must be a srppo.PipelineConfig, not {type(args).__name__}")
    distributed.start()
    if args.fsdp:
        sharding.require_ranks(adapters=args.use_peft)
    console = console or Console(quiet=not distributed.is_main())
    target = Path(output_dir)
    distributed.on_main(lambda: require_new_folder(target))
    if tokenizer is None:
        tokenizer = load_tokenizer(starting_model(args), args)
    stops = stop_tokens(tokenizer, args.stop_token_ids)
    train, held_out = (demonstrations(rows, tokenizer, stops, args) for rows in (train_dataset, eval_dataset))
    if not train:
        raise UserError(
            "SFT needs demonstrations, and no row has a completion: add a 'completion' column, or messages that end in "
            "an assistant turn, or give sft_model_name_or_path"
        )
    distributed.require_alike(lambda: {**args.of_all_processes(), "data": digest([*train, *held_out])})
    model = model or load_model(starting_model(args), args)
    check_positions(model.config, [len(e.prompt_ids) + len(e.completion_ids or ()) for e in [*train, *held_out]])
    pad = filler_token(tokenizer, stops)
    check_tokens(model, [*train, *held_out], [*stops, pad])
    torch.manual_seed(args.seed)
    role = sft_role(args, model)

    def as_rollout(examples: Sequence[Example]) -> Rollout:
        return collate_demonstrations(examples, pad_token_id=pad, stop_token_ids=stops, device=role.device)

    distributed.spread_from_main(parameter for _, parameter in role.parameters())
    distributed.seed_apart(args.seed)
    if args.fsdp:
        sharding.shard(role.causal_lm)
    mini_batch_size = args.mini_batch_size * distributed.size()
    steps = math.ceil(len(train) / mini_batch_size)  # of an epoch
    total = args.sft_num_train_epochs * steps
    learner = Learner.create(role, args, args.sft_learning_rate, total)
    console.note(
        f"SFT: {len(train)} demonstrations, {args.sft_num_train_epochs} epochs, {total} steps of "
        f"{mini_batch_size}, {sum(p.numel() for p in learner.parameters):,} trainable parameters"
    )
    generator = torch.Generator().manual_seed(args.seed)
    with atomic_folder(target) if distributed.is_main() else nullcontext() as folder:
        with (
            MetricsWriter(folder, args, place=target) as writer,
            console.progress("SFT", total) as progress,
            role.active(),  # once, and not for each step
        ):
            for _ in range(args.sft_num_train_epochs):
                order = torch.randperm(len(train), generator=generator)
                for rows in order.split(mini_batch_size):
                    rollout = as_rollout([train[row] for row in rows.tolist()])
                    tokens = int(rollout.completion_mask.sum())
                    loss = sft_step(learner, rollout, tokens, args)
                    norm = learner.step(args.max_grad_norm)
                    if not math.isfinite(norm):
                        raise UserError("the SFT gradient is not finite: lower sft_learning_rate, or use dtype=float32")
                    rate = float(learner.scheduler.get_last_lr()[0])
                    learner.scheduler.step()
                    metrics = {"sft/loss": loss, "grad_norm": norm, "lr": rate}
                    step = len(writer.history) + 1
                    if held_out and step % steps == 0:
                        metrics["eval/loss"] = held_out_loss(role, as_rollout(held_out), args)
                    writer.write(step, metrics)
                    progress.advance(tokens, f"loss {loss:.3f}")
            history = writer.history
        role.model.eval()
        weights = sharding.whole_state(role.causal_lm)
        if folder is not None:
            save_model(role, tokenizer, folder, weights)
            plot_history(history, folder / "plots", {"sft_loss": ["sft/loss", "eval/loss"]})
    distributed.wait()
    console.note(f"SFT model written to {target}")
    return target


def demonstrations(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], args: SRPPOConfig
) -> list[Example]:
    """The rows that have a completion."""
    rows = as_examples(dataset, tokenizer, stops, args)
    return [example for example in rows if example.completion_ids is not None]


def starting_model(args: PipelineConfig) -> str:
    if args.base_model_name_or_path is None:
        raise UserError("SFT needs a model to start from: set base_model_name_or_path")
    return args.base_model_name_or_path


def sft_role(args: SRPPOConfig, model: PreTrainedModel) -> Role:
    """The base model made trainable: whole, or with a new adapter."""
    if has_adapter_layers(model):  # they would be trained on, and what is written would be without them
        raise UserError(
            "the model to fine-tune has adapter layers in it, of peft or an earlier run: load it again, or "
            "merge_and_unload() them"
        )
    keep_unpacked("the model to fine-tune", model)
    role = Role("sft", model.eval(), trainable=True)  # the two looks at it are without its dropout
    check_head(role)
    layout = layout_of(role)
    if args.use_peft:
        role = Role("sft", new_adapter(model, args, None, "default"), "default", trainable=True)
    role = dataclasses.replace(role, layout=layout)
    require_full_precision("model", (parameter for _, parameter in role.parameters()))
    if args.gradient_checkpointing:
        recompute_activations(role.causal_lm)
    role.model.train()
    return role


@torch.enable_grad()  # whatever the caller's notebook has set
def sft_step(learner: Learner, rollout: Rollout, tokens: int, args: SRPPOConfig) -> float:
    """Accumulates the gradient of this rank's part of a mini-batch, a micro-batch at a time; returns the loss per token
    of the whole."""
    total = torch.zeros((), dtype=torch.float64)
    with learner.role.active():
        for part in own_micro_batches(learner.role, rollout, args):
            loss = demonstration_loss(learner.role, part, tokens)
            loss.backward()
            total += loss.item()
    for parameter in learner.parameters:  # of a rank that the last, smaller mini-batch left without a row
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return distributed.summed(total).item()


def own_micro_batches(role: Role, rollout: Rollout, args: SRPPOConfig) -> Iterator[Rollout]:
    """This rank's rows of a mini-batch, a micro-batch at a time.

    A sharded model's forwards are collectives, so there the ranks get equally many rows: the first ones come again,
    without a token that counts.
    """
    rank, size, count = distributed.rank(), distributed.size(), len(rollout)
    places = torch.arange(rank, -(-count // size) * size if sharding.is_sharded(role.causal_lm) else count, size)
    if len(places):
        own = rollout.select(places % count)
        counts = (places < count).to(own.completion_mask.device)
        own = dataclasses.replace(own, completion_mask=own.completion_mask & counts[:, None])
        for rows in split_micro_batches(torch.arange(len(own)), own, args, role):
            yield own.select(rows)


@torch.no_grad()
def held_out_loss(role: Role, rollout: Rollout, args: SRPPOConfig) -> float:
    """Cross-entropy per token of demonstrations that were not trained on."""
    role.model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with role.active():
        for part in own_micro_batches(role, rollout, args):
            total += demonstration_loss(role, part, 1).item()
    role.model.train()
    return distributed.summed(total).item() / int(rollout.completion_mask.sum())
