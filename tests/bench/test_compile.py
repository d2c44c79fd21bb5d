"""`bench/compile.py` compiles without a GPU, and each of its rules can fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KERNELS = """
import triton
import triton.language as tl

from srppo_kernels._triton import CompileCase


@triton.jit
def product(a, b, out, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, DOT: tl.constexpr):
    row = tl.arange(0, N)
    inner = tl.arange(0, K)
    total = tl.zeros((N, N), tl.float32)
    for step in tl.range(STEPS):
        left = tl.load(a + row[:, None] * (K * STEPS) + step * K + inner[None, :])
        right = tl.load(b + (step * K + inner[:, None]) * N + row[None, :])
        if DOT:
            total = tl.dot(left, right, total)
        else:
            total += tl.sum(left.to(tl.float32), 1)[:, None] * tl.sum(right.to(tl.float32), 0)[None, :]
    tl.store(out + row[:, None] * N + row[None, :], total)


@triton.jit
def broken(a, N: tl.constexpr):
    tl.store(a + tl.arange(0, N), no_such_name)


def compile_cases():
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
    small = {"N": 64, "K": 64, "STEPS": 8, "DOT": True}
    yield CompileCase("fine", product, types, small, gemm=True)
    yield CompileCase("no tensor core", product, types, {**small, "DOT": False}, gemm=True)
    yield CompileCase("spilling", product, types, {**small, "N": 256}, gemm=True)
    yield CompileCase("greedy", product, types, {**small, "N": 256}, num_warps=8, num_stages=5, gemm=True)
    yield CompileCase("broken", broken, {"a": "*fp32"}, {"N": 64})
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "bench" / "compile.py"), "--no-cuda", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}  # which it must not heed
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


def test_each_rule_fails_the_kernel_that_breaks_it_and_no_other(tmp_path):
    (tmp_path / "made_kernels.py").write_text(KERNELS)
    done = run(tmp_path, "--arch=90", "--module=made_kernels")
    assert done.returncode == 1, done.stderr
    faults = [line for line in done.stdout.splitlines() if " on sm_90 " in line]
    for name, text in (
        ("no tensor core", "multiplies matrices without wgmma"),
        ("spilling", "spills "),
        ("greedy", "of shared memory; a block has 227 KiB"),
        ("broken", "does not compile: "),
    ):
        assert any(line.startswith(f"{name} on sm_90") and text in line for line in faults), (name, done.stdout)
    assert not any(line.startswith("fine") for line in faults)
    row = next(line for line in done.stdout.splitlines() if line.startswith("│ fine"))
    assert "wgmma" in row


def test_architecture_kernel_and_status_of_a_good_one(tmp_path):
    (tmp_path / "made_kernels.py").write_text(KERNELS)
    done = run(tmp_path, "--arch=80,100", "--module=made_kernels", "--kernel=fine")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("│ fine")]
    assert [("mma.sync" in row, "tcgen05.mma" in row) for row in rows] == [(True, False), (False, True)]
    assert run(tmp_path, "--arch=90", "--kernel=no such kernel").returncode == 1
    wrong = run(tmp_path, "--arch=75")
    assert wrong.returncode == 2
    assert "[75] is not among [80, 90, 100]" in wrong.stderr
