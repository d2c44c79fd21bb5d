"""The self-reward: per-token log-ratio of two heads, and the reward tensor that PPO gets from log-probs.

The ratio is a small difference of large numbers, so that rounding of the logits, harmless for either log-prob, is most
of what is left of it: ``max_error`` and ``grad_error`` (here the relative error of the ratio itself) say how much.
The two models share a head here; base hidden states differ from SFT ones by 1 % of their size, as after a short
fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import srppo_kernels
from bench.core import Call, Case, Errors, Floor, Op, Provider, Result, copy_floor, relative
from bench.gae import padding_mask, token_cases
from bench.head import HeadInputs, Oracle, bare_gemms, naive_logprob, problem_inputs
from bench.linear_logprob import FIRST, GROSS, SHAPE, cases

DRIFT = 0.01
KL_COEF = 0.1


@dataclass(frozen=True, eq=False)
class RatioProblem:
    """One set of tokens under two heads."""

    case: Case
    sft: HeadInputs
    base: HeadInputs

    @classmethod
    def of(cls, case: Case) -> RatioProblem:
        sft = problem_inputs(case)
        generator = torch.Generator(case.device).manual_seed(1)
        noise = torch.randn(sft.hidden.shape, generator=generator, device=case.device)
        hidden = (sft.hidden.float() * (1 + DRIFT * noise)).to(sft.hidden.dtype)
        return cls(case, sft, replace(sft, hidden=hidden))

    @property
    def useful_flops(self) -> float:
        _, width, vocab = self.case.shape
        return 2.0 * 2 * self.sft.live * width * vocab

    useful_bytes = 0.0

    def floor(self) -> Floor:
        forward = bare_gemms(self.sft, 1).call

        def twice() -> None:
            forward()
            forward()

        return Floor("2 x torch.mm", twice)

    def errors(self, result: Result) -> Errors:
        exact = self.sft.oracle.logprob - Oracle.of(self.base).logprob
        ratio = result["ratio"][self.sft.mask]
        return Errors((ratio.double() - exact).abs().amax().item(), relative(ratio, exact))


def ratio_call(
    function: Callable[[RatioProblem], Callable[[Tensor, Tensor, Tensor], Tensor]], compiled: bool = False
) -> Callable[[RatioProblem, str], Call]:
    """``function(problem)`` gives ``(hidden of SFT, hidden of base, weight) -> [N]``."""

    def prepare(problem: RatioProblem, plan: str) -> Call:
        forward = function(problem)
        run = torch.compile(forward, dynamic=False) if compiled else forward

        @torch.no_grad()
        def call() -> Result:
            return {"ratio": run(problem.sft.hidden, problem.base.hidden, problem.sft.weight)}

        return call

    return prepare


def our_ratio(problem: RatioProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    targets, mask = problem.sft.targets, problem.sft.mask
    return lambda sft, base, weight: srppo_kernels.linear_log_ratio(sft, weight, base, weight, targets, mask=mask)


def plain_ratio(problem: RatioProblem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    targets = problem.sft.targets
    return lambda sft, base, weight: naive_logprob(sft, weight, targets) - naive_logprob(base, weight, targets)


@dataclass(frozen=True, eq=False)
class RewardProblem:
    """``[B, T]`` log-probs of four roles."""

    case: Case
    sft: Tensor
    base: Tensor
    policy: Tensor
    mask: Tensor

    @classmethod
    def of(cls, case: Case) -> RewardProblem:
        generator = torch.Generator(case.device).manual_seed(0)
        sft, base, policy = (-torch.rand(case.shape, generator=generator, device=case.device) for _ in range(3))
        return cls(case, sft, base, policy, padding_mask(case))

    useful_flops = 0.0

    @property
    def useful_bytes(self) -> float:
        # The KL reference is SFT, whose log-probs are there already: three inputs, a mask, one output.
        return float((3 * 4 + 1 + 4) * self.sft.numel())

    def floor(self) -> Floor:
        return copy_floor(self.useful_bytes, self.case.device)

    def errors(self, result: Result) -> Errors:
        exact = plain_reward(self.sft.double(), self.base.double(), self.policy.double(), self.mask)
        return Errors(relative(result["rewards"], exact))


def plain_reward(sft: Tensor, base: Tensor, policy: Tensor, mask: Tensor) -> Tensor:
    """The summed ratio at the last valid token, less the k1 KL penalty towards SFT on each."""
    score = torch.where(mask, sft - base, 0).sum(-1)
    rewards = torch.where(mask, -KL_COEF * (policy - sft), 0)
    last = mask.sum(-1, keepdim=True) - 1
    return rewards.scatter_add(1, last, score[:, None])


def our_reward(sft: Tensor, base: Tensor, policy: Tensor, mask: Tensor) -> Tensor:
    return srppo_kernels.log_ratio_reward(
        sft, base, mask, logprobs_policy=policy, logprobs_ref=sft, kl_coef=KL_COEF, kl_estimator="k1"
    )


def reward_call(
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], compiled: bool = False
) -> Callable[[RewardProblem, str], Call]:
    def prepare(problem: RewardProblem, plan: str) -> Call:
        run = torch.compile(function, dynamic=False) if compiled else function

        @torch.no_grad()
        def call() -> Result:
            return {"rewards": run(problem.sft, problem.base, problem.policy, problem.mask)}

        return call

    return prepare


REWARD_SHAPES = {"cpu": ((64, 4096),), "cuda": ((512, 4096),)}

OPS = (
    Op(
        name="linear_log_ratio",
        title="per-token log-ratio of two models, no gradient",
        shape_names=SHAPE,
        error_of="max log-ratio error, nats",
        make=RatioProblem.of,
        providers=(
            Provider("srppo", "this library", ratio_call(our_ratio)),
            Provider("torch", "two naive log-probs", ratio_call(plain_ratio)),
            Provider("torch-compile", "torch.compile of that", ratio_call(plain_ratio, True)),
        ),
        defaults=cases("linear_log_ratio", (FIRST,)),
        gross_error=GROSS,
    ),
    Op(
        name="log_ratio_reward",
        title="reward tensor with KL penalty",
        shape_names=("B", "T"),
        error_of="relative error",
        make=RewardProblem.of,
        providers=(
            Provider("srppo", "this library", reward_call(our_reward)),
            Provider("torch", "plain torch", reward_call(plain_reward)),
            Provider("torch-compile", "torch.compile of that", reward_call(plain_reward, True)),
        ),
        defaults=lambda device: token_cases("log_ratio_reward", REWARD_SHAPES)(device)[:1],
        gross_error=1e-2,
        dtypes=("float32",),
    ),
)
