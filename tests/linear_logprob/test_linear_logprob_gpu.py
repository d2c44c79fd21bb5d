"""The torch backend on a GPU: values and gradients against float64, and nothing that waits for the device."""

import pytest
import torch
from linear_logprob.head_problems import Problem, make, relative, value_bound
from torch import Tensor

from srppo_kernels import linear_logprob, linear_ppo_loss

pytestmark = pytest.mark.gpu
BIG = 1 << 30


def on_device(p: Problem, device: str = "cuda") -> Problem:
    def move(t):
        return t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return Problem(move(p.hidden), move(p.weight), move(p.targets), {k: move(v) for k, v in p.options.items()})


def check(p: Problem, plan: str) -> None:
    """Values in fp32 bounds; gradients within what one rounding to the inputs' dtype makes of them."""
    twin = p.double()
    entropy = plan != "precompute"
    got = p.run(entropy=entropy, plan=plan, workspace_bytes=BIG, backend="torch")
    want = twin.oracle()
    assert (got.logprob - want[0]).abs().max() <= value_bound(p)
    total, total_want = (got.logprob, want[0]) if not entropy else (got.logprob + got.entropy, want[0] + want[1])
    bound = 1e-5 if p.hidden.dtype == torch.float32 else 8e-3
    gradients = torch.autograd.grad(total.sum(), p.inputs())
    for a, b in zip(gradients, torch.autograd.grad(total_want.sum(), twin.inputs()), strict=True):
        assert relative(a, b) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_against_float64(kind, plan, dtype):
    p = make(kind, n=1100, dtype=dtype, bias=True, mask=torch.rand(1100) > 0.3, grad=(True, plan != "precompute"))
    check(on_device(p), plan)


def test_row_bits_and_an_unchanged_model():
    p = on_device(make("random", n=1100, dtype=torch.bfloat16))
    whole = p.run(plan="score").logprob
    order = torch.randperm(1100, device="cuda")
    assert torch.equal(linear_logprob(p.hidden[order], p.weight, p.targets[order]).logprob, whole[order])
    assert torch.equal(linear_logprob(p.hidden[:7], p.weight, p.targets[:7]).logprob, whole[:7])
    ones = torch.ones(1100, device="cuda")
    _, stats = linear_ppo_loss(p.hidden, p.weight, p.targets, whole, ones, ones.bool())
    assert stats.ratio_max == 1
    assert stats.approx_kl == 0


def test_nothing_waits():
    p = on_device(make("random", n=300, dtype=torch.bfloat16, mask=torch.rand(300) > 0.3))
    ones = torch.ones(300, device="cuda")
    mask = p.options["mask"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.run(entropy=True, plan="recompute").logprob.sum().backward()
        linear_ppo_loss(p.hidden, p.weight, p.targets, -ones, ones, mask)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
