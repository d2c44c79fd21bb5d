import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a model or data set that is not found is an error at once, not after retries
sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py and tiny_runs.py

from ppo_steps import gradients  # noqa: F401
from tiny_runs import lean_runs, tiny_models  # noqa: F401

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def beside(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[pytest.Item], subprocess.CompletedProcess]]:
    """The processes of the longest tests, half a minute each, begun with the first test of this folder: they take the
    core that the others leave.

    ``@pytest.mark.beside(script, *arguments)`` names one, of a script in tests/, which gets a folder of its own before
    the arguments. Called with the test's node, this waits for it.
    """
    begun: dict[str, tuple[subprocess.Popen, Path]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    for item in request.session.items:
        mark = item.get_closest_marker("beside")
        if mark is not None:
            folder, (script, *arguments) = tmp_path_factory.mktemp("beside"), mark.args
            with (folder / "output.txt").open("w") as output, (folder / "errors.txt").open("w") as errors:
                command = [sys.executable, str(TESTS / script), str(folder), *arguments]
                begun[item.nodeid] = subprocess.Popen(command, env=environment, stdout=output, stderr=errors), folder

    def wait(item: pytest.Item) -> subprocess.CompletedProcess:
        process, folder = begun[item.nodeid]
        status = process.wait(timeout=600)
        told = ((folder / name).read_text() for name in ("output.txt", "errors.txt"))
        return subprocess.CompletedProcess(process.args, status, *told)

    yield wait
    for process, _ in begun.values():
        process.kill()
        process.wait()
