"""What every test shares: a fixed seed, `gpu` tests skipped where there is no GPU, and Triton interpreted there."""

import itertools
import os
import random
import sys
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


def pytest_collection_finish() -> None:
    """The interpreter takes programs in ascending order, a GPU in any: here shuffled, by another order every launch."""
    if "triton.runtime.interpreter" not in sys.modules:
        return
    builder = sys.modules["triton.runtime.interpreter"].interpreter_builder
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    generator, order = random.Random(0), []

    def shuffled(*grid: int) -> None:
        set_grid_dim(*grid)
        order[:] = itertools.product(*map(range, grid))
        generator.shuffle(order)

    builder.set_grid_dim, builder.set_grid_idx = shuffled, lambda *_: set_grid_idx(*order.pop())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
