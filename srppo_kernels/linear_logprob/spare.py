"""Memory of a CPU call's large tensors (exponentials, dz, dweight), which later calls use again.

malloc takes what is large from the system at every call, and the system hands it out page by page, cleared, at the
first write to each: 0.9 to 2.2 us a page [measured, README.md], a tenth to a quarter of forward and backward of a few
hundred rows. So it comes from blocks that stay with the process (csrc/common/spare.cpp), up to four free ones of 4 GiB
in all: a block is free again when the last tensor over it has gone, be it a caller's ``weight.grad``, and a free one is
the system's to take back whenever it is short of memory. Until then it counts as the process's. Such a tensor's storage
cannot be resized.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1 << 20  # bytes; below, malloc keeps what it had


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor on like's device, and of its dtype unless another is given."""
    dtype = dtype or like.dtype
    if _is_memory(like) and _is_there() and torch.Size(shape).numel() * dtype.itemsize >= LEAST:
        block: Tensor = torch.ops.srppo_native.empty_spare(shape, dtype)
        return block
    return like.new_empty(shape, dtype=dtype)


def empty_cache() -> None:
    """Returns the CPU memory that is kept for later calls, up to 4 GiB, to the system at once.

    The system takes it by itself when it is short of memory: this is for whoever measures it. Memory that tensors are
    over, a ``weight.grad`` for one, stays theirs. `torch.cuda.empty_cache` is the same for a GPU.
    """
    if _is_there():
        torch.ops.srppo_native.empty_spare_cache()


def _is_there() -> bool:
    return hasattr(torch.ops.srppo_native, "empty_spare")  # not without the extension, or in one of older sources


def _is_memory(tensor: Tensor) -> bool:
    """Whether it is a CPU tensor, and not one of a trace's."""
    return tensor.device.type == "cpu" and type(tensor.detach()) is Tensor
