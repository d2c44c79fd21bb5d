#!/usr/bin/env python3
"""Which tiles a GPU likes: linear_logprob's Triton GEMMs under other configurations, beside cuBLAS in the same process.

    python bench/tiles.py --kernel scan dx dw --shape 8192x4096x151936

A configuration is what `triton_tiles.py` would hold for this architecture; each is checked against the one that is
there before it is timed, in turns with cuBLAS's GEMM of the same shape (bench/method.py). What wins belongs into
`triton_tiles.py`, with the device's name. On Hopper the scan's rows include the CUDA C++ kernel for sm_90a, with and
without clusters. `--quick` leaves out all but what is there and that kernel. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.choose import parse_shape
from bench.core import SelectionError
from bench.method import Clock, Effort, Spread, clock_for, interleave

KERNELS = ("scan", "dx", "dw")
SHAPE = (8192, 4096, 151936)


def variants(tile: object, group: int, band: int) -> Iterator[tuple[str, object, int, int]]:
    """``(name, tile, vocabulary group, row blocks of a band)`` to try; the first is what is there."""
    yield "as it is", tile, group, band
    for stages in (3, 4, 5):
        for bn, warps in ((128, 4), (128, 8), (256, 8)):
            for flat in (False, True):
                other = replace(tile, bn=bn, warps=warps, stages=stages, flat=flat)  # type: ignore[type-var]
                if other != tile:
                    yield (
                        f"128 x {bn} x {other.bk}, {warps} warps, {stages} stages{', flat' if flat else ''}",
                        other,
                        group,
                        band,
                    )
    for other_group in (1024, 4096, 8192):
        yield f"groups of {other_group}", tile, other_group, band
    for other_band in (8, 32, 64):
        yield f"bands of {other_band}", tile, group, other_band


def hopper_calls(scan: Callable[[], Tensor]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The scan of `calls`, by the kernel for sm_90a: ``(name, call)`` of each cluster size and vocabulary group."""
    from srppo_kernels.linear_logprob import sm90, triton_scan

    for cluster in (1, 2):
        for group in (sm90.GROUP, 2 * sm90.GROUP):

            def call(cluster: int = cluster, group: int = group) -> Tensor:
                with mock.patch.object(triton_scan, "scan", partial(sm90.scan, cluster=cluster, group=group)):
                    return scan()

            yield f"sm_90a, clusters of {cluster}, groups of {group}", call


def calls(
    kernel: str, n: int, width: int, vocab: int, device: str = "cuda"
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """``(ours, cuBLAS's GEMM of the same work)``, which look the configuration up when they are called."""
    from srppo_kernels.linear_logprob import triton_products, triton_scan
    from srppo_kernels.linear_logprob.chunked import Head
    from srppo_kernels.linear_logprob.rows import Rows

    options = {"device": device, "dtype": torch.bfloat16}
    x, w = torch.randn(n, width, **options), torch.randn(vocab, width, **options).mul_(width**-0.5)  # type: ignore[arg-type]
    if kernel == "scan":
        y = torch.randint(vocab, (n,), device=device)
        rows = Rows(0, n, live=torch.ones(n, dtype=torch.bool, device=device))
        head = Head(w, None, None, 1.0, 1.0, None)
        out = torch.empty(n, vocab, **options)  # type: ignore[arg-type]
        return (
            lambda: triton_scan.scan(x, head, y, None, rows, True, None, None),
            lambda: torch.mm(x, w.T, out=out),
        )
    dz = torch.randn(n, vocab, **options)  # type: ignore[arg-type]
    count = torch.tensor([n], dtype=torch.int32, device=device)
    if kernel == "dx":
        ours, theirs = torch.empty_like(x), torch.empty_like(x)

        def dx() -> Tensor:
            triton_products.rows_product(dz, w, ours, count, accumulate=False)
            return ours

        return dx, lambda: torch.mm(dz, w, out=theirs)
    ours, theirs = torch.empty_like(w), torch.empty_like(w)

    def dw() -> Tensor:
        triton_products.columns_product(dz, x, ours, count, accumulate=False)
        return ours

    return dw, lambda: torch.mm(dz.T, x, out=theirs)


def measure(
    kernel: str, shape: Sequence[int], effort: Effort, device: str = "cuda", *, quick: bool = False
) -> Iterator[tuple[str, str, str]]:
    """``(configuration, ratio to cuBLAS, what went wrong or its spread)``; ``quick``: what is there, and sm_90a's."""
    from srppo_kernels.linear_logprob import sm90, triton_products, triton_scan, triton_tiles

    arch = 90 if device == "cpu" else triton_tiles.architecture(torch.device(device))
    module = triton_scan if kernel == "scan" else triton_products
    table = triton_tiles.SCAN_TILES if kernel == "scan" else triton_tiles.PRODUCT_TILES
    ours, floor = calls(kernel, *shape, device)  # type: ignore[arg-type]
    clock, expected = clock_for(device), meaning(kernel, ours())
    tried = list(variants(table[arch], triton_tiles.GROUP, triton_tiles.SUPER))[: 1 if quick else None]
    for name, tile, group, band in tried:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(table, {arch: tile}))
            stack.enter_context(mock.patch.object(module, "SUPER", band))
            if kernel == "scan":
                stack.enter_context(mock.patch.object(module, "group_size", lambda device, group=group: group))
            yield name, *_row(kernel, ours, expected, floor, effort, clock)
    example = torch.empty(shape[0], shape[1], device=device, dtype=torch.bfloat16)
    if kernel == "scan" and not sm90.obstacle(example, example):
        for name, call in hopper_calls(ours):
            yield name, *_row(kernel, call, expected, floor, effort, clock)


def meaning(kernel: str, result: Tensor) -> Tensor:
    """What results of two kernels have in common: of a scan log-prob, lse and entropy, as its state may be around the
    largest logit or around the target's. Not the result's memory, which the next call may write to."""
    if kernel != "scan":
        return result.float().clone()
    from srppo_kernels.linear_logprob.chunked import RowOutputs

    made = RowOutputs.of(result.double(), entropy=True)
    return torch.stack([made.logprob, made.lse, made.entropy])


def _row(
    kernel: str,
    call: Callable[[], Tensor],
    expected: Tensor,
    floor: Callable[[], Tensor],
    effort: Effort,
    clock: Clock,
) -> tuple[str, str]:
    """Ratio to cuBLAS and its spread, or what went wrong."""
    try:
        error = ((meaning(kernel, call()) - expected).norm() / expected.norm()).item()
        if not error < 1e-3:
            return "-", f"wrong: {error:.1e} from what is there"
        _, (samples,) = interleave(floor, [call], effort, clock)
    except Exception as failure:  # a configuration that does not compile or launch is a finding
        reason = str(failure).splitlines()[0][:100] if str(failure) else ""
        return "-", f"{type(failure).__name__}: {reason}"
    spread = Spread.of(samples.ratios)
    return f"{spread.median:.3f}", f"{spread.p20:.3f} to {spread.p80:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 without a device."""
    parser = argparse.ArgumentParser(prog="bench/tiles.py", description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--shape", default="x".join(map(str, SHAPE)), help="NxDxV, default %(default)s")
    parser.add_argument("--quick", action="store_true", help="only what is there, and the sm_90a kernel")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each configuration")
    arguments = parser.parse_args(argv)
    try:
        shape = parse_shape(arguments.shape)
    except SelectionError as error:
        parser.error(str(error))
    if len(shape) != len(SHAPE):
        parser.error(f"--shape {arguments.shape}: three sizes, NxDxV")
    if not torch.cuda.is_available():
        print("bench/tiles.py: no CUDA device; bench/compile.py says what can be said without one", file=sys.stderr)
        return 2
    console = Console(width=140)
    for kernel in arguments.kernel:
        table = Table(title=f"{kernel}, {arguments.shape}, bf16, {torch.cuda.get_device_name()}", title_justify="left")
        for column in ("configuration", "time / cuBLAS", "p20 to p80"):
            table.add_column(column)
        for row in measure(kernel, shape, Effort(seconds=arguments.seconds, least=5), quick=arguments.quick):
            table.add_row(*row)
            print(f"{kernel}: {' | '.join(row)}", file=sys.stderr, flush=True)  # should the run be cut off
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
