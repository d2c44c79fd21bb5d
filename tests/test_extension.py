"""The native extension: there where it can be built, honest about itself, and no loss but speed where it is missing."""

import shutil
import subprocess
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from sysconfig import get_config_var
from types import SimpleNamespace

import pytest
import torch

from srppo_kernels import _extension
from srppo_kernels.gae import gae

ROOT = Path(__file__).parent.parent
built = pytest.mark.skipif(not _extension.available(), reason=_extension.why())


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
def test_is_built_where_there_is_a_compiler():
    assert _extension.available(), _extension.why()


@built
def test_says_what_it_is():
    info = _extension.build_info()
    assert info["cpu_detected"] in _extension.CPU_LEVELS
    assert info["torch_target_version"] == "2.11"
    assert info["threads"] == torch.get_num_threads()
    assert f"CPU level {info['cpu_level']}" in _extension.why()
    # Why a CPU goes without AMX tiles, or that they have multiplied correctly.
    assert info["amx"].startswith("on: ") == (info["cpu_detected"] == "amx")
    assert (f"not amx: {info['amx']}" in _extension.why()) == (info["cpu_detected"] == "avx512_bf16")


@built
def test_level_is_capped_and_restored():
    levels = _extension.cpu_levels()
    before = _extension.build_info()["cpu_level"]
    for level in levels:
        with _extension.cpu_level(level):
            assert _extension.build_info()["cpu_level"] == level
    assert _extension.build_info()["cpu_level"] == before == levels[-1]
    with pytest.raises(ValueError, match="choose one of portable"), _extension.cpu_level("sse9"):
        pass


@built
def test_raw_kernels_refuse_what_they_cannot_read():
    x, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    tail = (1.0, 0.95, None, None, None, True, None)
    for bad in ((x.double(), x, mask), (x.t(), x, mask), (x, x[:1], mask), (x, x, x)):
        with pytest.raises(RuntimeError, match="srppo_native"):
            torch.ops.srppo_native.gae(*bad, *tail)


@pytest.mark.parametrize(
    ("built", "capability", "dtype", "auto", "native"),
    [
        ("80,90a,100", (9, 0), torch.float32, "native", "native"),
        ("80,90a,100", (9, 0), torch.bool, "native", "native"),  # gae's gradient goes by its mask
        ("80,90a,100", (8, 9), torch.float32, "native", "native"),  # machine code of sm_80 runs on 8.x
        ("80,90a,100", (9, 0), torch.bfloat16, "triton", "native"),
        (
            "80,90a,100",
            (12, 0),
            torch.float32,
            "triton",
            "were built for sm_80, sm_90a, sm_100 and the device is sm_120",
        ),
        ("90a", (9, 1), torch.float32, "triton", "were built for sm_90a and the device is sm_91"),
        ("", (9, 0), torch.float32, "triton", "the extension was built without CUDA"),
        ("80 under 12080", (8, 0), torch.float32, "triton", "built with CUDA 13 and the driver is for CUDA 12: build"),
        ("80,90a,100", (9, 0), torch.float64, "reference", "an input is float64"),
    ],
)
def test_what_runs_on_a_cuda_device(monkeypatch, built, capability, dtype, auto, native):
    """With a pretended device: `resolve` looks at a tensor's device and dtype alone."""
    like = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    monkeypatch.setattr(_extension, "_module", object())
    built, _, driver = built.partition(" under ")
    versions = {"cuda_runtime": 13010, "cuda_driver": int(driver or 13000)}
    monkeypatch.setattr(_extension, "build_info", lambda: {"cuda": built, **versions})
    monkeypatch.setattr(_extension, "_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(_extension._triton, "obstacle", lambda device, explicit=True: "")
    forget()
    try:
        assert _extension.resolve("gae", "auto", like, compute) == auto
        if native == "native":
            assert _extension.resolve("gae", "native", like, compute) == "native"
        else:
            with pytest.warns(RuntimeWarning, match=f"runs on the reference instead: .*{native}"):
                assert _extension.resolve("gae", "native", like, compute) == "reference"
        # Without Triton "auto" still takes a native kernel, widened inputs or not, before it falls back with a warning.
        monkeypatch.setattr(_extension._triton, "obstacle", lambda device, explicit=True: "triton is not installed")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            alone = _extension.resolve("gae", "auto", like, compute)
        assert alone == ("native" if native == "native" else "reference")
        told = [w for w in caught if "instead of Triton kernels: triton is not installed" in str(w.message)]
        assert len(told) == (alone == "reference" and dtype != torch.float64)
    finally:
        forget()


def forget() -> None:
    _extension._device_obstacle.cache_clear()
    _extension.driver_obstacle.cache_clear()


def test_explicit_native_that_cannot_run_warns_once_and_still_answers():
    x, mask = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    _extension._warned.clear()
    with pytest.warns(RuntimeWarning, match="gae\\(backend='native'\\) runs on the reference instead"):
        first = gae(x, x, mask, backend="native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = gae(x, x, mask, backend="native")
    assert torch.equal(first[0], second[0])


def test_without_the_extension_all_ops_run_and_say_so_once():
    code = """
import sys, warnings
sys.modules["srppo_kernels._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from srppo_kernels import _extension, gae, log_ratio_reward, ppo_loss, value_loss, whiten
    x, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for _ in range(2):
        gae(x, x, mask), whiten(x, mask), ppo_loss(x, x, x, mask), value_loss(x, x, x, mask)
        log_ratio_reward(x, x, mask)
ours = [str(w.message) for w in caught if "srppo" in str(w.message)]
assert not _extension.available() and _extension.cpu_levels() == () and _extension.build_info() == {}
assert len(ours) == 1 and "running on plain torch" in ours[0], ours
print(_extension.why())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "extension" in done.stdout


def test_why_there_is_no_extension_is_named(tmp_path):
    package = tmp_path / "srppo_kernels"
    shutil.copytree(ROOT / "srppo_kernels", package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    code = """
import pathlib, sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(f)]  # which would find the checkout's
sys.path[1:] = [p for p in sys.path[1:] if not list(pathlib.Path(p).glob("srppo_kernels/_C.*"))]  # likewise
import shutil, sysconfig, torch
sys.platform, shutil.which = sys.argv[1], lambda name: name in sys.argv[2].split()
sysconfig.get_path = lambda name: sys.argv[3]
import srppo_kernels._extension as extension
print(extension.why())
"""
    headers = tmp_path / "include"
    headers.mkdir()
    for system, compilers, name, text in (
        ("linux", "g++ cc", "", f"Python's headers are not in {headers}"),
        ("linux", "cc", "Python.h", "no C++ compiler"),
        ("linux", "clang++", "", "the build failed"),
        ("win32", "", "", "not built on Windows"),
        ("linux", "c++", "_C.cpython-39-other.so", "only for another: _C.cpython-39-other.so"),
    ):
        if name:
            ((headers if name == "Python.h" else package) / name).touch()
        command = [sys.executable, "-c", code, system, compilers, str(headers)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert text in done.stdout, done.stderr


def test_an_extension_installed_elsewhere_is_named(tmp_path):
    """`pip install .` and then Python in the checkout, whose package has no extension and is imported first."""
    source, site = tmp_path / "checkout", tmp_path / "site"
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "srppo_kernels", source / "srppo_kernels", ignore=ignored)
    (site / "srppo_kernels").mkdir(parents=True)
    (site / "srppo_kernels" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    code = f"""
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(f)]  # which would find the checkout's
sys.path.insert(1, {str(site)!r})
import srppo_kernels._extension as extension
print(extension.why())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert f"not in {source / 'srppo_kernels'}" in done.stdout, done.stderr
    assert f"but in {site / 'srppo_kernels'}: run Python from another folder, or install with" in done.stdout


def built_for_cuda(folder: Path, before: str = "", **environment: str) -> list[str]:
    """What setup.py says that is lost where torch is one for CUDA and a folder has all compilers; it ends well."""
    options = ["setup.py", "build_ext", f"--build-temp={folder}/t", f"--build-lib={folder}/lib"]
    code = f"import runpy, sys, torch; torch.version.cuda = '13.0'; {before}"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", f"import sys; sys.argv = {options}; {code}"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": str(folder), **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if line.startswith("srppo: ")]


def test_a_failing_build_leaves_an_installation(tmp_path):
    # Compilers that refuse everything: setup.py ends well and says in a line each what is lost. clang++ alone is tried.
    for name in ("clang++", "nvcc"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    lines = built_for_cuda(tmp_path)
    assert len(lines) == 2
    assert lines[0].startswith("srppo: CUDA kernels are not built: Command") and "nvcc" in lines[0]
    assert lines[1].startswith("srppo: the extension could not be built (") and "nvcc" not in lines[1]
    assert str(tmp_path / "clang++") in lines[1]
    assert "runs on plain torch without its native kernels" in lines[1]
    assert not list((tmp_path / "lib").rglob("_C*"))
    # Where headers are missing, too, they come before the command that failed.
    _, line = built_for_cuda(tmp_path, "import sysconfig; sysconfig.get_path = lambda *names, **options: '/nowhere'; ")
    assert (
        "could not be built (Python's headers are not in /nowhere; Debian and Ubuntu have them in python3-dev)" in line
    )


def test_cuda_kernels_are_linked_to_what_they_need_of_torch(tmp_path):
    """With compilers that note how they are called. Left to what comes along with libtorch, all of the extension failed
    to load where it was built against torch 2.13, whose libtorch linkers leave out."""
    note = (
        f"#!{sys.executable}\nimport pathlib, sys\n"
        + """
arguments = sys.argv[1:]
if "--dryrun" in arguments:
    print("#$ TOP=/toolkit", file=sys.stderr)
elif "-o" in arguments:
    pathlib.Path(arguments[arguments.index("-o") + 1]).touch()
    with pathlib.Path(__file__).with_name("calls.txt").open("a") as calls:
        print(*arguments, file=calls)
else:
    print("13.0.0")
"""
    )
    of_python = {str(get_config_var(name)).split()[0] for name in ("CC", "CXX")}  # x86_64-linux-gnu-g++ of Debian's
    for name in {"c++", "g++", "gcc", "nvcc", *of_python}:
        (tmp_path / name).write_text(note)
        (tmp_path / name).chmod(0o755)
    assert built_for_cuda(tmp_path, USE_NINJA="0", MAX_JOBS="1") == []
    (link,) = (call.split() for call in (tmp_path / "calls.txt").read_text().splitlines() if "-shared" in call.split())
    assert {"-ltorch_cpu", "-ltorch_cuda", "-lcudart_static", "-L/toolkit/lib64"} <= set(link)
    assert len([name for name in link if name.endswith(".cu.o")]) == len(list((ROOT / "csrc").rglob("*.cu")))


def test_on_windows_no_build_is_tried_and_the_installation_stays(tmp_path):
    options = ["setup.py", "build_ext", f"--build-temp={tmp_path}/t", f"--build-lib={tmp_path}/lib"]
    code = "import runpy, setuptools; sys.platform = 'win32'; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", f"import sys; sys.argv = {options}; {code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("srppo: "))
    assert "it is not built on Windows: srppo runs on plain torch without its native kernels" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("ModuleNotFoundError('no', name='torch')", "torch is not there to build against, so"),
        ("ImportError('undefined symbol: fork2', name='_C')", "does not load (undefined symbol: fork2), so"),
        ("OSError('libcudart.so.99: cannot open')", "does not load (libcudart.so.99: cannot open), so"),
    ],
)
def test_a_torch_that_does_not_load_leaves_an_installation(tmp_path, raised, said):
    (tmp_path / "torch.py").write_text(f"raise {raised}")
    command = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}/t", f"--build-lib={tmp_path}/lib"]
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("srppo: "))
    assert said in line and "runs on plain torch without its native kernels" in line


def test_the_mark_for_the_compiler_is_the_one_that_torch_sets():
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    _extension.constant_when_traced(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
