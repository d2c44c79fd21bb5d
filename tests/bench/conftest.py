"""The benchmark is a folder of the checkout, not a part of the installed package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems are tiny here, and two threads that wait for each other on a busy machine are the slow way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
