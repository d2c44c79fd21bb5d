"""GAE's gradient on every backend against autograd through the float64 reference."""

import pytest
import torch
from backends import BACKENDS, MASKS, NATIVE, TRITON, make_mask, poison, running, same_bits, threads
from hypothesis import example, given, settings
from hypothesis import strategies as st
from interpreted import fresh_memory_is_nan

from srppo_kernels.gae import gae
from srppo_kernels.gae.reference import gae_reference


def tokens(rows: int, steps: int, kind: str, seed: int) -> list[torch.Tensor]:
    """rewards, values, both gradients, mask, bootstrap."""
    generator = torch.Generator().manual_seed(seed)
    four = [torch.randn(rows, steps, generator=generator) for _ in range(4)]
    return [*four, make_mask(kind, rows, steps, generator), torch.randn(rows, generator=generator)]


def check(backend, rows, steps, kind, mask_mode, by_row, seed):
    rewards, values, da, dr, mask, end = tokens(rows, steps, kind, seed)
    gamma = torch.linspace(0.5, 1.0, rows) if by_row else 0.97
    lam = torch.linspace(0.0, 1.0, rows) if by_row else 0.9
    exact = [x.double().requires_grad_() for x in (rewards, values, end)]
    factors = [x.double() if by_row else x for x in (gamma, lam)]
    out = gae_reference(*exact[:2], mask, *factors, exact[2], mask_mode)
    loss = sum((x * torch.where(mask, g, 0)).sum() for x, g in zip(out, (da, dr), strict=True))
    wanted = torch.autograd.grad(loss, exact, allow_unused=True, materialize_grads=True)

    leaves = [poison(x.requires_grad_(), mask) for x in (rewards, values)] + [end.requires_grad_()]
    with running(backend) as name:
        out = gae(*leaves[:2], mask, gamma=gamma, lam=lam, bootstrap=leaves[2], mask_mode=mask_mode, backend=name)
        gradients = torch.autograd.grad(out, leaves, [poison(x, mask) for x in (da, dr)])
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-5)
    assert (gradients[0][~mask] == 0).all() and (gradients[1][~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 20),
    steps=st.integers(0, 50),
    kind=st.sampled_from(MASKS),
    mask_mode=st.sampled_from(("carry", "zero")),
    by_row=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_is_autograd_of_the_reference(backend, rows, steps, kind, mask_mode, by_row, seed):
    check(backend, rows, steps, kind, mask_mode, by_row, seed)


@pytest.mark.parametrize("backend", TRITON)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 3),
    steps=st.sampled_from([0, 1, 31, 32, 33, 70]),
    kind=st.sampled_from(MASKS),
    mask_mode=st.sampled_from(("carry", "zero")),
    by_row=st.booleans(),
    seed=st.integers(0, 2**20),
)
@example(rows=2, steps=70, kind="gaps", mask_mode="zero", by_row=False, seed=3)  # a tile ends with a masked token
def test_in_the_interpreter(backend, rows, steps, kind, mask_mode, by_row, seed):
    with fresh_memory_is_nan():
        check(backend, rows, steps, kind, mask_mode, by_row, seed)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
@pytest.mark.parametrize("kind", MASKS)
def test_bits_do_not_depend_on_padding_packing_or_threads(backend, mask_mode, kind):
    rewards, values, da, dr, mask, end = tokens(21, 77, kind, 5)

    def gradients(pad=(0, 0), packed=False):
        def wide(x, fill=float("nan")):
            x = torch.nn.functional.pad(x, pad, value=fill)
            return x.flatten() if packed else x

        leaves = [wide(x).requires_grad_() for x in (rewards, values)] + [end.clone().requires_grad_()]
        starts = torch.arange(0, 21 * 77 + 1, 77, dtype=torch.int32) if packed else None
        with running(backend) as name:
            options = {"mask_mode": mask_mode, "cu_seqlens": starts, "backend": name}
            out = gae(*leaves[:2], wide(mask, False), bootstrap=leaves[2], **options)
            found = torch.autograd.grad(out, leaves, [wide(x) for x in (da, dr)])
        inside = slice(pad[0], pad[0] + 77)
        return [x.reshape(21, -1)[:, inside].contiguous() for x in found[:2]] + [found[2]]

    whole = gradients()
    others = [gradients((0, 19)), gradients((3, 0)), gradients((16, 40)), gradients(packed=True)]
    for n in (1, 3):
        with threads(n):
            others.append(gradients())
    assert all(same_bits(a, b) for other in others for a, b in zip(whole, other, strict=True))
