"""One SRPPO update, rollout excluded, of a real architecture: fused ops against the same trainer with logits in full.

The update is the trainer's own: ``ppo.score`` under four roles, ``ppo.advantages``, ``ppo.update`` with one epoch.
Weights are random and the learning rate is 0, so that every call does the same work on the same numbers. What is
exchanged are the two functions through which ``srppo.ppo`` reaches the vocabulary:

    srppo        as shipped
    logits       plain torch on materialised logits, softmax in fp32
    (floor)      neither: the same update without any head, that is transformer, values and optimizer

So the ratio less 1 is what the vocabulary costs on top of everything else. The error is that of the policy's log-probs
against fp64 logits of the same hidden states. The largest batch, a line through the peaks measured at B and 2 B, is
left out where the run has a time budget (``--budget 0`` or a chosen shape lifts it); of small models it tells the peak
at 4 B within a fifth.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.core import Call, Case, Errors, Floor, Op, Provider, Result, Unavailable
from bench.head import naive_logprob, ppo_of
from bench.memory_run import shape_of
from bench.method import extra_memory
from srppo_kernels import LinearLogprob, PPOStats

# Hidden 576, vocabulary 49152, head tied to the embedding: 0.13 B parameters of a Llama.
ARCHITECTURE = {name: value for name, value in shape_of("smollm2-135m").items() if name != "model_type"}
RESOLUTION_MIB = 1.0  # less growth from B to 2 B than this is the process's own: a page now and then
MEMORY_GIB = {"cpu": 8.0, "cuda": 80.0}  # of a laptop; of the GPU that the other shapes are meant for
GIB = float(1 << 30)


def configuration(batch: int, prompt: int, completion: int) -> Any:
    from srppo.config import SRPPOConfig

    return SRPPOConfig(
        use_peft=True, learning_rate=0.0, num_ppo_epochs=1, per_device_train_batch_size=batch, report_to=["none"],
        max_prompt_length=prompt, max_completion_length=completion,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def roles_for(dtype: torch.dtype, device: str) -> Any:
    """Base and SFT of random weights, with LoRA adapters for policy and critic on SFT."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from srppo.roles import build_roles

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).to(device=device, dtype=dtype).eval()

    return build_roles(configuration(1, 1, 1), model(0), model(1))


@dataclass(frozen=True, eq=False)
class StepProblem:
    """A rollout of full rows, with the learners."""

    case: Case
    roles: Any
    rollout: Any
    args: Any
    policy: Any
    critic: Any

    useful_flops = 0.0
    useful_bytes = 0.0

    @classmethod
    def of(cls, case: Case) -> StepProblem:
        try:
            from srppo import ppo
            from srppo.rollout import collate
        except ImportError as error:
            raise RuntimeError(f"the trainer does not import: {error}") from error
        batch, prompt, completion = case.shape
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, ARCHITECTURE["vocab_size"], (batch, prompt + completion), generator=generator)
        rollout = collate(
            ids[:, :prompt].tolist(), ids[:, prompt:].tolist(), pad_token_id=0, stop_token_ids=[0], device=case.device
        )
        args = configuration(batch, prompt, completion)
        roles = roles_for(case.torch_dtype, case.device)
        learners = [ppo.Learner.create(role, args, 0.0, 1) for role in (roles.policy, roles.critic)]
        return cls(case, roles, rollout, args, *learners)

    def step(self) -> Result:
        """The update of :meth:`srppo.trainer.SRPPOTrainer.iterate`, without sampling and metrics."""
        from srppo import ppo

        rows = [[torch.arange(len(self.rollout))]]
        scores = ppo.score(self.roles, self.rollout, self.args, rows[0])
        targets = ppo.advantages(self.rollout, scores, self.args)
        ppo.update(self.policy, self.critic, self.rollout, scores, targets, self.args, rows)
        return {"logprob": scores.policy, "advantages": targets.advantages}

    def floor(self) -> Floor:
        def call() -> Result:
            with vocabulary(no_logprob, no_loss):
                return self.step()

        return Floor("the update without a head", call)

    @torch.no_grad()
    def errors(self, result: Result) -> Errors:
        role = self.roles.policy
        with role.active():
            hidden = role.hidden(self.rollout).double()
            weight = role.head.weight.double()
        targets = self.rollout.tokens
        pieces = zip(hidden.split(64), targets.split(64), strict=True)
        exact = torch.cat([torch.log_softmax(x @ weight.T, -1).gather(-1, y[:, None])[:, 0] for x, y in pieces])
        return Errors((result["logprob"].double().flatten() - exact).abs().amax().item())

    def doubled(self) -> StepProblem:
        batch, *rest = self.case.shape
        return StepProblem.of(Case(self.case.op, (2 * batch, *rest), self.case.dtype, device=self.case.device))

    def held_bytes(self) -> int:
        """Weights of all roles, each once, and the optimizers' state."""
        tensors = {p.data_ptr(): p.numel() * p.element_size() for role in self.roles for p in role.model.parameters()}
        states = [s for learner in (self.policy, self.critic) for s in learner.optimizer.state.values()]
        extra = sum(t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, Tensor))
        return sum(tensors.values()) + extra


@contextmanager
def vocabulary(logprob: Any, loss: Any) -> Iterator[None]:
    """The trainer with other ways to the vocabulary."""
    from srppo import ppo

    for name in ("linear_logprob", "linear_ppo_loss"):
        if not hasattr(ppo, name):
            raise Unavailable(f"srppo.ppo has no {name} any more: this benchmark exchanges it")
    with mock.patch.object(ppo, "linear_logprob", logprob), mock.patch.object(ppo, "linear_ppo_loss", loss):
        yield


def no_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False, **_: Any) -> LinearLogprob:
    zeros = torch.zeros(targets.shape, device=hidden.device)
    return LinearLogprob(zeros, zeros if entropy else None, None)


def no_loss(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, PPOStats]:
    return hidden.float().mean(), no_statistics(hidden.device)


def no_statistics(device: torch.device) -> PPOStats:
    return PPOStats(*[torch.ones((), device=device)] * len(PPOStats._fields))


def logits_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False, **_: Any
) -> LinearLogprob:
    """The naive form. The architecture has no bias, scale or cap in its head."""
    log_p = torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)
    logprob = log_p.gather(-1, targets[..., None])[..., 0]
    spread = -(log_p.exp() * log_p).sum(-1) if entropy else None
    return LinearLogprob(logprob, spread, None)


def logits_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *,
    normalizer: Tensor, **_: Any,
) -> tuple[Tensor, PPOStats]:  # fmt: skip
    """The naive loss, at temperature 1. Its statistics are left out, which is in its favour."""
    logprob = naive_logprob(hidden.flatten(0, -2), weight, targets.flatten()).view(targets.shape)
    return ppo_of(logprob, old, advantages, mask) * (mask.sum() / normalizer), no_statistics(hidden.device)


def fused(problem: StepProblem, plan: str) -> Call:
    return problem.step


def materialised(problem: StepProblem, plan: str) -> Call:
    def call() -> Result:
        with vocabulary(logits_logprob, logits_loss):
            return problem.step()

    return call


def line(batch: int, peaks: tuple[float, float]) -> tuple[float, float]:
    """What a batch of 0 would take and what each sequence adds, from the peaks at ``batch`` and twice that."""
    per_sequence = (peaks[1] - peaks[0]) / batch
    return peaks[0] - per_sequence * batch, per_sequence


def largest_batch(prepare: Any) -> Any:
    """How many sequences fit, from the peaks at B and 2 B."""

    def detail(problem: StepProblem, plan: str) -> str:
        batch = problem.case.shape[0]
        limit = MEMORY_GIB[problem.case.device]
        first, second = (extra_memory(prepare(p, plan), problem.case.device)[1] for p in (problem, problem.doubled()))
        if not second - first >= RESOLUTION_MIB:
            return ""
        constant, per_sequence = line(batch, (first, second))
        fits = max(0, int((limit * 1024 - problem.held_bytes() / (1 << 20) - constant) / per_sequence))
        return (
            f"{per_sequence:.0f} MiB a sequence: {fits} sequences in {limit:g} GiB (line through {batch}, {2 * batch})"
        )

    return detail


SHAPES = {"cpu": ((2, 16, 48),), "cuda": ((64, 128, 512),)}

OPS = (
    Op(
        name="training_step",
        title="one SRPPO update of a 0.13 B model with LoRA, rollout excluded",
        shape_names=("B", "P", "T"),
        error_of="max log-prob error, nats",
        make=StepProblem.of,
        providers=(
            Provider("srppo", "the trainer as shipped", fused, detail=largest_batch(fused)),
            Provider("logits", "the same trainer on materialised logits", materialised,
                     detail=largest_batch(materialised)),
        ),
        defaults=lambda device: [Case("training_step", shape, "bfloat16", device=device) for shape in SHAPES[device]],
        gross_error=0.25,
    ),
)  # fmt: skip
