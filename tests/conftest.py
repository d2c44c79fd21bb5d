"""What every test shares: a fixed seed; GPUs for `pytest -m gpu`, which has the tests of a device and no others, and
hidden from the rest, with Triton interpreted, so that it is the same suite on every machine."""

import argparse
import os
import re
import shlex
import sys
import tempfile

import interpreted
import pytest
import torch

if "SRPPO_TESTS" not in os.environ:  # which xdist's workers have from the process that was given the arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", default="")
    given = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *sys.argv[1:]]
    expression = parser.parse_known_args(given)[0].m
    os.environ["SRPPO_TESTS"] = "gpu" if re.search(r"(?<!not )\bgpu\b", expression) else "cpu"
if os.environ["SRPPO_TESTS"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for devices
if not torch.cuda.is_available():
    # Before anything imports triton: it reads the variable when it decorates a function.
    os.environ["TRITON_INTERPRET"] = "1"

# For pytest-xdist's workers, which inherit it: threads that wait for each other leave the core to the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Names that no model has are tests of errors. Asking the hub for them takes minutes where it is not reached.
os.environ["HF_HUB_OFFLINE"] = "1"

# Compiled graphs are cached by what they call, not by its signature: an op that gained an argument would be called
# without it, by code that another version of this project left in the shared folder.
_COMPILED = tempfile.TemporaryDirectory(prefix="srppo-inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILED.name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    if "triton.runtime.interpreter" in sys.modules:
        interpreted.as_on_a_gpu(sys.modules["triton.runtime.interpreter"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ["SRPPO_TESTS"] == "pretended":  # pretended_device.py
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
