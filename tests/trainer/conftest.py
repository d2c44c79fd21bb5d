import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a model or data set that is not found is an error at once, not after retries
sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py and tiny_runs.py

from ppo_steps import gradients  # noqa: F401
from tiny_runs import lean_runs, tiny_models  # noqa: F401

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def on_pretended_device(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen, Path] | None]:
    """The GPU tests on a device that is pretended, where test_pretended_device.py is to run: half a minute of a core of
    their own, so they begin with the first test of this folder. The process and the file that it prints to."""
    if not any(item.path.name == "test_pretended_device.py" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("pretended")
    command = [
        sys.executable, str(TESTS / "pretended_device.py"), str(folder), "-q", "-m", "gpu",
        "-k", "not kernels and not sft-auto and not adapter-float32", str(TESTS / "trainer" / "test_training_gpu.py"),
    ]  # fmt: skip
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    yield process, folder / "output.txt"
    process.kill()
    process.wait()
