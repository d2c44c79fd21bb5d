"""What a call would launch on a GPU, seen without one: Triton's kernels in the interpreter, and torch's operators."""

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch.profiler import ProfilerActivity, profile, record_function

# Of torch's operators these reach no device: they make a view, or memory that nobody has filled.
FREE = {
    "_local_scalar_dense", "_reshape_alias", "alias", "as_strided", "contiguous", "detach", "detach_", "empty",
    "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty", "reshape", "resize_", "result_type", "select",
    "slice", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view", "view_as",
}  # fmt: skip
_KERNEL = "triton kernel "


def launched(call: Callable[[], Any]) -> list[str]:
    """Names of the Triton kernels that `call` runs, interpreted, and of torch's operators that would run a kernel.

    An operator that is made of others is not named beside them, but for its own name where it is not free.
    """
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def named(self: Any, *arguments: Any, **options: Any) -> Any:
        with record_function(_KERNEL + self.fn.__name__):
            return run(self, *arguments, **options)

    with mock.patch.object(GridExecutor, "__call__", named), profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    events = sorted(seen.events(), key=lambda event: (event.time_range.start, -event.time_range.end))
    found, busy_until = [], -1.0
    for event in events:
        kernel = event.name.removeprefix(_KERNEL) if event.name.startswith(_KERNEL) else ""
        operator = event.name.removeprefix("aten::") if event.name.startswith("aten::") else ""
        if event.time_range.start < busy_until or not (kernel or (operator and operator not in FREE)):
            continue  # within the interpreter, or another operator; or free
        busy_until = event.time_range.end
        found.append(kernel or event.name)
    return found
