"""The native extension: whether it is there, why not, and which backend an op takes.

`srppo_kernels._C` holds the C++ (and, where built, CUDA) kernels; importing it registers the raw kernels as
`torch.ops.srppo_native.*`. It is built from csrc/ at installation and is optional: without it the ops run on their
plain-torch references, and `why()` says what is missing.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from srppo_kernels import _triton

__all__ = [
    "available",
    "build_info",
    "constant_when_traced",
    "cpu_level",
    "cpu_levels",
    "native_input",
    "resolve",
    "why",
]

# Ops with a CUDA C++ kernel, and those of them that Triton's beats on an H100 (8 x 4096 rewards: 7.4 us for 9.9).
QUICKER_IN_TRITON = frozenset({"log_ratio_reward"})
CUDA_OPS = frozenset({"gae", "whiten", "log_ratio_reward", "ppo_loss", "value_loss", "scaled_gradients"})
CPU_LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def _built_elsewhere(names: set[str]) -> Path | None:
    """Another folder of this package on sys.path that holds the extension, as where one installs a checkout and then
    runs Python in it."""
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        folder = Path(entry).resolve() / here.name
        if folder != here and any((folder / name).is_file() for name in names):
            return folder
    return None


def _what_a_build_lacks() -> str:
    """Of what setup.py needs, as far as it can be seen now."""
    import shutil
    import sysconfig

    headers = sysconfig.get_path("include")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "there is no C++ compiler on PATH (install g++ or clang++, then srppo again)"
    if not Path(headers, "Python.h").is_file():
        return f"Python's headers are not in {headers} (Debian and Ubuntu: install python3-dev, then srppo again)"
    return "there was no pybind11, or the build failed (see pip install -v)"


_module: ModuleType | None = None
_reason: str = ""

try:
    from srppo_kernels import _C as _loaded  # type: ignore[attr-defined]

    _module = _loaded
except ImportError as error:
    if "_C" in str(error) and "cannot import name" in str(error):
        ours = {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES}
        if elsewhere := _built_elsewhere(ours):
            _reason = (
                f"the extension is not in {Path(__file__).resolve().parent}, which Python has imported, but in "
                f"{elsewhere}: run Python from another folder, or install with pip install -e ."
            )
        elif others := sorted({path.name for path in Path(__file__).parent.glob("_C.*")} - ours):
            _reason = f"the extension was not built for this Python, only for another: {', '.join(others)}"
        elif sys.platform == "win32":
            _reason = "the extension is not built on Windows: it is for GCC and clang"
        else:
            _reason = f"the extension was not built: {_what_a_build_lacks()}"
    else:
        _reason = f"the extension does not load: {error}"
        if "libtorch_cuda" in str(error):
            _reason += (
                " (it was built against a CUDA build of torch and this is none: install with --no-build-isolation)"
            )

_warned: set[str] = set()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_traced(function: _Function) -> _Function:
    """Marks a function whose result torch.compile may take as it is: it cannot look into the extension.

    The same mark as `torch.compiler.assume_constant_result` sets, which imports the whole compiler to set it: a second
    of everybody's `import srppo`. A test holds the two equal.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def available() -> bool:
    """Whether the native kernels are there."""
    return _module is not None


def why() -> str:
    """One line: what is on, or why nothing is."""
    if _module is None:
        return _reason
    info = build_info()
    cuda = f"CUDA kernels built for sm_{info['cuda'].replace(',', ', sm_')}" if info["cuda"] else "no CUDA kernels"
    level = f"CPU level {info['cpu_level']} of {info['cpu_detected']}"
    # Tiles that a CPU has and the library does not use are worth a word; an older extension has none.
    above = f" (not amx: {info['amx']})" if info["cpu_detected"] == "avx512_bf16" and "amx" in info else ""
    return f"C++ kernels on, {level}{above}; {cuda}"


def build_info() -> dict[str, Any]:
    """Compiler, build options and CPU capabilities of the extension; empty without it."""
    return dict(_module.build_info()) if _module is not None else {}


def cpu_levels() -> tuple[str, ...]:
    """The instruction levels that this machine can run, lowest first; empty without the extension."""
    if _module is None:
        return ()
    return CPU_LEVELS[: CPU_LEVELS.index(build_info()["cpu_detected"]) + 1]


@contextmanager
def cpu_level(name: str) -> Iterator[None]:
    """Cap the instruction level inside a `with` block, for tests; it holds for the whole process.

    Raises:
        ValueError: an unknown level, or one that this machine or build does not have.
    """
    if name not in cpu_levels():
        raise ValueError(
            f"cpu_level: {name!r} is not available here; choose one of {', '.join(cpu_levels()) or 'none'}"
        )
    assert _module is not None
    before = _module.cpu_level()
    _module.set_cpu_level(name)
    try:
        yield
    finally:
        _module.set_cpu_level(before)


def native_input(tensor: Tensor) -> Tensor:
    """What a native kernel reads: contiguous, float32 where it is floating point."""
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def warn_once(key: str, text: str) -> None:
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _resolve_triton(op: str, backend: str, like: Tensor, dtype: torch.dtype) -> str:
    explicit = backend == "triton"
    obstacle = _triton.obstacle(like.device, explicit)
    if not obstacle and dtype != torch.float32:
        obstacle = "it computes in float32 and an input is float64"
    if not obstacle:
        return "triton"
    if explicit:
        raise ValueError(f"{op}: backend='triton' cannot run: {obstacle}; pass backend='auto'")
    if dtype == torch.float32:  # float64 has the reference everywhere
        warn_once(f"auto:{obstacle}", f"srppo: running on plain torch instead of Triton kernels: {obstacle}")
    return "reference"


@cache
def driver_obstacle() -> str:
    """Why the runtime that the CUDA kernels are linked with cannot run on this driver; empty if it can."""
    info = build_info()
    runtime, driver = info.get("cuda_runtime", 0), info.get("cuda_driver", 0)
    if driver // 1000 >= runtime // 1000:  # a driver runs all versions of its generation
        return ""
    return (
        f"its CUDA kernels were built with CUDA {runtime // 1000} and the driver is for CUDA {driver // 1000}: "
        f"build them with nvcc {driver // 1000}, or update the driver"
    )


@cache
def _device_obstacle(index: int) -> str:
    architectures = build_info().get("cuda", "")
    if not architectures:
        return "it has no kernel for device 'cuda': the extension was built without CUDA"
    if obstacle := driver_obstacle():
        return obstacle
    major, minor = torch.cuda.get_device_capability(index)
    for name in architectures.split(","):
        number = int(name.rstrip("a"))
        # Machine code runs on its generation, from its minor version on; that of an "a" on its own version alone.
        if number // 10 == major and (number % 10 == minor or (number % 10 < minor and not name.endswith("a"))):
            return ""
    return (
        f"its CUDA kernels were built for sm_{architectures.replace(',', ', sm_')} and the device is sm_{major}{minor}"
    )


def _native_obstacle(op: str, like: Tensor, dtype: torch.dtype) -> str:
    """Why no native kernel of `op` can run, in a clause; "" where one can."""
    kind = like.device.type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and op not in CUDA_OPS):
        return f"it has no kernel for device {kind!r}"
    if dtype != torch.float32:
        return "it computes in float32 and an input is float64"
    if _module is None:
        return _reason
    if kind == "cpu":
        return ""
    return _device_obstacle(torch.cuda.current_device() if like.device.index is None else like.device.index)


def resolve(op: str, backend: str, like: Tensor, dtype: torch.dtype) -> str:
    """The backend that runs `op` for inputs like `like` in compute dtype `dtype`: "native", "triton" or "reference".

    "auto" takes the native kernel where there is one, otherwise Triton's on a CUDA device, and says once why neither
    can run; an explicit "native" that cannot run falls back to the reference with one warning that says why.

    On an H100 most CUDA C++ kernels are the quicker ones. They read float32: 16 bit inputs would have to be widened
    first, a launch each, and "auto" leaves them to Triton's, which read any width.

    Raises:
        ValueError: an explicit "triton" that cannot run.
    """
    if backend == "reference":
        return "reference"
    if backend == "triton":
        return _resolve_triton(op, backend, like, dtype)
    obstacle = _native_obstacle(op, like, dtype)
    if backend == "auto" and like.device.type == "cuda":
        for_triton = op in QUICKER_IN_TRITON or like.dtype in (torch.bfloat16, torch.float16)
        if obstacle or (for_triton and not _triton.obstacle(like.device, explicit=False)):
            return _resolve_triton(op, backend, like, dtype)
    if not obstacle:
        return "native"
    if backend == "native":
        warn_once(f"{op}:{obstacle}", f"srppo: {op}(backend='native') runs on the reference instead: {obstacle}")
    elif _module is None:
        warn_once("auto", f"srppo: running on plain torch instead of native kernels: {_reason}")
    return "reference"
