"""What every test shares: a fixed seed, `gpu` tests skipped where there is no GPU, and Triton interpreted there."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: it reads the variable when it decorates a function.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
