"""The trainer's GPU tests on a device that is pretended, wherever there is a compiler: no tensor is left on the CPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pretended_device
import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_the_trainers_tests_of_a_gpu_pass_on_a_pretended_one(tmp_path):
    library = pretended_device.build(tmp_path)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "pretended_device", "-p", "no:cacheprovider", "-m", "gpu",
        "-k", "not kernels and not sft-auto and not adapter-float32", str(TESTS / "trainer" / "test_training_gpu.py"),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "SRPPO_TESTS": "pretended",
        "OMP_NUM_THREADS": "1", pretended_device.LIBRARY: str(library),
    }  # fmt: skip
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^1[2-9] passed", done.stdout, re.MULTILINE), done.stdout[-500:]
