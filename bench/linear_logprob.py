"""Log-probs from hidden states, and losses over them: forward, autograd op, PPO loss, cross-entropy.

    linear_logprob          score, no gradient                                   floor 1 GEMM
    linear_logprob_grad     the per-token op under an uneven upstream gradient   floor 3
    linear_ppo_loss         clipped loss, forward + backward, trainable head     floor 3
    linear_ppo_loss_frozen  the same, head frozen as under LoRA                  floor 2
    linear_cross_entropy    mean negative log-likelihood, forward + backward     floor 3

Useful work is 2 D V times the live rows, once per GEMM of the floor: a plan that recomputes the logits earns nothing
for it. The last op is there for libraries whose loss is one scalar: they are compared on that scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import srppo_kernels
from bench.core import PLANS, ROWS, Call, Case, Errors, Floor, Op, Provider, Result, Unavailable
from bench.head import (
    CLIP,
    HeadInputs,
    bare_gemms,
    logprob_errors,
    loss_errors,
    naive_logprob,
    ppo_of,
    problem_inputs,
)
from bench.peers import FUSED_MEAN, FUSED_PPO, PER_TOKEN, Forward, Peer, torch_mean
from srppo_kernels.linear_logprob import sm90

SHAPE = ("N", "D", "V")
GROSS = 0.25  # nats: sixteen-bit logits of these sizes are off by a tenth of that


@dataclass(frozen=True, eq=False)
class HeadProblem:
    """What the ops of this file share; ``kind`` is the op's name."""

    kind: str
    case: Case
    inputs: HeadInputs
    gemms: int
    frozen: bool = False

    @property
    def useful_flops(self) -> float:
        _, width, vocab = self.case.shape
        return 2.0 * self.gemms * self.inputs.live * width * vocab

    useful_bytes = 0.0

    def floor(self) -> Floor:
        return bare_gemms(self.inputs, self.gemms)

    def loss(self, logprob: Tensor) -> Tensor:
        """The scalar that is differentiated, from log-probs ``[N]``."""
        x = self.inputs
        if self.kind == "linear_logprob_grad":
            return torch.where(x.mask, logprob * x.upstream, 0).sum()
        if self.kind == "linear_cross_entropy":
            return -torch.where(x.mask, logprob, 0).sum() / x.live
        return ppo_of(logprob, x.old_logprobs, x.advantages, x.mask)

    def errors(self, result: Result) -> Errors:
        if self.kind == "linear_logprob":
            return logprob_errors(self.inputs, result["logprob"])
        x = self.inputs
        exact = torch.zeros(x.mask.shape, dtype=torch.float64, device=x.mask.device)
        exact[x.mask] = x.oracle.logprob
        exact.requires_grad_()
        wide = replace(
            self,
            inputs=_Widened(x.mask, x.upstream.double(), x.advantages.double(), x.old_logprobs.double(), x.live),  # type: ignore[arg-type]
        )
        loss = wide.loss(exact)
        (g,) = torch.autograd.grad(loss, exact)
        return loss_errors(x, result, loss.detach(), g[x.mask])


@dataclass(frozen=True)
class _Widened:
    """The fp64 inputs of :meth:`HeadProblem.loss`."""

    mask: Tensor
    upstream: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    live: int


def problem(kind: str, gemms: int, frozen: bool = False) -> Callable[[Case], HeadProblem]:
    return lambda case: HeadProblem(kind, case, problem_inputs(case), gemms, frozen)


# -- calls ------------------------------------------------------------------------------------------------------------


def score_call(inputs: HeadInputs, forward: Forward) -> Call:
    @torch.no_grad()
    def call() -> Result:
        return {"logprob": forward(inputs.hidden, inputs.weight)}

    return call


def training_call(problem: HeadProblem, loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
    """Forward, backward, and the gradients as results; they are dropped before the next call, as an optimizer does."""
    hidden, weight = problem.inputs.leaves(frozen=problem.frozen)
    if OPS_OF[problem.kind] == "linear_ppo_loss":
        problem.inputs.old_logprobs  # noqa: B018  (from the fp64 oracle, whose memory is not the first call's)

    def call() -> Result:
        hidden.grad = weight.grad = None
        value = loss(hidden, weight)
        value.backward()
        result = {"loss": value.detach(), "dhidden": hidden.grad}
        if weight.grad is not None:
            result["dweight"] = weight.grad
        hidden.grad = weight.grad = None
        return result  # type: ignore[return-value]

    return call


def per_token(peer: Peer) -> Provider:
    """A library's log-probs, completed with the op's loss in plain torch."""

    def prepare(problem: HeadProblem, plan: str) -> Call:
        forward = peer.adapter(problem.inputs)
        if problem.kind == "linear_logprob":
            return score_call(problem.inputs, forward)
        return training_call(problem, lambda hidden, weight: problem.loss(forward(hidden, weight)))

    return Provider(peer.name, peer.note, prepare, applies=peer.applies)


def fused(peer: Peer) -> Provider:
    """A library's own loss."""
    return Provider(
        peer.name,
        peer.note,
        lambda problem, plan: training_call(problem, peer.adapter(problem.inputs)),
        applies=peer.applies,
    )


def compiled(problem: HeadProblem, plan: str) -> Call:
    """torch.compile of the plain formula, loss included."""
    inputs = problem.inputs
    if problem.kind == "linear_logprob":
        return score_call(inputs, torch.compile(lambda h, w: naive_logprob(h, w, inputs.targets), dynamic=False))
    if problem.kind == "linear_cross_entropy":
        return training_call(problem, torch.compile(torch_mean(inputs), dynamic=False))
    return training_call(
        problem, torch.compile(lambda h, w: problem.loss(naive_logprob(h, w, inputs.targets)), dynamic=False)
    )


COMPILED = Provider("torch-compile", "torch.compile of logits, log_softmax, gather and loss", compiled)


# -- srppo ------------------------------------------------------------------------------------------------------------


def ours(backend: str) -> Callable[[HeadProblem, str], Call]:
    def prepare(problem: HeadProblem, plan: str) -> Call:
        x = problem.inputs
        reason = sm90.obstacle(x.hidden, x.weight) if backend == "sm90" else ""
        if reason:
            raise Unavailable(reason)
        options: dict[str, Any] = {"mask": x.mask, "plan": plan, "backend": backend}
        if problem.kind == "linear_logprob":
            return score_call(x, lambda h, w: srppo_kernels.linear_logprob(h, w, x.targets, **options).logprob)
        if problem.kind == "linear_logprob_grad":
            return training_call(
                problem, lambda h, w: problem.loss(srppo_kernels.linear_logprob(h, w, x.targets, **options).logprob)
            )
        if problem.kind == "linear_cross_entropy":
            count = x.live
            return training_call(
                problem,
                lambda h, w: srppo_kernels.linear_loss(
                    h, w, x.targets, lambda logprob, entropy: (-logprob.sum() / count, {}), **options
                )[0],
            )
        return training_call(
            problem,
            lambda h, w: srppo_kernels.linear_ppo_loss(
                h, w, x.targets, x.old_logprobs, x.advantages, clip_low=CLIP, clip_high=CLIP, **options
            )[0],
        )

    return prepare


OPS_OF = {
    "linear_logprob": "linear_logprob",
    "linear_logprob_grad": "linear_logprob",
    "linear_cross_entropy": "linear_loss",
    "linear_ppo_loss": "linear_ppo_loss",
    "linear_ppo_loss_frozen": "linear_ppo_loss",
}


def explained(backend: str) -> Callable[[HeadProblem, str], str]:
    """What srppo says that it does with the call."""

    def resolve(problem: HeadProblem, plan: str) -> str:
        hidden, weight = problem.inputs.leaves(frozen=problem.frozen)
        if problem.kind == "linear_logprob":
            hidden, weight = hidden.detach(), weight.detach()
        chosen = srppo_kernels.explain(
            hidden, weight, problem.inputs.targets, op=OPS_OF[problem.kind], mask=problem.inputs.mask, plan=plan,
            backend=backend,
        )  # fmt: skip
        return f"{chosen.backend}, {chosen.plan}, {chosen.gemms} GEMMs"

    return resolve


def on_hopper(case: Case) -> bool:
    return case.device != "cpu" and case.dtype == "bfloat16"


def srppo_providers(plans: tuple[str, ...] = ("auto",)) -> tuple[Provider, ...]:
    others = tuple(plan for plan in PLANS if plan not in plans)
    return (
        Provider("srppo", "this library", ours("auto"), plans, others, resolve=explained("auto")),
        Provider("srppo-sm90", "this library with GEMM 1 in CUDA C++ for Hopper", ours("sm90"), ("auto",), PLANS[1:],
                 applies=on_hopper, resolve=explained("sm90")),
        Provider("srppo-torch", "this library without its native kernels", ours("torch"), ("auto",), PLANS[1:],
                 default=False, resolve=explained("torch")),
        Provider("srppo-reference", "this library's reference, logits in full", ours("reference"), ("auto",),
                 default=False, resolve=explained("reference")),
    )  # fmt: skip


# -- cases ------------------------------------------------------------------------------------------------------------

# CPU: SmolLM2's head, and Qwen2.5-0.5B's for the larger vocabulary, with as many tokens as the five minutes allow.
# GPU: the shapes of the design's table of targets.
SHAPES = {
    "cpu": ((256, 576, 49152), (128, 896, 151936)),
    "cuda": ((8192, 4096, 151936), (8192, 4096, 128256), (4096, 2304, 256000)),
}


def cases(op: str, variants: Sequence[tuple[int, float, str]]) -> Callable[[str], list[Case]]:
    """``variants``: index of the shape, mask density, kind of rows."""

    def defaults(device: str) -> list[Case]:
        shapes = SHAPES[device]
        return [Case(op, shapes[i], "bfloat16", density, rows, device) for i, density, rows in variants]

    return defaults


def op(
    name: str,
    title: str,
    error_of: str,
    gemms: int,
    providers: tuple[Provider, ...],
    variants: Sequence[tuple[int, float, str]],
    frozen: bool = False,
) -> Op:
    return Op(
        name=name,
        title=title,
        shape_names=SHAPE,
        error_of=error_of,
        make=problem(name, gemms, frozen),
        providers=providers,
        defaults=cases(name, variants),
        gross_error=GROSS,
        rows=ROWS,
    )


PEERS = tuple(map(per_token, PER_TOKEN))
LOSS_PEERS = (PEERS[0], COMPILED, *PEERS[1:])
FIRST, PEAKED, LARGE = (0, 1.0, "random"), (0, 1.0, "peaked"), (1, 1.0, "random")

OPS = (
    op("linear_logprob", "log-probs, no gradient", "max log-prob error, nats", 1, (*srppo_providers(), *LOSS_PEERS),
       (FIRST, LARGE, (0, 0.5, "random"), PEAKED, (0, 0.2, "random"))),
    op("linear_ppo_loss", "PPO loss, forward + backward, trainable head", "loss error", 3,
       (*srppo_providers(), *LOSS_PEERS, *map(fused, FUSED_PPO)), (FIRST, LARGE, PEAKED, (0, 0.5, "random"))),
    op("linear_ppo_loss_frozen", "PPO loss, forward + backward, frozen head", "loss error", 2,
       (*srppo_providers(), *LOSS_PEERS, *map(fused, FUSED_PPO)), (FIRST,), frozen=True),
    op("linear_logprob_grad", "per-token op, forward + backward, trainable head", "loss error, nats", 3,
       (*srppo_providers(("auto", "cache", "recompute")), *LOSS_PEERS), (FIRST,)),
    op("linear_cross_entropy", "mean cross-entropy, forward + backward, trainable head", "loss error, nats", 3,
       (*srppo_providers(), fused(FUSED_MEAN[0]), COMPILED, *map(fused, FUSED_MEAN[1:])), (FIRST,)),
)  # fmt: skip
