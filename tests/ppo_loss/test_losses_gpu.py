"""The policy and value losses on a device: values, gradients, statistics, launches, graphs."""

import pytest
import torch
from backends import MASKS, make_mask, poison, same_bits
from cuda_checks import BACKENDS, launches, no_waiting, on_another_stream, replayed
from torch import Tensor

from srppo_kernels import ppo_loss, value_loss

pytestmark = pytest.mark.gpu


def inputs(rows: int, steps: int, kind: str = "gaps") -> tuple[list[Tensor], Tensor]:
    """new, old, advantages, entropy; no ratio or value within rounding of a clip bound."""
    generator = torch.Generator().manual_seed(0)
    old, shift, advantages, entropy = (torch.randn(rows, steps, generator=generator) for _ in range(4))
    shift = shift * 0.3
    for bound in (torch.tensor(0.8).log(), torch.tensor(1.2).log(), torch.tensor(0.2), torch.tensor(-0.2)):
        shift = torch.where((shift - bound).abs() < 1e-4, 0.01, shift)
    mask = make_mask(kind, rows, steps, generator)
    return [poison(x, mask).cuda() for x in (old + shift, old, advantages, entropy.abs())], mask.cuda()


REDUCTIONS = ("token_mean", "sequence_mean", "sum", "constant_length")


# A test runs all masks on what Triton compiles once: it compiles anew for another divisor or another kind of shape.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "steps", "reduction"),
    [(1, 1, "token_mean"), (8, 4096, "token_mean"), *((37, 4001, reduction) for reduction in REDUCTIONS)],
)
def test_policy_loss(rows, steps, reduction, backend):
    def run(dtype: torch.dtype, backend: str):
        new, old, advantages, entropy = (x.to(dtype) for x in tokens)
        leaves = [new.requires_grad_(), entropy.requires_grad_()]
        loss, stats = ppo_loss(
            leaves[0], old, advantages, mask, entropy=leaves[1], entropy_coef=0.01, reduction=reduction, backend=backend
        )
        return [loss, *stats], torch.autograd.grad(loss, leaves)

    for kind in MASKS:
        tokens, mask = inputs(rows, steps, kind)
        (got, gradients), (want, exact) = run(torch.float32, backend), run(torch.float64, "reference")
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=3e-6, atol=1e-6)
        for a, b in zip(gradients, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip, backend):
    (values, old, returns, _), mask = inputs(37, 4001)

    def run(dtype: torch.dtype, backend: str):
        leaf = values.to(dtype).requires_grad_()
        loss, stats = value_loss(leaf, old.to(dtype), returns.to(dtype), mask, clip=clip, backend=backend)
        return [loss, *stats, torch.autograd.grad(loss, leaf)[0]]

    for a, b in zip(run(torch.float32, backend), run(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (40000, {}),
        (40000, {"reduction": "sequence_mean"}),
        (4096, {"normalizer": 1000.0, "reduction": "sum"}),
        (4096, {"reduction": "constant_length"}),
    ],
    ids=["token_mean", "sequence_mean", "sum", "constant_length"],
)
def test_one_launch_each_no_wait_streams_and_graphs(options, steps, backend):
    (new, old, advantages, entropy), mask = inputs(8, steps)
    leaves = new.requires_grad_(), entropy.requires_grad_()
    one = torch.ones((), device="cuda")

    def forward():
        loss, stats = ppo_loss(
            leaves[0], old, advantages, mask, entropy=leaves[1], entropy_coef=0.01, backend=backend, **options
        )
        return loss, stats.ratio_var, stats.approx_kl, stats.entropy

    def call():
        loss, *stats = forward()
        return (loss.detach(), *stats, *torch.autograd.grad(loss, leaves, one))

    assert len(launches(forward)) == 1
    assert len(launches(call)) == 2
    with no_waiting():
        whole = call()
    for _ in range(20):  # the last program to arrive is another one every time
        assert all(same_bits(a, b) for a, b in zip(whole, call(), strict=True))
    assert all(same_bits(a, b) for a, b in zip(whole, on_another_stream(call), strict=True))
    graph = replayed(call, lambda: advantages.mul_(2))
    assert all(same_bits(a, b) for a, b in zip(graph, call(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_launch_of_the_value_loss(backend):
    (values, old, returns, _), mask = inputs(8, 4096)
    values.requires_grad_()
    one = torch.ones((), device="cuda")

    def forward():
        loss, stats = value_loss(values, old, returns, mask, backend=backend)
        return loss, stats.explained_variance

    def call():
        loss, explained = forward()
        return loss.detach(), explained, *torch.autograd.grad(loss, values, one)

    assert len(launches(forward)) == 1
    assert len(launches(call)) == 2
    with no_waiting():
        whole = call()
    graph = replayed(call, lambda: returns.mul_(2))
    assert all(same_bits(a, b) for a, b in zip(graph, call(), strict=True))
    assert not same_bits(graph[0], whole[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_normalizer_on_the_host(backend):
    (new, old, advantages, _), mask = inputs(8, 600)
    for count in (50, 0):
        made = [
            (ppo_loss(new, old, advantages, mask, normalizer=n, backend=backend)[0],
             value_loss(new, old, advantages, mask, normalizer=n, backend=backend)[0])
            for n in (torch.full((), count), torch.full((), count).cuda())
        ]  # fmt: skip
        assert all(same_bits(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_into_a_graph(backend):
    """Warmed up, captured and replayed; nothing of ours stays in the graph's memory."""
    (values, old, returns, _), mask = inputs(8, 4096)

    def loss(*tokens):
        return value_loss(*tokens, mask, backend=backend)[0]

    compiled, want = torch.compile(loss, mode="reduce-overhead", fullgraph=True), loss(values, old, returns)
    for _ in range(3):
        assert same_bits(compiled(values, old, returns), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_padding_on_either_side_changes_no_bit(reduction, backend):
    tokens, mask = inputs(8, 1500)

    def run(left: int, right: int):
        pad = torch.nn.functional.pad
        new, old, advantages, entropy = (pad(x, (left, right), value=float("nan")) for x in tokens)
        wide = pad(mask, (left, right), value=False)
        leaf = new.requires_grad_()
        loss, stats = ppo_loss(leaf, old, advantages, wide, entropy=entropy, reduction=reduction, backend=backend)
        of_values, value_stats = value_loss(leaf, old, advantages, wide, backend=backend)
        (gradient,) = torch.autograd.grad(loss + of_values, leaf)
        return [loss, *stats, of_values, *value_stats, gradient[:, left : left + 1500].contiguous()]

    assert all(same_bits(a, b) for a, b in zip(run(0, 0), run(77, 3000), strict=True))
