"""Gradients of adapters are there before the backward that adds to them, and that changes no bit of what is learned."""

from __future__ import annotations

import pytest
import torch
from ppo_steps import trained_head
from tiny_runs import config, learners, rollout

from srppo import ppo
from srppo.roles import build_roles


@pytest.mark.parametrize("train_policy", [True, False])
@pytest.mark.parametrize(("kind", "use_peft"), [("sft", False), ("adapter", True)])
def test_an_adapters_gradients_are_made_before_its_backward(
    tiny_models, tmp_path, monkeypatch, kind, use_peft, train_policy
):
    args = config(tmp_path, use_peft=use_peft, num_ppo_epochs=2, gradient_accumulation_steps=2)
    present: dict[str, list[bool]] = {"policy_backward": [], "value_backward": []}

    def watched(name: str):
        inner = getattr(ppo, name)

        def call(role, *rest):
            present[name].append(all(parameter.grad is not None for _, parameter in role.parameters()))
            return inner(role, *rest)

        return call

    for name in present:
        monkeypatch.setattr(ppo, name, watched(name))

    def learned() -> list[torch.Tensor]:
        torch.manual_seed(0)
        roles = trained_head(build_roles(args, tiny_models.base, getattr(tiny_models, kind)))
        parameters = [p for role in (roles.policy, roles.critic) for _, p in role.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True).grad = torch.ones_like(parameter)  # as what Ctrl-C ended leaves one
        given, taught = rollout(), learners(roles, args)
        assert all(parameter.grad is None for parameter in parameters)
        mini_batches = [list(torch.arange(len(given)).split(2))]
        scores = ppo.score(roles, given, args, mini_batches[0])
        targets = ppo.advantages(given, scores, args)
        for parameter in parameters:  # and a callback that measures something
            parameter.requires_grad_(True).grad = torch.ones_like(parameter)
        with torch.no_grad():  # as a notebook may be all through
            ppo.update(*taught, given, scores, targets, args, mini_batches, generator=torch.Generator().manual_seed(4),
                       train_policy=train_policy)  # fmt: skip
        assert all(parameter.grad is None for learner in taught for parameter in learner.parameters)
        assert bool(taught[0].optimizer.state) is train_policy
        return [parameter.detach().clone() for learner in taught for parameter in learner.parameters]

    with_them = learned()
    assert present["value_backward"][0] is use_peft
    assert present["policy_backward"][0] is (use_peft and train_policy)
    monkeypatch.setattr(ppo.Learner, "make_gradients", lambda self: None)
    assert all(torch.equal(a, b) for a, b in zip(with_them, learned(), strict=True))
