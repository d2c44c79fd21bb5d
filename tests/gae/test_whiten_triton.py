"""Whitening's Triton kernels, interpreted."""

import pytest
import torch
from backends import MASKS, make_mask, needs_triton, poison, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import fresh_memory_is_nan

from srppo_kernels.gae import whiten
from srppo_kernels.gae.reference import whiten_reference

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def nothing_is_left_unwritten():
    with fresh_memory_is_nan():
        yield


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(0, 3), (1, 1), (3, 70), (5, 1000), (1300,)]),  # a program takes 512 tokens
    kind=st.sampled_from(MASKS),
    shift_mean=st.booleans(),
    centre=st.sampled_from([0.0, -3.0, 1000.0]),
    spread=st.sampled_from([1.0, 1e-2, 50.0]),
    seed=st.integers(0, 2**20),
)
def test_is_the_reference(shape, kind, shift_mean, centre, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * spread + centre
    mask = make_mask(kind, x.numel() // shape[-1], shape[-1], generator).reshape(shape)
    got = whiten(poison(x, mask), mask, shift_mean=shift_mean, backend="triton")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), whiten_reference(x.double(), mask, shift_mean), rtol=1e-6, atol=1e-6)
    assert (got[~mask] == 0).all()


def test_a_constant_gives_zero_and_bits_repeat():
    mask = torch.ones(3, 700, dtype=torch.bool)
    assert whiten(torch.full((3, 700), 0.1), mask, backend="triton").abs().max() < 1e-6
    x = torch.randn(3, 700)
    assert same_bits(whiten(x, mask, backend="triton"), whiten(x, mask, backend="triton"))


@pytest.mark.parametrize("kind", ["gaps", "empty rows"])
def test_padding_on_either_side_changes_no_bit(kind):
    x = torch.randn(3, 600)
    mask = make_mask(kind, 3, 600, torch.Generator().manual_seed(1))
    want = whiten(x, mask, backend="triton")
    wide = [torch.nn.functional.pad(t, (40, 1000), value=v) for t, v in ((x, float("nan")), (mask, False))]
    assert same_bits(want, whiten(*wide, backend="triton")[:, 40:640].contiguous())


def test_gradient_goes_through_the_same_formula():
    x = torch.randn(2, 9)
    mask = torch.rand(2, 9) < 0.7
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    for leaf, backend in zip(leaves, ("triton", "reference"), strict=True):
        whiten(leaf, mask, backend=backend).pow(3).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(dtype):
    x, mask = torch.randn(8, 50).to(dtype).t(), torch.rand(8, 50).t() < 0.8
    torch.testing.assert_close(whiten(x, mask, backend="triton"), whiten_reference(x, mask), rtol=1e-6, atol=1e-6)
