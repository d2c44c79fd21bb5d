"""How an op joins `torch.ops.srppo`: schema, kernel, fake and autograd, on the dispatcher alone.

`torch.library.custom_op` does the same with more in between on every call: it checks that no output aliases an input
(opcheck asserts that once, in the tests) and asks the schema for the default of each argument, 40 us for an op of 13
arguments on a CPU, where the kernel itself takes 70, and more than twice that for one of 26. Ops here have no defaults:
their public fronts have.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srppo_kernels._arguments import refuse_tangents

__all__ = ["OPS", "Op", "differentiable_once"]

_LIBRARY = torch.library.Library("srppo", "FRAGMENT")
OPS: dict[str, "Op"] = {}  # by their names


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's `once_differentiable` for gradients that were formed in the forward.

    It refuses a second derivative where the upstream gradient has a graph, and takes what was formed for a constant
    where it has none, as in a gradient penalty. But that depends on the inputs, so it is refused there, too. Not where
    a caller asks for second derivatives with `allow_unused`, as `torch.autograd.functional.hessian` does: there is no
    path to the inputs then, and torch has None, or zeros.
    """
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx: Any, grad: Tensor | None, *rest: Any) -> Any:
        if grad is not None and torch.is_grad_enabled() and not grad.requires_grad:  # under create_graph
            grad = grad.detach().requires_grad_()
        return refusing(ctx, grad, *rest)

    return wrapper


class Op:
    """An op `srppo::name` with the signature of `kernel`, which runs on every device.

    Args:
        name: in namespace `srppo`.
        kernel: the implementation, fully annotated; every argument positional and without default. It returns fresh
            tensors: never an input or a view of one.
        writes: the one tensor that it writes to, if any: an argument's name.
    """

    def __init__(self, name: str, kernel: Callable[..., Any], *, writes: str | None = None) -> None:
        self.name, self.kernel = f"srppo::{name}", kernel
        OPS[self.name] = self
        schema = torch.library.infer_schema(kernel, mutates_args=() if writes is None else (writes,))
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        call = self._call = getattr(torch.ops.srppo, name).default
        if writes is None:
            return
        position = [argument.name for argument in call._schema.arguments].index(writes)

        def noting_the_write(keyset: Any, *inputs: Any) -> Any:
            if inputs[position] is not None:
                torch.autograd.graph.increment_version(inputs[position])
            return call.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *inputs)

        _LIBRARY.impl(name, noting_the_write, "ADInplaceOrView", with_keyset=True)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: shapes and dtypes of the outputs."""
        return torch.library.register_fake(self.name, fake, lib=_LIBRARY)

    def differentiate_no_further(self, of: str) -> None:
        """For an op that is the gradient of ``of``."""

        def refuse(ctx: Any, *grads: Tensor | None) -> Any:
            raise NotImplementedError(f"{of} is differentiable once: its gradient has no gradient of its own")

        self.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`: `setup_context(ctx, inputs, output)`, `backward(ctx, *grads)`."""
        call = self._call

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs_and_keyset: Any) -> Any:
                *inputs, keyset = inputs_and_keyset
                with torch._C._AutoDispatchBelowAutograd():
                    output = call.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
                setup_context(ctx, tuple(inputs), output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                return (*backward(ctx, *grads), None)

        Node.__name__ = Node.__qualname__ = f"{self.name.replace('::', '_')}_backward"

        def autograd_kernel(keyset: Any, *inputs: Any) -> Any:
            refuse_tangents(self.name, *inputs)
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
                return Node.apply(*inputs, keyset)
            with torch._C._AutoDispatchBelowAutograd():
                return call.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

        _LIBRARY.impl(self.name, autograd_kernel, "Autograd", with_keyset=True)
