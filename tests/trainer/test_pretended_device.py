"""The trainer's GPU tests on a device that is pretended, wherever there is a compiler: no tensor is left on the CPU."""

from __future__ import annotations

import re
import shutil

import pytest


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
@pytest.mark.beside(
    "pretended_device.py", "-q", "-m", "gpu", "-k", "not kernels and not sft-auto and not adapter-float32",
    "tests/trainer/test_training_gpu.py",
)  # fmt: skip
def test_the_trainers_tests_of_a_gpu_pass_on_a_pretended_one(beside, request):
    done = beside(request.node)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^1[2-9] passed", done.stdout, re.MULTILINE), done.stdout[-500:]
