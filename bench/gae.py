"""Advantages and their whitening, against the loops that trainers publish.

Both loops run from the last step to the first, in Python, a few launches a step::

    verl    delta_t = r_t + gamma V' - V_t        A = delta_t + gamma lambda A;  a masked step leaves V' and A alone
    TRL     V is set to 0 on masked steps first   A = delta_t + gamma lambda A   on every step, masked ones too

They are written here from these formulas (verl's ``compute_gae_advantage_return``, TRL's PPO trainer), without the
whitening that both put behind them. Masks are right padding, where the two agree on valid tokens. The floor is a copy
of the bytes that must move: two inputs and a mask in, two outputs out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import srppo_kernels
from bench.core import Call, Case, Errors, Floor, Op, Provider, Result, copy_floor, relative

GAMMA, LAM = 0.99, 0.95
EPS = 1e-8


def verl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked steps carry the next value and the running advantage."""
    live = mask.to(rewards.dtype)
    following = torch.zeros_like(values[:, 0])
    running = torch.zeros_like(following)
    steps = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        candidate = delta + GAMMA * LAM * running
        following = values[:, t] * live[:, t] + (1 - live[:, t]) * following
        running = candidate * live[:, t] + (1 - live[:, t]) * running
        steps.append(running)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages, advantages + values


def trl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked steps have value 0 and are steps like any other."""
    values = torch.masked_fill(values, ~mask, 0)
    rewards = torch.masked_fill(rewards, ~mask, 0)
    running: Tensor | float = 0.0
    steps = []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        running = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running
        steps.append(running)
    advantages = torch.stack(steps[::-1], dim=1)
    return advantages, advantages + values


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and unbiased variance 1 over valid tokens, as both trainers' helpers of this name compute it."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / count * count / (count - 1)
    return (x - mean) * torch.rsqrt(variance + EPS) * mask


@dataclass(frozen=True, eq=False)
class TokenProblem:
    """``[B, T]`` tokens with right padding."""

    kind: str
    case: Case
    rewards: Tensor
    values: Tensor
    mask: Tensor
    bytes_per_token: int

    @classmethod
    def of(cls, kind: str, case: Case, bytes_per_token: int) -> TokenProblem:
        generator = torch.Generator(case.device).manual_seed(0)
        rewards, values = (torch.randn(case.shape, generator=generator, device=case.device) for _ in range(2))
        return cls(kind, case, rewards, values, padding_mask(case), bytes_per_token)

    useful_flops = 0.0

    @property
    def useful_bytes(self) -> float:
        return float(self.bytes_per_token * self.rewards.numel())

    def floor(self) -> Floor:
        return copy_floor(self.useful_bytes, self.case.device)

    def errors(self, result: Result) -> Errors:
        if self.kind == "whiten":
            exact = masked_whiten(self.values.double(), self.mask)[self.mask].nan_to_num()  # a single token's is 0 / 0
            return Errors(relative(result["whitened"][self.mask], exact))
        advantages, returns = verl_loop(self.rewards.double(), self.values.double(), self.mask)
        return Errors(
            max(
                relative(result["advantages"][self.mask], advantages[self.mask]),
                relative(result["returns"][self.mask], returns[self.mask]),
            )
        )


def padding_mask(case: Case) -> Tensor:
    """``[B, T]`` bool: row lengths spread evenly, so that ``mask_density`` of all tokens are valid."""
    batch, length = case.shape
    low = max(0.0, 2 * case.mask_density - 1)
    high = min(1.0, 2 * case.mask_density)
    lengths = torch.linspace(low, high, batch, device=case.device).mul(length).round().clamp(min=1)
    return torch.arange(length, device=case.device) < lengths[:, None]


def gae_call(
    function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Callable[[TokenProblem, str], Call]:
    def prepare(problem: TokenProblem, plan: str) -> Call:
        @torch.no_grad()
        def call() -> Result:
            advantages, returns = function(problem.rewards, problem.values, problem.mask)
            return {"advantages": advantages, "returns": returns}

        return call

    return prepare


def whiten_call(
    function: Callable[[Tensor, Tensor], Tensor], compiled: bool = False
) -> Callable[[TokenProblem, str], Call]:
    def prepare(problem: TokenProblem, plan: str) -> Call:
        run = torch.compile(function, dynamic=False) if compiled else function

        @torch.no_grad()
        def call() -> Result:
            return {"whitened": run(problem.values, problem.mask)}

        return call

    return prepare


def ours(backend: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda rewards, values, mask: srppo_kernels.gae(rewards, values, mask, gamma=GAMMA, lam=LAM, backend=backend)


# 64 x 4096 is the acceptance shape on a CPU, 512 x 4096 on a GPU; the short rows are what a small run has.
SHAPES = {"cpu": ((64, 4096), (16, 512)), "cuda": ((512, 4096), (64, 1024), (8, 131072))}


def token_cases(op: str, shapes: Mapping[str, tuple[tuple[int, int], ...]]) -> Callable[[str], list[Case]]:
    """Each shape in full, the first also half padded."""

    def defaults(device: str) -> list[Case]:
        full = [Case(op, shape, "float32", 1.0, "random", device) for shape in shapes[device]]
        return [full[0], Case(op, full[0].shape, "float32", 0.5, "random", device), *full[1:]]

    return defaults


OPS = (
    Op(
        name="gae",
        title="advantages and returns",
        shape_names=("B", "T"),
        error_of="relative error",
        make=lambda case: TokenProblem.of("gae", case, 2 * 4 + 1 + 2 * 4),
        providers=(
            Provider("srppo", "this library", gae_call(ours("auto"))),
            Provider("trl-loop", "TRL's loop over time steps, from its formula", gae_call(trl_loop)),
            Provider("verl-loop", "verl's loop over time steps, from its formula", gae_call(verl_loop)),
            Provider("srppo-reference", "this library's reference", gae_call(ours("reference")), default=False),
        ),
        defaults=token_cases("gae", SHAPES),
        gross_error=1e-2,
        dtypes=("float32",),
    ),
    Op(
        name="whiten",
        title="masked whitening",
        shape_names=("B", "T"),
        error_of="relative error",
        make=lambda case: TokenProblem.of("whiten", case, 4 + 1 + 4),
        providers=(
            Provider("srppo", "this library", whiten_call(srppo_kernels.whiten)),
            Provider("torch", "masked mean and variance in plain torch", whiten_call(masked_whiten)),
            Provider("torch-compile", "torch.compile of that", whiten_call(masked_whiten, True)),
        ),
        defaults=lambda device: token_cases("whiten", SHAPES)(device)[:1],
        gross_error=1e-2,
        dtypes=("float32",),
    ),
)
