"""Layouts and bytes that the small ops must not depend on: strides of inputs, and what a mask's bytes are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import NATIVE, TRITON, needs_triton, running
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from srppo_kernels import gae, log_ratio_reward, ppo_loss, value_loss, whiten

Call = Callable[[Tensor, Tensor, Tensor, Tensor, str], Any]

# fmt: off
OPS: dict[str, Call] = {
    "whiten": lambda x, y, z, mask, backend: whiten(x, mask, backend=backend),
    "gae": lambda x, y, z, mask, backend: gae(
        x, y, mask, gamma=z.sigmoid()[:, 0], lam=z.sigmoid()[:, 1], bootstrap=x[:, 2], moments=True, backend=backend
    ),
    "gae's gradient": lambda x, y, z, mask, backend: torch.ops.srppo.gae_backward(
        x, y, mask, 0.0, 0.0, z.sigmoid()[:, 0], z.sigmoid()[:, 1], "carry", None, backend
    ),
    "ppo_loss": lambda x, y, z, mask, backend: ppo_loss(x, y, z, mask, entropy=z, entropy_coef=0.1, backend=backend),
    "ppo_loss with its gradient": lambda x, y, z, mask, backend: torch.ops.srppo.ppo_loss(
        x, y, z, mask, z, 0.2, 0.2, None, 0.1, "token_mean", None, None, backend
    ),
    "value_loss with its gradient": lambda x, y, z, mask, backend: torch.ops.srppo.value_loss(
        x, y, z, mask, 0.2, None, None, backend
    ),
    "value_loss": lambda x, y, z, mask, backend: value_loss(x, y, z, mask, backend=backend),
    "log_ratio_reward": lambda x, y, z, mask, backend: log_ratio_reward(
        x, y, mask, placement="token", logprobs_policy=x, logprobs_ref=z, kl_coef=0.1, parts=True, backend=backend,
        truncated=mask[:, 0], missing_eos_penalty=1.5,
    ),
}
# fmt: on


def problem(dtype: torch.dtype) -> list[Tensor]:
    """Transposed, as time-major rollouts are."""
    x, y, z = torch.randn(3, 37, 5, dtype=dtype)
    mask = torch.rand(37, 5) > 0.3
    return [x.T, y.T, z.T, mask.T]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("auto", torch.float32), ("auto", torch.float64), ("reference", torch.float32),
        pytest.param("triton", torch.float32, marks=needs_triton),
    ],
)  # fmt: skip
def test_strides_are_what_a_compiler_is_told(op, backend, dtype):
    """A kernel that a compiler makes of the fake's strides reads the real tensor by them."""
    inputs = problem(dtype)
    real = tree_leaves(OPS[op](*inputs, backend))
    with FakeTensorMode() as mode:
        told = tree_leaves(OPS[op](*(mode.from_tensor(t) for t in inputs), backend))
    for got, want in zip(real, told, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [*NATIVE[:1], *TRITON])
def test_strides_change_no_number(op, backend):
    """Nor those of vectors with an element a row, which are views of one layout or the other."""
    inputs = problem(torch.float32)
    with running(backend) as name:
        strided, whole = (tree_leaves(OPS[op](*given, name)) for given in (inputs, [t.contiguous() for t in inputs]))
    for got, want in zip(strided, whole, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [*NATIVE, *TRITON])
def test_any_byte_but_zero_is_true(op, backend):
    """A bool tensor that is a view of bytes: torch's where and logical ops take each of them for True."""
    *inputs, mask = (t.contiguous() for t in problem(torch.float32))
    mask[0, :19], mask[1, 20:] = False, False
    odd = (mask.to(torch.uint8) * torch.randint(1, 256, mask.shape, dtype=torch.uint8)).view(torch.bool)
    with running(backend) as name:
        got, want = (tree_leaves(OPS[op](*inputs, given, name)) for given in (odd, mask))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
