"""`bench/compile.py` compiles without a GPU, and each of its rules can fail."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile import Compiled, figures, main

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
    hopper = {"gemm": True, "architectures": (90,)}
    yield CompileCase("fine", product, types, small, gemm=True)
    yield CompileCase("no tensor core", product, types, {**small, "DOT": False}, **hopper)
    yield CompileCase("spilling", product, types, {**small, "N": 256, "K": 16, "STEPS": 1}, **hopper)
    yield CompileCase("greedy", product, types, {**small, "N": 128, "K": 128}, num_stages=5, **hopper)
    yield CompileCase("broken", broken, {"a": "*fp32"}, {"N": 64}, architectures=(90,))
"""


def test_each_rule_fails_the_kernel_that_breaks_it_and_no_other(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "made_kernels.py").write_text(KERNELS)
    command = [sys.executable, str(ROOT / "bench" / "compile.py"), "--no-cuda", "--module=made_kernels"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}  # which it must not heed
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    faults = [line for line in done.stdout.splitlines() if " on sm_" in line]
    for name, text in (
        ("no tensor core", "multiplies matrices without wgmma"),
        ("spilling", "spills "),
        ("greedy", "of shared memory; a block has 227 KiB"),
        ("broken", "does not compile: "),
    ):
        assert any(line.startswith(f"{name} on sm_90") and text in line for line in faults), (name, done.stdout)
    assert not any(line.startswith("fine") for line in faults)
    rows = [line for line in done.stdout.splitlines() if line.startswith("│ fine")]
    for row, architecture, instruction in zip(
        rows, ("80", "90", "100"), ("mma.sync", "wgmma", "tcgen05.mma"), strict=True
    ):
        assert f" {architecture} " in row and instruction in row


def test_limits_of_each_architecture():
    def made(architecture: int, **figures: int) -> list[str]:
        return Compiled("kernel", architecture, False, **figures).faults()

    assert made(80, spilled=128, shared=163 * 1024) == made(90, shared=227 * 1024) == []
    assert made(80, spilled=129) and made(90, spilled=1) and made(100, spilled=129)
    assert made(80, shared=163 * 1024 + 1) and made(100, shared=227 * 1024 + 1)
    assert figures(PTXAS) == {"registers": 40, "spilled": 24, "shared": 96}
    called = PTXAS.replace("16 bytes spill", "40 bytes spill").replace("Used 40", "Used 96")
    assert figures(PTXAS + called) == {"registers": 96, "spilled": 64, "shared": 192}
    older = [Compiled("kernel", a, True, tensor_core="mma.sync").faults() for a in (80, 90, 100)]
    assert older == [[], ["multiplies matrices without wgmma"], ["multiplies matrices without tcgen05.mma"]]
    with pytest.raises(ValueError, match="ptxas reports no registers"):
        figures("ptxas: it changed its words")


PTXAS = """
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    16 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 96 bytes smem
"""


def test_bad_arguments(capsys, monkeypatch):
    for given in ("75", "sm_75", "90,,80"):
        with pytest.raises(SystemExit) as stopped:
            main([f"--arch={given}"])
        assert stopped.value.code == 2
        assert "is not among 80, 90, 100" in capsys.readouterr().err
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
        assert main([]) == 2
    assert "pip install triton" in capsys.readouterr().err
    pytest.importorskip("triton")
    assert main(["--kernel=no such kernel", "--no-cuda"]) == 1
    assert "no kernel of that name: 'no such kernel'" in capsys.readouterr().out
