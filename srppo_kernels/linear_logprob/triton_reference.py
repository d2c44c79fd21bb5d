# mypy: allow-untyped-defs
"""What precedes and follows a scan whose exponentials are around the targets' logits; sm90.py has the scan.

    reference_kernel  before the scan, live rows and their targets, gathered, and z_y of every row: a number that all of
                      a row's tiles share
    settle_kernel     after it: rows that were raised on the way are brought to the one number that they ended with, and
                      what the gradient has at the target takes the place of its exponential

With E the kept exponentials around m, s their sum without the target, S that with it, and p_j = E_j / S:

    dz_j = b p_j = (b / S) E_j            j is not the target
    dz_y = b (p_y - 1) = (b / S) (-s)     as p_y - 1 = -s / S

So with -s for E_y, dZ is E with its rows multiplied by b / S, and GEMMs 2 and 3 read E itself: dX = (b / S) (E W), and
dW = E^T ((b / S) X). No dZ is formed or stored, and a cache of E serves any number of backwards. E is rounded to bf16
around any m as well as around the maximum, for bf16 has the exponents of float32.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels.linear_logprob.gpu import to_row_ends
from srppo_kernels.linear_logprob.triton_dz import STEP
from srppo_kernels.linear_logprob.triton_tiles import LOG2E, RowList, logits

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.chunked import Head, Residual

REFERENCED = (4, 512)  # rows and hidden columns that a step of reference_kernel takes
SETTLED = (8, 512)  # rows and vocabulary entries of a step of settle_kernel


@triton.jit
def reference_kernel(
    hidden,  # [n, D]
    w,  # [V, D]
    bias,  # [V] fp32
    y,  # [n] int64, by row
    inverse_temperatures,  # [n] fp32, by position
    index,  # [n] int64
    count,  # [1] int32
    x,  # [n, D] live rows, compacted, and zeros
    targets,  # [n] int64, by position
    reference,  # [padded] fp32
    n,
    padded,
    width,
    vocab,
    stride_hr,
    stride_hd,
    stride_wv,
    stride_wd,
    scale,
    softcap,
    inverse_temperature,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
):
    """The target's logit; of another rank's target, the nearest entry's. 0 beyond the count.

    Where that is no number, or ruled out, one below all others: around 0 they might all vanish, and from below a row is
    raised to its own maximum.
    """
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = r < tl.load(count)
    row = tl.load(index + r, mask=here, other=0)
    target = tl.load(y + row, mask=here, other=0)
    tl.store(targets + r, target, mask=r < n)
    target = tl.minimum(tl.maximum(target, 0), vocab - 1)
    inverse = tl.load(inverse_temperatures + r, mask=here, other=1.0) if ROW_TEMPERATURE else inverse_temperature
    acc = tl.zeros((ROWS, BK), tl.float32)
    for k0 in range(0, width, BK):
        k = k0 + tl.arange(0, BK)
        inside = here[:, None] & (k < width)[None, :]
        at = hidden + row[:, None] * stride_hr + k.to(tl.int64)[None, :] * stride_hd
        a = tl.load(at, mask=inside, other=0.0)
        at = x + r.to(tl.int64)[:, None] * width + k[None, :]
        tl.store(at, a, mask=(r < n)[:, None] & (k < width)[None, :])
        b = tl.load(w + target[:, None] * stride_wv + k.to(tl.int64)[None, :] * stride_wd, mask=inside, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    z = logits(tl.sum(acc, 1)[None, :], target, vocab, bias, scale, softcap, 1.0, BIAS, SOFTCAP, False)
    z = tl.sum(z, 0) * inverse
    z = tl.where(tl.abs(z) < 1e30, z, -1e30)
    tl.store(reference + r, tl.where(here, z, 0.0), mask=r < padded)


def references(
    hidden: Tensor, head: "Head", y: Tensor, inverse_temperatures: Tensor | None, rows: RowList, padded: int
) -> tuple[Tensor, Tensor, Tensor]:
    """By position: live rows ``[n, D]``, then zeros; their targets ``[n]``; and the targets' logits, ``[padded]``.

    In one pass: gathered alone, and read again for the logits, the rows took half as long again.
    """
    n, width = hidden.shape
    x, targets = hidden.new_empty(n, width), y.new_empty(n)
    reference = hidden.new_empty(padded, dtype=torch.float32)
    bias = reference if head.bias is None else head.bias.float().contiguous()
    with _triton.on_device(hidden):
        reference_kernel[(-(-padded // REFERENCED[0]),)](
            hidden, head.weight, bias, y.contiguous(),
            reference if inverse_temperatures is None else inverse_temperatures, rows.index, rows.count, x, targets,
            reference, n, padded, width, head.weight.shape[0], *hidden.stride(), *head.weight.stride(),
            head.logit_scale, head.softcap or 0.0, 1 / head.temperature, ROWS=REFERENCED[0], BK=REFERENCED[1],
            BIAS=head.bias is not None, SOFTCAP=head.softcap is not None,
            ROW_TEMPERATURE=inverse_temperatures is not None,
        )  # fmt: skip
    return x, targets, reference


@triton.jit
def settle_kernel(
    kept,  # [n, V] exponentials by position
    around,  # [n, tiles] fp32: what those of a tile are around
    reference,  # [n] fp32: what all are around, unless the row was raised
    merged,  # [4, n] m, s, t, z_y by row
    index,  # [n] int64
    count,  # [1] int32
    y,  # [n] int64, by position
    maximum,  # [n] fp32, by position: m
    n,
    vocab,
    columns,  # of a row of `kept`, some behind its exponentials
    stride_kept,
    stride_around,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    ZERO_ALL: tl.constexpr,
):
    """Rows up to the next multiple of STEP, or all, are zero beyond the count, as is a row that holds no numbers."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = tl.load(count)
    end = n if ZERO_ALL else tl.minimum(n, tl.cdiv(live, STEP) * STEP)
    here = r < live
    row = tl.load(index + r, mask=here, other=0)
    m = tl.load(merged + row, mask=here, other=0.0)
    s = tl.load(merged + tl.cast(n, tl.int64) + row, mask=here, other=0.0)
    tl.store(maximum + r, m, mask=here)
    numbers = s < float("inf")  # which a NaN is not either
    raised = here & numbers & (m > tl.load(reference + r, mask=here, other=0.0))
    blank = (here & ~numbers) | ((r >= live) & (r < end))
    at = kept + r.to(tl.int64)[:, None] * stride_kept
    if tl.max((raised | blank).to(tl.int32), 0) > 0:
        for v0 in range(0, columns, COLUMNS):
            v = v0 + tl.arange(0, COLUMNS)
            inside = (v < columns)[None, :]
            e = tl.load(at + v[None, :], mask=raised[:, None] & inside, other=0.0).to(tl.float32)
            was = tl.load(
                around + r.to(tl.int64)[:, None] * stride_around + v[None, :] // TILE, mask=raised[:, None] & inside,
                other=0.0,
            )  # fmt: skip
            e = e * tl.exp2((was - m[:, None]) * LOG2E)
            e = tl.where(raised[:, None], e, 0.0)
            tl.store(at + v[None, :], e.to(kept.dtype.element_ty), mask=(raised | blank)[:, None] & inside)
        tl.debug_barrier()  # the target's entry may be another thread's
    target = tl.load(y + r, mask=here, other=-1)
    own = here & numbers & (target >= 0) & (target < vocab)
    tl.store(kept + r.to(tl.int64) * stride_kept + target, (-s).to(kept.dtype.element_ty), mask=own)


def settle(
    residual: "Residual",  # in: what a scan kept; out: E, and m for its one maximum
    around: Tensor,
    tile: int,
    reference: Tensor,
    merged: Tensor,
    rows: RowList,
    y: Tensor,
    *,
    zero_all: bool,
) -> None:
    """Makes E of what was kept around ``around[position, column // tile]``; a row stays where that is ``reference``."""
    n, vocab, kept = y.shape[0], residual.kept.shape[1], to_row_ends(residual.kept)
    with _triton.on_device(kept):
        settle_kernel[(-(-n // SETTLED[0]),)](
            kept, around, reference, merged, rows.index, rows.count, y, residual.group_max, n, vocab, kept.shape[1],
            kept.stride(0), around.stride(0), TILE=tile, ROWS=SETTLED[0], COLUMNS=SETTLED[1], STEP=STEP,
            ZERO_ALL=zero_all, num_warps=8,
        )  # fmt: skip


def compile_cases() -> Iterator[_triton.CompileCase]:
    """As the scan for sm_90a has them: bf16, and tiles of 192."""
    plain = dict.fromkeys(("BIAS", "SOFTCAP", "ROW_TEMPERATURE"), False)
    for name, on in (("plain", plain), ("every option", dict.fromkeys(plain, True))):
        yield _triton.CompileCase(
            f"reference: {name}", reference_kernel,
            {
                "hidden": "*bf16", "w": "*bf16", "bias": "*fp32", "y": "*i64", "inverse_temperatures": "*fp32",
                "index": "*i64", "count": "*i32", "x": "*bf16", "targets": "*i64", "reference": "*fp32",
                **dict.fromkeys(("n", "padded", "width", "vocab", "stride_hr", "stride_wv"), "i32"),
                **dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32"),
            },
            {"stride_hd": 1, "stride_wd": 1, "ROWS": REFERENCED[0], "BK": REFERENCED[1], **on},
            multiples_of_16=("width", "stride_hr", "stride_wv"),
        )  # fmt: skip
    yield _triton.CompileCase(
        "settle", settle_kernel,
        {
            "kept": "*bf16", "around": "*fp32", "reference": "*fp32", "merged": "*fp32", "index": "*i64",
            "count": "*i32", "y": "*i64", "maximum": "*fp32",
            **dict.fromkeys(("n", "vocab", "columns", "stride_kept", "stride_around"), "i32"),
        },
        {"TILE": 192, "ROWS": SETTLED[0], "COLUMNS": SETTLED[1], "STEP": STEP, "ZERO_ALL": True}, num_warps=8,
        multiples_of_16=("columns", "stride_kept"),
    )  # fmt: skip
