"""What a checkpoint holds besides the model: all that the next iteration depends on, so resuming alters nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from srppo import distributed, sharding
from srppo.config import SRPPOConfig, read_yaml
from srppo.errors import UserError

if TYPE_CHECKING:
    from srppo.trainer import SRPPOTrainer


def snapshot(run: SRPPOTrainer) -> dict[str, Any]:
    """Weights, optimizers, schedulers, random numbers, data position and running figures. Every rank must call it."""
    return {
        "policy": {name: sharding.gathered(p.detach()) for name, p in run.roles.policy.parameters()},
        "critic": {name: sharding.gathered(p.detach()) for name, p in run.roles.critic.parameters()},
        "optimizers": [sharding.whole_optimizer(learner.optimizer) for learner in (run.policy, run.critic)],
        "schedulers": [learner.scheduler.state_dict() for learner in (run.policy, run.critic)],
        "sampler": run.sampler.state_dict(),
        "moments": vars(run.moments),
        "guard": run.guard.state_dict(),
        "controller": run.controller.state_dict(),
        "generator": run.generator.get_state(),
        "frozen_bits": frozen_bits(run),
        "rng": distributed.gathered(torch.get_rng_state()),
        "cuda_rng": distributed.gathered(torch.cuda.get_rng_state()) if torch.cuda.is_available() else [],
    }


def frozen_bits(run: SRPPOTrainer) -> int:
    """What tells base and SFT from others of the same shapes, whether each rank has them whole or a part."""
    own = torch.tensor(run.frozen % 2**62)
    return int(distributed.summed(own) if sharding.is_sharded(run.roles.sft.model) else own) % 2**62


def restore(run: SRPPOTrainer, folder: Path, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Puts everything back as it was when the checkpoint in ``folder`` was written.

    Raises:
        UserError: the checkpoint is of another model.
    """
    for role in (run.roles.policy, run.roles.critic):
        own, saved = dict(role.parameters()), tensors[role.name]
        if role.adapter is not None:  # an older checkpoint calls the critic's "value"
            saved = {
                re.sub(r"\.(lora_\w+|modules_to_save)\.value\b", rf".\1.{role.adapter}", n): saved[n] for n in saved
            }
        if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in saved.items()}:
            raise UserError(f"checkpoint {folder} is of another model: its {role.name} has other parameters")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(sharding.cut_like(saved[name], parameter))
    for learner, optimizer, scheduler in zip(
        (run.policy, run.critic), tensors["optimizers"], tensors["schedulers"], strict=True
    ):
        learner.load(optimizer, scheduler)
    run.sampler.load_state_dict(tensors["sampler"])
    vars(run.moments).update(tensors["moments"])
    run.guard.load_state_dict(tensors["guard"])
    run.controller.load_state_dict(tensors["controller"])
    run.generator.set_state(tensors["generator"])
    rank, ranks = distributed.rank(), len(tensors["rng"])
    if ranks == distributed.size():
        torch.set_rng_state(tensors["rng"][rank])
        if torch.cuda.is_available() and tensors["cuda_rng"]:
            torch.cuda.set_rng_state(tensors["cuda_rng"][rank])
    else:
        torch.manual_seed(run.args.seed + state["step"])
        distributed.seed_apart(run.args.seed + state["step"])
        run.console.warn(
            f"{folder} was written by {ranks} processes and is resumed by {distributed.size()}: samples come from "
            f"other random numbers than they would have, and a batch is now {run.sampler.batch_size} prompts"
        )
    frozen = tensors.get("frozen_bits")  # an older checkpoint has none
    if distributed.any_rank(frozen_bits(run) != frozen and frozen is not None):
        run.console.warn(
            f"{folder} was written beside other weights of base or SFT than these: rewards and KL are other ones from "
            "here on"
        )
    run.step, run.episodes, run.tokens = state["step"], state["episode"], state["num_tokens"]
    run.history = state["log_history"]
    run.console.note(f"resumed from {folder} after iteration {run.step}")
    changed = changed_settings(run.args, folder.parent / "srppo_config.yaml")
    if changed:
        run.console.note(f"settings that are others than before: {', '.join(changed)}")


def changed_settings(args: SRPPOConfig, path: Path) -> list[str]:
    """What differs from the configuration that a run wrote, as ``name before -> now``; nothing if it is not there."""
    try:
        before = read_yaml(path)
    except UserError:
        return []
    now = {name: value for name, value in dataclasses.asdict(args).items() if name in before}
    own = ("output_dir", "resume_from_checkpoint")  # of a resumed run
    return [f"{n} {before[n]} -> {now[n]}" for n in now if n not in own and now[n] != before[n]]
