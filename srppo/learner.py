"""A role that learns: its optimizer, its learning rate over the run, and one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from srppo import distributed, sharding
from srppo.config import SRPPOConfig
from srppo.roles import Role


@dataclass(frozen=True, slots=True)
class Learner:
    """A role that learns, with its optimizer, schedule and parameters."""

    role: Role
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    parameters: tuple[torch.nn.Parameter, ...]

    @classmethod
    def create(cls, role: Role, args: SRPPOConfig, learning_rate: float, total_steps: int) -> Learner:
        named = role.parameters()
        for _, parameter in named:
            parameter.requires_grad_(True)
            parameter.grad = None  # the first step would add what an interrupted run or a loop before this one left
        parameters = tuple(parameter for _, parameter in named)
        betas = (args.adam_betas[0], args.adam_betas[1])
        # the value head apart: with fsdp the trunk is cut and the head is not, and one fused call takes either
        split = [[p for name, p in named if name.startswith("value_head.") == of_head] for of_head in (False, True)]
        groups = [{"params": members} for members in split if members]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, weight_decay=0.0)
        return cls(role, optimizer, lr_schedule(args, optimizer, total_steps), parameters)

    def load(self, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        """Moments and the place in the schedule as a checkpoint has them; rates and decay as this run is configured,
        which may have been changed since."""
        groups, rates = self.optimizer.param_groups, self.scheduler.base_lrs
        betas = [group["betas"] for group in groups]
        done = scheduler["last_epoch"]
        now = [rate * factor(done) for rate, factor in zip(rates, self.scheduler.lr_lambdas, strict=True)]
        sharding.load_optimizer(self.optimizer, optimizer)
        self.scheduler.load_state_dict({**scheduler, "base_lrs": rates, "_last_lr": now})
        for group, own, rate in zip(self.optimizer.param_groups, betas, now, strict=True):
            group.update(betas=own, lr=rate)

    def make_gradients(self) -> None:
        """An adapter's gradients, as zeros, before the backward that adds to them.

        Made one by one amid that backward, small buffers that stay split what the activations leave behind, and a heap
        grows for want of holes that fit: by 653 MiB in an update where 298 do (SmolLM2-135M in bf16, checkpointing, 4
        sequences of 96 tokens, on a CPU with glibc). A full model's gradients are as large as what they would keep
        whole, and are left to the backward.
        """
        if self.role.adapter is None:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def step(self, max_grad_norm: float | None) -> float:
        """Clips and steps; a gradient that is not finite is dropped. Returns the norm before clipping.

        The gradient is the sum over ranks, so that all of them clip, drop and step alike.
        """
        distributed.sum_gradients(self.parameters)
        norm = sharding.clip_gradients(self.parameters, max_grad_norm or math.inf)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def lr_schedule(
    args: SRPPOConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up to the peak rate, then decay. With w steps of warm-up, step i of them runs at ``(i + 1) / (w + 1)`` of
    the peak: none is spent at a rate of 0, which would learn nothing."""
    warmup = math.ceil(args.warmup_ratio * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        left = max(total_steps - step, 0) / max(total_steps - warmup, 1)
        return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[args.lr_scheduler_type]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
