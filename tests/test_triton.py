"""When Triton's kernels run: never by themselves in the interpreter, and refused in words where they cannot."""

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from backends import needs_triton

from srppo_kernels import _arguments, _triton, gae, linear_logprob, log_ratio_reward, ppo_loss, value_loss, whiten

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **changes: str | None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{k: v for k, v in changes.items() if v is not None}}
    for name in (name for name, value in changes.items() if value is None):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_the_variable_it_is_refused_in_words_and_auto_is_native():
    pytest.importorskip("triton")
    code = """
import torch
from srppo_kernels import _triton, gae
x, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
gae(x, x, mask)
try:
    gae(x, x, mask, backend="triton")
except ValueError as error:
    print(error)
print(_triton.available(), _triton.why())
"""
    lines = python(code, TRITON_INTERPRET=None).splitlines()
    assert lines[0].startswith(
        "gae: backend='triton' cannot run: Triton kernels need a CUDA device; on CPU tensors only"
    )
    assert lines[1] == "False off: no CUDA device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_interpreter_is_for_those_who_ask():
    pytest.importorskip("triton")
    cpu = torch.device("cpu")
    assert _triton.obstacle(cpu) == ""
    assert "need a CUDA device" in _triton.obstacle(cpu, explicit=False)
    assert _triton.why() == "on: interpreted on the CPU, for tests"
    late = "import triton.language, os; os.environ['TRITON_INTERPRET'] = '1'; from srppo_kernels import _triton"
    assert python(f"{late}; print(_triton.interpreted())", TRITON_INTERPRET=None).strip() == "False"


def test_an_unknown_device_and_a_missing_triton():
    assert "no kernels for device 'meta'" in _triton.obstacle(torch.device("meta"))
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from srppo_kernels import _triton
print(_triton.why())
"""
    assert python(code).strip() == "off: triton is not installed (pip install triton)"


def test_every_triton_module_is_compiled_by_the_tool():
    pytest.importorskip("triton")
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "srppo_kernels").glob("*/triton_*.py")
        if "def compile_cases" in path.read_text()
    }
    assert found == set(_triton.KERNEL_MODULES)


def test_a_call_of_auto_on_the_cpu_does_not_import_triton():
    code = """
import sys, torch
from srppo_kernels import gae
x, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
gae(x, x, mask)
print("triton" in sys.modules)
"""
    assert python(code).strip() == "False"
    assert gae(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))[0] == 0


@needs_triton
def test_no_kernel_asks_for_the_extension(monkeypatch):
    """A machine with a GPU may have no C++ compiler. Gradients run with it absent as well."""
    monkeypatch.setattr(torch.ops, "srppo_native", None)
    x, y, mask = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    tokens, targets = torch.randn(6, 16, requires_grad=True), torch.arange(6)
    for result in (
        gae(x, y, mask, backend="triton")[0].sum(),
        whiten(x, mask, backend="triton").sum(),
        log_ratio_reward(x, y, mask, backend="triton").sum(),
        ppo_loss(x, y, y, mask, backend="triton")[0],
        value_loss(x, y, y, mask, backend="triton")[0],
        linear_logprob(tokens, torch.randn(9, 16), targets, backend="triton").logprob.sum(),
    ):
        result.backward()


def test_a_counter_stays_out_of_the_memory_of_graphs(monkeypatch):
    """torch.compile's "reduce-overhead" warms up with all that the calling thread allocates in its graph's memory. Each
    stream has one of its own, and a graph that is captured one for each call."""
    stream, made, capturing = SimpleNamespace(device_index=0, cuda_stream=7), [], False
    monkeypatch.setattr(_triton, "_counters", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda on: (made.append(on), nullcontext())[1])
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: (made.append(threading.get_ident()), object())[1])
    counters = [_triton.finish_counter(torch.device("cuda", 0)) for _ in range(2)]
    assert counters[0] is counters[1]
    assert made[0] is stream and made[1] != threading.get_ident() and len(made) == 2
    for other in ({"cuda_stream": 8}, {"device_index": 1}):
        stream = SimpleNamespace(**{"device_index": 0, "cuda_stream": 7, **other})
        counters.append(_triton.finish_counter(torch.device("cuda", 0)))
    capturing = True
    counters += [_triton.finish_counter(torch.device("cuda", 0)) for _ in range(2)]
    assert len(set(map(id, counters))) == 5


@pytest.mark.parametrize(
    ("capabilities", "hip", "refused"),
    [({1: (8, 0)}, None, False), ({0: (8, 0), 1: (7, 5)}, None, True), ({1: (7, 5)}, "6.4", False)],
)
def test_the_kernels_need_an_ampere(capabilities, hip, refused, monkeypatch):
    """Of NVIDIA's; and they are launched on the device that is asked, or on the current one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device", lambda device: f"on {device}")
    monkeypatch.setattr(_triton, "_installed", lambda: True)
    _triton._device_obstacle.cache_clear()
    try:
        for name in ("cuda", "cuda:1"):
            said = _triton.obstacle(torch.device(name), explicit=False)
            assert said == ("the device has compute capability 7.5 and the kernels need 8.0" if refused else "")
    finally:
        _triton._device_obstacle.cache_clear()
    assert _triton.on_device(SimpleNamespace(device=torch.device("cuda:1"))) == "on cuda:1"


def test_a_number_on_the_cpu_is_no_tensor_for_a_devices_kernel():
    count, meta = torch.tensor([3]), torch.device("meta")
    assert _arguments.number_or_tensor("op", "count", count, meta) == (3.0, None)
    assert _arguments.number_or_tensor("op", "count", count, count.device)[1].shape == ()
    assert _arguments.number_or_tensor("op", "count", count.to(meta), meta)[1].device == meta
    with pytest.raises(ValueError, match="op: count is on meta but the other inputs on cpu; move it, or pass a number"):
        _arguments.number_or_tensor("op", "count", count.to(meta), count.device)
