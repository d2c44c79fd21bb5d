# mypy: allow-untyped-defs
"""dZ on a GPU; chunked.py has the maths. It is formed in fp32, ``p_y - 1`` too, and rounded once.

    dz_kernel         from kept exponentials, in their own memory where nobody needs them again
    logits_dz_kernel  from the logits of a vocabulary chunk, computed anew: plan recompute

Rows with no gradient (masked, or clipped by PPO) are not there: both kernels write dZ by position in the list of rows
that have one. In place that moves rows up over rows that were read before, where a program takes all rows of its
columns in ascending order: position p holds what was at a position >= p. Where every kept row has a gradient none
moves, and programs take blocks of rows instead, in the order in which they lie in memory. Where the products can read
the exponentials themselves (triton_reference.py) there is no dZ.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels.linear_logprob.gpu import GROUP, PART, to_row_ends
from srppo_kernels.linear_logprob.triton_scan import scan_tile
from srppo_kernels.linear_logprob.triton_tiles import (
    BUSY_SCAN_TILES,
    LOG2E,
    LOWEST,
    SCAN_TILES,
    SUPER,
    RowList,
    Tile,
    arithmetic,
    column_part,
    for_width,
    group_size,
    head_tile,
    logits,
    operand,
    placed,
)

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.chunked import Head, Residual

DZ_ROWS, DZ_MAXIMA = 16, 4  # of a block of dz_kernel where rows move: 16 rows x 128 entries, all rows a program
DZ_STILL_ROWS, DZ_STILL_MAXIMA, DZ_STILL_BLOCKS = 4, 16, 8  # where they do not: 4 x 512, and how many a program
STEP = 128  # rows are zeroed up to a multiple of this: K steps of GEMM 3 divide it


@triton.jit
def form_dz(
    lp,  # [R, C] log p; read only where h or the softcap needs it
    p,  # [R, C]
    at_target,  # [R, C] bool
    b,  # [R, 1], chain included, and so below
    h,
    dz_target,
    log_norm,  # [R, 1] m + log S
    cap_scale,  # [R, 1] temperature / softcap
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """``p (b - h log p)`` times the softcap's slope, and ``dz_target`` at the target, which has it."""
    if ENTROPY:
        dz = p * (b - h * tl.maximum(lp, -1e4))  # a ruled-out entry: p is 0, and h log p must not overflow
    else:
        dz = p * b
    if SOFTCAP:
        u = tl.minimum(tl.maximum((lp + log_norm) * cap_scale, -1.0), 1.0)
        dz = dz * (1 - u * u)
    return tl.where(at_target, dz_target, dz)


@triton.jit
def dz_kernel(
    kept,  # [rows, V of the chunk] exponentials
    kept_max,  # [rows, maxima], or [rows] where AROUND_ONE
    source,  # [n] int64, position in `kept` of a position here, ascending
    y,  # [n] int64, local to the chunk
    scalars,  # [6, n] fp32: b, h, dz at the target, m, log S, 1 / temperature
    count,
    dz,  # [n, V of the chunk]
    n,
    entries,  # V of the chunk
    stride_kept,
    stride_max,
    stride_dz,
    softcap,
    PART: tl.constexpr,
    MAXIMA: tl.constexpr,
    ROWS: tl.constexpr,
    STILL_MAXIMA: tl.constexpr,
    STILL_ROWS: tl.constexpr,
    STILL_BLOCKS: tl.constexpr,
    STEP: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ZERO_ALL: tl.constexpr,
    AROUND_ONE: tl.constexpr,
):
    pid = tl.program_id(0)
    live = tl.load(count)
    end = n if ZERO_ALL else tl.minimum(n, tl.cdiv(live, STEP) * STEP)
    moves = False
    if IN_PLACE:  # positions ascend, so the last tells whether any row moves
        moves = tl.load(source + live - 1, mask=live > 0, other=-1) >= live
    if moves:
        if pid * (MAXIMA * PART) < entries:
            dz_rows(
                kept, kept_max, source, y, scalars, dz, pid * MAXIMA, 0, end, live, n, entries, stride_kept, stride_max,
                stride_dz, softcap, PART, MAXIMA, ROWS, ENTROPY, SOFTCAP, AROUND_ONE, True,
            )  # fmt: skip
    else:
        wide = tl.cdiv(entries, STILL_MAXIMA * PART)
        first = pid // wide * (STILL_ROWS * STILL_BLOCKS)
        dz_rows(
            kept, kept_max, source, y, scalars, dz, pid % wide * STILL_MAXIMA, first,
            tl.minimum(end, first + STILL_ROWS * STILL_BLOCKS), live, n, entries, stride_kept, stride_max, stride_dz,
            softcap, PART, STILL_MAXIMA, STILL_ROWS, ENTROPY, SOFTCAP, AROUND_ONE, False,
        )  # fmt: skip


@triton.jit
def dz_rows(
    kept,
    kept_max,
    source,
    y,
    scalars,
    dz,
    part0,  # first part of PART columns
    first,  # row
    end,  # one past the last row
    live,
    n,
    entries,
    stride_kept,
    stride_max,
    stride_dz,
    softcap,
    PART: tl.constexpr,
    MAXIMA: tl.constexpr,
    ROWS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    AROUND_ONE: tl.constexpr,
    MOVES: tl.constexpr,
):
    """dZ of rows ``first`` to ``end`` and MAXIMA parts, zero from ``live`` on."""
    part = part0 + tl.arange(0, MAXIMA)
    v = part[:, None] * PART + tl.arange(0, PART)[None, :]  # [MAXIMA, PART]
    n64 = tl.cast(n, tl.int64)
    for r0 in range(first, end, ROWS):
        r = r0 + tl.arange(0, ROWS)
        here = r < live
        inside = here[:, None, None] & (v < entries)[None, :, :]
        row = tl.load(source + r, mask=here, other=0)
        e = tl.load(kept + row[:, None, None] * stride_kept + v[None, :, :], mask=inside, other=0.0).to(tl.float32)
        around = tl.load(
            kept_max + row[:, None] * stride_max + (0 if AROUND_ONE else 1) * part[None, :],
            mask=here[:, None] & (part * PART < entries)[None, :], other=LOWEST,
        )  # fmt: skip
        at = scalars + r
        b = tl.load(at, mask=here, other=0.0)
        h = tl.load(at + n64, mask=here, other=0.0)
        dz_target = tl.load(at + 2 * n64, mask=here, other=0.0)
        row_max = tl.load(at + 3 * n64, mask=here, other=0.0)
        log_sum = tl.load(at + 4 * n64, mask=here, other=0.0)
        inverse = tl.load(at + 5 * n64, mask=here, other=1.0)
        target = tl.load(y + r, mask=here, other=-1)
        shift = (around - row_max[:, None]) - log_sum[:, None]
        p = e * tl.exp2(shift * LOG2E)[:, :, None]
        lp = p
        if ENTROPY or SOFTCAP:
            lp = tl.log(tl.maximum(e, 1.1754943508222875e-38)) + shift[:, :, None]
        formed = form_dz(
            lp, p, v[None, :, :] == target[:, None, None], b[:, None, None], h[:, None, None],
            dz_target[:, None, None], (row_max + log_sum)[:, None, None], (1 / (inverse * softcap))[:, None, None],
            ENTROPY, SOFTCAP,
        )  # fmt: skip
        formed = tl.where(here[:, None, None], formed, 0.0)
        if MOVES:
            tl.debug_barrier()  # every thread has read its rows before any writes over them
        at_dz = dz + r.to(tl.int64)[:, None, None] * stride_dz + v[None, :, :]
        tl.store(at_dz, formed.to(dz.dtype.element_ty), mask=(r < end)[:, None, None] & (v < entries)[None, :, :])


@triton.jit
def logits_dz_kernel(
    x,  # [n, D]
    w,  # [V of the chunk, D]
    bias,
    y,  # [n] int64, local to the chunk
    scalars,  # [6, n] fp32
    count,
    dz,  # [n, V of the chunk]
    n,
    width,
    entries,
    stride_xr,
    stride_wv,
    stride_wd,
    stride_dz,
    groups,
    scale,
    softcap,
    inverse_temperature,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SUPER: tl.constexpr,
    PARTS: tl.constexpr,
    FLAT: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    ZERO_ALL: tl.constexpr,
):
    r0, group = placed(tl.program_id(0), n, groups, BM, SUPER)
    first = group * GROUP
    live = tl.load(count)
    if r0 >= live and not ZERO_ALL:
        return
    r = r0 + tl.arange(0, BM)
    here = r < live
    at = scalars + r
    n64 = tl.cast(n, tl.int64)
    b = tl.load(at, mask=here, other=0.0)
    h = tl.load(at + n64, mask=here, other=0.0)
    dz_target = tl.load(at + 2 * n64, mask=here, other=0.0)
    row_max = tl.load(at + 3 * n64, mask=here, other=1e30)  # beyond the count p is 0, whatever the logits are
    log_sum = tl.load(at + 4 * n64, mask=here, other=0.0)
    inverse = tl.load(at + 5 * n64, mask=here, other=1.0)
    target = tl.load(y + r, mask=here, other=-1).to(tl.int32)
    H: tl.constexpr = BN // PARTS
    for tile in tl.range(0, tl.cdiv(tl.minimum(GROUP, entries - first), BN), flatten=FLAT):
        v0 = first + tile * BN
        acc = head_tile(
            x, w, r0, v0, n, entries, width, stride_xr, stride_wv, stride_wd, BM, BN, BK, TMA_X, TMA_W, WIDEN, PRECISION
        )
        for part in tl.static_range(PARTS):
            v = v0 + part * H + tl.arange(0, H)
            z = column_part(acc, part, PARTS, BM, BN)
            if ROW_TEMPERATURE:
                z = logits(z, v, entries, bias, scale, softcap, inverse, BIAS, SOFTCAP, True)
            else:
                z = logits(z, v, entries, bias, scale, softcap, inverse_temperature, BIAS, SOFTCAP, False)
            lp = (z - row_max[:, None]) - log_sum[:, None]
            formed = form_dz(
                lp, tl.exp2(lp * LOG2E), v[None, :] == target[:, None], b[:, None], h[:, None], dz_target[:, None],
                (row_max + log_sum)[:, None], (1 / (inverse * softcap))[:, None], ENTROPY, SOFTCAP,
            )  # fmt: skip
            out = dz + r.to(tl.int64)[:, None] * stride_dz + v[None, :]
            tl.store(out, formed.to(dz.dtype.element_ty), mask=(r < n)[:, None] & (v < entries)[None, :])


@triton.jit
def column_sums_kernel(
    dz, count, out, entries, stride_dz, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``out (+)= dz.sum(0)`` over the rows below ``count``, in row order."""
    v = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    live = tl.load(count)
    for r0 in range(0, live, ROWS):
        r = r0 + tl.arange(0, ROWS)
        inside = (r < live)[:, None] & (v < entries)[None, :]
        tile = tl.load(dz + r.to(tl.int64)[:, None] * stride_dz + v[None, :], mask=inside, other=0.0)
        total += tl.sum(tile.to(tl.float32), 0)
    if ACCUMULATE:
        total += tl.load(out + v, mask=v < entries, other=0.0).to(tl.float32)
    tl.store(out + v, total.to(out.dtype.element_ty), mask=v < entries)


def from_kept(
    residual: "Residual",
    source: Tensor | None,
    target: Tensor,
    packed: Tensor,
    rows: RowList,
    v: slice,
    dz: Tensor,
    head: "Head",
    switches: dict[str, bool],
) -> None:
    kept, kept_max, dz = to_row_ends(residual.kept[:, v]), residual.group_max, to_row_ends(dz)
    n, entries = dz.shape
    if not residual.around_one:
        kept_max = kept_max[:, v.start // PART :]
    still = -(-n // (DZ_STILL_ROWS * DZ_STILL_BLOCKS)) * -(-entries // (PART * DZ_STILL_MAXIMA))
    dz_kernel[(max(still, -(-entries // (PART * DZ_MAXIMA))),)](
        kept, kept_max, source, target, packed, rows.count, dz, n, entries,
        kept.stride(0), kept_max.stride(0), dz.stride(0), head.softcap or 1.0,
        PART=PART, MAXIMA=DZ_MAXIMA, ROWS=DZ_ROWS, STILL_MAXIMA=DZ_STILL_MAXIMA, STILL_ROWS=DZ_STILL_ROWS,
        STILL_BLOCKS=DZ_STILL_BLOCKS, STEP=STEP, IN_PLACE=dz.data_ptr() == kept.data_ptr(),
        ENTROPY=switches["ENTROPY"], SOFTCAP=switches["SOFTCAP"], ZERO_ALL=switches["ZERO_ALL"],
        AROUND_ONE=residual.around_one, num_warps=8,
    )  # fmt: skip


def from_logits(
    x: Tensor,
    head: "Head",
    target: Tensor,
    packed: Tensor,
    rows: RowList,
    v: slice,
    dz: Tensor,
    switches: dict[str, bool],
) -> None:
    (n, entries), weight, device = dz.shape, head.weight[v], x.device
    tile = scan_tile(switches, device, (x.dtype, weight.dtype))
    size = group_size(device)
    groups = -(-entries // size)
    x_matrix, tma_x = operand(x, tile.bm, tile.bk, tile.tma)
    w_matrix, tma_w = operand(weight, tile.bn, tile.bk, tile.tma)
    bias = packed if head.bias is None else head.bias[v].float().contiguous()
    logits_dz_kernel[(-(-n // tile.bm) * groups,)](
        x_matrix, w_matrix, bias, target, packed, rows.count, dz, n, x.shape[1], entries, x.stride(0),
        *weight.stride(), dz.stride(0), groups, head.logit_scale, head.softcap or 1.0, 1 / head.temperature,
        GROUP=size, SUPER=SUPER, PARTS=tile.parts, FLAT=tile.flat, TMA_X=tma_x, TMA_W=tma_w, **tile.blocks,
        **arithmetic(device, x.dtype, weight.dtype), **switches, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def column_sums(dz: Tensor, rows: RowList, out: Tensor, accumulate: bool) -> None:
    with _triton.on_device(dz):
        column_sums_kernel[(-(-dz.shape[1] // 128),)](
            dz, rows.count, out, dz.shape[1], dz.stride(0), ACCUMULATE=accumulate, ROWS=32, COLUMNS=128
        )


def compile_cases() -> Iterator[_triton.CompileCase]:
    """dZ from kept exponentials and from logits, plain and with every option, and the column sums."""
    plain = {"ENTROPY": True, "BIAS": False, "SOFTCAP": False, "ROW_TEMPERATURE": False, "ZERO_ALL": False}
    every = dict.fromkeys(plain, True)
    for name, on in (("plain", {**plain, "ENTROPY": False}), ("entropy", plain), ("every option", every)):
        for around_one in (False, True):
            yield _from_kept_case(f"{name}, around one number" if around_one else name, on, around_one)
        for arch, tile in (BUSY_SCAN_TILES if on is every else SCAN_TILES).items():
            if on is plain:
                yield _from_logits_case("row temperature, bf16", arch, tile, "bf16", {**on, "ROW_TEMPERATURE": True})
            yield _from_logits_case(f"{name}, bf16", arch, tile, "bf16", on)
            if on is every:
                yield _from_logits_case(f"{name}, fp32", arch, for_width(tile, 4), "fp32", on)
    yield _triton.CompileCase(
        "column sums", column_sums_kernel,
        {"dz": "*bf16", "count": "*i32", "out": "*fp32", "entries": "i32", "stride_dz": "i32"},
        {"ACCUMULATE": True, "ROWS": 32, "COLUMNS": 128}, multiples_of_16=("entries", "stride_dz"),
    )  # fmt: skip


def _from_kept_case(name: str, on: dict[str, bool], around_one: bool) -> _triton.CompileCase:
    return _triton.CompileCase(
        f"dz: {name}", dz_kernel,
        {
            "kept": "*bf16", "kept_max": "*fp32", "source": "*i64", "y": "*i64", "scalars": "*fp32",
            "count": "*i32", "dz": "*bf16", "softcap": "fp32",
            **dict.fromkeys(("n", "entries", "stride_kept", "stride_max", "stride_dz"), "i32"),
        },
        {"PART": PART, "MAXIMA": DZ_MAXIMA, "ROWS": DZ_ROWS, "STEP": STEP, "IN_PLACE": True,
         "STILL_MAXIMA": DZ_STILL_MAXIMA, "STILL_ROWS": DZ_STILL_ROWS, "STILL_BLOCKS": DZ_STILL_BLOCKS,
         "AROUND_ONE": around_one,
         **{key: on[key] for key in ("ENTROPY", "SOFTCAP", "ZERO_ALL")}},
        num_warps=8, multiples_of_16=("entries", "stride_kept", "stride_dz"),
    )  # fmt: skip


def _from_logits_case(name: str, arch: int, tile: Tile, dtype: str, on: dict[str, bool]) -> _triton.CompileCase:
    strides = ("stride_xr", "stride_wv", "stride_dz")
    return _triton.CompileCase(
        f"dz from logits: {name}", logits_dz_kernel,
        {
            "x": f"tensordesc<{dtype}[{tile.bm},{tile.bk}]>" if tile.tma else f"*{dtype}",
            "w": f"tensordesc<{dtype}[{tile.bn},{tile.bk}]>" if tile.tma else f"*{dtype}",
            "bias": "*fp32", "y": "*i64", "scalars": "*fp32", "count": "*i32", "dz": f"*{dtype}",
            **dict.fromkeys(("n", "width", "entries", *strides, "groups"), "i32"),
            **dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32"),
        },
        {
            "stride_wd": 1, "GROUP": GROUP, "SUPER": SUPER, "PARTS": tile.parts, "FLAT": tile.flat,
            "TMA_X": tile.tma, "TMA_W": tile.tma, "WIDEN": False,
            "PRECISION": "tf32" if dtype == "bf16" else "tf32x3", **tile.blocks, **on,
        },
        tile.warps, tile.stages, gemm=True, architectures=(arch,), multiples_of_16=("width", "entries", *strides),
    )  # fmt: skip
