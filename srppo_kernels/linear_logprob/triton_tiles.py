# mypy: allow-untyped-defs
"""What the Triton kernels of this room share: tile shapes, the rows that take part, loads, and accumulators to logits.

Rows come compacted: position ``p`` of a row list is row ``index[p]`` of the call, and how many positions are live only
the device knows. Kernels read that count; a program whose rows all lie beyond it ends at once. So a masked row costs a
few bytes of gathering, and nothing waits.

Tiles and groups do not depend on the number of rows, so neither do a row's bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from srppo_kernels import _triton
from srppo_kernels.linear_logprob import triton_passes
from srppo_kernels.linear_logprob.gpu import GROUP, PART

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-2e38)  # a finite stand-in for -inf, whose product with 0 would be NaN; times log2 e it is finite


@dataclass(frozen=True)
class Tile:
    """A GEMM's configuration.

    ``flat``: the loops over tiles and over K become one, so that loads of the next tile run under the epilogue of this
    one. ``pairs``: kept exponentials leave in pairs of columns (triton_scan.store_pairs).
    """

    bm: int  # rows
    bn: int  # columns
    bk: int  # depth of a step
    warps: int
    stages: int
    flat: bool = False
    tma: bool = False
    pairs: bool = False

    @property
    def parts(self) -> int:
        """Column parts in which an epilogue takes the accumulators: its temporaries must fit beside them."""
        return self.bn // PART

    @property
    def blocks(self) -> dict[str, Any]:
        """Compile-time arguments of a kernel."""
        return {"BM": self.bm, "BN": self.bn, "BK": self.bk}


# By architecture. Registers and spills of every configuration: `python bench/compile.py`. sm_90 with parts of 64, 128
# and 256 columns spills 8, 76 and 328 bytes. sm_100 accumulates in tensor memory; there flat loops spill 400 bytes and
# plain ones none. sm_80, and consumer parts of any age: pointer loads, as descriptors are emulated there, under 100 KB.
SCAN_TILES = {
    80: Tile(128, 128, 32, 8, 3),
    90: Tile(128, 256, 64, 8, 3, flat=True, tma=True, pairs=True),
    100: Tile(128, 256, 64, 8, 3, tma=True),
}
# Where an epilogue does more than scale: softcap, bias, exponentials kept but not in pairs.
BUSY_SCAN_TILES = {
    80: Tile(128, 128, 32, 8, 3),
    90: Tile(128, 128, 64, 8, 4, flat=True, tma=True),
    100: Tile(128, 128, 64, 8, 4, tma=True),
}
PRODUCT_TILES = {
    80: Tile(128, 128, 32, 8, 3),
    90: Tile(128, 256, 64, 8, 3, tma=True),
    100: Tile(128, 256, 64, 8, 3, tma=True),
}
INTERPRETED = Tile(16, 64, 16, 4, 1)  # small: the interpreter's time goes with the number of operations
INTERPRETED_GROUP = 128
SUPER = 16  # row blocks of a band: 16 MB of rows at D = 4096, a third of an H100's L2


def architecture(device: torch.device) -> int:
    """The key of the tables above."""
    if torch.version.hip is not None:
        return 80  # AMD's 9.x is no Hopper, and reads no PTX
    capability = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100, 11: 100}.get(capability[0], 80)


def tile_of(table: dict[int, Tile], device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> Tile:
    """The configuration for these operands."""
    if device.type == "cpu":
        return INTERPRETED
    return for_width(table[architecture(device)], max(t.itemsize for t in dtypes))


def for_width(tile: Tile, itemsize: int) -> Tile:
    """``tile`` for 2-byte operands, or a smaller one for 4-byte ones, whose tf32 x 3 products also take registers."""
    if itemsize == 2:
        return tile
    return Tile(64, 128, 32, 8, 3, tma=True) if tile.tma else Tile(64, 64, 32, 8, 3)


def group_size(device: torch.device) -> int:
    """Vocabulary entries of a group."""
    return INTERPRETED_GROUP if device.type == "cpu" else GROUP


@dataclass(frozen=True)
class RowList:
    """Live rows in ascending order; from ``count`` on the others."""

    index: Tensor  # [n] int64
    count: Tensor  # [1] int32


def row_list(live: Tensor) -> RowList:
    """The rows where ``live`` (``[n]`` bool)."""
    return RowList(*triton_passes.listed(live))


def gather_rows(matrix: Tensor, rows: RowList) -> Tensor:
    """The live rows of ``matrix``, contiguous, then rows of zeros: what a masked row holds reaches nobody."""
    return triton_passes.gather(matrix, rows.index, rows.count)


def operand(matrix: Tensor, rows: int, columns: int, tma: bool) -> tuple[Any, bool]:
    """A kernel's matrix argument, and whether it is a TMA descriptor of ``rows x columns`` blocks.

    TMA wants contiguous rows at multiples of 16 bytes; a matrix that is none (a transposed head, an odd width) is read
    through pointers.
    """
    aligned = (
        tma
        and matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]  # not an expanded row
        and matrix.data_ptr() % 16 == 0
        and matrix.stride(0) * matrix.element_size() % 16 == 0
    )
    return (TensorDescriptor.from_tensor(matrix, [rows, columns]) if aligned else matrix), aligned


def arithmetic(device: torch.device, a: torch.dtype, b: torch.dtype) -> dict[str, Any]:
    """How a product of these dtypes runs. 16-bit factors multiply exactly into the fp32 accumulators; two 16-bit dtypes
    that differ are exact in tf32; fp32 factors take three tf32 products, which lose 2^-22 of each."""
    narrow = a.itemsize == 2 and b.itemsize == 2
    widen = a != b or _triton.interpreted()
    return {"WIDEN": widen, "PRECISION": "tf32" if narrow else "tf32x3"}


@triton.jit
def load(matrix, r0, c0, rows, columns, stride_r, stride_c, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """``matrix[r0 : r0 + BR, c0 : c0 + BC]``, zero beyond its ``rows`` and ``columns``."""
    if TMA:
        tile = matrix.load([r0, c0])
    else:
        r = r0 + tl.arange(0, BR)
        c = c0 + tl.arange(0, BC)
        # 64-bit offsets: [N, V] passes 2^31 elements at N = 14200 of a vocabulary of 151936.
        at = matrix + r.to(tl.int64)[:, None] * stride_r + c.to(tl.int64)[None, :] * stride_c
        tile = tl.load(at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return tile


@triton.jit
def multiply_add(a, b, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def placed(pid, rows, columns, BM: tl.constexpr, SUPER: tl.constexpr):
    """``(first row, column of the grid)`` of a program; row blocks of BM run fastest within a band of SUPER of them."""
    band = pid // (SUPER * columns)
    blocks = tl.minimum(tl.cdiv(rows, BM) - band * SUPER, SUPER)
    within = pid - band * SUPER * columns
    column = within // blocks
    return (band * SUPER + within % blocks) * BM, column


@triton.jit
def head_tile(
    x, w, r0, v0, rows, vocab, width, stride_xr, stride_wv, stride_wd,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA_X: tl.constexpr, TMA_W: tl.constexpr,
    WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x[r0 : r0 + BM] @ w[v0 : v0 + BN].T`` in fp32: a tile of what logits are made of."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(tl.cdiv(width, BK)):
        a = load(x, r0, k * BK, rows, width, stride_xr, 1, BM, BK, TMA_X)
        b = load(w, v0, k * BK, vocab, width, stride_wv, stride_wd, BN, BK, TMA_W)
        acc = multiply_add(a, b.T, acc, WIDEN, PRECISION)
    return acc


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right columns of a tile; moves nothing between threads."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def column_part(tile, part: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Columns ``part`` of ``PARTS`` (1, 2, 4 or 8) of a tile."""
    if PARTS > 1:
        left, right = halves(tile, BM, BN)
        tile = left if part * 2 // PARTS == 0 else right
    if PARTS > 2:
        left, right = halves(tile, BM, BN // 2)
        tile = left if part * 4 // PARTS % 2 == 0 else right
    if PARTS > 4:
        left, right = halves(tile, BM, BN // 4)
        tile = left if part % 2 == 0 else right
    return tile


@triton.jit
def tanh(u):
    """Odd series near 0, where ``1 - 2 / (e^2u + 1)`` would lose digits; its next term is below 1e-7 of it."""
    q = u * u
    series = -0.053968254 + q * (0.021869489 - q * 0.008863236)
    near = u * (1 + q * (-0.33333333 + q * (0.13333333 + q * series)))
    far = 1 - 2 / (tl.exp2(tl.minimum(tl.maximum(u, -20.0), 20.0) * (2 * LOG2E)) + 1)
    return tl.where(tl.abs(u) < 0.25, near, tl.where(u == u, far, u))  # a minimum may drop a NaN


@triton.jit
def logits(
    acc,  # [BM, columns]
    v,  # [columns] vocabulary entries
    vocab,
    bias,  # [V] fp32
    scale,
    softcap,
    inverse_temperature,  # [BM], or a number
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
):
    """``softcap(scale * (acc + bias)) / temperature``, LOWEST beyond the vocabulary."""
    if BIAS:
        acc += tl.load(bias + v, mask=v < vocab, other=0.0)[None, :]
    z = acc * scale
    if SOFTCAP:
        z = softcap * tanh(z / softcap)
    if ROW_TEMPERATURE:
        z = z * inverse_temperature[:, None]
    else:
        z = z * inverse_temperature
    if BIAS:
        z = tl.where(z < LOWEST, LOWEST, z)  # a bias of -inf rules an entry out; a NaN stays
    return tl.where((v < vocab)[None, :], z, LOWEST)
