"""Builds the optional extension `srppo_kernels._C` from csrc/; all metadata is in pyproject.toml.

C++ kernels are built wherever there is a compiler. CUDA kernels are built too when nvcc is found *and* the torch that
is built against is a CUDA build: they launch on torch's stream, which a CPU build has none of. `python setup.py
check_cuda` compiles them on any machine with nvcc and throws the objects away.

Without a compiler the installation still succeeds, with one line that says what is missing, and the library runs on its
plain-torch references. So it does on Windows, where torch's build takes MSVC, and these sources are for GCC and clang.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup

ROOT = Path(__file__).parent.resolve()
# 2.11's stable ABI: one binary serves every torch from there on.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No contraction: a fused multiply-add appears where the source says fma() and nowhere else, so that two paths through
# the same maths have the same bits. -Wno-psabi: vectors are passed between inlined functions only.
# -Wno-(maybe-)uninitialized: GCC 12 warns of its own AVX-512 intrinsics. Clang does not know of maybe.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option", TARGET]
CUDA_ARCHITECTURES = ("80", "90a", "100")
# A source that is named after an architecture has instructions of its own and is compiled for that one alone.
OWN_ARCHITECTURE = {"sm90.cu": ("90a",)}
LOST = "srppo runs on plain torch without its native kernels"


def say(text):
    print(f"srppo: {text}", file=sys.stderr, flush=True)


def relative(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def architectures(source):
    return OWN_ARCHITECTURE.get(Path(source).name, CUDA_ARCHITECTURES)


def nvcc_command(nvcc, source, output, include_dirs):
    flags = [
        "-std=c++20",
        "-O3",
        "-fmad=false",
        "--expt-relaxed-constexpr",
        "-Xcompiler",
        "-fPIC",
        TARGET,
        "-DUSE_CUDA",
    ]
    for arch in architectures(source):
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    includes = [flag for path in include_dirs for flag in ("-I", str(path))]
    return [nvcc, *flags, *includes, "-c", source, "-o", str(output)]


def toolkit_of(nvcc):
    """The toolkit that `nvcc` belongs to: it may be a wrapper on PATH, so it is asked."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    top = next(line.split("TOP=", 1)[1] for line in plan.splitlines() if "TOP=" in line)
    return Path(top.strip()).resolve()


def torch_include_dirs():
    from torch.utils.cpp_extension import include_paths

    return include_paths()


def missing_headers():
    """Debian and Ubuntu have them apart from Python. Asked where a build has failed: a compiler may find others."""
    folder = sysconfig.get_path("include")
    found = Path(folder, "Python.h").is_file()
    return "" if found else f"Python's headers are not in {folder}; Debian and Ubuntu have them in python3-dev"


class CheckCuda(Command):
    """Compile the CUDA sources with nvcc alone, for machines that cannot run them."""

    description = "compile csrc/**/*.cu and discard the objects"
    user_options: ClassVar = [
        ("keep=", None, "keep the objects in this folder and print ptxas's figures of every kernel"),
    ]

    def initialize_options(self):
        self.keep = None

    def finalize_options(self):
        pass

    def run(self):
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise SystemExit("check_cuda: nvcc is not on PATH; install the CUDA toolkit or skip this check")
        with tempfile.TemporaryDirectory() as discarded:
            for source in relative("**/*.cu"):
                output = Path(self.keep or discarded) / (source.replace("/", "_") + ".o")
                command = nvcc_command(nvcc, source, output, torch_include_dirs())
                command += ["-Xptxas", "-v"] if self.keep else []
                subprocess.run(command, check=True, cwd=ROOT)
                say(f"{source} compiles for sm_{', sm_'.join(architectures(source))}")


def extension_arguments():
    if sys.platform == "win32":
        say(f"the extension is for GCC and clang, so it is not built on Windows: {LOST}")
        return {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
    except ModuleNotFoundError as error:
        say(f"{error.name} is not there to build against, so the extension is not built: {LOST}")
        return {}
    except (ImportError, OSError) as error:  # torch opens some of its libraries itself, and fails with an OSError
        reason = (str(error) or repr(error)).splitlines()[0]
        say(f"what to build against does not load ({reason}), so the extension is not built: {LOST}")
        return {}

    nvcc = shutil.which("nvcc") or (str(Path(CUDA_HOME) / "bin" / "nvcc") if CUDA_HOME else None)
    cuda_sources = relative("**/*.cu")
    cuda = bool(cuda_sources) and nvcc is not None and torch.version.cuda is not None
    missing = "nvcc is not found" if nvcc is None else "torch is a CPU build"

    class OptionalBuild(BuildExtension):
        """Compiles; a failure costs the kernels and not the installation."""

        def run(self):
            if cuda_sources and not cuda:
                say(f"CUDA kernels are not built: {missing}")
            # Where CXX is not set torch's build takes "c++", which an installation of clang alone may not have.
            other = shutil.which("g++") or shutil.which("clang++")
            if other and not shutil.which("c++"):
                os.environ.setdefault("CXX", other)
            try:
                super().run()
            except Exception as error:
                self.give_up(error)

        def build_extensions(self):
            if not os.environ.get("CXX") and not shutil.which("c++"):
                self.give_up("no C++ compiler on PATH (install g++ or clang++)")
                return
            if cuda:
                self.add_cuda()
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                self.give_up(missing_headers() or error)

        def give_up(self, reason):
            # The first line says which command failed; the compiler's own output stands above.
            say(f"the extension could not be built ({str(reason).strip().splitlines()[0]}): {LOST}")
            self.extensions = []

        def add_cuda(self):
            """A toolkit that is too old for an architecture, or for the host's compiler, costs no CPU kernel."""
            try:
                objects, folders = self.compile_cuda()
            except Exception as error:
                say(f"CUDA kernels are not built: {(str(error) or repr(error)).splitlines()[0][:200]}")
                return
            extension = self.extensions[0]
            extension.extra_compile_args.append(f'-DSRPPO_CUDA="{",".join(CUDA_ARCHITECTURES)}"')
            extension.extra_objects += objects
            extension.library_dirs += folders
            # The runtime is linked statically: the wheel then needs torch's driver and no other CUDA library. In
            # torch_cuda are the stable ABI's functions of streams and errors; torch 2.11's libtorch brings it along,
            # 2.13's does not, as linkers leave that out.
            extension.libraries += ["torch_cuda", "cudart_static", "rt", "dl", "pthread"]

        def compile_cuda(self):
            folder = Path(self.build_temp) / "cuda"
            folder.mkdir(parents=True, exist_ok=True)
            include_dirs = torch_include_dirs()

            def compile_one(source):
                output = folder / (source.replace("/", "_") + ".o")
                subprocess.run(nvcc_command(nvcc, source, output, include_dirs), check=True, cwd=ROOT)
                return str(output)

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:  # as torch's build
                objects = list(pool.map(compile_one, cuda_sources))
            toolkit = toolkit_of(nvcc)
            return objects, [str(toolkit / "lib64"), str(toolkit / "lib")]

    extension = CppExtension(
        "srppo_kernels._C",
        sources=relative("**/*.cpp"),
        include_dirs=[pybind11.get_include()],
        depends=relative("**/*.h"),
        extra_compile_args=[*CXX_FLAGS],
    )
    # torch_python is not ours to need: pybind11 alone makes the module.
    extension.libraries = [name for name in extension.libraries if name != "torch_python"]
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild, "check_cuda": CheckCuda}}


arguments = extension_arguments()
arguments.setdefault("cmdclass", {"check_cuda": CheckCuda})
setup(**arguments)
