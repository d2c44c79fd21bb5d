"""What each of two gloo ranks runs in test_vocab_parallel.py: a head cut over the ranks against the whole head."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from linear_logprob.head_problems import Problem, make, relative
from torch import Tensor

from srppo_kernels import linear_logprob, linear_loss, linear_ppo_loss
from srppo_kernels.parallel import full_head, vocab_parallel_head


def run(rank: int, size: int) -> None:
    """All checks in one process group, as starting a process costs more than a check."""
    for check in (uneven, no_target, empty_shard, frozen, losses, chunks, caches, dtensor):
        torch.manual_seed(0)
        check(rank, size)


def _shard(whole: Tensor, cuts: list[int], rank: int) -> Tensor:
    return whole.detach()[cuts[rank] : cuts[rank + 1]].clone().requires_grad_(whole.requires_grad)


def _same_on_all_ranks(values: Tensor, size: int) -> None:
    others = [torch.empty_like(values) for _ in range(size)]
    dist.all_gather(others, values.detach().contiguous())
    assert all(torch.equal(values, other) for other in others)


def _compare(p: Problem, cuts: list[int], rank: int, size: int, **options: Any) -> None:
    """Values, dhidden, the shard of dweight and dbias, on every plan, against the whole head in float64."""
    n = p.targets.shape[0]
    twin = p.double()
    upstream = torch.linspace(0, 1, n)
    frozen = not p.weight.requires_grad
    for plan in ("precompute",) if frozen else ("recompute", "cache"):
        weight, bias = _shard(p.weight, cuts, rank), _shard(p.options["bias"], cuts, rank)
        entropy = not frozen
        got = linear_logprob(
            p.hidden, weight, p.targets, **{**p.options, "bias": bias}, entropy=entropy, lse=True, plan=plan,
            workspace_bytes=1 << 30, group=dist.group.WORLD, **options,
        )  # fmt: skip
        oracle = twin.oracle()
        outputs = [t for t in got if t is not None]
        expected = [o for o, t in zip(oracle, got, strict=True) if t is not None]
        for a, b in zip(outputs, expected, strict=True):
            assert (a - b).abs().max() < 1e-5, plan
            _same_on_all_ranks(a, size)
        want = torch.autograd.grad(sum((o * upstream).sum() for o in expected), twin.inputs())  # type: ignore[arg-type]
        inputs = [p.hidden] if frozen else [p.hidden, weight, bias]
        gradients = torch.autograd.grad(sum((o * upstream).sum() for o in outputs), inputs)  # type: ignore[arg-type]
        assert relative(gradients[0], want[0]) < 3e-6, plan
        _same_on_all_ranks(gradients[0], size)
        for a, b in zip(gradients[1:], want[1:], strict=True):
            assert torch.allclose(a.double(), b[cuts[rank] : cuts[rank + 1]], rtol=0, atol=1e-5), plan


def uneven(rank: int, size: int) -> None:
    """Shards of 2100 and 400: targets mostly outside a rank's shard."""
    p = make("random", n=70, d=12, bias=True, mask=torch.rand(70) > 0.2, softcap=5.0, temperature=0.8)
    _compare(p, [0, 2100, 2500], rank, size)


def no_target(rank: int, size: int) -> None:
    """A rank that holds no target at all, on peaked rows."""
    p = make("peaked", n=40, d=40, bias=True)
    p.targets %= 900
    _compare(p, [0, 1000, 2500], rank, size)


def empty_shard(rank: int, size: int) -> None:
    """A rank with no vocabulary at all, as DTensor makes them."""
    p = make("random", n=20, d=8, v=300, bias=True)
    _compare(p, [0, 300, 300], rank, size)


def frozen(rank: int, size: int) -> None:
    """Two GEMMs with a frozen head: the kept vector is the shard's, its gradient everybody's."""
    p = make("random", n=70, d=12, bias=True, grad=(True, False), softcap=5.0)
    _compare(p, [0, 1100, 2500], rank, size)


def losses(rank: int, size: int) -> None:
    """The fused losses, chunked, and a bad target's name."""
    p = make("random", n=300, d=12)
    weight = _shard(p.weight, cuts := [0, 1700, 2500], rank)
    mask = torch.rand(300) > 0.3
    old, advantages = p.run(plan="score").logprob + torch.randn(300) * 0.3, torch.randn(300)
    for more in ({}, {"workspace_bytes": 0}):
        want, want_stats = linear_ppo_loss(p.hidden, p.weight, p.targets, old, advantages, mask, entropy_coef=0.01)
        got, stats = linear_ppo_loss(
            p.hidden, weight, p.targets, old, advantages, mask, entropy_coef=0.01, group=dist.group.WORLD, **more
        )
        assert abs(got - want) < 1e-5
        assert abs(stats.approx_kl - want_stats.approx_kl) < 1e-5
        w = torch.autograd.grad(want, p.inputs())
        g = torch.autograd.grad(got, [p.hidden, weight])
        assert relative(g[0], w[0].double()) < 1e-5
        assert relative(g[1], w[1][cuts[rank] : cuts[rank + 1]].double()) < 1e-5
    any_loss, _ = linear_loss(p.hidden, weight, p.targets, lambda lp, h: (lp.sum(), {}), group=dist.group.WORLD)
    (g1,) = torch.autograd.grad(any_loss, [p.hidden])
    (g2,) = torch.autograd.grad(p.run().logprob.sum(), [p.hidden])
    assert relative(g1, g2.double()) < 1e-5
    p.targets[5] = 2500
    with pytest.raises(ValueError, match=r"targets\[5\] is 2500, outside the vocabulary \[0, 2500\)"):
        linear_logprob(p.hidden, weight, p.targets, group=dist.group.WORLD)


def chunks(rank: int, size: int) -> None:
    """As many rows at a time on all ranks, though more of them fit beside a smaller shard, or an empty one."""
    p = make("random", n=300, d=400, v=900)
    whole = p.run().logprob
    want = torch.autograd.grad(whole.sum(), p.inputs())
    for cut, more in ((600, {"workspace_bytes": 600_000}), (900, {"workspace_bytes": 600_000}), (900, {})):
        weight = _shard(p.weight, cuts := [0, cut, 900], rank)
        options = {**more, "group": dist.group.WORLD}
        loss, _ = linear_loss(p.hidden, weight, p.targets, lambda lp, h: (lp.sum(), {}), **options)
        assert abs(loss - whole.sum()) < 1e-2
        dhidden, dweight = torch.autograd.grad(loss, [p.hidden, weight])
        assert relative(dhidden, want[0].double()) < 1e-5
        assert torch.allclose(dweight, want[1][cuts[rank] : cuts[rank + 1]], rtol=0, atol=1e-4)
        logprob = linear_logprob(p.hidden, weight.detach(), p.targets, **options).logprob
        assert (logprob - whole).abs().max() < 1e-4
        (dhidden,) = torch.autograd.grad(logprob.sum(), [p.hidden])
        assert relative(dhidden, want[0].double()) < 1e-5


def caches(rank: int, size: int) -> None:
    """A plan cache that was asked for and fits on some ranks only stops all of them."""
    p = make("random", n=300, d=12, v=900)
    for cut, bound, kept in ((600, 400_000, 720_000), (600, (0, 10**9)[rank], 720_000), (900, None, (1200, 1_080_000))):
        weight = _shard(p.weight, [0, cut, 900], rank)
        said = kept if bound is not None else kept[1 - rank]
        with pytest.raises(ValueError, match=f"plan='cache' keeps {said} bytes and workspace_bytes allows"):
            linear_logprob(p.hidden, weight, p.targets, plan="cache", workspace_bytes=bound, group=dist.group.WORLD)


def dtensor(rank: int, size: int) -> None:
    """DTensor heads through parallel.py: vocabulary-parallel with uneven shards, and gathered."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    p = make("random", n=20, d=8, v=301, bias=True)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    weight, bias = (
        distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in (p.weight, p.options["bias"])
    )
    plain = p.run().logprob.detach()
    want = torch.autograd.grad(p.run().logprob.sum(), p.inputs())
    head = vocab_parallel_head(weight, bias, mesh_dim="tp")
    full, full_bias = full_head(weight, bias)
    for logprob, own in (
        (linear_logprob(p.hidden, head.weight, p.targets, bias=head.bias, group=head.group).logprob, 1),
        (linear_logprob(p.hidden, full, p.targets, bias=full_bias).logprob, 2 * (rank + 1) / (size + 1)),
    ):  # by which the gathered one's gradient is multiplied, 1 on average over ranks
        assert (logprob - plain).abs().max() < 1e-5
        dhidden, *of_head = torch.autograd.grad(own * logprob.sum(), [p.hidden, weight, bias])
        assert relative(dhidden, own * want[0].double()) < 1e-6
        for got, wanted in zip(of_head, want[1:], strict=True):
            assert isinstance(got, DTensor)
            assert relative(got.full_tensor(), wanted.double()) < 1e-6
    assert full_head(p.weight) == (p.weight, None)
    assert vocab_parallel_head(weight, mesh_dim=-1).group == head.group
    for other, said in (("dp", "is no dimension of the mesh, which has"), (1, "cut over mesh dimension 0")):
        with pytest.raises(ValueError, match=f"mesh_dim={other!r}.* {said}"):
            vocab_parallel_head(weight, mesh_dim=other)
    for bad, error, text in (
        (p.weight, TypeError, "plain tensor"),
        (distribute_tensor(p.weight.detach(), mesh, [Shard(1)]), ValueError, r"takes Shard\(0\)"),
        (distribute_tensor(p.weight.detach(), mesh, [Replicate()]), ValueError, r"takes Shard\(0\)"),
    ):
        with pytest.raises(error, match=text):
            vocab_parallel_head(bad)
    for other in (p.options["bias"], distribute_tensor(p.options["bias"].detach(), mesh, [Replicate()])):
        with pytest.raises(ValueError, match="bias is not placed as weight is"):
            vocab_parallel_head(weight, other)
    backwards = distribute_tensor(p.weight.detach(), DeviceMesh("cpu", list(reversed(range(size)))), [Shard(0)])
    with pytest.raises(ValueError, match=r"shards lie on ranks \[1, 0\] in this order"):
        vocab_parallel_head(backwards)
    with pytest.raises(TypeError, match="vocab_parallel_head"):  # its shards' meaning has to be said
        linear_logprob(p.hidden, weight, p.targets)
