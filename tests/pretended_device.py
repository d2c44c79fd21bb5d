"""pretended_device.cpp built and given to torch, and as a pytest plugin (``-p pretended_device``) the device that the
trainer takes for its GPU: what runs there mixes no devices. Its arithmetic is the CPU's, so it proves nothing else.

    python tests/pretended_device.py FOLDER ARGUMENT...

builds it in a folder and becomes pytest with that plugin.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "pretended"
LIBRARY = "SRPPO_PRETENDED_DEVICE"  # the variable that tells the plugin where it was built


def build(folder: Path) -> Path:
    source, target = Path(__file__).with_suffix(".cpp"), folder / "pretended_device.so"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w"]
    command = ["c++", *flags, *includes, str(source), "-o", str(target), *libraries, "-lc10", "-ltorch_cpu", "-ltorch"]
    subprocess.run(command, check=True)
    return target


def install(library: str) -> None:
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    device = types.ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(device, name, lambda answer=answer: answer)
    device.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]  # it draws from the CPU's generator
    torch._register_device_module(NAME, device)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def pytest_configure() -> None:
    from srppo import memory, models
    from srppo_kernels import _arguments

    install(os.environ[LIBRARY])
    _arguments.WITHOUT_FLOAT64 += (NAME,)
    choose_dtype = models.choose_dtype
    for module in (memory, models):
        module.choose_device = lambda: torch.device(NAME, 0)
        module.choose_dtype = lambda args, device: choose_dtype(args, torch.device("cuda"))


if __name__ == "__main__":
    tests = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    os.environ |= {"SRPPO_TESTS": "pretended", "OMP_NUM_THREADS": "1", LIBRARY: str(build(Path(sys.argv[1])))}
    os.chdir(tests.parent)
    command = [sys.executable, "-m", "pytest", "-p", "pretended_device", "-p", "no:cacheprovider", *sys.argv[2:]]
    os.execv(sys.executable, command)
