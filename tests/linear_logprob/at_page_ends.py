"""Runs native kernels on matrices that end where memory ends: a read beyond one of them ends the process.

``python at_page_ends.py LEVEL...``: both products, where the level has them, over sizes around a tile and a panel, and
the scan.
"""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

from srppo_kernels import _extension

host = ctypes.CDLL(None, use_errno=True)
host.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
held = []  # the memory, until the process ends


def ending_a_page(matrix: Tensor) -> Tensor:
    """A copy, behind which a page may not be touched."""
    size = matrix.numel() * matrix.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    held.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if host.mprotect(begin + room, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=matrix.dtype, count=matrix.numel(), offset=room - size)
    return copy.view(matrix.shape).copy_(matrix)


def products(product, dtype: torch.dtype) -> None:
    """Each against float64."""
    for m, n, k in [(3, n, 5) for n in range(1, 40)] + [(m, 7, 9) for m in range(1, 20)] + [(6, 45, 1027)]:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        want = a.double() @ b.double()
        for transposed in (False, True):
            left, right = ending_a_page(a.T.contiguous() if transposed else a), ending_a_page(b)
            out = ending_a_page(torch.zeros(m, n))
            product(left, right, transposed, True, out, None)
            assert (out - want).abs().max() < 1e-5 * k**0.5


def scans() -> None:
    """Of every dtype: whole panels and parts of one, rows and widths that are multiples of nothing."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, d, v in [(3, 5, v) for v in (*range(1, 34), 64, 65, 2048, 2049)] + [(17, d, 40) for d in range(1, 34)]:
            x, w = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
            bias, y = torch.randn(v), torch.arange(n) % v
            m, s, _, z_y = torch.ops.srppo_native.linear_logprob_scan(
                ending_a_page(x), ending_a_page(w), ending_a_page(bias), ending_a_page(y), None, None, 1.0, 1.0, 0.0,
                False, 2048, None, None, None, None,
            )  # fmt: skip
            z = x.double() @ w.double().T + bias
            want = z.gather(1, y[:, None])[:, 0] - z.logsumexp(1)
            assert (z_y - m - torch.log(s + (z_y - m).exp()) - want).abs().max() < 1e-5 * d**0.5


for level in sys.argv[1:]:
    with _extension.cpu_level(level):
        scans()
        products(torch.ops.srppo_native.linear_logprob_product_fp32, torch.float32)
        if level in ("avx512_bf16", "amx"):
            products(torch.ops.srppo_native.linear_logprob_product, torch.bfloat16)
