# mypy: allow-untyped-defs
"""GEMMs 2 and 3 over rows that only the device can count: ``dX = dZ W`` and ``dW = dZ^T X``.

    dX   M is the rows: a program whose rows lie beyond the count ends at once
    dW   K is the rows: the loop over K ends at the count

Rows from the count up to the next multiple of a K step are zero in dZ and in X, so they add nothing. Where a call has
no mask cuBLAS does these products over all rows (triton_gradients.py chooses).
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels.linear_logprob.triton_tiles import (
    PRODUCT_TILES,
    SUPER,
    RowList,
    Tile,
    arithmetic,
    column_part,
    for_width,
    load,
    multiply_add,
    operand,
    placed,
    tile_of,
)


@triton.jit
def product_kernel(
    a,  # [M, K], or [K, M] where A_TRANSPOSED
    b,  # [K, N]
    c,  # [M, N]
    count,  # [1] int32, bounds M or K
    index,  # [M] int64, where a row of c goes to
    factor,  # [M] fp32, what it is multiplied by, by where it goes to
    m,
    n,
    k,
    stride_ar,
    stride_br,
    stride_bc,
    stride_cr,
    stride_cc,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SUPER: tl.constexpr,
    PARTS: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_B: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    COUNT_BOUNDS_K: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BY_ROW: tl.constexpr,
):
    m0, column = placed(tl.program_id(0), m, tl.cdiv(n, BN), BM, SUPER)
    n0 = column * BN
    live = tl.load(count)
    depth = k
    if COUNT_BOUNDS_K:
        depth = tl.minimum(k, live)
    elif BY_ROW:
        depth = tl.where(m0 < live, k, 0)  # rows beyond the count become zeros
    elif m0 >= live:
        return
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.cdiv(depth, BK)):
        if A_TRANSPOSED:
            left = load(a, step * BK, m0, k, m, stride_ar, 1, BK, BM, TMA_A).T
        else:
            left = load(a, m0, step * BK, m, k, stride_ar, 1, BM, BK, TMA_A)
        right = load(b, step * BK, n0, k, n, stride_br, stride_bc, BK, BN, TMA_B)
        acc = multiply_add(left, right, acc, WIDEN, PRECISION)
    r = m0 + tl.arange(0, BM)
    row = r.to(tl.int64)
    if BY_ROW:
        row = tl.load(index + r, mask=r < m, other=0)
        by = tl.load(factor + row, mask=r < live, other=0.0)[:, None]
    H: tl.constexpr = BN // PARTS
    for part in tl.static_range(PARTS):
        columns_here = n0 + part * H + tl.arange(0, H)
        at = c + row[:, None] * stride_cr + columns_here.to(tl.int64)[None, :] * stride_cc
        inside = (r < m)[:, None] & (columns_here < n)[None, :]
        result = column_part(acc, part, PARTS, BM, BN)
        if BY_ROW:
            result = tl.where(by != 0, result * by, 0.0)  # 0 whatever the row holds
        if ACCUMULATE:
            result += tl.load(at, mask=inside, other=0.0)
        tl.store(at, result.to(c.dtype.element_ty), mask=inside)


def rows_product(dz: Tensor, w: Tensor, out: Tensor, count: Tensor, *, accumulate: bool) -> None:
    """``out (+)= dz @ w``: ``[n, K] @ [K, D]``, rows below ``count``; the others are left as they are, or garbage."""
    _launch(dz, w, out, count, transposed=False, accumulate=accumulate)


def rows_product_back(e: Tensor, w: Tensor, out: Tensor, rows: RowList, factor: Tensor) -> None:
    """``out[index] = factor[index] * (e @ w)`` of rows below the count, and zeros elsewhere, where factor is 0 too."""
    _launch(e, w, out, rows.count, transposed=False, accumulate=False, index=rows.index, factor=factor)


def columns_product(dz: Tensor, x: Tensor, out: Tensor, count: Tensor, *, accumulate: bool) -> None:
    """``out (+)= dz.T @ x``: ``[n, V].T @ [n, D]``, over the rows below ``count``."""
    _launch(dz, x, out, count, transposed=True, accumulate=accumulate)


def _launch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    count: Tensor,
    *,
    transposed: bool,
    accumulate: bool,
    index: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    (m, n), k = out.shape, b.shape[0]
    tile = tile_of(PRODUCT_TILES, a.device, (a.dtype, b.dtype))
    a_matrix, tma_a = operand(a, *((tile.bk, tile.bm) if transposed else (tile.bm, tile.bk)), tile.tma)
    b_matrix, tma_b = operand(b, tile.bk, tile.bn, tile.tma)
    with _triton.on_device(a):
        product_kernel[(-(-m // tile.bm) * -(-n // tile.bn),)](
            a_matrix, b_matrix, out, count, count if index is None else index, count if factor is None else factor,
            m, n, k, a.stride(0), *b.stride(), *out.stride(),
            SUPER=SUPER, PARTS=tile.parts, TMA_A=tma_a, TMA_B=tma_b, A_TRANSPOSED=transposed,
            COUNT_BOUNDS_K=transposed, ACCUMULATE=accumulate, BY_ROW=index is not None,
            **tile.blocks, **arithmetic(a.device, a.dtype, b.dtype),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def compile_cases() -> Iterator[_triton.CompileCase]:
    """Both products, rounded to 16 bits and added to fp32."""
    for arch, tile in PRODUCT_TILES.items():
        for name, transposed in (("dX", False), ("dW", True)):
            yield _case(f"{name}, bf16", arch, tile, "bf16", "bf16", transposed, False)
            yield _case(f"{name} added to fp32, bf16", arch, tile, "bf16", "fp32", transposed, True)
            yield _case(f"{name}, fp32", arch, for_width(tile, 4), "fp32", "fp32", transposed, False)
        yield _case("dX from exponentials, bf16", arch, tile, "bf16", "bf16", False, False, by_row=True)


def _case(
    name: str, arch: int, tile: Tile, dtype: str, out: str, transposed: bool, accumulate: bool, by_row: bool = False
) -> _triton.CompileCase:
    a_block = (tile.bk, tile.bm) if transposed else (tile.bm, tile.bk)
    strides = ("stride_ar", "stride_br", "stride_cr")
    return _triton.CompileCase(
        f"product: {name}", product_kernel,
        {
            "a": f"tensordesc<{dtype}[{a_block[0]},{a_block[1]}]>" if tile.tma else f"*{dtype}",
            "b": f"tensordesc<{dtype}[{tile.bk},{tile.bn}]>" if tile.tma else f"*{dtype}",
            "c": f"*{out}", "count": "*i32", "index": "*i64", "factor": "*fp32",
            **dict.fromkeys(("m", "n", "k", *strides), "i32"),
        },
        {
            **tile.blocks, "stride_bc": 1, "stride_cc": 1, "SUPER": SUPER, "PARTS": tile.parts, "TMA_A": tile.tma,
            "TMA_B": tile.tma, "WIDEN": False, "PRECISION": "tf32" if dtype == "bf16" else "tf32x3",
            "A_TRANSPOSED": transposed, "COUNT_BOUNDS_K": transposed, "ACCUMULATE": accumulate, "BY_ROW": by_row,
        },
        tile.warps, tile.stages, gemm=True, architectures=(arch,),
        multiples_of_16=("m" if transposed else "k", "n", *strides),
    )  # fmt: skip
