"""What each of the demo's models is judged by, on prompts whose strings no stage has seen.

- *score*: how often the first way (the right answer, then stop) is sampled, in domain and out of domain;
- *reward*: ``log pi_sft - log pi_base`` of a sampled completion, summed over its tokens, mean over completions;
- *KL to SFT*: ``sum_t KL(pi(.|y_<t) || pi_sft(.|y_<t))`` along a sampled completion, mean over completions, with pi at
  the temperature that was sampled at. Each term is the exact KL of two next-token distributions, which the tiny
  vocabulary allows: an estimate of the same sequence-level KL as ``log pi - log pi_sft`` of the samples, but never
  negative and with less noise;
- *length*: tokens of a completion, its stop token included.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo.data import Example
from srppo.evaluation import fixed_seed
from srppo.roles import Role
from srppo.rollout import Rollout, generate

from .world import DEMONSTRATED_TASK, TASKS, WAYS, classify, parse_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Summary:
    """Means over the completions of one domain."""

    score: float  # share answered in the first way
    ways: dict[str, float]  # share of each way; "other" is none of the three, a wrong answer say
    reward: float  # nats per sequence
    kl_to_sft: float  # nats per sequence
    length: float  # tokens


@dataclass(frozen=True)
class Judgement:
    """One model on all held-out prompts."""

    in_domain: Summary
    out_of_domain: Summary
    score_by_task: dict[str, float]
    samples: list[tuple[str, str]]  # (prompt, completion), the first of each task

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A model to judge: a role, or with ``beta`` the policy that extrapolates from base past that role; at a
    temperature."""

    name: str
    role: Role
    beta: float | None = None
    temperature: float = 1.0


def judge(
    candidate: Candidate,
    sft: Role,
    base: Role,
    held_out: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_completion_length: int,
    seed: int,
    batch_size: int = 256,
) -> Judgement:
    """Sample a completion per held-out prompt, at the candidate's temperature, and measure it.

    Every candidate is sampled with the same seed, which makes differences between candidates a little less noisy.
    """
    with fixed_seed(seed):
        rollout = generate(
            candidate.role,
            [example.prompt_ids for example in held_out],
            max_completion_length=max_completion_length,
            pad_token_id=tokenizer.pad_token_id,
            stop_token_ids=[tokenizer.eos_token_id],
            temperature=candidate.temperature,
            batch_size=batch_size,
            extrapolate=None if candidate.beta is None else (base, candidate.beta),
        )
    parts = [
        reward_and_kl(candidate, sft, base, rollout.select(rows))
        for rows in torch.arange(len(rollout)).split(batch_size)
    ]
    rewards, kls = (torch.cat(column) for column in zip(*parts, strict=True))
    prompts = [str(tokenizer.decode(example.prompt_ids)) for example in held_out]
    completions = [
        str(tokenizer.decode(ids[keep], skip_special_tokens=True))
        for ids, keep in zip(rollout.completions, rollout.completion_mask, strict=True)
    ]
    tasks = [parse_prompt(prompt)[0] for prompt in prompts]
    ways = [
        classify(prompt, completion, ended=not cut) or "other"
        for prompt, completion, cut in zip(prompts, completions, rollout.truncated.tolist(), strict=True)
    ]
    rows_of = {task: [row for row, name in enumerate(tasks) if name == task] for task in TASKS}

    def summary(rows: list[int]) -> Summary:
        counts: Counter[str] = Counter(ways[row] for row in rows)
        return Summary(
            score=counts["right"] / len(rows),
            ways={way: counts[way] / len(rows) for way in (*WAYS, "other")},
            reward=rewards[rows].mean().item(),
            kl_to_sft=kls[rows].mean().item(),
            length=rollout.lengths[rows].float().mean().item(),
        )

    return Judgement(
        in_domain=summary(rows_of[DEMONSTRATED_TASK]),
        out_of_domain=summary([row for task, rows in rows_of.items() if task != DEMONSTRATED_TASK for row in rows]),
        score_by_task={task: sum(ways[row] == "right" for row in rows) / len(rows) for task, rows in rows_of.items()},
        samples=[(prompts[rows[0]], completions[rows[0]]) for rows in rows_of.values()],
    )


@torch.no_grad()
def reward_and_kl(candidate: Candidate, sft: Role, base: Role, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Reward and KL to SFT of each sequence of a rollout, two of ``[B]``, by teacher forcing."""
    log_base, log_sft = distributions(base, rollout), distributions(sft, rollout)
    log_policy = log_sft if candidate.role is sft else distributions(candidate.role, rollout)
    if candidate.beta is not None:
        log_policy = (log_policy + (log_policy - log_base) / candidate.beta).log_softmax(-1)
    if candidate.temperature != 1:
        log_policy = (log_policy / candidate.temperature).log_softmax(-1)
    mask = rollout.completion_mask
    taken = rollout.completions[..., None]
    ratio = (log_sft - log_base).gather(-1, taken).squeeze(-1)
    # kl_div(input, target) is sum target (target - input), with the target in log space here.
    kl = torch.nn.functional.kl_div(log_sft, log_policy, reduction="none", log_target=True).sum(-1)
    return (ratio * mask).sum(-1), (kl * mask).sum(-1)


def distributions(role: Role, rollout: Rollout) -> Tensor:
    """Next-token log-probs of a role at every completion position, ``[B, T, V]``.

    All of them at once is what the library's ops are there to avoid; a vocabulary of 258 is small enough to look at.
    """
    with role.active() as model:
        logits = model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            use_cache=False,
        ).logits
    return logits[:, rollout.prompt_length - 1 : -1].float().log_softmax(-1)
