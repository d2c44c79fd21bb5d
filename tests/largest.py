"""The largest tensor that is made while a block of code runs, whoever makes it: the model, autograd, an op's inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srppo_kernels import empty_cache
from srppo_kernels._library import OPS


class LargestTensor(TorchDispatchMode):
    """``numel`` is that of the largest storage of any operator's output inside the block, backward passes included.

    A mode is off while it handles a call, so an op of ours would hide what its Python code allocates; that code is
    therefore run with the mode on, in place of the op. Memory that an earlier call left for the next one is dropped, as
    it may be larger than what this block needs.
    """

    def __init__(self) -> None:
        super().__init__()
        empty_cache()
        self.numel, self.by, self.ops = 0, "", set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = OPS.get(func._schema.name)
        if op is None:
            result = func(*args, **kwargs)
        else:
            self.ops.add(func._schema.name)
            with self:
                result = op.kernel(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):  # the storage, as a view or an expanded scalar takes no memory of its own
                stored = tensor.untyped_storage().nbytes() // tensor.element_size()
                if stored > self.numel:
                    self.numel, self.by = stored, f"{func} {tuple(tensor.shape)}"
        return result
