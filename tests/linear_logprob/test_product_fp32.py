"""The fp32 product of the gradients: against float64 at every level and ragged sizes, sums, bits, where it is taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import LEVELS, threads
from linear_logprob.head_problems import make, relative

from srppo_kernels import _extension, explain
from srppo_kernels.linear_logprob import native, native_gradients

pytestmark = pytest.mark.skipif(
    bool(native.obstacle(torch.device("cpu"), (torch.float32, torch.float32))), reason="the extension is not built"
)


def product(a, b, out, *, transposed, add=False, bound=None):
    torch.ops.srppo_native.linear_logprob_product_fp32(a, b, transposed, add, out, bound)
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_each_level(level, transposed):
    """No size a multiple of a tile, K of several blocks, columns of several tasks, rows with gaps between them."""
    for m, n, k in ((1, 1, 1), (31, 33, 17), (355, 70, 1100), (29, 1100, 130)):
        wide = torch.randn((k, m + 3) if transposed else (m, k + 3))
        a, b, out = wide[:, : m if transposed else k], torch.randn(k, n + 5)[:, :n], torch.full((m, n + 2), 7.0)
        want = (a.double().T if transposed else a.double()) @ b.double()
        scale = 1e-6 * k**0.5
        with _extension.cpu_level(level):
            assert (product(a, b, out[:, :n], transposed=transposed) - want).abs().max() < 8 * scale
            product(a, b, out[:, :n], transposed=transposed, add=True)
        assert (out[:, :n] - 2 * want).abs().max() < 16 * scale
        assert (out[:, n:] == 7.0).all()


def test_no_step_of_k_leaves_zeros_or_what_was_there():
    out = torch.ones(3, 40)
    assert (product(torch.empty(3, 0), torch.empty(0, 40), out, transposed=False, add=True) == 1).all()
    assert (product(torch.empty(3, 0), torch.empty(0, 40), out, transposed=False) == 0).all()
    product(torch.empty(0, 5), torch.empty(5, 40), torch.empty(0, 40), transposed=False)


@pytest.mark.skipif(os.name != "posix", reason="protects pages with mprotect")
def test_nothing_is_read_beyond_a_matrix():
    """The bf16 product's and the scan's too; in a process of its own, which such a read would end."""
    script = Path(__file__).parent / "at_page_ends.py"
    done = subprocess.run([sys.executable, script, *_extension.cpu_levels()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] or done.returncode


@pytest.mark.parametrize("transposed", [False, True])
def test_bits_over_threads_and_rows(transposed):
    """However the result is cut into tasks, and whichever rows a row shares the call with."""
    a, b = torch.randn(700, 900), torch.randn(700 if transposed else 900, 1100)
    want = product(a, b, torch.empty(900 if transposed else 700, 1100), transposed=transposed)
    for count, bound in ((1, None), (2, None), (3, None), (2, 0), (16, 4 << 20)):
        with threads(count):
            assert torch.equal(product(a, b, torch.empty_like(want), transposed=transposed, bound=bound), want)
    for few in ([698, 13, 2], *(range(600, 600 + count) for count in range(1, 30))):  # tiles of every height
        rows = torch.tensor(list(few))
        some = a[:, rows] if transposed else a[rows]
        assert torch.equal(product(some, b, torch.empty(len(rows), 1100), transposed=transposed), want[rows])


@pytest.mark.parametrize("native_product", [False, True])
def test_gradients_with_either_product(native_product, monkeypatch):
    """Each of the two gives float64's gradients, in one chunk and in several, and explain names it."""
    monkeypatch.setattr(native_gradients, "fp32_product_is_native", lambda: native_product)
    if not native_gradients.serves(torch.device("cpu"), torch.float32, torch.float32):
        pytest.skip("fp32 gradients are torch's at this CPU level")
    p = make("random", n=150, d=40, v=4500, dtype=torch.float32)
    twin = p.double()
    want = torch.autograd.grad(twin.oracle()[0].sin().sum(), twin.inputs())
    assert ("beat MKL" in explain(p.hidden, p.weight, p.targets).reason) is native_product
    for options in ({"plan": "cache", "workspace_bytes": 1 << 30}, {"plan": "recompute", "workspace_bytes": 0}):
        got = torch.autograd.grad(p.run(**options).logprob.sin().sum(), p.inputs())
        for a, b in zip(got, want, strict=True):
            assert relative(a, b) < 3e-6


def test_a_wrong_factor_is_refused():
    a, b, out = torch.zeros(3, 4), torch.zeros(5, 6), torch.zeros(3, 6)
    with pytest.raises(RuntimeError, match="different depths"):
        product(a, b, out, transposed=False)
    with pytest.raises(RuntimeError, match="a must be a float32 CPU matrix"):
        product(a.bfloat16(), b, out, transposed=False)
    with pytest.raises(RuntimeError, match="out must be a float32 CPU matrix of 3 rows"):
        product(a, b[:4], out[:2], transposed=False)
