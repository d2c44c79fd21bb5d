"""The memory of a chunk's exponentials, or dz, on a CPU, kept for the next call.

malloc takes what is above 32 MB from the system at every call, and the system hands it out page by page, cleared, at
the first write to each: about 2 us a page [measured, README.md], or 5 to 10 % of forward and backward of 256 rows in
fp32. So one block of at most ``LIMIT`` bytes, what a chunk of rows takes by default, stays with the process.
"""

from contextlib import suppress

import torch
from torch import Tensor

LIMIT = 64 << 20

_spare: list[torch.UntypedStorage] = []  # at most one


def take(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised ``[rows, columns]`` on like's device, of the spare block if that is there and large enough."""
    size = rows * columns * dtype.itemsize
    if 0 < size <= LIMIT and _is_memory(like):
        with suppress(IndexError):  # the first call, or another thread has it
            storage = _spare.pop()
            if storage.nbytes() >= size:
                return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (rows, columns), (columns, 1))
    return like.new_empty(rows, columns, dtype=dtype)


def give_back(block: Tensor) -> None:
    """Makes a block that :func:`take` gave the spare one. Nothing may read or write it any more."""
    if _is_memory(block) and 0 < block.untyped_storage().nbytes() <= LIMIT:
        _spare[:] = [block.untyped_storage()]


def drop() -> None:
    """Returns the spare block to the system."""
    _spare.clear()


def _is_memory(tensor: Tensor) -> bool:
    """Whether it is a CPU tensor, and not one of a trace's."""
    return tensor.device.type == "cpu" and type(tensor.detach()) is Tensor
