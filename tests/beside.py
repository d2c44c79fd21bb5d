"""Processes of the longest tests of a folder, begun with its first test: they take the core that the others leave.

``@pytest.mark.beside(script, *arguments)`` names one, of a script in tests/, which gets a folder of its own before the
arguments. The folder's conftest has the fixture ``beside``: called with a test's node, it waits for the process.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
Wait = Callable[[pytest.Item], subprocess.CompletedProcess]


@contextmanager
def begun(items: Sequence[pytest.Item], folder: Path, temporary: pytest.TempPathFactory) -> Iterator[Wait]:
    """Those of the tests in a folder; the function that waits. Tests that are skipped have none."""
    running: dict[str, tuple[subprocess.Popen, Path]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    for item in items:
        mark = item.get_closest_marker("beside")
        if mark is None or item.path.parent != folder or any(skip.args[0] for skip in item.iter_markers("skipif")):
            continue
        own, (script, *arguments) = temporary.mktemp("beside"), mark.args
        with (own / "output.txt").open("w") as output, (own / "errors.txt").open("w") as errors:
            command = [sys.executable, str(TESTS / script), str(own), *arguments]
            running[item.nodeid] = subprocess.Popen(command, env=environment, stdout=output, stderr=errors), own

    def wait(item: pytest.Item) -> subprocess.CompletedProcess:
        process, own = running[item.nodeid]
        status = process.wait(timeout=600)
        told = ((own / name).read_text() for name in ("output.txt", "errors.txt"))
        return subprocess.CompletedProcess(process.args, status, *told)

    try:
        yield wait
    finally:
        for process, _ in running.values():
            process.kill()
            process.wait()
