"""The clipped losses with their gradient and every statistic that a trainer logs, against plain torch.

The plain versions compute what ours do, statistics included, and wait for nothing: a trainer that calls ``.item()`` on
each of them is slower still. The floor is a copy of the bytes that must move: three inputs, a mask, and the
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import srppo_kernels
from bench.core import Call, Case, Errors, Floor, Op, Provider, Result, copy_floor, relative
from bench.gae import padding_mask, token_cases
from bench.head import CLIP

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, tuple[Tensor, ...]]]


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> loss, (k1, k3, clip fractions low and high, ratio mean, maximum and variance, count)."""
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum() / count

    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    loss = mean(torch.maximum(unclipped, clipped))
    with torch.no_grad():
        low = mean(((ratio < 1 - CLIP) & (advantages < 0)).float())
        high = mean(((ratio > 1 + CLIP) & (advantages > 0)).float())
        ratio_mean = mean(ratio)
        statistics = (
            mean(-log_ratio), mean(ratio - 1 - log_ratio), low, high, ratio_mean,
            torch.where(mask, ratio, 0).amax(), mean((ratio - ratio_mean).square()), count,
        )  # fmt: skip
    return loss, statistics


def critic_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """-> loss, (clip fraction, mean square error, means, variance of the returns, explained variance, count)."""
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum() / count

    plain = (values - returns).square()
    clipped = (torch.clamp(values, old - CLIP, old + CLIP) - returns).square()
    loss = 0.5 * mean(torch.maximum(plain, clipped))
    with torch.no_grad():
        error = values - returns
        return_mean = mean(returns)
        return_variance = mean((returns - return_mean).square())
        residual = mean((error - mean(error)).square())
        statistics = (
            mean((clipped > plain).float()), mean(plain), mean(values), return_mean, return_variance, residual,
            1 - residual / return_variance, count,
        )  # fmt: skip
    return loss, statistics


def our_policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss, stats = srppo_kernels.ppo_loss(logprobs, old, advantages, mask, clip_low=CLIP, clip_high=CLIP)
    return loss, tuple(value for value in stats if value is not None)


def our_critic_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss, stats = srppo_kernels.value_loss(values, old, returns, mask, clip=CLIP)
    return loss, tuple(stats)


@dataclass(frozen=True, eq=False)
class LossProblem:
    """``new`` is differentiated; ``old`` and ``target`` are constants (advantages or returns)."""

    exact: Loss
    case: Case
    new: Tensor
    old: Tensor
    target: Tensor
    mask: Tensor

    @classmethod
    def of(cls, exact: Loss, case: Case) -> LossProblem:
        generator = torch.Generator(case.device).manual_seed(0)
        new, shift, target = (torch.randn(case.shape, generator=generator, device=case.device) for _ in range(3))
        # A quarter of the shifts leaves the clip range; none lies so near its bound that rounding decides the branch.
        shift = 0.16 * shift.clamp(-3, 3)
        near = (shift.abs() - CLIP).abs() < 0.03
        return cls(exact, case, new, new - torch.where(near, 0.05, shift), target, padding_mask(case))

    useful_flops = 0.0

    @property
    def useful_bytes(self) -> float:
        return float((3 * 4 + 1 + 4) * self.new.numel())

    def floor(self) -> Floor:
        return copy_floor(self.useful_bytes, self.case.device)

    def errors(self, result: Result) -> Errors:
        leaf = self.new.double().requires_grad_()
        loss, _ = self.exact(leaf, self.old.double(), self.target.double(), self.mask)
        (grad,) = torch.autograd.grad(loss, leaf)
        return Errors(relative(result["loss"], loss.detach()), relative(result["grad"], grad))


def loss_call(loss: Loss, compiled: bool = False) -> Callable[[LossProblem, str], Call]:
    def prepare(problem: LossProblem, plan: str) -> Call:
        run = torch.compile(loss, dynamic=False) if compiled else loss
        leaf = problem.new.detach().requires_grad_()

        def call() -> Result:
            value, statistics = run(leaf, problem.old, problem.target, problem.mask)
            (grad,) = torch.autograd.grad(value, leaf)
            return {"loss": value.detach(), "grad": grad, **{f"statistic{i}": s for i, s in enumerate(statistics)}}

        return call

    return prepare


def providers(ours: Loss, plain: Loss) -> tuple[Provider, ...]:
    return (
        Provider("srppo", "this library", loss_call(ours)),
        Provider("torch", "plain torch with the same statistics", loss_call(plain)),
        Provider("torch-compile", "torch.compile of that", loss_call(plain, True)),
    )


# 8 x 4096 is the 32k tokens of the acceptance figures.
SHAPES = {"cpu": ((8, 4096),), "cuda": ((8, 4096), (64, 4096))}

OPS = (
    Op(
        name="ppo_loss",
        title="clipped policy loss, statistics and gradient",
        shape_names=("B", "T"),
        error_of="relative loss error",
        make=lambda case: LossProblem.of(policy_loss, case),
        providers=providers(our_policy_loss, policy_loss),
        defaults=token_cases("ppo_loss", SHAPES),
        gross_error=1e-2,
        dtypes=("float32",),
    ),
    Op(
        name="value_loss",
        title="clipped critic loss, statistics and gradient",
        shape_names=("B", "T"),
        error_of="relative loss error",
        make=lambda case: LossProblem.of(critic_loss, case),
        providers=providers(our_critic_loss, critic_loss),
        defaults=lambda device: token_cases("value_loss", SHAPES)(device)[:1],
        gross_error=1e-2,
        dtypes=("float32",),
    ),
)
