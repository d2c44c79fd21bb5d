"""One PPO update taken apart, for the test files that compare gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_runs import learners
from torch import Tensor

from srppo import SRPPOConfig, ppo
from srppo.packing import Layout
from srppo.roles import Roles
from srppo.rollout import Rollout


def one_update(roles: Roles, args: SRPPOConfig, given: Rollout, *, mini_batches=None, reward_fn=None):
    """score, advantages and update on one rollout, as the trainer does."""
    mini_batches = mini_batches or ppo.split_rows(
        torch.arange(len(given)), given, args, role=roles.policy, generator=torch.Generator().manual_seed(3)
    )
    scores = ppo.score(roles, given, args, [rows for mini in mini_batches for rows in mini])
    targets = ppo.advantages(given, scores, args, reward_fn=reward_fn)
    result = ppo.update(
        *learners(roles, args), given, scores, targets, args, mini_batches, generator=torch.Generator().manual_seed(4)
    )
    return scores, targets, result


@pytest.fixture
def gradients(monkeypatch):
    """Collects what every optimizer step would have used, and steps nothing."""
    collected: list[list[Tensor]] = []

    def record(self: ppo.Learner, max_grad_norm: float | None) -> float:
        collected.append([p.grad.clone() for p in self.parameters if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return 1.0

    monkeypatch.setattr(ppo.Learner, "step", record)
    return collected


def assert_same_gradients(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert len(a) == len(b) > 0
        scale = max(x.abs().max() for x in a)
        assert scale > 1e-5
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5 * scale.item(), rtol=1e-3)


def laid_out(roles: Roles, layout: Layout) -> Roles:
    return Roles(*(dataclasses.replace(role, layout=layout) for role in roles))


def trained_head(roles: Roles) -> Roles:
    """With a value head that is not 0, so that the critic's trunk has a gradient."""
    with torch.no_grad():
        roles.critic.value_head.weight.fill_(0.1)
    return roles
