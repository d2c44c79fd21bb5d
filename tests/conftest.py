"""What every test shares: a fixed seed, `gpu` tests skipped where there is no GPU, and Triton interpreted there."""

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: it reads the variable when it decorates a function.
    os.environ["TRITON_INTERPRET"] = "1"

# Names that no model has are tests of errors. Asking the hub for them takes minutes where it is not reached.
os.environ["HF_HUB_OFFLINE"] = "1"

# Compiled graphs are cached by what they call, not by its signature: an op that gained an argument would be called
# without it, by code that another version of this project left in the shared folder.
_COMPILED = tempfile.TemporaryDirectory(prefix="srppo-inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILED.name


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
