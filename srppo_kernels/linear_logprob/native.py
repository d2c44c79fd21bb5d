"""The C++ scan (csrc/linear_logprob): the torch backend's ``(m, s, t, z_y)`` of a row, from one pass over the head.

It fills the same residual and uses the same vocabulary groups, so every plan runs on it; gradients are formed in
native_gradients.py where that serves the dtypes, and in backward.py elsewhere. It is taken where it was measured to be
faster than GEMMs and passes of torch: README.md has the table.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo_kernels import _extension
from srppo_kernels.linear_logprob.rows import Rows

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.chunked import Head, Residual

# Measured on a Zen 4: 0.7 times MKL's fp32 GEMM with AVX2 as with AVX-512. Portable code takes 2.2 times that GEMM.
FASTER_LEVELS = ("avx2", "avx512", "avx512_bf16", "amx")
WORKSPACE = 64 << 20  # of a scan, or of plan recompute, where the caller gives no bound
# kRowBlock and kFewestRows of csrc/linear_logprob/cpu.cpp; kTileMostRows and what follows it in amx_logits.h
ROW_BLOCK, FEWEST_ROWS = 336, 64
TILE_MOST_ROWS, TILE_FEWEST_ROWS, TILE_PACKED_BYTES = 1024, 128, 1600 << 10
TILE_ROW_BYTES = 16 << 20  # kTileRowBytes of cpu.cpp
TILE_BLOCK = 640  # kTileBlock of amx_tile.h
TILE_COPY_BYTES = 4 * 32 * 672 + 8192  # of amx_logits.h: entries of the head twice, 640 of K; two blocks of sums
SMALL_TASK = 128  # kSmallTask of cpu_product.cpp
PANEL = 32  # vocabulary entries packed at a time, at most


def obstacle(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    """Why the scan cannot run; empty if it can."""
    if device.type != "cpu":
        return f"the native kernel has no code for device {device.type!r}"
    if torch.float64 in dtypes:
        return "the native kernel computes in float32 and the inputs are float64"
    return _missing()


# A compiler that traces the public functions cannot look into the extension; what it says does not change under it.
@_extension.constant_when_traced
def _missing() -> str:
    if not _extension.available():
        return _extension.why()
    if not hasattr(torch.ops.srppo_native, "linear_logprob_scan"):
        return "the extension was built from older sources, without linear_logprob; install again"
    return ""


@_extension.constant_when_traced
def not_faster() -> str:
    """Why "auto" leaves a scan that could run alone; empty where it takes it."""
    level = _extension.build_info()["cpu_level"]
    return "" if level in FASTER_LEVELS else f"the native kernel was not measured to be faster at CPU level {level!r}"


def default_bound(held: int) -> int:
    """What a kernel keeps to where the caller gives no bound, ``held`` of it being there already: WORKSPACE, or where
    that leaves the threads less than a quarter of it, half of it beside what is held: a scan on AMX tiles by 16
    threads has room there."""
    return WORKSPACE if held <= WORKSPACE * 3 // 4 else held + WORKSPACE // 2


def _within(bound: int | None, held: int, most: int, least: int) -> int:
    """What threads that take ``most`` each take within ``bound``, beside ``held``: they cut their blocks until each of
    them has one, and then fewer of them work; one with the smallest blocks takes ``least``."""
    every = held + most * _threads()
    return every if bound is None else min(every, max(bound, held + least))


def held_bytes(rows: int, vocab: int, group: int) -> int:
    """Of a scan, whatever its threads do: four numbers a row and group."""
    return 16 * rows * (-(-vocab // group) + 1)


def workspace_bytes(rows: int, width: int, vocab: int, group: int, bf16: bool, bound: int | None) -> int:
    """Of a scan of inputs that are both ``bf16``, or not: what it holds, and by thread packed rows, a panel packed and
    widened, two rows, logits."""
    held = held_bytes(rows, vocab, group)
    bound = default_bound(held) if bound is None else bound
    if bf16 and on_tiles():
        # Rows packed for all threads. For each, 36 bytes a row, and sums of 32 entries where K has parts; before that,
        # zeros and, of an odd width, copies of 32 rows.
        row_bytes = max(1, 2 * _whole(width))
        row_block = min(max(TILE_PACKED_BYTES // row_bytes // PANEL * PANEL, TILE_FEWEST_ROWS), TILE_MOST_ROWS)
        fitting = max(row_block, TILE_ROW_BYTES // row_bytes // row_block * row_block)
        each = 36 + (4 * 32 if width > TILE_BLOCK else 0)
        packing = -(-width // 2) * 4 * (PANEL + 1 if width % 2 else 1)
        most, least = (
            max(each * min(_whole(rows), block) + TILE_COPY_BYTES, packing) for block in (row_block, TILE_FEWEST_ROWS)
        )
        packed, fewest = (_whole(min(rows, block)) * row_bytes for block in (fitting, TILE_FEWEST_ROWS))
        return min(held + packed + most * _threads(), max(bound, held + fewest + least))
    steps = -(-width // 2) if bf16 and _in_pairs() else width
    columns = _whole(min(group, vocab)) + 16
    most, least = (
        4 * (2 * (PANEL + 1) * steps + min(rows, block) * (steps + columns)) for block in (ROW_BLOCK, FEWEST_ROWS)
    )
    return _within(bound, held, most, least)


def _whole(size: int) -> int:
    return -(-size // PANEL) * PANEL


def product_bytes(width: int, bf16: bool, held: int, bound: int | None) -> int:
    """Of GEMMs 2 and 3 with ``held``: by thread a block of A and panels of B, packed (kPairs of bf16_product.h, kRows,
    kColumns, kTileTaskRows and kTileTaskColumns of cpu_product.cpp; those of cpu_product_fp32.cpp)."""
    if not bf16:
        most, least = (4 * (512 * (rows + 2 * PANEL) + 16 * PANEL) for rows in (ROW_BLOCK, 80))  # 80: 64 in whole tiles
        return _within(bound, held, most, least)
    if on_tiles():  # A by rows, an odd number of cache lines each; pairs of A^T on their way there; all columns of B
        # and a panel of sums, or a panel of B and all sums
        most, least = (
            rows * (2 * 1056 + 4 * 16) + 4 * 512 * (min(_whole(width), columns) + PANEL)
            for rows, columns in ((512, 2048), (SMALL_TASK, SMALL_TASK))
        )
        return _within(bound, held, most, least)
    # A by rows, with a gap behind each and between tiles; two panels; the sums that bf16 results are rounded from
    most, least = (
        4 * (528 * rows + 80 + 2 * 512 * PANEL + rows * (min(_whole(width), columns) + 16))
        for rows, columns in ((ROW_BLOCK, 1024), (SMALL_TASK, SMALL_TASK))
    )
    return _within(bound, held, most, least)


@_extension.constant_when_traced
def on_tiles() -> bool:
    """Whether bf16 products run on AMX tiles."""
    return _extension.build_info()["cpu_level"] == "amx"


@_extension.constant_when_traced
def _in_pairs() -> bool:
    """Whether bf16 inputs are packed as they are, and not widened."""
    return _extension.build_info()["cpu_level"] in ("avx512_bf16", "amx")


@_extension.constant_when_traced
def _threads() -> int:
    return torch.get_num_threads()


def scan(
    hidden: Tensor,  # [N, D]
    head: "Head",
    y: Tensor,  # [count]
    temperature: Tensor | None,  # [count]
    rows: Rows,
    entropy: bool,
    residual: "Residual | None",
    kept_rows: Tensor | None,
    bound: int | None,  # bytes of workspace
) -> Tensor:
    """The online state ``(m, s, t, z_y)``, ``[4, count]``; chunked._scan has the meaning of the arguments."""
    from srppo_kernels.linear_logprob.chunked import GROUP

    if rows.index is None:
        hidden = hidden[rows.start : rows.stop]
    if bound is None:
        bound = default_bound(held_bytes(rows.count, head.weight.shape[0], GROUP))
    weight = head.weight if head.weight.shape[1] <= 1 or head.weight.stride(1) == 1 else head.weight.contiguous()
    return torch.ops.srppo_native.linear_logprob_scan(
        hidden if hidden.stride(1) == 1 else hidden.contiguous(),
        weight,
        None if head.bias is None else head.bias.float().contiguous(),
        y.contiguous(),
        rows.index,
        None if temperature is None else temperature.contiguous(),
        head.temperature,
        head.logit_scale,
        0.0 if head.softcap is None else head.softcap,
        entropy,
        GROUP,
        None if residual is None else residual.kept,
        None if residual is None else residual.group_max,
        kept_rows,
        bound,
    )
