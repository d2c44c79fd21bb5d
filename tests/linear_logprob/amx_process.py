"""Runs tests of linear_logprob in this process at CPU level "amx", on a library whose tiles are emulated.

``python amx_process.py LIBRARY TESTS...``: the library that test_amx_level.py builds takes the place of the installed
extension. The last line says, as JSON, what the emulator saw.
"""

import ctypes
import json
import sys
import types
from pathlib import Path

import pytest
import torch

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def take_the_place(library: str) -> ctypes.CDLL:
    """Before srppo_kernels is imported: what csrc/module.cpp offers, of ``library``."""
    ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(library)
    host = ctypes.CDLL(library)
    host.amx_obstacle_text.restype = host.first_breach.restype = ctypes.c_char_p
    module = types.ModuleType("srppo_kernels._C")
    module.cpu_level = lambda: LEVELS[host.level()]
    module.set_cpu_level = lambda name: LEVELS[host.set_level(LEVELS.index(name))]
    module.build_info = lambda: {
        "cuda": "",
        "cpu_detected": LEVELS[host.detected_level()],
        "cpu_level": LEVELS[host.level()],
        "amx": host.amx_obstacle_text().decode(),
    }
    sys.modules["srppo_kernels._C"] = module
    return host


def main() -> int:
    host = take_the_place(sys.argv[1])
    code = pytest.main(sys.argv[2:])
    seen = {
        "level": LEVELS[host.level()],
        "breach": host.first_breach().decode(),
        "configured": host.configured(),
        "configurations": host.configurations(),
        "products": host.products(),
    }
    print(json.dumps(seen))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
