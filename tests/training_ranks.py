"""What each rank does in the tests of many processes: importable functions of ``(rank, size)`` and a folder."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from ppo_steps import trained_head
from tiny_runs import (
    QUIET,
    ROWS,
    TinyModels,
    config,
    examples,
    full_roles,
    learners,
    rollout,
    without_plots,
)

from srppo import UserError, distributed, ppo, run_sft, sharding
from srppo.metrics import iteration_metrics
from srppo.roles import build_roles

# What the loss and the step depend on; each is a training in its own right.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"use_peft": True, "learning_rate": 1e-2},
    "everything on": {
        "entropy_coef": 0.1, "missing_eos_penalty": 1.0, "reward_normalization": "running", "whiten_rewards": True,
        "max_grad_norm": 1e-2, "temperature": 0.8, "max_tokens_per_micro_batch": 9, "learning_rate": 1.0,
    },
    "fsdp": {"max_tokens_per_micro_batch": 9, "gradient_checkpointing": True, "max_grad_norm": 1e-2,
             "learning_rate": 1.0},
    "target_kl": {"target_kl": 1e-3, "num_ppo_epochs": 8, "learning_rate": 1e-2},
}  # fmt: skip


def length_reward(prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
    return [len(p) + 0.1 * len(c) for p, c in zip(prompts, completions, strict=True)]


def groups_of(learner: ppo.Learner) -> list[dict[str, Any]]:
    return [{"params": group["params"]} for group in learner.optimizer.param_groups]


def steps(models: TinyModels, folder: Path, name: str) -> dict[str, Any]:
    """Scores, advantages and updates of one rollout by however many processes there are; all that came of it.

    The optimizer is plain gradient descent: Adam divides by the gradient's size, and so makes a difference of rounding
    in a gradient of almost 0 as large as the learning rate.
    """
    size = distributed.size()
    args = config(folder, **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // size, **CASES[name]})
    roles = build_roles(args, models.base, models.adapter) if args.use_peft else full_roles(args)
    trained_head(roles)
    if name == "fsdp" and size > 1:
        sharding.shard_roles(roles)
        for role in roles:  # a layer is gathered apart from the others
            assert len(sharding.parts(role.causal_lm)) == 1 + role.causal_lm.config.num_hidden_layers
    given = rollout()
    policy, critic = (
        dataclasses.replace(x, optimizer=torch.optim.SGD(groups_of(x), lr=args.learning_rate))
        for x in learners(roles, args)
    )
    start = [sharding.gathered(p.detach()).clone() for learner in (policy, critic) for p in learner.parameters]
    own = torch.arange(len(given)).chunk(size)[distributed.rank()]
    generator = torch.Generator().manual_seed(0)
    parts = ppo.split_rows(own, given, args, role=roles.policy, generator=generator)
    scores = ppo.gather_scores(ppo.score(roles, given, args, [rows for mini in parts for rows in mini]))
    targets = ppo.advantages(given, scores, args, moments=ppo.RunningMoments(), reward_fn=length_reward)
    result = ppo.update(policy, critic, given, scores, targets, args, parts, generator=generator)
    return {
        "start": start,
        "weights": [sharding.gathered(p.detach()).clone() for learner in (policy, critic) for p in learner.parameters],
        "metrics": iteration_metrics(given, scores, targets, result),
        "first": [float(x) for x in result.first if x is not None],
    }


def check(rank: int, size: int, *, models: TinyModels, folder: Path) -> None:
    for name in CASES:
        torch.save(steps(models, folder, name), folder / f"{name} {rank}.pt")
    check_differences(rank, models=models, folder=folder / "differences")
    with without_plots():
        sft(models, folder / "sft-2")
        sft_cut(models, folder / "sft-cut")
        sft_cut(models, folder / "sft-cut-by-tokens", max_tokens_per_micro_batch=16)
        for kind in ("sft", "adapter", "fsdp"):
            check_runs(rank, models=models, folder=folder / kind, kind=kind)


def sft(models: TinyModels, target: Path, **settings: Any) -> Path:
    """Five demonstrations and a held-out one: a last mini-batch that leaves the second rank without a row."""
    args = config(
        target.parent, base_model_name_or_path=models.base, sft_num_train_epochs=1, sft_learning_rate=1e-3,
        per_device_train_batch_size=4 // distributed.size(), gradient_accumulation_steps=1, **settings,
    )  # fmt: skip
    rows = examples(ROWS)
    return run_sft(args, train_dataset=rows[:5], eval_dataset=rows[5:], output_dir=target, console=QUIET)


def sft_cut(models: TinyModels, target: Path, **settings: Any) -> None:
    """The same with every weight that learns cut over the ranks."""
    cut: list[bool] = []
    clip = sharding.clip_gradients

    def looked_at(parameters: list[torch.nn.Parameter], max_norm: float) -> float:
        cut.extend(sharding.is_cut(p) and sharding.is_cut(p.grad) for p in parameters)
        return clip(parameters, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "clip_gradients", looked_at)
        sft(models, target, fsdp=True, **settings)
    assert cut and all(cut)


def weights(run: Any) -> list[torch.Tensor]:
    return [
        sharding.gathered(p.detach()).clone()
        for role in (run.roles.policy, run.roles.critic)
        for _, p in role.parameters()
    ]


RUN = {
    "max_steps": 2, "save_steps": 1, "eval_steps": 2, "log_completions": 1, "reward_normalization": "running",
    "num_mini_batches": 2, "gradient_accumulation_steps": 1, "max_tokens_per_micro_batch": 40,
}  # fmt: skip


def check_runs(rank: int, *, models: TinyModels, folder: Path, kind: str) -> None:
    """A whole run, one that goes on from its middle, one that a callback ends on one rank, and one that is refused."""
    rows = [*examples(ROWS), *examples(ROWS)]
    how = {"kind": "sft", "fsdp": True} if kind == "fsdp" else {"kind": kind}
    run_of = functools.partial(tiny_runs.trainer, models, rows=rows, **RUN, **how)
    straight = run_of(folder / "straight", eval_dataset=rows[:3])
    drawn = straight.rollout([rows[0], rows[0]]).tokens.tolist()
    straight.train()
    torch.manual_seed(99)  # what the resuming process did before must not matter
    source = str(folder / "straight" / "run" / "checkpoint-1")
    resumed = run_of(folder / "resumed", eval_dataset=rows[:3], resume_from_checkpoint=source)
    resumed.train()
    stopped = run_of(folder / "stopped", callbacks=[stop_on_the_last_rank])
    stopped.train()
    assert stopped.step == 1
    with pytest.raises(UserError, match="exists and is not empty"):
        run_of(folder / "straight").train()
    for one, other in zip(weights(straight), weights(resumed), strict=True):
        assert torch.equal(one, other)
        assert all(torch.equal(one, of_rank) for of_rank in distributed.gathered(one))
    torch.save(
        {"straight": straight.history, "resumed": resumed.history, "drawn": drawn, "weights": weights(straight)},
        folder / f"{rank}.pt",
    )


def check_differences(rank: int, *, models: TinyModels, folder: Path) -> None:
    """What ranks were given or read for themselves and is not the same stops all of them."""
    rows = examples(ROWS)
    other = dataclasses.replace(models, base=models.sft) if rank == 1 else models
    longer = config(folder, base_model_name_or_path=models.base, sft_num_train_epochs=1 + rank)
    for said, run in {
        "kl_target, max_steps:": lambda: tiny_runs.trainer(models, folder, max_steps=1 + rank, kl_target=rank or None),
        "resume_from_checkpoint:": lambda: tiny_runs.trainer(
            models, folder, resume_from_checkpoint=("latest" if rank else None)
        ),
        "data:": lambda: tiny_runs.trainer(models, folder, rows=rows[rank:]),
        "weights of base and SFT:": lambda: tiny_runs.trainer(other, folder),
        "sft_num_train_epochs, data:": lambda: run_sft(longer, train_dataset=rows[rank:], output_dir=folder / "sft"),
    }.items():
        with pytest.raises(UserError, match=f"the processes do not have the same {said} give all of them the same"):
            run()


def stop_on_the_last_rank(run: Any, step: int, metrics: dict[str, float]) -> None:
    if distributed.rank() == distributed.size() - 1:
        raise StopIteration


def die_in_the_second_iteration(run: Any, step: int, metrics: dict[str, float]) -> None:
    if step == 1 and distributed.rank() == 1:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # a process that its rank's environment makes one of two, and of which the second dies
    base, sft_model, output = sys.argv[1:]
    models = TinyModels(base, sft_model, "")
    tiny_runs.trainer(models, Path(output), callbacks=[die_in_the_second_iteration], max_steps=4, save_steps=1).train()
