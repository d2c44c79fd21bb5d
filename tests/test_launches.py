"""One launch each: what the small ops run on a GPU, counted in the interpreter. On a device the profiler counts."""

import importlib

import pytest
import torch
from backends import needs_triton
from launches import launched

from srppo_kernels import gae, log_ratio_reward, ppo_loss, value_loss, whiten

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy's, of what masked places hold


@pytest.fixture(autouse=True)
def _a_first_call_fills_the_counter():
    ones = torch.ones(1, 1)
    whiten(ones, ones.bool(), backend="triton")


def tokens(steps: int = 600) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    four, mask = [torch.randn(3, steps) for _ in range(4)], torch.rand(3, steps) < 0.8
    return four, mask, torch.rand(3)


def test_the_counter_sees_kernels_and_operators():
    x, mask = torch.randn(2, 5), torch.ones(2, 5, dtype=torch.bool)
    seen = launched(lambda: whiten(x * 2, mask, backend="triton").sum())
    assert seen == ["aten::mul", "whiten_moments", "whiten_apply", "aten::sum"]
    assert launched(lambda: torch.empty(3).view(1, 3).detach().unbind()) == []


@pytest.mark.parametrize(
    "options",
    [
        {}, {"gamma": "rows"}, {"gamma": "rows", "lam": "rows"}, {"mask_mode": "zero"}, {"moments": True},
        {"cu_seqlens": torch.tensor([0, 60, 70, 120])},
    ],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_gae_and_its_gradient(options, monkeypatch):
    # On the CPU alone it reads them: the package's attribute `gae` is the function, so the module comes by its name.
    monkeypatch.setattr(importlib.import_module("srppo_kernels.gae.op"), "_check_starts", lambda *_: None)
    (rewards, values, *_), mask, end = tokens(40)  # a tile is 32 tokens in the interpreter
    options = {name: end if value == "rows" else value for name, value in options.items()}
    if "cu_seqlens" in options:
        rewards, values, mask = rewards.flatten(), values.flatten(), mask.flatten()
    assert launched(lambda: gae(rewards, values, mask, bootstrap=end, **options, backend="triton")) == ["gae_rows"]
    advantages = gae(rewards.requires_grad_(), values, mask, **options, backend="triton")[0]
    assert launched(lambda: torch.autograd.grad(advantages, rewards, torch.ones_like(advantages))) == [
        "aten::ones_like",  # of this test
        "gae_adjoint_rows",
    ]


def test_whitening_is_two_or_one_after_gae():
    (rewards, values, *_), mask, _ = tokens(40)
    assert launched(lambda: whiten(rewards, mask, backend="triton")) == ["whiten_moments", "whiten_apply"]
    advantages, _, moments = gae(rewards, values, mask, moments=True, backend="triton")
    assert launched(lambda: whiten(advantages, mask, moments=moments, backend="triton")) == ["whiten_apply"]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("placement", ["eos", "token"])
def test_reward(placement, parts):
    (sft, base, policy, ref), mask, std = tokens()
    options = {"placement": placement, "normalize": "running", "running_std": std[0], "clip": 2.0, "parts": parts}
    options |= {"truncated": std > 0.5, "missing_eos_penalty": 1.0}
    options |= {"logprobs_policy": policy, "logprobs_ref": ref, "kl_coef": 0.1, "kl_estimator": "k3"}
    assert launched(lambda: log_ratio_reward(sft, base, mask, **options, backend="triton")) == ["reward_rows"]


@pytest.mark.parametrize("normalizer", [None, 5.0, torch.tensor(5.0)], ids=["none", "number", "tensor"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum", "constant_length"])
def test_policy_loss_and_its_gradients(reduction, normalizer):
    (new, old, advantages, entropy), mask, _ = tokens()
    leaves = new.requires_grad_(), entropy.requires_grad_()

    def call():
        return ppo_loss(
            leaves[0], old, advantages, mask, entropy=leaves[1], entropy_coef=0.1, reduction=reduction,
            normalizer=normalizer, backend="triton",
        )  # fmt: skip

    assert launched(call) == ["policy_loss"]
    loss, _ = call()
    assert launched(lambda: torch.autograd.grad(loss, leaves, torch.empty(()))) == ["scale"]


def test_value_loss_and_its_gradient():
    (values, old, returns, _), mask, _ = tokens()
    assert launched(lambda: value_loss(values.requires_grad_(), old, returns, mask, backend="triton")) == ["value_loss"]
    loss, _ = value_loss(values, old, returns, mask, backend="triton")
    assert launched(lambda: torch.autograd.grad(loss, values, torch.empty(()))) == ["scale"]
