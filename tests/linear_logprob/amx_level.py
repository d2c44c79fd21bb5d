"""Builds the extension's CPU sources of linear_logprob with emulated AMX tiles in a folder, and runs with them, by
amx_process.py, what every level has to pass: ``python amx_level.py FOLDER``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parent
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
no_avx512_bf16 = pytest.mark.skipif(
    "avx512_bf16" not in FLAGS.split(), reason="the code around the tiles takes AVX-512 BF16"
)
no_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
SOURCES = ("linear_logprob/cpu.cpp", "linear_logprob/cpu_product.cpp", "linear_logprob/cpu_dz.cpp")
PROBE = """
#include "csrc/common/cpu_level.cpp"
#define OUT extern "C" __attribute__((visibility("default")))
using namespace srppo;
OUT int detected_level() { return static_cast<int>(detected_cpu_level()); }
OUT int level() { return static_cast<int>(cpu_level()); }
OUT int set_level(int level) { return static_cast<int>(set_cpu_level(static_cast<CpuLevel>(level))); }
OUT const char* amx_obstacle_text() { return amx_obstacle() ? amx_obstacle() : ""; }
OUT const char* first_breach() { return tiles::emulated::first_breach.c_str(); }
OUT int configured() { return tiles::emulated::configured_threads; }
OUT int configurations() { return tiles::emulated::configurations; }
OUT int products() { return tiles::emulated::products; }
"""


def build(folder: Path) -> Path:
    (folder / "probe.cpp").write_text(PROBE)
    flags = [
        "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-w", f"-I{ROOT}",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", '-DSRPPO_TILES="tests/linear_logprob/amx_emulator.h"',
        *(f"-I{path}" for path in include_paths()),
    ]  # fmt: skip
    sources = [folder / "probe.cpp", *(ROOT / "csrc" / source for source in SOURCES)]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen(["c++", *flags, "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    subprocess.run(["c++", "-shared", *objects, "-o", folder / "emulated.so"], check=True)
    return folder / "emulated.so"


def main() -> None:
    files = [TESTS / f"test_linear_logprob_{name}.py" for name in ("native", "gradients")]
    # dtype1 is bfloat16, the only one that tiles multiply.
    which = "native and amx and (dtype1 or rows) or gradients and (dtype1 or product)"
    library = build(Path(sys.argv[1]))
    command = [sys.executable, TESTS / "amx_process.py", library, *files, "-k", which, "-qx", "-p", "no:cacheprovider"]
    os.chdir(ROOT)
    os.execv(sys.executable, list(map(str, command)))


if __name__ == "__main__":
    main()
