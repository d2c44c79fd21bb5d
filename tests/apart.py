"""A script of tests/ in a process of its own, for what only a process shows: its memory, its devices, its build."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def run_apart(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """On one thread, with the project and tests/ to import; the caller looks at how it ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
