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
ROW_BLOCK = 336  # kRowBlock of csrc/linear_logprob/cpu.cpp
TILE_ROW_BLOCK = 512  # kTileRowBlock of amx_logits.h
TILE_FEWEST_ROWS = 128  # kTileFewestRows of cpu.cpp
TILE_ROW_BYTES = 16 << 20  # kTileRowBytes of cpu.cpp
TILE_COPY_BYTES = 2 * 256 * 672  # kCopyBytes of amx_logits.h: entries of the head, 640 of K and padding
ROW_BYTES = 48 << 20  # kRowBytes of cpu.cpp
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


def workspace_bytes(rows: int, width: int, vocab: int, group: int) -> int:
    """Of all threads: packed rows, a panel packed and widened, two rows, logits; and four numbers a row and group."""
    columns = _whole(min(group, vocab)) + 16
    room = max(1, ROW_BYTES // (_threads() * 4 * (columns + width) * 64)) * 64
    block = min(rows, ROW_BLOCK, room)
    scratch = 4 * (block * width + 2 * (PANEL + 1) * width + block * columns)
    packed = 0
    if on_tiles():  # of bf16 inputs: rows packed for all threads; for each, logits of 256 entries and 40 bytes a row
        row_bytes = max(1, 2 * _whole(width))
        most = max(TILE_ROW_BLOCK, TILE_ROW_BYTES // row_bytes // TILE_ROW_BLOCK * TILE_ROW_BLOCK)
        packed = _whole(min(rows, most)) * row_bytes
        room = (ROW_BYTES // _threads() - TILE_COPY_BYTES) // 1024 // PANEL * PANEL
        block = min(_whole(rows), max(TILE_FEWEST_ROWS, min(TILE_ROW_BLOCK, room)))
        scratch = max(scratch, (4 * 256 + 40) * block + TILE_COPY_BYTES)
    return packed + scratch * _threads() + 16 * rows * (-(-vocab // group) + 1)


def _whole(size: int) -> int:
    return -(-size // PANEL) * PANEL


def product_bytes(width: int) -> int:
    """Of all threads: a block of A and panels of B, packed (kRows or kTileTaskRows, kPairs, of cpu_product.cpp)."""
    if on_tiles():  # A by rows, an odd number of cache lines each; pairs of A^T on their way there; all columns of B
        # and a panel of sums, or a panel of B and all sums
        return (512 * (2 * 1056 + 4 * 16) + 4 * 512 * (min(_whole(width), 2048) + PANEL)) * _threads()
    return 4 * 512 * (ROW_BLOCK + PANEL) * _threads()


@_extension.constant_when_traced
def on_tiles() -> bool:
    """Whether bf16 products run on AMX tiles."""
    return _extension.build_info()["cpu_level"] == "amx"


def fp32_product_bytes(width: int) -> int:
    """Of all threads: a block of A and panels of B, packed (kSteps, kRows and kColumns of cpu_product_fp32.cpp)."""
    return 4 * 512 * (ROW_BLOCK + min(-(-width // PANEL) * PANEL, 1024)) * _threads()


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
) -> Tensor:
    """The online state ``(m, s, t, z_y)``, ``[4, count]``; chunked._scan has the meaning of the arguments."""
    from srppo_kernels.linear_logprob.chunked import GROUP

    if rows.index is None:
        hidden = hidden[rows.start : rows.stop]
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
    )
