"""Compiles every kernel for the GPUs it is meant for, on a machine that need not have one: `python bench/compile.py`.

Each Triton kernel goes through Triton and its own ptxas in its production configurations (`compile_cases()` of the
modules in `srppo_kernels._triton.KERNEL_MODULES`); where nvcc is there, the CUDA sources go through nvcc. The table
shows what decides a kernel's speed before it has run: registers and spilled bytes of a thread, shared memory of a
block, and the tensor-core instruction. It ends with status 1 if a kernel

- does not compile,
- spills on sm_90, or spills more than 128 bytes elsewhere,
- needs more shared memory than a block can have (163 KiB on sm_80, 227 KiB on sm_90 and sm_100), or
- multiplies matrices without the architecture's tensor-core instruction (mma.sync, wgmma, tcgen05).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from srppo_kernels._triton import KERNEL_MODULES, compile_cases  # noqa: E402

SHARED_KIB = {80: 163, 90: 227, 100: 227}
SPILL_LIMIT = {80: 128, 90: 0, 100: 128}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
IN_SASS = (("HGMMA", "wgmma"), ("UTCHMMA", "tcgen05.mma"), ("HMMA", "mma.sync"))
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiler says of one kernel on one architecture."""

    name: str
    architecture: int
    gemm: bool
    registers: int = 0
    spilled: int = 0  # bytes a thread
    shared: int = 0  # bytes a block
    tensor_core: str = "none"
    error: str = ""  # why it does not compile

    def faults(self) -> list[str]:
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.spilled > SPILL_LIMIT[self.architecture]:
            found.append(f"spills {self.spilled} B; at most {SPILL_LIMIT[self.architecture]} B are allowed")
        if self.shared > SHARED_KIB[self.architecture] * 1024:
            found.append(f"needs {self.shared} B of shared memory; a block has {SHARED_KIB[self.architecture]} KiB")
        if self.gemm and self.tensor_core != TENSOR_CORES[self.architecture]:
            found.append(f"multiplies matrices without {TENSOR_CORES[self.architecture]}")
        return found


def figures(log: str) -> dict[str, int]:
    """Registers, spilled and static shared bytes from what `ptxas -v` says of one kernel and the functions it calls."""
    spills = [max(int(a), int(b)) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise ValueError(f"ptxas reports no registers: {log.strip()[:200]!r}")
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    return {"registers": max(registers), "spilled": sum(spills), "shared": sum(shared)}


def start_worker() -> None:
    """Before anything imports triton: a kernel that is interpreted cannot be compiled."""
    os.environ.pop("TRITON_INTERPRET", None)


def compile_triton(module: str, place: int, architecture: int) -> Compiled:
    """In a worker: one case on one architecture, past Triton's cache, as only a compilation leaves ptxas's figures."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    (case,) = (case for _, at, case in compile_cases((module,)) if at == place)
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | set(case.multiples_of_16)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        triton.knobs.cache.dir = cache
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = ASTSource(case.kernel, signature, dict(case.constexprs), attributes)
                kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        except Exception as error:  # whatever a compiler throws is the answer
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            return Compiled(case.name, architecture, case.gemm, error=" | ".join(lines[-3:])[:400])
    found = figures(log.getvalue())
    found["shared"] += kernel.metadata.shared
    ptx = kernel.asm["ptx"]
    core = next((name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx), "none")
    return Compiled(case.name, architecture, case.gemm, **found, tensor_core=core)


def compile_cuda(kernel: str, architectures: Sequence[int]) -> Iterator[Compiled]:
    """Every kernel of csrc/**/*.cu by nvcc, as setup.py compiles them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "check_cuda", f"--keep={folder}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            yield Compiled("csrc/**/*.cu", 90, False, error=done.stderr.strip()[-400:])
            return
        cores = tensor_cores_of(Path(folder))
    # A stretch of the log a kernel and architecture: "Compiling entry function 'NAME' for 'sm_90a'", then its figures.
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'", done.stdout + done.stderr)
    for mangled, architecture, log in zip(parts[1::3], map(int, parts[2::3]), parts[3::3], strict=True):
        name = readable(mangled)
        if architecture in architectures and kernel in name:
            core = cores.get((mangled, architecture), "none")
            yield Compiled(name, architecture, "gemm" in name, **figures(log), tensor_core=core)


def tensor_cores_of(folder: Path) -> dict[tuple[str, int], str]:
    """(kernel, architecture) -> instruction, from the machine code in the objects of `folder`."""
    import triton

    found: dict[tuple[str, int], str] = {}
    for path in folder.glob("*.o"):
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(path)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for part in sass.split("\tcode for sm_")[1:]:
            architecture = int(re.match(r"\d+", part)[0])
            for function in part.split("Function : ")[1:]:
                core = next((name for code, name in IN_SASS if code in function), "none")
                found[function.split(maxsplit=1)[0], architecture] = core
    return found


def readable(mangled: str) -> str:
    filt = shutil.which("c++filt")
    if filt is None:
        return mangled
    plain = subprocess.run([filt, mangled], capture_output=True, text=True, check=True).stdout.strip()
    plain = plain.removeprefix("void ").replace("(anonymous namespace)", "")
    return f"CUDA {plain.split('(')[0].split('::')[-1]}"


def table(rows: Sequence[Compiled]) -> Table:
    result = Table(title="Compiled without running: figures of ptxas", title_justify="left")
    for heading in ("kernel", "sm", "registers", "spilled B", "shared KiB", "tensor cores"):
        result.add_column(heading, justify="left" if heading in ("kernel", "tensor cores") else "right")
    for row in rows:
        figures = (row.registers, row.spilled, f"{row.shared / 1024:.1f}", row.tensor_core)
        cells = (row.name, row.architecture, *(("-",) * 4 if row.error else figures))
        result.add_row(*(Text(str(cell)) for cell in cells), style="red" if row.faults() else None)
    return result


def rows_of(modules: Sequence[str], kernel: str, architectures: Sequence[int], cuda: bool) -> Iterator[Compiled]:
    wanted = [
        (module, at, architecture)
        for module, at, case in compile_cases(tuple(modules))
        for architecture in case.architectures
        if kernel in case.name and architecture in architectures
    ]
    nvcc = ThreadPoolExecutor(1)  # it waits for a process of its own, beside those that compile Triton's
    cuda_rows = nvcc.submit(lambda: list(compile_cuda(kernel, architectures))) if cuda else None
    if wanted:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(WORKERS, len(wanted)), spawn, start_worker) as pool:
            jobs = [pool.submit(compile_triton, *job) for job in wanted]
            yield from (job.result() for job in jobs)
    if cuda_rows is not None:
        yield from cuda_rows.result()
    nvcc.shutdown()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="80,90,100", help="compute capabilities: %(default)s")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--module", action="append", help="look for kernels in this module instead; may be repeated")
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA sources alone")
    options = parser.parse_args(arguments)
    named = {str(number): number for number in SHARED_KIB}
    unknown = [text for text in options.arch.split(",") if text not in named]
    if unknown:
        parser.error(f"--arch {options.arch}: {', '.join(map(repr, unknown))} is not among {', '.join(named)}")
    architectures = [named[text] for text in options.arch.split(",")]
    if importlib.util.find_spec("triton") is None:
        print(
            "bench/compile.py: Triton compiles the kernels, and it is not installed (pip install triton)",
            file=sys.stderr,
        )
        return 2
    cuda = not options.no_cuda and not options.module and shutil.which("nvcc") is not None

    rows = list(rows_of(options.module or KERNEL_MODULES, options.kernel, architectures, cuda))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(rows))
    if not cuda and not options.module:
        console.print("CUDA sources: not compiled, " + ("as asked" if options.no_cuda else "nvcc is not on PATH"))
    faults = [f"{row.name} on sm_{row.architecture} {fault}" for row in rows for fault in row.faults()]
    for fault in faults:
        console.print(Text(fault, style="red"))
    if not rows:
        console.print(f"no kernel of that name: {options.kernel!r}")
    return 1 if faults or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
