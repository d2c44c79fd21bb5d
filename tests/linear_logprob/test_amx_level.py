"""The kernels at CPU level "amx" without a CPU that has it: the sources of the extension, built with emulated tiles.

The tests that every level has to pass (test_linear_logprob_native.py, test_linear_logprob_gradients.py) run once more
in a process whose extension is that build: values against float64, bits over threads and rows, kept exponentials, and
the product with an fp32 result, in one chunk, in several and into a caller's buffer.
"""

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from apart import run_apart
from backends import CXXFLAGS
from linear_logprob import test_linear_logprob_workspace as workspace
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parent
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
pytestmark = [
    pytest.mark.skipif("avx512_bf16" not in FLAGS.split(), reason="the code around the tiles takes AVX-512 BF16"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine"),
]

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


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("amx_level")
    (folder / "probe.cpp").write_text(PROBE)
    flags = [
        "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-w", f"-I{ROOT}",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", '-DSRPPO_TILES="tests/linear_logprob/amx_emulator.h"',
        *(f"-I{path}" for path in include_paths()), *CXXFLAGS,
    ]  # fmt: skip
    sources = [folder / "probe.cpp", *(ROOT / "csrc" / source for source in SOURCES)]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen(["c++", *flags, "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    subprocess.run(["c++", *flags, "-shared", *objects, "-o", folder / "emulated.so"], check=True)
    return folder / "emulated.so"


def test_what_every_level_has_to_pass(library):
    files = [TESTS / f"test_linear_logprob_{name}.py" for name in ("native", "gradients")]
    # dtype1 is bfloat16, the only one that tiles multiply.
    which = "native and amx and (dtype1 or rows) or gradients and (dtype1 or product)"
    done = run_apart("linear_logprob/amx_process.py", library, *files, "-k", which, "-qx", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["level"] == "amx"
    assert seen["breach"] == ""
    assert seen["configured"] == 0  # nobody kept the tiles
    assert seen["products"] > 500_000  # forwards and adding products went through them
    assert "skipped" not in done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts glibc's malloc")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")
def test_a_bounded_workspace_for_any_number_of_threads(library, tmp_path):
    # 4097: rows of an odd width are copied on their way to the tiles, which is the most that a thread takes there.
    cases = [f"amx-bfloat16-{plan}" for plan in ("score", "score-4097x40", "recompute", "cache")]
    workspace.check(tmp_path, str(library), cases)
