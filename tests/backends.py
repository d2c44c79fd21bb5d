"""The backends that a test runs an op on: the reference, and the native kernels at every instruction level here."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from srppo_kernels import _extension, _triton

# Higher levels than avx512 have no code of their own in these ops.
LEVELS = [level for level in _extension.cpu_levels() if level in ("portable", "avx2", "avx512")]
BACKENDS = ["reference", *(f"native-{level}" for level in LEVELS)]
NATIVE = BACKENDS[1:] or [pytest.param("native", marks=pytest.mark.skip(reason=_extension.why()))]
# Triton's kernels, interpreted, which is slow: few and small cases. test_*_gpu.py have those that a device runs.
_why_no_triton = _triton.obstacle(torch.device("cpu"))
needs_triton = pytest.mark.skipif(bool(_why_no_triton), reason=_why_no_triton)
TRITON = [pytest.param("triton", marks=needs_triton)]
CXXFLAGS = os.environ.get("CXXFLAGS", "").split()  # of what tests compile, beside their own: tests/sanitize.sh's


@contextmanager
def running(backend: str) -> Iterator[str]:
    """Set the level that `backend` names; yields what to pass as the op's `backend`."""
    kind, _, level = backend.partition("-")
    if not level:
        yield kind
        return
    with _extension.cpu_level(level):
        yield kind


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, the sign of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_int = torch.int64 if a.dtype == torch.float64 else torch.int32
    return torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


MASKS = ("full", "right", "left", "gaps", "sparse", "empty rows")


def make_mask(kind: str, rows: int, steps: int, generator: torch.Generator) -> Tensor:
    """bool `[rows, steps]`: all valid, padded right or left by row, with gaps, mostly masked, or with empty rows."""
    length = torch.randint(0, steps + 1, (rows, 1), generator=generator)
    at = torch.arange(steps)[None, :]
    noise = torch.rand(rows, steps, generator=generator)
    if kind == "full":
        return torch.ones(rows, steps, dtype=torch.bool)
    if kind == "right":
        return at < length
    if kind == "left":
        return at >= steps - length
    if kind == "gaps":
        return noise < 0.8
    if kind == "sparse":
        return noise < 0.1
    return (noise < 0.9) & (torch.rand(rows, 1, generator=generator) < 0.5)


def poison(x: Tensor, mask: Tensor) -> Tensor:
    """NaN, inf and -inf in turn at masked places, as a leaf that asks for a gradient if `x` does."""
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=x.dtype)
    filled = torch.where(mask, x.detach(), bad[torch.arange(x.numel()).reshape(x.shape) % 3])
    return filled.requires_grad_(x.requires_grad)


def compile_host(source: str, folder: Path, optimise: str = "-O1") -> ctypes.CDLL:
    """Compile C++ that includes headers of csrc/ as plain scalar host code, and load it."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    (folder / "host.cpp").write_text(source)
    root = Path(__file__).parent.parent
    flags = ["-std=c++20", optimise, "-ffp-contract=off", "-fPIC", "-shared", f"-I{root}", *CXXFLAGS]
    subprocess.run([compiler, *flags, str(folder / "host.cpp"), "-o", str(folder / "host.so")], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
