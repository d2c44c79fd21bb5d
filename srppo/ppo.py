"""One PPO iteration as three functions for people with a loop of their own: score, advantages, update. Their metrics
are :func:`srppo.metrics.iteration_metrics`.

In the notation of the paper, for a completion y of prompt x sampled from the policy pi::

    score(x, y)  = sum_t [log pi_sft(y_t | x, y_<t) - log pi_base(y_t | x, y_<t)]       the self-reward
    reward_t     = score at the last token  -  beta * KL estimate at t towards pi_sft (or pi_base)
    A_t, R_t     = GAE(reward, V)
    loss         = -mean_t min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t),   r_t = pi(y_t) / pi_old(y_t)

Sums run over completion tokens up to and including the stop token. The losses of a mini-batch are divided by its token
count, whatever its split into micro-batches. Old log-probs come from the same forward, on the same micro-batches, as
the first epoch's, so that the first ratio is exactly 1. Policy and critic are stepped apart, one backward per role.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from srppo import distributed
from srppo.config import SRPPOConfig
from srppo.errors import UserError
from srppo.learner import Learner as Learner
from srppo.packing import split_micro_batches, split_rows
from srppo.roles import Role, Roles
from srppo.rollout import Rollout
from srppo_kernels import (
    PPOStats,
    ValueStats,
    gae,
    linear_logprob,
    linear_ppo_loss,
    log_ratio_reward,
    value_loss,
    whiten,
)
from srppo_kernels.log_ratio.reference import kl_per_token

RewardFn = Callable[[list[list[int]], list[list[int]]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Scores:
    """Per-token results of the passes over a rollout without gradients, all ``[B, T]`` fp32 and 0 where masked."""

    policy: Tensor  # log pi_old of the tokens taken, at the sampling temperature
    reference: Tensor  # log-probs of the KL reference, at the same temperature
    sft: Tensor  # log pi_sft at the score temperature
    base: Tensor  # log pi_base at the score temperature
    entropy: Tensor  # of the policy, in nats
    values: Tensor  # the critic's values before the update


@dataclass(frozen=True, slots=True)
class Advantages:
    """What the update learns from, ``[B, T]`` fp32 and 0 where masked; ``scores`` is ``[B]``."""

    scores: Tensor  # self-reward per sequence, before normalisation, scale, clip and penalty
    shaped_scores: Tensor  # the same as it enters the reward, with penalty and reward_fn
    penalties: Tensor  # -beta * KL estimate per token
    advantages: Tensor
    returns: Tensor


class RunningMoments:
    """Mean and variance of all finite scores so far (Chan's update), for ``reward_normalization=running``."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        batch = values.cpu().double()
        batch = batch[batch.isfinite()]
        if not len(batch):
            return
        count, mean = batch.numel(), batch.mean().item()
        delta, total = mean - self.mean, self.count + count
        self.m2 += (batch - mean).square().sum().item() + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """1 while all scores were equal: dividing by (almost) 0 would blow the first score up."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.m2 > 0 else 1.0


def logprobs(
    role: Role, rollout: Rollout, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (and entropies) of a rollout's completion tokens under a role, ``[B, T]``, with no gradient."""
    with torch.no_grad(), role.active():
        return head_logprobs(role, role.hidden(rollout), rollout, temperature, entropy)


def score_role(role: Role, rollout: Rollout, temperature: float, micro_batches: Sequence[Tensor]) -> Tensor:
    """Log-probs under one role, ``[B, T]``, a micro-batch at a time; 0 where masked."""
    result = torch.zeros(rollout.completion_mask.shape, device=rollout.input_ids.device)
    with role.active():
        for rows in micro_batches:
            part = logprobs(role, rollout.select(rows), temperature=temperature)[0]
            result[rows, : part.shape[1]] = part
    return result


def head_logprobs(
    role: Role, hidden: Tensor, rollout: Rollout, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    head = role.head
    out = linear_logprob(hidden, head.weight, rollout.tokens, temperature=temperature, entropy=entropy, **head.options)
    return rollout.in_place(out.logprob), None if out.entropy is None else rollout.in_place(out.entropy)


@torch.no_grad()
def score(
    roles: Roles,
    rollout: Rollout,
    args: SRPPOConfig,
    micro_batches: Sequence[Tensor] | None = None,
) -> Scores:
    """Log-probs of a rollout under policy, SFT and base, and the critic's values, role by role in micro-batches.

    Args:
        micro_batches: row indices of each micro-batch; :func:`update` must get the same for a first ratio of exactly 1.
            Rows in none of them, as those of other ranks, stay 0 (see :func:`gather_scores`).
    """
    if micro_batches is None:
        micro_batches = split_micro_batches(torch.arange(len(rollout)), rollout, args, roles.policy)
    names = Scores.__dataclass_fields__
    results = {name: torch.zeros(rollout.completion_mask.shape, device=rollout.input_ids.device) for name in names}
    parts = [(rows, rollout.select(rows)) for rows in micro_batches]
    # Base and SFT as one mixed batch of peft's (adapter_names) have the same bits as apart, and take 8 % more CPU time
    # (2.18 s to 2.01 s for 8 x 96 tokens through 12 layers of SmolLM2-135M's width, one thread) and twice the memory.
    for role in roles:
        with role.active():
            for rows, part in parts:
                for name, value in score_part(role, part, args).items():
                    results[name][rows, : value.shape[1]] = value
    return Scores(**results)


def gather_scores(scores: Scores) -> Scores:
    """What the ranks scored of one rollout, put together: each row by one of them, 0 from the others."""
    if distributed.size() == 1:
        return scores
    names = Scores.__dataclass_fields__
    return Scores(*distributed.summed(torch.stack([getattr(scores, name) for name in names])).unbind())


def score_part(role: Role, part: Rollout, args: SRPPOConfig) -> dict[str, Tensor]:
    """What a micro-batch gets from one role, by the names of :class:`Scores`. Call it inside ``role.active()``."""
    if role.name == "critic":
        return {"values": part.in_place(role.values(part))}
    hidden = role.hidden(part)
    if role.name == "policy":
        logp, entropy = head_logprobs(role, hidden, part, args.temperature, entropy=True)
        assert entropy is not None
        return {"policy": logp, "entropy": entropy}
    found = {role.name: head_logprobs(role, hidden, part, args.score_temperature)[0]}
    if role.name == args.kl_reference:
        same = args.score_temperature == args.temperature
        found["reference"] = found[role.name] if same else head_logprobs(role, hidden, part, args.temperature)[0]
    return found


@torch.no_grad()
def advantages(
    rollout: Rollout,
    scores: Scores,
    args: SRPPOConfig,
    *,
    moments: RunningMoments | None = None,
    reward_fn: RewardFn | None = None,
    kl_coef: float | None = None,
    weights: Tensor | None = None,
) -> Advantages:
    """Rewards, advantages and returns of a scored rollout.

    Args:
        rollout, scores: of all ranks, see :func:`srppo.rollout.gather` and :func:`gather_scores`; every rank computes
            the same from them, and ``reward_fn`` is called with the rank's own share.
        moments: running moments of the scores, updated here; needed for ``reward_normalization=running``.
        reward_fn: ``(prompts, completions) -> a number per sequence`` on token ids, added at the last token.
        kl_coef: beta in place of ``args.kl_coef``.
        weights: importance weights ``[B, T]`` that multiply the advantages, after whitening.
    """
    beta = args.kl_coef if kl_coef is None else kl_coef
    mask = rollout.completion_mask
    sequence_scores = (scores.sft - scores.base).sum(-1)
    if moments is not None:
        moments.update(sequence_scores)
    rewards = log_ratio_reward(
        scores.sft,
        scores.base,
        mask,
        placement=args.reward_placement,
        normalize=args.reward_normalization,
        running_std=moments.std if args.reward_normalization == "running" and moments is not None else None,
        scale=args.reward_scale,
        clip=args.reward_clip,
        truncated=rollout.truncated,
        missing_eos_penalty=args.missing_eos_penalty,
        logprobs_policy=scores.policy,
        logprobs_ref=scores.reference,
        kl_coef=beta,
        kl_estimator=args.kl_estimator,
    )
    penalties = -beta * kl_per_token(scores.policy - scores.reference, args.kl_estimator)  # scores are 0 where masked
    if reward_fn is not None:
        own = list(distributed.share(range(len(rollout))))
        extra = distributed.gathered_rows(call_reward_fn(reward_fn, rollout.select(own)))
        rewards = rewards + at_last_token(extra, mask)
    shaped = (rewards - penalties).sum(-1)
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantage, returns = gae(rewards, scores.values, mask, gamma=args.gamma, lam=args.lam)
    if args.whiten_advantages:
        advantage = whiten(advantage, mask)
    if weights is not None:
        advantage = advantage * weights
    return Advantages(sequence_scores, shaped, penalties, advantage, returns)


def call_reward_fn(reward_fn: RewardFn, rollout: Rollout) -> Tensor:
    prompts = [
        ids[keep.bool()].tolist()
        for ids, keep in zip(
            rollout.input_ids[:, : rollout.prompt_length],
            rollout.attention_mask[:, : rollout.prompt_length],
            strict=True,
        )
    ]
    completions = [ids[keep].tolist() for ids, keep in zip(rollout.completions, rollout.completion_mask, strict=True)]
    given = reward_fn(prompts, completions)
    try:
        values = torch.as_tensor(list(given), dtype=torch.float32, device=rollout.input_ids.device)
    except (TypeError, ValueError):  # no list, or of None or text
        raise UserError(
            f"reward_fn must give a finite number per sequence ({len(rollout)} here), got {str(given)[:80]}"
        ) from None
    wrong = None
    if values.shape != (len(rollout),):
        wrong = f"shape {tuple(values.shape)}"
    elif not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0])
        wrong = f"{values[row].item()} at sequence {row}"
    if wrong is not None:
        raise UserError(f"reward_fn must give a finite number per sequence ({len(rollout)} here), got {wrong}")
    return values


def at_last_token(values: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` values placed at the last valid token of each row of ``mask``; rows without one stay 0."""
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask * positions).argmax(-1, keepdim=True)
    return torch.zeros(mask.shape, device=mask.device).scatter_(1, last, values[:, None]) * mask


# -- the update -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UpdateResult:
    policy_loss: float
    value_loss: float
    first: PPOStats  # of the first mini-batch, before any step: its ratios are exactly 1
    policy: PPOStats  # over all mini-batches
    value: ValueStats
    grad_norm: float
    value_grad_norm: float
    skipped_steps: int  # optimizer steps dropped because a gradient was not finite
    epochs: int


@torch.enable_grad()  # whatever the caller's notebook has set
def update(
    policy: Learner,
    critic: Learner,
    rollout: Rollout,
    scores: Scores,
    targets: Advantages,
    args: SRPPOConfig,
    mini_batches: list[list[Tensor]],
    *,
    generator: torch.Generator | None = None,
    train_policy: bool = True,
) -> UpdateResult:
    """The epochs of clipped updates on one rollout.

    Args:
        mini_batches: the first epoch's partition (see :func:`split_rows`), the one that :func:`score` ran on; later
            epochs draw their own from ``generator``.
        train_policy: false while the critic warms up; the policy is then measured, at the cost of a forward.
    """
    policy_stats: list[PPOStats] = []
    value_stats: list[ValueStats] = []
    losses, norms = [], []
    first, epoch = None, 0
    own = torch.cat([rows for mini_batch in mini_batches for rows in mini_batch]).sort().values
    for learner in (policy, critic):
        learner.optimizer.zero_grad(set_to_none=True)  # Ctrl-C or a callback may have left a gradient
    for epoch in range(1, args.num_ppo_epochs + 1):
        epoch_stats = []
        if epoch > 1:
            mini_batches = split_rows(own, rollout, args, role=policy.role, generator=generator)
        for mini_batch in mini_batches:
            count = distributed.summed(rollout.completion_mask[torch.cat(mini_batch)].sum())
            parts = [(rollout.select(rows), rows) for rows in mini_batch]
            for learner in (policy, critic) if train_policy else (critic,):
                learner.make_gradients()
            with policy.role.active(), torch.set_grad_enabled(train_policy):
                of_policy = [
                    policy_backward(policy.role, part, part.of_tokens(scores.policy[rows]),
                                    part.of_tokens(targets.advantages[rows]), count, args)
                    for part, rows in parts
                ]  # fmt: skip
            with critic.role.active():
                of_critic = [
                    value_backward(critic.role, part, part.of_tokens(scores.values[rows]),
                                   part.of_tokens(targets.returns[rows]), count, args)
                    for part, rows in parts
                ]  # fmt: skip
            losses.append([sum(loss for loss, _ in of_policy), sum(loss for loss, _ in of_critic)])
            norms.append((policy.step(args.max_grad_norm), critic.step(args.max_grad_norm)))
            mini_stats = [stats for _, stats in of_policy]
            first = first or merged(PPOStats, mini_stats)
            epoch_stats += mini_stats
            value_stats += [stats for _, stats in of_critic]
        policy_stats += epoch_stats
        if args.target_kl is not None and merged(PPOStats, epoch_stats).approx_kl.item() > args.target_kl:
            break
    assert first is not None
    losses = distributed.summed(torch.tensor(losses, dtype=torch.float64)).tolist()
    finite = [[n for n in column if math.isfinite(n)] for column in zip(*norms, strict=True)]
    return UpdateResult(
        policy_loss=mean([loss[0] for loss in losses]),
        value_loss=mean([loss[1] for loss in losses]),
        first=first,
        policy=merged(PPOStats, policy_stats),
        value=merged(ValueStats, value_stats),
        grad_norm=mean(finite[0]),
        value_grad_norm=mean(finite[1]),
        skipped_steps=2 * len(norms) - sum(map(len, finite)),
        epochs=epoch,
    )


Stats = TypeVar("Stats", PPOStats, ValueStats)


def merged(kind: type[Stats], stats: Sequence[Stats]) -> Stats:
    """The statistics (``PPOStats`` or ``ValueStats``) of the union of these and those of the other ranks."""
    own = kind.merge(stats)
    given = [name for name, value in own._asdict().items() if value is not None]
    rows = distributed.gathered(torch.stack([getattr(own, name) for name in given]))
    return kind.merge([own._replace(**dict(zip(given, row.unbind(), strict=True))) for row in rows])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def policy_backward(
    role: Role, part: Rollout, old: Tensor, advantage: Tensor, count: Tensor, args: SRPPOConfig
) -> tuple[float, PPOStats]:
    """Adds one micro-batch's share of the clipped loss to the policy's gradient; with gradients off, only measures
    it. ``old`` and ``advantage`` are ``[N]``, of ``part.tokens``."""
    with role.active():
        hidden = role.hidden(part)
        head = role.head
        loss, stats = linear_ppo_loss(
            hidden, head.weight, part.tokens, old, advantage, torch.ones_like(old, dtype=torch.bool),
            clip_low=args.cliprange, clip_high=args.cliprange, entropy_coef=args.entropy_coef,
            normalizer=count, temperature=args.temperature, **head.options,
        )  # fmt: skip
        if torch.is_grad_enabled():
            loss.backward()
    return loss.item(), stats


def value_backward(
    role: Role, part: Rollout, old: Tensor, returns: Tensor, count: Tensor, args: SRPPOConfig
) -> tuple[float, ValueStats]:
    """Adds one micro-batch's share of the value loss to the critic's gradient; ``old`` and ``returns`` are ``[N]``."""
    with role.active():
        counts = torch.ones_like(old, dtype=torch.bool)
        loss, stats = value_loss(role.values(part), old, returns, counts, clip=args.cliprange_value, normalizer=count)
        loss.backward()
    return loss.item(), stats
