"""The Triton backend as the rest of the room sees it; nothing here imports triton until a kernel runs.

    triton_tiles.py       tile shapes, row lists, what the kernels share
    triton_scan.py        GEMM 1 with the softmax's state in its epilogue
    triton_gradients.py   what follows it: dZ, then GEMMs 2 and 3
    triton_dz.py          dZ, from kept exponentials or from logits computed anew
    triton_reference.py   what precedes and follows a scan around the targets' logits
    triton_products.py    GEMMs 2 and 3 over rows that only the device can count
    triton_passes.py      checking, listing, placing and gathering rows, scaling a gradient that is formed

Backend "sm90" is the same with GEMM 1 in CUDA C++ (sm90.py).

Compiled for sm_80, sm_90 and sm_100 (`bench/compile.py`), interpreted against the reference on small shapes, and run on
an H100 and an H200 (README.md); not yet run on sm_80 or sm_100.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo_kernels import _extension, _triton

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.backward import Destination, RowScalars
    from srppo_kernels.linear_logprob.chunked import Head, Residual
    from srppo_kernels.linear_logprob.rows import Rows

# Forward scans that these kernels' gradients follow: rows compacted on the device, exponentials kept by position.
FAMILY = ("triton", "sm90")
GROUP = 2048  # vocabulary entries that one program scans, in order, whatever the number of rows
PART = 32  # columns of an accumulator tile that an epilogue takes at a time, and that share a kept maximum
CHUNK_GROUPS = 8  # vocabulary groups of a dZ that is not formed in place: K = 16384 in GEMM 2
WIDE_PART = 16384  # entries of dweight that cuBLAS forms in fp32 before they are added
ROW_BYTES = 320  # of a backward's vectors, for a row: outputs, scalars, lists; a PPO loss's were 290 on an H200


@_extension.constant_when_traced  # a compiler that traces the public functions need not look for triton
def obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why the kernels cannot run; empty if they can. "auto" asks for CUDA devices alone, so never interprets them."""
    if torch.float64 in dtypes:
        return "the Triton kernels accumulate in float32 and the inputs are float64"
    return _triton.obstacle(device)


def whole_columns(entries: int) -> int:
    """What rows of exponentials and of dZ are apart: TMA and cuBLAS want them at multiples of 16 bytes, and what Triton
    knows to be a multiple of 16 it loads and stores 16 bytes at a time. What lies behind a row's entries is nobody's.
    """
    return -(-entries // 16) * 16


def to_row_ends(matrix: Tensor) -> Tensor:
    """The same rows with what lies behind their entries (whole_columns), which is nobody's: a kernel that takes it
    for entries is told a number of columns that is a multiple of 16."""
    columns = whole_columns(matrix.shape[1])
    assert columns <= matrix.stride(0)
    return matrix.as_strided((matrix.shape[0], columns), matrix.stride())


def maxima(vocab: int) -> int:
    """Room for the maxima of a row that Triton's scan keeps: one a part of whole tiles, the widest of 256 entries."""
    return -(-vocab // 256) * (256 // PART)


def scan(
    hidden: Tensor,
    head: "Head",
    y: Tensor,
    temperature: Tensor | None,
    rows: "Rows",
    entropy: bool,
    residual: "Residual | None",
    kept_rows: Tensor | None,
) -> Tensor:
    """``triton_scan.scan``."""
    from srppo_kernels.linear_logprob import triton_scan

    return triton_scan.scan(hidden, head, y, temperature, rows, entropy, residual, kept_rows)


def outputs(state: Tensor, live: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """``triton_scan.outputs``."""
    from srppo_kernels.linear_logprob import triton_scan

    return triton_scan.outputs(state, live, entropy)


def live_targets(targets: Tensor, mask: Tensor | None, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor]:
    """``triton_passes.live_targets``."""
    from srppo_kernels.linear_logprob import triton_passes

    return triton_passes.live_targets(targets, mask, ignore_index, vocab)


def over_vocabulary(
    hidden: Tensor,
    head: "Head",
    targets: Tensor,
    rows: "Rows",
    wanted: Tensor,
    scalars: "RowScalars",
    temperature: Tensor | None,
    into: "Destination",
    residual: "Residual | None",
    consume: bool,
    dz_bytes: int,
) -> Tensor | None:
    """dhidden of ``rows``, and dweight and dbias into their destination; ``wanted`` (``[count]``) have a gradient."""
    from srppo_kernels.linear_logprob import triton_gradients

    here = slice(rows.start, rows.stop)
    return triton_gradients.over_vocabulary(
        hidden[here], head, targets[here].long(), wanted, scalars, temperature, into, residual, rows.live,
        consume=consume, dense=rows.dense, dz_bytes=dz_bytes,
    )  # fmt: skip


def from_exponentials(
    hidden: Tensor,
    head: "Head",
    rows: "Rows",
    g: Tensor,
    log_sum: Tensor,
    into: "Destination",
    residual: "Residual",
    consume: bool,
) -> Tensor | None:
    """``triton_gradients.from_exponentials`` of ``rows``, for a log-prob's gradients ``g``, ``[count]``."""
    from srppo_kernels.linear_logprob import triton_gradients

    assert rows.live is not None
    temperature = None if head.row_temperature is None else rows.take(head.row_temperature, 1.0).to(g.dtype)
    return triton_gradients.from_exponentials(
        hidden[rows.start : rows.stop], head, g, log_sum, temperature, into, residual, rows.live, consume=consume,
        dense=rows.dense,
    )  # fmt: skip


def scan_bytes(rows: int, width: int, vocab: int, item: int, group: int = GROUP, tiles: int = 0) -> int:
    """Rows gathered, three numbers a row and group, one a tile (where they have one), and what lists the rows."""
    return rows * (width * item + 12 * -(-vocab // group) + 4 * tiles + 96)


def chunk_entries(rows: int, vocab: int, item: int, dz_bytes: int, group: int = GROUP) -> int:
    """Vocabulary entries of a dz that is not formed in place, of ``dz_bytes`` (0: CHUNK_GROUPS groups)."""
    groups = dz_bytes // (rows * item * group) if dz_bytes else CHUNK_GROUPS
    return min(vocab, max(1, groups) * group)


def backward_bytes(
    rows: int,
    width: int,
    vocab: int,
    item: int,
    kept_item: int,
    *,
    in_place: bool,
    straight: bool,
    adds: bool,
    fp16: bool,
    dz_bytes: int = 0,
) -> int:
    """Beyond exponentials that are kept: rows gathered, dZ where it is not formed in them, dhidden by position and by
    row or, in its place, a part of what cuBLAS forms before it is added.

    ``straight``: the products read exponentials, and dhidden is scaled from fp32, by cuBLAS at least. ``adds``: cuBLAS
    forms a part of dweight in fp32. Where not ``in_place``, dhidden itself is made when the rest has gone.
    """
    entries = vocab if in_place or straight else chunk_entries(max(1, rows), vocab, kept_item, dz_bytes)
    dz = 0 if in_place or straight else whole_columns(entries) * kept_item
    sums = 4 if straight or fp16 or entries < vocab else item
    by_row = item if straight else sums  # and as much, before, for what cuBLAS adds to dhidden
    part = min(entries, WIDE_PART) * width * 4 if adds else 0
    beside = max(rows * width * by_row, part)
    result = 0 if in_place else rows * width * item
    return rows * (width * (item + sums) + dz + ROW_BYTES) + beside - result
