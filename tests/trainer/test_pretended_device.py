"""The trainer's GPU tests on a device that is pretended, wherever there is a compiler: no tensor is left on the CPU."""

from __future__ import annotations

import re
import shutil

import pytest
from apart import run_apart


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_the_trainers_tests_of_a_gpu_pass_on_a_pretended_one(tmp_path):
    which = "not kernels and not sft-auto and not adapter-float32"
    arguments = ["-q", "-m", "gpu", "-k", which, "tests/trainer/test_training_gpu.py"]
    done = run_apart("pretended_device.py", tmp_path, *arguments)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^1[2-9] passed", done.stdout, re.MULTILINE), done.stdout[-500:]
