"""Apple's GPUs, pretended: they have no float64. What the ops compute where a tensor in float64 is refused is what they
compute elsewhere."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srppo import losses
from srppo_kernels import (
    _arguments,
    _extension,
    gae,
    linear_log_ratio,
    linear_logprob,
    linear_loss,
    linear_ppo_loss,
    log_ratio_reward,
    ppo_loss,
    value_loss,
    whiten,
)
from srppo_kernels._library import OPS
from srppo_kernels.linear_logprob.chunked import operand_dtype
from srppo_kernels.linear_logprob.plan import Plan
from srppo_kernels.ppo_loss import PPOStats, ValueStats


class NoFloat64(TorchDispatchMode):
    """Refuses what makes a tensor in float64, inside of our ops, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().removesuffix(".default") in OPS:
            with self:
                return OPS[func.name().removesuffix(".default")].kernel(*args)
        result = func(*args, **(kwargs or {}))
        wide = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype == torch.float64]
        assert not wide, f"{func.name()} makes a tensor in float64"
        return result


def of_tokens(x: Tensor, y: Tensor, z: Tensor, mask: Tensor):
    yield (found := gae(x, y, mask, moments=True))
    yield whiten(found[0].detach(), mask, moments=found[2])
    yield gae(x[mask], y[mask], torch.ones_like(x[mask], dtype=torch.bool), cu_seqlens=torch.tensor([0, 3, 12]))
    yield whiten(x, mask)
    yield whiten(z, mask, shift_mean=False)
    statistics = []
    for reduction in ("token_mean", "sequence_mean", "sum", "constant_length"):
        options = {"entropy": y, "entropy_coef": 0.1, "dual_clip": 3.0, "reduction": reduction}
        yield (found := ppo_loss(x, z, y, mask, **options))
        statistics.append(found[1])
    yield PPOStats.merge(statistics)
    yield (found := value_loss(x, y, z, mask, clip=0.2))
    yield ValueStats.merge([found[1], found[1]])
    kl = {"logprobs_policy": x, "logprobs_ref": z, "kl_coef": 0.1}
    for options in ({}, {"normalize": "length", "clip": 1.0}, {"placement": "token", "kl_estimator": "k3", **kl}):
        yield log_ratio_reward(x, y, mask, parts=True, **options)


def of_losses(x: Tensor, y: Tensor, z: Tensor, mask: Tensor):
    n = mask.sum()
    yield losses.dapo(x, y, mask, z.detach(), y.detach(), normalizer=n)
    yield losses.gspo(x, y, mask, z.detach(), y[:, 0].detach(), normalizer=n)
    yield losses.dpo(x, y, mask, z.detach(), normalizer=2.0)
    yield losses.group_advantages(x[:, 0].detach(), 2)
    yield losses.group_advantages(torch.full((7,), -3001.3), 7, eps=0.0, scale=False)


def of_heads(x: Tensor, y: Tensor, z: Tensor, mask: Tensor):
    hidden, weight = x[..., None] * y[:, None, :], z.T @ y  # [B, T, T] and [T, T]: a vocabulary as wide as a state
    targets = torch.arange(mask.numel()).view(mask.shape) % weight.shape[0]
    yield linear_logprob(hidden, weight, targets, mask=mask, entropy=True)
    yield linear_log_ratio(hidden, weight, hidden.detach() * 0.5, weight.detach(), targets, mask=mask)
    for size in (None, 1):  # all rows at once, and in chunks
        loss = lambda logprob, entropy: (-logprob.sum(), {})  # noqa: E731
        yield linear_loss(hidden, weight, targets, loss, mask=mask, workspace_bytes=size)
        yield linear_ppo_loss(hidden, weight, targets, z.detach(), y.detach(), mask, workspace_bytes=size)


@pytest.mark.parametrize("function", [of_tokens, of_losses, of_heads])
def test_ops_give_the_same_without_float64(monkeypatch, function):
    plan = sys.modules[Plan.__module__]  # the package has a function of the name of the folder
    monkeypatch.setattr(_extension, "_module", None)
    monkeypatch.setattr(_extension, "_reason", "it is left out")
    monkeypatch.setattr(_extension, "_warned", {"auto"})
    monkeypatch.setattr(plan, "row_block", lambda device: 8)

    def computed() -> list[Tensor]:
        torch.manual_seed(0)
        inputs = [torch.randn(4, 6, requires_grad=True) for _ in range(3)]
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0] * 6, [0, 1, 1, 0, 0, 1]]).bool()
        results = [x for x in tree_leaves(list(function(*inputs, mask))) if isinstance(x, Tensor)]
        differentiable = [x.sum() for x in results if x.requires_grad]
        return [*(x.detach() for x in results), *torch.autograd.grad(sum(differentiable), inputs, allow_unused=True)]

    elsewhere = computed()
    monkeypatch.setattr(_arguments, "WITHOUT_FLOAT64", ("cpu",))
    with NoFloat64():
        here = computed()
    for got, want in zip(here, elsewhere, strict=True):
        torch.testing.assert_close(got, want, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(_arguments, "WITHOUT_FLOAT64", ("cpu",))
    with FakeTensorMode() as mode:
        x, mask = mode.from_tensor(torch.ones(2, 3)), mode.from_tensor(torch.ones(2, 3).bool())
        for moments in (gae(x, x, mask, moments=True)[2], torch.ops.srppo.whiten_moments(x, mask, "auto")):
            assert (moments.shape, moments.dtype) == ((3,), torch.float32)


def test_no_gemm_is_asked_to_widen_where_there_is_none():
    """torch.mm takes an out_dtype on CUDA alone."""
    for kind, dtype in (("mps", torch.float32), ("cpu", torch.float32), ("cuda", torch.bfloat16)):
        operand = SimpleNamespace(device=torch.device(kind), dtype=torch.bfloat16)
        assert operand_dtype(operand, operand) == dtype
