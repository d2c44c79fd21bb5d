"""What the reward cannot see, watched every iteration; and beta adapted to hold a KL target.

The self-reward ``log pi_sft - log pi_base`` of sampled completions rises in runs that destroy the policy, too. Three
signs tell them apart, each compared with the start of the run, where the policy is SFT::

    likelihood   g = sum_d log [pi(y_d | x_d) / pi_sft(y_d | x_d)] / tokens       over held-out demonstrations d
    KL           k = mean over samples of log pi - log pi_sft                     nats per sequence
    length       l = mean tokens of a sample

A sign has turned where

- ``exp(g) < 1 - 0.03`` and g is two standard errors below 0: held-out demonstrations lost 3 % of their likelihood per
  token. The same demonstrations are scored each time, so there is no sampling noise in g, only in which they are;
- ``k > 2 E_sft[r]``: as ``E_sft[r] = KL(pi_sft || pi_base)``, the policy has gone further from SFT than twice the way
  from the base to SFT. For small steps the optimum with beta towards SFT lies at ``k = E_sft[r] / beta^2``;
- ``l`` has grown or shrunk by half: the reward is a sum, and pays for length.

Without held-out demonstrations the other two are all there is. k, l and the reward are averaged over iterations
(weight 1/2 on the newest), since a batch of samples is noisy.

The *best* policy so far is the one with the highest objective ``E[r] - beta KL`` among those for which no sign had
turned and whose g is not below 0 by more than its standard error or 1 %: no worse than SFT, as far as demonstrations
can tell. SFT is the first of them. It is an insurance against collapse, and no verdict on the last policy: on the
demo's seed 0, that is 1.4 % below SFT in likelihood, and solves 0.89 of the tasks without demonstrations, SFT 0.77.
Nor are the signs where demonstrations are one of many ways to say a thing: the optimum is sharper than SFT, so others
lose. In examples/smollm2's transfer they lost 10 to 15 % by the end of runs that had gained on prompts of all kinds.

Everything is measured on the policy that an iteration sampled from, before its update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from srppo import distributed, ppo
from srppo.config import SRPPOConfig
from srppo.data import Example
from srppo.roles import Role
from srppo.rollout import Rollout, collate_demonstrations

LOST_LIKELIHOOD = 0.03  # per token, of held-out demonstrations
NO_WORSE = 0.01  # largest such loss of a policy that is kept as the best
KL_FACTOR = 2.0  # times KL(pi_sft || pi_base)
LENGTH_FACTOR = 1.5
SMOOTHING = 0.5  # weight of the newest iteration in running means


@dataclass(frozen=True, slots=True)
class Look:
    """What one iteration shows of the policy that it sampled from; means over the whole batch, in nats and tokens."""

    reward: float  # self-reward
    objective: float  # shaped score minus beta KL: what PPO maximises
    objective_error: float  # its standard error
    kl: float  # to SFT
    length: float
    gain: float | None = None  # g above; absent without held-out demonstrations
    gain_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to tell, and whether this policy is the best so far."""

    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    best: bool


class HeldOut:
    """Demonstrations that no training has seen, with their log-probs under SFT.

    At most ``batch_size`` of them on each rank, evenly spaced: a look then costs at most what scoring under one role
    does.
    """

    def __init__(self, demonstrations: Sequence[Example], args: SRPPOConfig, sft: Role, **collating: Any) -> None:
        count = min(len(demonstrations), args.batch_size * distributed.size())
        chosen = [demonstrations[i * len(demonstrations) // count] for i in range(count)]
        self.rollout: Rollout = collate_demonstrations(chosen, device=sft.device, **collating)
        self.own = torch.tensor(distributed.even_share(range(count)))
        self.parts = ppo.split_micro_batches(self.own, self.rollout, args, sft)
        self.sft = self.logprobs(sft)

    def logprobs(self, role: Role) -> Tensor:
        """Log-prob of each demonstration, ``[B]`` on the CPU, at temperature 1."""
        own = ppo.score_role(role, self.rollout, 1.0, self.parts).sum(-1)[self.own]
        return distributed.gathered_rows(own)[: len(self.rollout)].cpu().double()

    def look(self, policy: Role) -> tuple[float, float, float]:
        """Log-prob per token under the policy, its gain over SFT, and the gain's standard error over demonstrations:
        infinite for a single one, which tells nothing of others."""
        logprobs, lengths = self.logprobs(policy), self.rollout.lengths.cpu().double()
        tokens, count = lengths.sum(), len(lengths)
        gains = logprobs - self.sft
        gain = gains.sum() / tokens
        spread = (gains - gain * lengths).square().sum()  # of a ratio of sums
        error = (spread * count / (count - 1)).sqrt().item() / tokens.item() if count > 1 else math.inf
        return (logprobs.sum() / tokens).item(), gain.item(), error


class Guard:
    """Follows the signs over a run; see the module's head. Its state is part of a checkpoint."""

    def __init__(self) -> None:
        self.start: Look | None = None
        self.mean: dict[str, float] = {}  # running means of reward, objective, kl and length
        self.told: dict[str, float] = {}  # how bad each sign was when it was last told
        self.best: dict[str, float] | None = None  # step, objective, and gain where known

    def look(self, step: int, seen: Look, *, beta: float) -> Verdict:
        """Judges the policy after ``step`` iterations.

        Args:
            beta: the weight of the KL penalty now, for the advice in a warning.
        """
        if self.start is None:
            self.start = seen
        for name in ("reward", "objective", "kl", "length"):
            value = getattr(seen, name)
            if math.isfinite(value):
                self.mean[name] = self.mean.get(name, value) + SMOOTHING * (value - self.mean.get(name, value))
        turned = self.turned(seen)
        no_worse = seen.gain is None or seen.gain >= -min(seen.gain_error, NO_WORSE)
        best = (
            not turned
            and no_worse
            and (self.best is None or self.mean["objective"] > self.best["objective"] + seen.objective_error)
        )
        if best:
            self.best = {"step": step, "objective": self.mean["objective"]}
            if seen.gain is not None:
                self.best["gain"] = seen.gain
        warnings = []
        for name, (size, text) in turned.items():
            if size >= 2 * self.told.get(name, 0.0):  # once, and again when it has doubled
                self.told[name] = size
                warnings.append(f"after iteration {step}: {text}{self.trend()}; {self.advice(beta)}")
        notes = [f"after iteration {step}: {name} is back within bounds" for name in self.told if name not in turned]
        self.told = {name: size for name, size in self.told.items() if name in turned}
        return Verdict(tuple(warnings), tuple(notes), best)

    def turned(self, seen: Look) -> dict[str, tuple[float, str]]:
        """The signs that have turned: how far, and what to say."""
        assert self.start is not None
        found = {}
        if seen.gain is not None:
            lost = 1 - math.exp(seen.gain)
            if lost > LOST_LIKELIHOOD and seen.gain < -2 * seen.gain_error:
                text = (
                    f"held-out demonstrations have lost {lost:.1%} of their likelihood per token against SFT (standard "
                    f"error {seen.gain_error:.1%})"
                )
                found["held-out likelihood"] = (lost, text)
        way = max(self.start.reward, self.start.objective_error)
        if 0 < KL_FACTOR * way < self.mean["kl"]:  # a first batch of one sequence may not tell the way
            text = (
                f"the policy is {self.mean['kl']:.2f} nats from SFT, more than {KL_FACTOR:g} times as far as SFT is "
                f"from the base ({way:.2f})"
            )
            found["KL to SFT"] = (self.mean["kl"] / way, text)
        change = self.mean["length"] / max(self.start.length, 1.0)
        if not 1 / LENGTH_FACTOR <= change <= LENGTH_FACTOR:
            text = f"completions went from {self.start.length:.1f} tokens under SFT to {self.mean['length']:.1f}"
            found["length"] = (max(change, 1 / change), text)
        return found

    def trend(self) -> str:
        assert self.start is not None
        before, now = self.start.reward, self.mean["reward"]
        if now > before:
            return f", while the reward rose from {before:.2f} to {now:.2f}"
        return f", and the reward fell from {before:.2f} to {now:.2f}"

    def advice(self, beta: float) -> str:
        kept = "best/ holds SFT itself" if not self.best or not self.best["step"] else (
            f"best/ holds the policy after iteration {self.best['step']:.0f}"
        )  # fmt: skip
        return f"raise kl_coef (now {beta:.3g}), lower learning_rate, or stop: {kept}"

    def state_dict(self) -> dict[str, Any]:
        return {"start": asdict(self.start) if self.start else None, "mean": dict(self.mean), "told": dict(self.told),
                "best": dict(self.best) if self.best else None}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = Look(**state["start"]) if state["start"] else None
        self.mean, self.told, self.best = state["mean"], state["told"], state["best"]


def look_at(
    scores: ppo.Scores, targets: ppo.Advantages, rollout: Rollout, args: SRPPOConfig,
    *, gain: float | None = None, gain_error: float = 0.0,
) -> Look:  # fmt: skip
    """The look at a scored rollout. The KL is to SFT; where only another reference was scored at the sampling
    temperature (``kl_reference=base``, two temperatures), it is taken at the score temperature."""
    sft = scores.reference if args.kl_reference == "sft" else scores.sft
    objective = targets.shaped_scores + targets.penalties.sum(-1)
    error = objective.std().item() / math.sqrt(len(objective)) if len(objective) > 1 else 0.0
    return Look(
        reward=targets.scores.mean().item(),
        objective=objective.mean().item(),
        objective_error=error,
        kl=(scores.policy - sft).sum(-1).mean().item(),
        length=rollout.lengths.float().mean().item(),
        gain=gain,
        gain_error=gain_error,
    )


class KLController:
    """beta, the weight of the KL penalty, constant or adapted to hold the KL at a target.

    With a target, after each iteration's sequence-level KL to the reference (Ziegler et al., arXiv 1909.08593, section
    2.2, with a step that suits runs of tens of iterations; theirs are 0.1 and an error clipped to +-0.2)::

        error = clip(KL / target - 1, -1, 1)
        beta  = beta * (1 + 0.2 * error)

    It is an integral controller of log beta: at rest only where the KL is at its target, and slower than the policy, so
    the KL swings around the target before it settles. A KL of exactly 0 is a policy that has not moved yet: no lesson,
    and neither is one that is not finite.
    """

    RATE = 0.2

    def __init__(self, args: SRPPOConfig) -> None:
        self.beta, self.target = args.kl_coef, args.kl_target

    def update(self, kl: float) -> None:
        """Adapts beta to the KL (nats per sequence) that the last rollout showed."""
        if self.target is not None and kl != 0 and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -1.0), 1.0)
            self.beta *= 1 + self.RATE * error

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if self.target is not None:  # without a target beta is the configuration's, which may have changed
            self.beta = state["beta"]
