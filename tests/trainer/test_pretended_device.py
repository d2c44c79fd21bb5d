"""The trainer's GPU tests on a device that is pretended, wherever there is a compiler: no tensor is left on the CPU."""

from __future__ import annotations

import re
import shutil

import pytest


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_the_trainers_tests_of_a_gpu_pass_on_a_pretended_one(on_pretended_device):
    process, output = on_pretended_device
    status = process.wait(timeout=600)
    told = output.read_text()
    assert status == 0, told[-6000:]
    assert re.search(r"^1[2-9] passed", told, re.MULTILINE), told[-500:]
