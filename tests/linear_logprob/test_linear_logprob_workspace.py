"""The native kernels' workspace for many threads: within its bound, as explain says it, and with no bit changed.

A process of its own counts what malloc hands out (allocations.c, allocated.py), in plans whose every GEMM is native: a
BLAS has memory of its own.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import LEVELS

from srppo_kernels import _extension
from srppo_kernels.linear_logprob import native, native_gradients

FOLDER = Path(__file__).parent
ROW_VECTORS = 64 * 600  # bytes: targets, outputs and such, of each of allocated.py's rows
CALL = 16 << 10  # of Python's and autograd's objects
PAGES = 16 << 10  # of a thread: malloc gives whole ones


def here() -> list[str]:
    """The cases for this machine: level, dtype and plan."""
    levels = _extension.cpu_levels()
    cases = [f"{level}-bfloat16-score" for level in levels if level in ("avx512_bf16", "amx")]
    cases += [f"{levels[-1]}-bfloat16-recompute"] if native_gradients.bf16_product_is_native() else []
    plan = "recompute" if native_gradients.fp32_product_is_native() else "score"
    cases += [f"{level}-{dtype}-{plan}" for level in LEVELS[-1:] for dtype in ("float32", "float16")]
    return cases + [f"{levels[-1]}-{dtype}-cache" for dtype in ("bfloat16", "float16") if products_are_native(dtype)]


def products_are_native(dtype: str) -> bool:
    """Of inputs of this dtype, GEMMs 2 and 3: a BLAS has memory of its own."""
    of_dz = native_gradients.dz_dtype(getattr(torch, dtype), getattr(torch, dtype))
    return bool(native_gradients.beaten_by_native_products(of_dz))


pytestmark = [
    pytest.mark.skipif(
        bool(native.obstacle(torch.device("cpu"), (torch.float32, torch.float32))), reason="the extension is not built"
    ),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts glibc's malloc"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine"),
]


def counter(folder: Path) -> Path:
    """What is preloaded to count allocations."""
    library = folder / "allocations.so"
    subprocess.run(["cc", "-O1", "-fPIC", "-shared", FOLDER / "allocations.c", "-o", library], check=True)
    return library


def run(folder: Path, library: str, cases: list[str]) -> list[dict[str, Any]]:
    """What allocated.py says of these cases."""
    command = [sys.executable, str(FOLDER / "allocated.py"), library, *cases]
    env = {**os.environ, "LD_PRELOAD": str(counter(folder)), "PYTHONMALLOC": "malloc"}  # Python maps 1 MiB at a time
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(folder: Path, library: str, cases: list[str]) -> None:
    """Holds each of allocated.py's results to what is promised."""
    results = run(folder, library, cases)
    assert len(results) == sum(3 if "cache" in case else 9 for case in cases)
    for case in results:
        if "cache" not in case["case"]:  # whose bound is on the exponentials that it keeps
            assert case["said"] <= (case["bound"] or 64 << 20), case
        rounding = ROW_VECTORS + CALL + PAGES * min(case["threads"], 16)
        least = 1 if "score" in case["case"] else case["said"] / 3  # what is mapped is among it
        assert least < case["took"] <= case["said"] + rounding, case
        assert case["same_bits"], case


def test_a_bounded_workspace_for_any_number_of_threads(tmp_path):
    check(tmp_path, "", here())


def test_what_the_torch_backend_takes(tmp_path):
    """A block's tensors go before the next block's come, and fp16's dz fits in a workspace too."""
    dtypes, plans = ("float16", "float64"), ("score", "cache", "recompute")
    results = run(tmp_path, "", [f"torch-{dtype}-{plan}" for dtype in dtypes for plan in plans])
    assert len(results) == 28
    for case in results:
        assert 0 < case["took"] <= case["said"] + ROW_VECTORS + (1 << 18), case
        if "recompute" in case["case"]:
            assert case["said"] <= (case["bound"] or 64 << 20) + (4 << 20), case
