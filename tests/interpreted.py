"""What Triton's interpreter does unlike a GPU, undone for all tests: kernels that are right in it alone fail here.

order   it takes programs in ascending order, a GPU in any: here shuffled, by another order every launch
bounds  it reads and writes any memory: here no access may leave the tensors of its launch
other   where a masked load has none it gives zeros, a GPU what happens to be there: here NaN, inf and -inf, or -1

And a loop's bound that a kernel loads: before Triton 3.9 numpy refuses it from 2.5 on, as an array that is no number.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_on_a_gpu(interpreter: ModuleType) -> None:
    """Changes ``triton.runtime.interpreter`` for this process."""
    _shuffle(interpreter.interpreter_builder)
    _watch(interpreter)
    _number(interpreter)


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Memory that torch hands out holds NaNs (and the largest integers), and not what a process mostly finds: zeros."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _shuffle(builder: Any) -> None:
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    generator, order = random.Random(0), []

    def shuffled(*grid: int) -> None:
        set_grid_dim(*grid)
        order[:] = itertools.product(*map(range, grid))
        generator.shuffle(order)

    builder.set_grid_dim, builder.set_grid_idx = shuffled, lambda *_: set_grid_idx(*order.pop())


def _number(interpreter: ModuleType) -> None:
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _watch(interpreter: ModuleType) -> None:
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    begin, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    update = builder.create_atomic_rmw
    tensors: list[tuple[int, int]] = []  # of the launch: first byte, and one past the last

    def beginning(self: Any, args: Any, kwargs: Any) -> Any:
        hosts = begin(self, args, kwargs)
        given = [getattr(x, "base", x) for x in (*hosts[0], *hosts[1].values())]
        tensors[:] = [_extent(x) for x in given if isinstance(x, Tensor)]
        return hosts

    def check(pointers: Any, mask: Any) -> None:
        touched = pointers.data[mask.data]
        if touched.size:
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            first, last = int(touched.min()), int(touched.max()) + size
            assert any(a <= first and last <= b for a, b in tensors), "a place outside of the launch's tensors"

    def checked_load(pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask)
        if other is None:
            kind = pointers.get_element_ty()
            dtype = np.dtype(interpreter._get_np_dtype(kind))
            other = interpreter.TensorHandle(np.resize(_nothing(kind, dtype), pointers.data.shape), kind)
        return load(pointers, mask, other, *rest, **options)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask)
        return store(pointers, value, mask, *rest, **options)

    def checked_update(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask)
        return update(operation, pointers, value, mask, *rest, **options)

    executor._init_args_hst = beginning
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = checked_update


def _nothing(kind: Any, dtype: Any) -> Any:
    """A maximum may drop a NaN, and a minimum infinity. NumPy has bf16 as its bits."""
    if dtype.kind == "b":
        return np.array(True)
    ones = (1 << 8 * dtype.itemsize) - 1
    infinity = ones >> 1 & -1 << kind.fp_mantissa_width if kind.is_floating() else ones
    bits = [ones, infinity, ones ^ ones >> 1 | infinity]
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)


def _extent(tensor: Tensor) -> tuple[int, int]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = elements if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + size * tensor.element_size()
