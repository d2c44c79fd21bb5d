"""A source distribution holds the checkout: sources, tests with what they need, benchmarks and examples."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="compared with what git tracks")
def test_holds_every_file_but_those_of_ci_and_git(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={tmp_path}"]  # lists what sdist would pack
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    held = set((tmp_path / "srppo.egg-info" / "SOURCES.txt").read_text().split("\n"))
    there = {name for name in filter(None, listed.split("\0")) if (ROOT / name).exists()}
    assert {name for name in there - held if not name.startswith((".ci/", ".git"))} == set()
    assert not any(name.endswith((".pyc", ".so")) for name in held)
