"""What GPU tests ask of an op beside its values: no waiting, the number of launches, and that a graph can hold it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from srppo_kernels import _extension

_built = bool(_extension.build_info().get("cuda"))
# What a device runs: Triton's kernels, and the C++ ones where the extension was built with them.
BACKENDS = ["triton", pytest.param("native", marks=pytest.mark.skipif(not _built, reason="no CUDA C++ kernels"))]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels and memsets that a warm `call` runs on the device."""
    for _ in range(2):  # the first profile of a process starts the device's tracing, and may miss what it starts with
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def replayed(call: Callable[[], tuple[Tensor, ...]], change: Callable[[], None]) -> tuple[Tensor, ...]:
    """Capture `call` in a CUDA graph, `change` its inputs in place, replay twice -> the outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles and warms up outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    change()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    return outputs


def on_another_stream(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = call()
    stream.synchronize()
    return outputs
