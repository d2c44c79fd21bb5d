"""Masked whitening against its formula, alone and over a process group."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from backends import BACKENDS, MASKS, NATIVE, TRITON, make_mask, poison, running, same_bits, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srppo_kernels.gae import gae, whiten
from srppo_kernels.gae.reference import whiten_moments


def formula(x, mask, shift_mean):
    """What TRL's and verl's masked_whiten compute, on the selected tokens alone."""
    chosen = x.double()[mask]
    variance = chosen.var() if chosen.numel() > 1 else torch.zeros((), dtype=torch.float64)
    mean = chosen.mean() if chosen.numel() else torch.zeros((), dtype=torch.float64)
    out = torch.zeros(x.shape, dtype=torch.float64)
    out[mask] = (chosen - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 6),
    steps=st.integers(0, 70),
    kind=st.sampled_from(MASKS),
    shift_mean=st.booleans(),
    centre=st.sampled_from([0.0, -3.0, 1000.0]),
    spread=st.sampled_from([1.0, 1e-2, 50.0]),
    seed=st.integers(0, 2**20),
)
def test_is_the_formula(backend, rows, steps, kind, shift_mean, centre, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, steps, generator=generator) * spread + centre
    mask = make_mask(kind, rows, steps, generator)
    with running(backend) as name:
        got = whiten(poison(x, mask), mask, shift_mean=shift_mean, backend=name)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), formula(x, mask, shift_mean), rtol=1e-5, atol=1e-5)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_zero_variance_one(backend):
    x = torch.randn(100, 131) * 7 + 300
    mask = torch.rand(100, 131) < 0.7
    with running(backend) as name:
        got = whiten(x, mask, backend=name)[mask].double()
    assert got.mean().abs() < 1e-6
    assert (got.var() - 1).abs() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_scale(backend):
    with running(backend) as name:
        one = torch.tensor([[False, True, False]])
        assert torch.equal(whiten(torch.full((1, 3), 5.0), one, backend=name), torch.zeros(1, 3))
        assert torch.equal(
            whiten(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), backend=name), torch.zeros(2, 3)
        )
        # A constant: any rounding of its mean would come out 10^4 times larger.
        constant = whiten(torch.full((3, 5000), 0.1), torch.ones(3, 5000, dtype=torch.bool), backend=name)
        assert constant.abs().max() < 1e-6
        neighbours = torch.tensor([1e5, 1e5 + 2**-7]).repeat(50)  # whose mean is no float32
        every = neighbours > 0
        got = whiten(neighbours, every, backend=name)
        torch.testing.assert_close(got.double(), formula(neighbours, every, True), rtol=1e-6, atol=0)
        assert whiten(torch.tensor(2.0), torch.tensor(True), backend=name) == 0


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", MASKS)
def test_bits_do_not_depend_on_padding_or_threads(backend, kind):
    generator = torch.Generator().manual_seed(1)
    x, mask = torch.randn(9, 5000, generator=generator), make_mask(kind, 9, 5000, generator)
    with running(backend) as name:
        whole = whiten(x, mask, backend=name)
        for left, right in ((0, 7), (5, 0), (33, 64)):
            wide = torch.nn.functional.pad(x, (left, right), value=float("nan"))
            inside = torch.nn.functional.pad(mask, (left, right), value=False)
            assert same_bits(whiten(wide, inside, backend=name)[:, left : left + 5000], whole)
        taller = torch.cat((torch.full((2, 5000), float("nan")), x)), torch.cat((torch.zeros_like(mask[:2]), mask))
        assert same_bits(whiten(*taller, backend=name)[2:], whole)
        for n in (1, 3):
            with threads(n):
                assert same_bits(whiten(x, mask, backend=name), whole)


@pytest.mark.parametrize("backend", [*BACKENDS, *TRITON])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("packed", [False, True])
def test_moments_out_of_gae_are_those_of_its_advantages(backend, kind, packed):
    generator = torch.Generator().manual_seed(2)
    rewards, values = (torch.randn(4, 70, generator=generator) for _ in range(2))
    mask = make_mask(kind, 4, 70, generator)
    starts = torch.arange(0, 281, 70) if packed else None
    rewards.requires_grad_()
    tokens = [x.flatten() if packed else x for x in (poison(rewards, mask), poison(values, mask), mask)]
    with running(backend) as name:
        advantages, returns, moments = gae(*tokens, cu_seqlens=starts, moments=True, backend=name)
        plain = gae(*tokens, cu_seqlens=starts, backend=name)
        assert advantages.requires_grad and not moments.requires_grad
        advantages = advantages.detach()
        whitened = whiten(advantages, tokens[2], moments=moments, backend=name)
        again = whiten(advantages, tokens[2], backend=name)
    assert same_bits(advantages, plain[0].detach()) and same_bits(returns.detach(), plain[1].detach())
    torch.testing.assert_close(moments, whiten_moments(advantages, tokens[2]), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(whitened, again, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="the moments that are given carry none"):
        whiten(advantages.clone().requires_grad_(), tokens[2], moments=moments)
    with pytest.raises(ValueError, match=r"moments has shape \(2,\)"):
        whiten(advantages, tokens[2], moments=moments[:2])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_gradient(shift_mean):
    mask = torch.tensor([[True, True, False, True], [False] * 4, [True, False, True, True]])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: whiten(y, mask, shift_mean=shift_mean), x)
    y = poison(x, mask)
    out = whiten(y, mask, shift_mean=shift_mean).square().sum()
    out.backward(retain_graph=True)
    first = y.grad.clone()
    out.backward()
    assert torch.equal(y.grad, 2 * first)
    assert (first[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_and_strides(dtype):
    x, mask = torch.randn(8, 5).to(dtype).t(), torch.rand(8, 5).t() < 0.8
    got = whiten(x, mask)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), formula(x, mask, True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck_and_compile(backend):
    x, mask = torch.randn(3, 7, requires_grad=True), torch.rand(3, 7) < 0.7
    torch.library.opcheck(torch.ops.srppo.whiten_moments, (x, mask, backend))
    moments = torch.ops.srppo.whiten_moments(x, mask, backend).detach().requires_grad_()
    torch.library.opcheck(torch.ops.srppo.whiten_apply, (x, mask, moments, False, backend))
    compiled = torch.compile(lambda y: whiten(y, mask, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), whiten(x, mask, backend=backend))


def test_over_a_process_group():
    # Two gloo ranks in two threads: the real collective, without the seconds that two more processes take to start.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 50, generator=generator) * 4 + 2
    mask = torch.rand(6, 50, generator=generator) < 0.6
    mask[4:] = False
    shares = slice(0, 1), slice(1, 6)  # uneven
    store = dist.HashStore()

    def rank(r: int) -> tuple[Tensor, Tensor]:
        group = dist.ProcessGroupGloo(store, r, 2)
        mine, valid = x[shares[r]], mask[shares[r]]
        with pytest.raises(ValueError, match="x requires grad but whitening over a process group has none"):
            whiten(mine.clone().requires_grad_(), valid, group=group)
        return whiten(mine, valid, group=group), whiten(mine, torch.zeros_like(valid), group=group)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(rank, range(2)))
    alone = whiten(x, mask)
    for (together, nothing), share in zip(results, shares, strict=True):
        torch.testing.assert_close(together, alone[share], rtol=1e-6, atol=1e-7)
        assert (nothing == 0).all()


def test_bad_input():
    x, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask has dtype torch\.int64; pass a bool tensor"):
        whiten(x, mask.long())
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\)"):
        whiten(x, mask[:, :2])
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        whiten(x, mask, backend="cuda")
    with pytest.raises(TypeError, match="moments must be a tensor, got list"):
        whiten(x, mask, moments=[6.0, 1.0, 0.0])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_a_nan_in_a_masked_place_reaches_no_second_derivative(shift_mean):
    mask = torch.arange(6) != 2
    x = torch.where(mask, torch.randn(6, dtype=torch.float64), torch.nan).requires_grad_()

    def second(x, mask):
        (first,) = torch.autograd.grad((whiten(x, mask, shift_mean=shift_mean) ** 3).sum(), x, create_graph=True)
        return torch.autograd.grad(first[mask].square().sum(), x)[0]

    alone = x.detach()[mask].requires_grad_()
    torch.testing.assert_close(second(x, mask)[mask], second(alone, torch.ones(5, dtype=torch.bool)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_token_is_scaled_by_nothing(backend):
    x, mask = torch.tensor([3.0, 5.0]), torch.tensor([True, False])
    with running(backend) as name:
        assert whiten(x, mask, backend=name).tolist() == [0, 0]
        assert whiten(x, mask, shift_mean=False, backend=name).tolist() == [3, 0]
        for shift_mean in (True, False):
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(whiten(leaf, mask, shift_mean=shift_mean, backend=name).sum(), leaf)
            assert gradient.tolist() == pytest.approx([0 if shift_mean else 1, 0], abs=1e-2)
