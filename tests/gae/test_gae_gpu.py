"""GAE and whitening on a device, at production tiles: values, bits, launches, graphs."""

import pytest
import torch
from backends import MASKS, make_mask, poison, same_bits
from cuda_checks import BACKENDS, launches, no_waiting, on_another_stream, replayed
from torch import Tensor

from srppo_kernels import gae, whiten
from srppo_kernels.gae.reference import gae_backward_reference, gae_reference, whiten_moments, whiten_reference

pytestmark = pytest.mark.gpu


def inputs(rows: int, steps: int, kind: str = "gaps") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(rows, steps, generator=generator) for _ in range(2))
    mask, end = make_mask(kind, rows, steps, generator), torch.randn(rows, generator=generator)
    return [x.cuda() for x in (poison(rewards, mask), poison(values, mask), mask, end)]


# A test runs all masks on what Triton compiles once: it compiles anew for another mode or another kind of shape.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
@pytest.mark.parametrize(("rows", "steps"), [(3, 1), (5, 1023), (96, 1500)])
def test_values_and_gradients(rows, steps, mask_mode, backend):
    # The reference steps through time in Python: all masks' rows at once.
    parts = zip(*(inputs(rows, steps, kind) for kind in MASKS), strict=True)
    rewards, values, mask, end = (torch.cat(part) for part in parts)
    leaves = [x.requires_grad_() for x in (rewards, values, end)]
    exact = [x.detach().double().cpu() for x in leaves]
    got = gae(*leaves[:2], mask, lam=0.9, bootstrap=leaves[2], mask_mode=mask_mode, backend=backend)
    want = gae_reference(*exact[:2], mask.cpu(), 1.0, 0.9, exact[2], mask_mode)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=2e-6, atol=2e-5)
    upstream = [torch.randn_like(x) for x in got]
    gradients = torch.autograd.grad(got, leaves, upstream)
    adjoint = gae_backward_reference(*(x.double().cpu() for x in upstream), mask.cpu(), 1.0, 0.9, mask_mode)
    for a, b in zip(gradients, adjoint, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=2e-6, atol=2e-4)


def exact_returns(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, end: Tensor) -> Tensor:
    """Returns of one row in "carry" mode, float64: sums of 2, 4, 8, ... tokens from two sums of half as many."""
    r, v = rewards[mask].double(), values[mask].double()
    sums, length = r + gamma * (1 - lam) * torch.cat((v[1:], end[None].double())), 1
    while length < len(r):
        sums = sums + (gamma * lam) ** length * torch.nn.functional.pad(sums[length:], (0, length))
        length *= 2
    left = torch.arange(len(r), 0, -1, device=r.device, dtype=torch.float64)
    returns = torch.zeros(rewards.shape, dtype=torch.float64, device=r.device)
    returns[mask] = sums + (gamma * lam) ** left * end.double()
    return returns


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [2, 100])  # spread over programs, and a program a row
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0)])
def test_a_row_of_131072_tokens(rows, gamma, lam, backend):
    rewards, values, mask, end = (torch.cat((x,) * (rows // 2)) for x in inputs(2, 131072))
    rewards = rewards.abs() * 1e-3
    got, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=end, backend=backend)
    for row in (0, 1, rows - 1):
        of_row = [x[row] for x in (rewards, values, mask)]
        want = exact_returns(*of_row, gamma, lam, end[row])
        tail = [x[None, -300:].double().cpu() for x in of_row[:2]]
        _, oracle = gae_reference(*tail, of_row[2][None, -300:].cpu(), gamma, lam, end[row][None].double().cpu())
        torch.testing.assert_close(want[-300:].cpu(), oracle[0], rtol=1e-12, atol=1e-12)
        advantages = torch.where(of_row[2], want - of_row[1].double(), 0)
        for a, b in ((got[row], advantages), (returns[row], want)):
            assert (a.double() - b).abs().max() / b.abs().max() <= 1e-6


@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
def test_bits_of_spread_packed_and_padded_rows(mask_mode):
    from srppo_kernels.gae.triton_scan import gae_triton

    rewards, values, mask, end = inputs(3, 5000)

    def run(r, v, m, starts=None, spread=False):
        return gae_triton(r, v, m, 1.0, 0.95, None, None, end, mask_mode == "carry", starts, spread=spread)[:2]

    whole = run(rewards, values, mask)
    starts = torch.arange(0, 15001, 5000, device="cuda", dtype=torch.int32)
    pad = torch.nn.functional.pad
    wide = pad(rewards, (7, 900), value=float("nan")), pad(values, (7, 900)), pad(mask, (7, 900), value=False)
    others = [run(rewards, values, mask, spread=True), run(rewards.flatten(), values.flatten(), mask.flatten(), starts)]
    others.append(tuple(x[:, 7:5007] for x in run(*wide)))
    for other in others:
        assert all(same_bits(a, b.reshape(3, 5000)) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_row", [False, True])
def test_one_launch_each_no_wait_and_graphs(by_row, backend):
    rewards, values, mask, end = inputs(64, 4096)
    leaves = [x.requires_grad_() for x in (rewards, values, end)]
    lam = torch.linspace(0.5, 1.0, 64, device="cuda") if by_row else 0.95
    upstream = torch.randn_like(rewards)

    def call():
        return gae(*leaves[:2], mask, lam=lam, bootstrap=end, backend=backend)

    def with_moments():
        return gae(*leaves[:2], mask, lam=lam, bootstrap=end, moments=True, backend=backend)

    assert len(launches(call)) == len(launches(with_moments)) == 1
    with no_waiting():
        whole = call()
    outputs = call()
    assert len(launches(lambda: torch.autograd.grad(outputs, leaves, [upstream, upstream], retain_graph=True))) == 1
    advantages, _, moments = with_moments()
    torch.testing.assert_close(moments, whiten_moments(advantages.double(), mask), rtol=1e-12, atol=1e-12)
    assert all(same_bits(a, b) for a, b in zip(whole, on_another_stream(call), strict=True))
    with torch.no_grad():
        graph = replayed(with_moments, lambda: rewards.mul_(2))
        again = with_moments()
    assert all(same_bits(a, b) for a, b in zip(graph[:2], again[:2], strict=True))
    assert torch.equal(graph[2], again[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradients_bits_of_packed_and_padded_rows(backend):
    upstream, other, mask, _ = inputs(5, 3000)
    pad, starts = torch.nn.functional.pad, torch.arange(0, 15001, 3000, device="cuda")

    def gradients(da, dr, valid, cu_seqlens=None):
        leaf = torch.zeros_like(da, requires_grad=True)
        outputs = gae(leaf, leaf, valid, cu_seqlens=cu_seqlens, backend=backend)
        return torch.autograd.grad(outputs, leaf, [da, dr])[0]

    whole = gradients(upstream, other, mask)
    assert same_bits(whole.flatten(), gradients(*(x.flatten() for x in (upstream, other, mask)), starts))
    wide = [pad(x, (0, 900), value=float("nan")) for x in (upstream, other)]
    assert same_bits(whole, gradients(*wide, pad(mask, (0, 900), value=False))[:, :3000].contiguous())


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows_wait_for_nothing_and_fit_in_a_graph(backend):
    """Their starts are looked at on the device."""
    rewards, values, mask, end = inputs(3, 600)
    flat, starts = [x.flatten() for x in (rewards, values, mask)], torch.arange(0, 1801, 600, device="cuda")

    def call():
        return gae(*flat, bootstrap=end, cu_seqlens=starts, backend=backend)

    whole = call()
    with no_waiting():
        again = call()
    assert all(same_bits(a, b) for a, b in zip(whole, again, strict=True))
    graph = replayed(call, lambda: flat[0].mul_(2))
    assert all(same_bits(a, b) for a, b in zip(graph, call(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_native_bits_of_packed_padded_and_spread_rows(backend):
    rewards, values, mask, end = inputs(3, 33000)  # few and long: spread over blocks
    whole = gae(rewards, values, mask, bootstrap=end, backend=backend)
    starts = torch.arange(0, 99001, 33000, device="cuda")
    flat = [x.flatten() for x in (rewards, values, mask)]
    packed = gae(*flat, bootstrap=end, cu_seqlens=starts, backend=backend)
    many = [x.repeat(30, 1) for x in (rewards, values, mask)]  # a block a row
    walked = gae(*many, bootstrap=end.repeat(30), backend=backend)
    for a, b, c in zip(whole, packed, walked, strict=True):
        assert same_bits(a.flatten(), b)
        assert same_bits(a, c[:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 513), (64, 4096)])
def test_whitened_values(shape, backend):
    for kind in MASKS:
        x, _, mask, _ = inputs(*shape, kind)
        got = whiten(x, mask, backend=backend)
        torch.testing.assert_close(got.double(), whiten_reference(x.double(), mask), rtol=1e-6, atol=1e-6, msg=kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (64, 4096)])
def test_whiten_launches_twice_waits_for_nothing_and_repeats(shape, backend):
    x, _, mask, _ = inputs(*shape)

    def call():
        return whiten(x, mask, backend=backend)

    assert len(launches(call)) == 2
    with no_waiting():
        whole = call()
    assert all(same_bits(whole, call()) for _ in range(3))
    pad = torch.nn.functional.pad
    wide = pad(x, (33, 2000), value=float("nan")), pad(mask, (33, 2000), value=False)
    assert same_bits(whole, whiten(*wide, backend=backend)[:, 33 : 33 + shape[1]].contiguous())
    (graph,) = replayed(lambda: (call(),), lambda: x.add_(1))
    assert same_bits(graph, call())
