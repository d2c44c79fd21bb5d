import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a model or data set that is not found is an error at once, not after retries
sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py and tiny_runs.py

from beside import Wait, begun
from ppo_steps import gradients  # noqa: F401
from tiny_runs import lean_runs, tiny_models  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wait]:
    with begun(request.session.items, Path(__file__).parent, tmp_path_factory) as wait:
        yield wait
