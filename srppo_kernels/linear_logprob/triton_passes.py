# mypy: allow-untyped-defs
"""Small kernels beside the GEMMs.

    live_kernel     which rows are live, and whether their targets are in the vocabulary
    list_kernel     the live rows, in order, then the others, and how many are live
    place_kernel    the same of rows with a gradient, which take the places of kept rows that have none
    move_kernel     brings what is kept of them there
    gather_kernel   live rows, one after another, and zeros after them, or such rows back to where they were; on request
                    times a factor a row
    scale_kernel    an upstream gradient times a gradient that was formed for 1; in place a factor of 1 ends it at once

They read on the device what they depend on, so nothing waits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels._triton_language import exp_expm1
from srppo_kernels.linear_logprob.gpu import to_row_ends

SCALED, SCALE_PROGRAMS = 4096, 2048  # elements of a step; programs at most: a factor of 1 costs their start alone
LISTED, PLACED = 4096, 2048  # rows of a step
MOVED = (32, 8192)  # programs, and columns of one
GATHERED = (4, 1024)  # rows and columns that a program of gather_kernel takes


@triton.jit
def scale_kernel(
    out,
    formed,
    upstream,  # 0-d
    elements,
    BLOCK: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    factor = tl.load(upstream).to(tl.float64 if DOUBLE else tl.float32)
    if IN_PLACE and factor == 1:
        return
    # 64-bit: a dweight has more than 2^31 elements from a vocabulary of 262144 and a width of 8192 on.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, elements, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < elements
        scaled = tl.load(formed + at, mask=inside, other=0.0).to(factor.dtype) * factor
        tl.store(out + at, scaled.to(out.dtype.element_ty), mask=inside)


def scale(formed: Tensor, upstream: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """``formed * upstream`` in ``dtype``, multiplied in fp32 (fp64 for fp64), in the memory of ``formed`` if wanted.

    Bits do not depend on ``in_place``.
    """
    assert formed.is_contiguous() and upstream.numel() == 1
    in_place = in_place and formed.dtype == dtype
    out = formed if in_place else torch.empty_like(formed, dtype=dtype)
    programs = min(-(-formed.numel() // SCALED), SCALE_PROGRAMS)
    if programs > 0:
        with _triton.on_device(formed):
            scale_kernel[(programs,)](
                out, formed, upstream, formed.numel(),
                BLOCK=SCALED, IN_PLACE=in_place, DOUBLE=formed.dtype == torch.float64, num_warps=8,
            )  # fmt: skip
    return out


@triton.jit
def live_kernel(
    targets,  # [n] int64 or int32
    mask,  # [n] bool
    ignore_index,
    live,  # [n] uint8
    fit,  # [1] int32
    n,
    vocab,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One program, as list_kernel: in torch's operators this is nine launches."""
    outside = tl.zeros([], tl.int32)
    for start in range(0, n, BLOCK):
        r = start + tl.arange(0, BLOCK)
        inside = r < n
        target = tl.load(targets + r, mask=inside, other=0).to(tl.int64)
        here = inside & (target != ignore_index)
        if MASKED:
            here &= tl.load(mask + r, mask=inside, other=0) != 0
        tl.store(live + r, here.to(tl.uint8), mask=inside)
        outside += tl.sum((here & ((target < 0) | (target >= vocab))).to(tl.int32), 0)
    tl.store(fit, tl.where(outside == 0, 1, 0))


def live_targets(targets: Tensor, mask: Tensor | None, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Which rows count, ``[n]`` bool, and whether (not 0) all targets of theirs are in the vocabulary, ``[1]``."""
    n = targets.shape[0]
    live, fit = targets.new_empty(n, dtype=torch.uint8), targets.new_empty(1, dtype=torch.int32)
    with _triton.on_device(targets):
        live_kernel[(1,)](
            targets.contiguous(), live if mask is None else mask.reshape(-1).contiguous(), ignore_index, live, fit, n,
            vocab, BLOCK=LISTED, MASKED=mask is not None, num_warps=8,
        )  # fmt: skip
    return live.view(torch.bool), fit


@triton.jit
def list_kernel(
    live,  # [n] bool
    index,  # [n] int64
    count,  # [1] int32
    n,
    BLOCK: tl.constexpr,
):
    """One program: 8192 rows are two steps, where a prefix sum and a scatter of torch's are seven launches."""
    total = 0
    for start in range(0, n, BLOCK):
        r = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(live + r, mask=r < n, other=0).to(tl.int32), 0)
    before = 0
    for start in range(0, n, BLOCK):
        r = start + tl.arange(0, BLOCK)
        here = tl.load(live + r, mask=r < n, other=0).to(tl.int32)
        rank = before + tl.cumsum(here, 0)
        tl.store(index + tl.where(here > 0, rank - 1, total + r - rank), r.to(tl.int64), mask=r < n)
        before += tl.sum(here, 0)
    tl.store(count, total)


def listed(live: Tensor) -> tuple[Tensor, Tensor]:
    """Rows where ``live`` (``[n]`` bool) in ascending order, then the others, ``[n]`` int64; and how many, ``[1]``."""
    n = live.shape[0]
    index = live.new_empty(n, dtype=torch.int64)
    count = live.new_empty(1, dtype=torch.int32)
    with _triton.on_device(live):
        list_kernel[(1,)](live.contiguous(), index, count, n, BLOCK=LISTED, num_warps=8)
    return index, count


@triton.jit
def place_kernel(
    live,  # [n] bool: rows that are kept, in order
    g,  # [n] fp32: their gradient comes in where this is not 0
    log_sum,  # [n] fp32
    temperatures,  # [n] fp32
    scale,
    index,  # [n] int64
    count,  # [1] int32
    factor,  # [n] fp32, by row
    moves,  # [3, n] int32: where a row goes to, where it is kept, and the row
    moved,  # [1] int32
    n,
    BLOCK: tl.constexpr,
    MOVES: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
):
    """One program. Rows with a gradient that are kept beyond their number fill the places of those with none."""
    total = 0
    for start in range(0, n, BLOCK):
        r = start + tl.arange(0, BLOCK)
        here = tl.load(live + r, mask=r < n, other=0) != 0
        if MOVES:
            here &= tl.load(g + r, mask=here, other=0.0) != 0
        total += tl.sum(here.to(tl.int32), 0)
    kept_before = 0
    listed_before = 0
    holes = 0
    fillers = 0
    n64 = tl.cast(n, tl.int64)  # a size of 1 is a constant here, which has no .to
    for start in range(0, n, BLOCK):
        r = start + tl.arange(0, BLOCK)
        kept = tl.load(live + r, mask=r < n, other=0) != 0
        upstream = tl.load(g + r, mask=kept, other=0.0)
        wanted = kept & (upstream != 0)
        e, _ = exp_expm1(-tl.load(log_sum + r, mask=kept, other=0.0))
        by = upstream * scale * e
        if ROW_TEMPERATURE:
            by = tl.div_rn(by, tl.load(temperatures + r, mask=kept, other=1.0))
        tl.store(factor + r, tl.where(wanted, by, 0.0), mask=r < n)
        listed = wanted if MOVES else kept
        place = kept_before + tl.cumsum(kept.to(tl.int32), 0) - 1
        rank = listed_before + tl.cumsum(listed.to(tl.int32), 0)
        stays = listed & (place < total)
        tl.store(index + tl.where(stays, place, total + r - rank), r.to(tl.int64), mask=(r < n) & (stays | ~listed))
        if MOVES:
            hole = kept & ~listed & (place < total)
            filler = listed & (place >= total)
            tl.store(moves + holes + tl.cumsum(hole.to(tl.int32), 0) - 1, place, mask=hole)
            at = moves + n64 + fillers + tl.cumsum(filler.to(tl.int32), 0) - 1
            tl.store(at, place, mask=filler)
            tl.store(at + n64, r, mask=filler)
            holes += tl.sum(hole.to(tl.int32), 0)
            fillers += tl.sum(filler.to(tl.int32), 0)
        kept_before += tl.sum(kept.to(tl.int32), 0)
        listed_before += tl.sum(listed.to(tl.int32), 0)
    tl.store(count, total)
    tl.store(moved, holes)
    if MOVES:
        tl.debug_barrier()  # moves was stored by other threads
        for start in range(0, holes, BLOCK):
            k = start + tl.arange(0, BLOCK)
            hole = tl.load(moves + k, mask=k < holes, other=0)
            row = tl.load(moves + 2 * n64 + k, mask=k < holes, other=0)
            tl.store(index + hole, row.to(tl.int64), mask=k < holes)


@triton.jit
def move_kernel(
    kept,  # [rows, columns]
    moves,  # [3, n] int32
    moved,  # [1] int32
    n,
    columns,
    stride,
    BLOCK: tl.constexpr,
):
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for k in range(tl.program_id(1), tl.load(moved), tl.num_programs(1)):
        to = tl.load(moves + k).to(tl.int64)
        row = tl.load(moves + tl.cast(n, tl.int64) + k).to(tl.int64)
        tl.store(kept + to * stride + v, tl.load(kept + row * stride + v, mask=v < columns), mask=v < columns)


def place(
    kept: Tensor, live: Tensor, g: Tensor, log_sum: Tensor, temperatures: Tensor | None, scale: float, *, moves: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``kept`` ``[n, V]``, of the rows where ``live`` in order: ``(index [n], count [1], factor [n])``.

    With ``moves`` rows where g is 0 leave: the last ones come to their places, in ``kept`` as well, and no other row
    moves. ``index`` has the row of each place, then those that have none; ``factor`` is by row,
    ``g scale e^-log_sum / temperature``.
    """
    kept = to_row_ends(kept)
    n, columns = kept.shape
    index, factor = live.new_empty(n, dtype=torch.int64), torch.empty_like(log_sum)
    count, moved = (live.new_empty(1, dtype=torch.int32) for _ in range(2))
    to = live.new_empty(3, n if moves else 0, dtype=torch.int32)
    with _triton.on_device(kept):
        place_kernel[(1,)](
            live.contiguous(), g.contiguous(), log_sum.contiguous(), factor if temperatures is None else temperatures,
            scale, index, count, factor, to, moved, n, BLOCK=PLACED, MOVES=moves,
            ROW_TEMPERATURE=temperatures is not None, num_warps=8,
        )  # fmt: skip
        if moves:
            move_kernel[(-(-columns // MOVED[1]), MOVED[0])](
                kept, to, moved, n, columns, kept.stride(0), BLOCK=MOVED[1], num_warps=8
            )
    return index, count, factor


@triton.jit
def gather_kernel(
    matrix,
    index,  # [n] int64
    factor,  # [rows of the matrix, or of out where SCATTER] fp32
    count,  # [1] int32
    out,  # [n, width]
    n,
    width,
    stride_r,
    stride_c,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr,
    SCATTER: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(index + r, mask=r < n, other=0)
    here = r < tl.load(count)
    if FACTOR:
        by = tl.load(factor + row, mask=here, other=0.0)
        here = here & (by != 0)  # 0 whatever the row holds
    source = row
    to = r.to(tl.int64)
    if SCATTER:
        source = to
        to = row
    at = matrix + source[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
    values = tl.load(at, mask=here[:, None] & (c < width)[None, :], other=0.0)
    if FACTOR:
        values = (values.to(tl.float32) * by[:, None]).to(out.dtype.element_ty)
    tl.store(out + to[:, None] * width + c[None, :], values, mask=(r < n)[:, None] & (c < width)[None, :])


def gather(
    matrix: Tensor,
    index: Tensor,
    count: Tensor,
    *,
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scatter: bool = False,
) -> Tensor:
    """``matrix[index]``, contiguous, with zeros from row ``count`` on, whatever is in the matrix.

    ``scatter``: the other way round, where ``index`` has every row once; rows of the result that come from row
    ``count`` on are zeros. ``factor``: an fp32 number for each row that ``index`` names, and the result in ``dtype``; a
    row times 0 is 0, be it NaN.
    """
    (width, n), (rows, columns) = (matrix.shape[1], index.shape[0]), GATHERED
    out = torch.empty(n, width, dtype=dtype or matrix.dtype, device=matrix.device)
    if out.numel() > 0:
        with _triton.on_device(matrix):
            gather_kernel[(-(-n // rows), -(-width // columns))](
                matrix, index, count if factor is None else factor, count, out, n, width, *matrix.stride(), ROWS=rows,
                COLUMNS=columns, FACTOR=factor is not None, SCATTER=scatter, num_warps=8,
            )  # fmt: skip
    return out


def compile_cases() -> Iterator[_triton.CompileCase]:
    """One of each, and what each dtype makes of them."""
    yield _triton.CompileCase(
        "row list", list_kernel, {"live": "*i1", "index": "*i64", "count": "*i32", "n": "i32"}, {"BLOCK": LISTED},
        num_warps=8,
    )  # fmt: skip
    yield _triton.CompileCase(
        "live rows", live_kernel,
        {"targets": "*i64", "mask": "*i1", "ignore_index": "i64", "live": "*u8", "fit": "*i32", "n": "i32",
         "vocab": "i32"},
        {"BLOCK": LISTED, "MASKED": True}, num_warps=8,
    )  # fmt: skip
    for name, out, formed, in_place in (
        ("in place, bf16", "bf16", "bf16", True),
        ("in place, fp32", "fp32", "fp32", True),
        ("fp32 to fp16", "fp16", "fp32", False),
    ):
        yield _triton.CompileCase(
            f"scale: {name}", scale_kernel,
            {"out": f"*{out}", "formed": f"*{formed}", "upstream": "*fp32", "elements": "i64"},
            {"BLOCK": SCALED, "IN_PLACE": in_place, "DOUBLE": False}, num_warps=8, multiples_of_16=("elements",),
        )  # fmt: skip
    yield _triton.CompileCase(
        "place", place_kernel,
        {
            "live": "*i1", **dict.fromkeys(("g", "log_sum", "temperatures", "factor"), "*fp32"), "scale": "fp32",
            "index": "*i64", **dict.fromkeys(("count", "moves", "moved"), "*i32"), "n": "i32",
        },
        {"BLOCK": PLACED, "MOVES": True, "ROW_TEMPERATURE": True}, num_warps=8,
    )  # fmt: skip
    yield _triton.CompileCase(
        "move", move_kernel,
        {"kept": "*bf16", "moves": "*i32", "moved": "*i32", **dict.fromkeys(("n", "columns", "stride"), "i32")},
        {"BLOCK": MOVED[1]}, num_warps=8, multiples_of_16=("columns", "stride"),
    )  # fmt: skip
    for name, kind, out, factor, scatter in (
        ("bf16", "bf16", "bf16", False, False),
        ("fp32", "fp32", "fp32", False, False),
        ("bf16, times a factor", "bf16", "bf16", True, False),
        ("fp32 to bf16, back, times a factor", "fp32", "bf16", True, True),
    ):
        yield _triton.CompileCase(
            f"gather: {name}", gather_kernel,
            {
                "matrix": f"*{kind}", "index": "*i64", "factor": "*fp32", "count": "*i32", "out": f"*{out}",
                **dict.fromkeys(("n", "width", "stride_r"), "i32"),
            },
            {"stride_c": 1, "ROWS": GATHERED[0], "COLUMNS": GATHERED[1], "FACTOR": factor,
             "SCATTER": scatter}, num_warps=8,
            multiples_of_16=("width", "stride_r"),
        )  # fmt: skip
