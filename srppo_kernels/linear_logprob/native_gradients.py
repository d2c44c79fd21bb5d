"""Gradients on a CPU from one native pass and large GEMMs in the inputs' own dtype; chunked.py has the maths.

A native kernel turns a vocabulary chunk's kept exponentials into dz, formed in fp32 (``p_y - 1`` too) and rounded
once, in the memory of the exponentials where nobody needs them again. Then ``dX = dz W`` and ``dW = dz^T X`` are one
GEMM each, with fp32 accumulators: in bf16 torch's, or a native one where that is faster, returns what is rounded
once, to the dtype that the gradient has anyway. Where several chunks add up, or a caller's fp32 buffer is added to, a
native GEMM adds unrounded (csrc/linear_logprob/cpu_product.cpp). In fp32 a native GEMM (cpu_product_fp32.cpp) takes
both where MKL's is slower.
Without kept exponentials the forward's scan makes a chunk's anew.

Inputs of other dtypes (fp16, bf16 without the instructions for it, one of each) are widened a block at a time, which is
exact: dz is in fp32, a vocabulary group wide, and the GEMMs are those of fp32.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo_kernels import _extension
from srppo_kernels.linear_logprob import native, spare
from srppo_kernels.linear_logprob.chunked import GROUP, Head, Residual
from srppo_kernels.linear_logprob.rows import Rows

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.backward import Destination, RowScalars

CHUNK_BYTES = 32 << 20  # of dz at once, where it is not formed in place, unless the caller's workspace is smaller
LEAST_CHUNK_BYTES = 1 << 18  # 32 rows of a vocabulary group in fp32: below, GEMMs would be mostly overhead


def serves(device: torch.device, hidden: torch.dtype, weight: torch.dtype) -> bool:
    """Whether these inputs' gradients come from here."""
    return not native.obstacle(device, (hidden, weight)) and not native.not_faster() and _is_there()


def dz_dtype(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """Of dz, and of what GEMMs 2 and 3 read."""
    return torch.bfloat16 if hidden == weight == torch.bfloat16 and _serves_bf16() else torch.float32


def widens(hidden: torch.dtype, weight: torch.dtype) -> bool:
    """Whether that is wider than one of the inputs."""
    return not dz_dtype(hidden, weight) == hidden == weight


# What a compiler that traces the public functions need not look into.
@_extension.constant_when_traced
def _is_there() -> bool:
    return hasattr(torch.ops.srppo_native, "linear_logprob_form_dz")  # not in an extension of older sources


@_extension.constant_when_traced
def _serves_bf16() -> bool:
    """oneDNN's bf16 GEMM needs the instructions to be worth it; without them fp32 GEMMs are as fast, and exact."""
    fast = _extension.build_info()["cpu_level"] in ("avx512_bf16", "amx")
    return fast and torch.backends.mkldnn.is_available()


@_extension.constant_when_traced
def fp32_product_is_native() -> bool:
    """Whether fp32 GEMMs 2 and 3 are the native product: where it was measured to be faster than MKL's."""
    return bool(torch.ops.srppo_native.linear_logprob_product_fp32_is_faster())


@_extension.constant_when_traced
def bf16_product_is_native() -> bool:
    """Whether bf16 GEMMs 2 and 3 with bf16 results are the native product: where it was measured to be faster."""
    return bool(torch.ops.srppo_native.linear_logprob_product_is_faster())


def beaten_by_native_products(dtype: torch.dtype) -> str:
    """Whose GEMMs the native product replaces; empty where it does not."""
    if dtype == torch.float32:
        return "MKL" if fp32_product_is_native() else ""
    return "oneDNN" if bf16_product_is_native() else ""


@dataclass(frozen=True)
class Sizes:
    """Of a call's gradients, or a chunk's: what their memory depends on."""

    rows: int
    width: int
    vocab: int
    item: int  # bytes of a number of dz
    wide: bool  # the operands are widened, of the head no more than a vocabulary group
    hidden: bool  # dhidden is wanted
    weight: bool  # dweight is wanted

    def chunk(self, dz_bytes: int) -> tuple[int, int]:
        """Rows and vocabulary entries of a dz that is not formed in place, of ``dz_bytes`` (0: CHUNK_BYTES)."""
        dz_bytes = dz_bytes or CHUNK_BYTES
        step = min(self.rows, max(1, dz_bytes // (GROUP * self.item)))
        groups = 1 if self.wide else max(1, dz_bytes // (max(1, step) * self.item) // GROUP)
        return step, min(self.vocab, groups * GROUP)

    @property
    def row_bytes(self) -> int:
        """dhidden in fp32, and a row's numbers."""
        return self.rows * self.width * 4 + 32 * self.rows

    def dz_held_bytes(self, dz_bytes: int) -> int:
        """dz, a chunk's rows, its dweight where blocks of rows add up or it is to be rounded, and its head, widened."""
        step, entries = self.chunk(dz_bytes)
        of_head = (self.weight and (self.wide or step < self.rows)) + (self.hidden and self.wide)
        return step * (entries + self.width) * self.item + of_head * entries * self.width * 4

    def held_bytes(self, dz_bytes: int) -> int:
        """All that the scan and the products run beside."""
        return self.row_bytes + self.dz_held_bytes(dz_bytes)


def workspace_bytes(sizes: Sizes, *, in_place: bool) -> int:
    """Beyond exponentials that are kept: what is held, and packed operands."""
    if in_place and not sizes.wide:
        held = 2 * sizes.rows * sizes.width * sizes.item + 32 * sizes.rows
    else:
        held = sizes.held_bytes(0)
    return native.product_bytes(sizes.width, sizes.item == 2, held, None)


def recompute_bytes(sizes: Sizes, *, dz_bytes: int, bound: int | None) -> int:
    """Of plan recompute, whose backward scans a chunk and multiplies by it beside what is held."""
    held, bf16 = sizes.held_bytes(dz_bytes), sizes.item == 2
    bound = native.default_bound(held) if bound is None else bound
    step, entries = sizes.chunk(dz_bytes)
    scan = native.workspace_bytes(step, sizes.width, entries, GROUP, bf16, bound - held)
    return max(held + scan, native.product_bytes(sizes.width, bf16, held, bound))


def bounded_dz_bytes(sizes: Sizes, bound: int) -> int:
    """Of dz in a workspace of ``bound``, 0 for the default: what comes with it takes half of what the rows leave, and
    the scan and the products share the rest. Not a matter of the number of threads: bits depend on it."""
    best, size, room, held = 0, 0, (bound - sizes.row_bytes) // 2, sizes.dz_held_bytes
    while size != LEAST_CHUNK_BYTES and held(size) > room:
        size = (size or CHUNK_BYTES) // 2
        if held(size) < held(best):  # fewer rows in dz may need a dweight to add up in, which is larger
            best = size
    return best


@dataclass(frozen=True)
class Dz:
    """What dz is formed of: exponentials that were kept, or without a ``residual`` a scan that makes them anew."""

    hidden: Tensor  # [N, D]
    head: Head
    y: Tensor  # [count]
    rows: Rows
    scalars: "RowScalars"  # chain included
    temperature: Tensor | None  # [count]
    residual: Residual | None
    kept_rows: Tensor | None  # where the residual has the rows; None: in order

    def form(self, r: slice, v: slice, out: Tensor, bound: int | None) -> None:
        """Writes dz of a block of rows and a chunk of the vocabulary; ``bound``: on the scan's workspace."""
        head, scalars, residual = self.head, self.scalars, self.residual
        local = (self.y[r] - v.start).contiguous()
        temperature = None if self.temperature is None else self.temperature[r].contiguous()
        groups = slice(v.start // GROUP, -(-v.stop // GROUP))
        where = None
        if residual is None:
            kept, group_max = out, out.new_empty(out.shape[0], groups.stop - groups.start, dtype=torch.float32)
            part = replace(head, weight=head.weight[v], bias=None if head.bias is None else head.bias[v])
            rows, chunk = self.rows.part(r.start, r.stop), Residual(kept, group_max)
            native.scan(self.hidden, part, local, temperature, rows, False, chunk, None, bound)
        else:
            kept, group_max = residual.kept[:, v], residual.group_max[:, groups]
            if self.kept_rows is not None:
                where = self.kept_rows[r].contiguous()
            elif r.start > 0:
                kept, group_max = kept[r], group_max[r]
        of_rows = (scalars.b, scalars.h, scalars.at_target, scalars.row_max, scalars.log_sum)
        b, h, at_target, row_max, log_sum = (None if t is None else t[r].contiguous() for t in of_rows)
        torch.ops.srppo_native.linear_logprob_form_dz(
            kept, group_max, where, local, b, h, at_target, row_max, log_sum, temperature,
            head.temperature, 0.0 if head.softcap is None else head.softcap, GROUP, out,
        )  # fmt: skip


def over_vocabulary(
    source: Dz, into: "Destination", *, consume: bool, dz_bytes: int, bound: int | None
) -> Tensor | None:
    """Writes dweight and dbias and returns dhidden, in float32 or in the operands' dtype.

    ``consume``: the residual may be overwritten. ``bound``: on the workspace without a residual, None: the default.
    """
    hidden, head, rows, residual = source.hidden, source.head, source.rows, source.residual
    n, vocab, dtypes = rows.count, head.weight.shape[0], (hidden.dtype, head.weight.dtype)
    dtype, wide = dz_dtype(*dtypes), widens(*dtypes)
    sizes = Sizes(n, hidden.shape[1], vocab, dtype.itemsize, wide, into.hidden, into.weight is not None)
    in_place = residual is not None and consume and not wide
    step, entries = (n, vocab) if in_place else sizes.chunk(dz_bytes)
    blocks = [slice(a, min(a + step, n)) for a in range(0, n, step)]
    if residual is not None and in_place:
        buffer = residual.kept
    else:
        buffer = spare.empty(hidden, (step * entries,), dtype)
    share = None  # of the bound, for the scan and the products
    if residual is None:
        held = sizes.held_bytes(dz_bytes)
        share = max(0, (native.default_bound(held) if bound is None else bound) - held)
    dhidden = None
    if into.hidden and entries < vocab:
        dhidden = hidden.new_zeros(n, hidden.shape[1], dtype=torch.float32)
    elif into.hidden:
        dhidden = hidden.new_empty(n, hidden.shape[1], dtype=dtype)
    for v0 in range(0, vocab, entries):
        v = slice(v0, min(v0 + entries, vocab))
        weight = head.weight[v].to(dtype) if into.hidden else head.weight[v]
        apart = into.weight is not None and (len(blocks) > 1 or (wide and into.weight.dtype != dtype))
        sums = spare.empty(hidden, weight.shape, torch.float32) if apart else None
        bias_sums: Tensor | None = None  # of blocks, in fp32: a 16-bit sum stops growing
        for r in blocks:
            shape = r.stop - r.start, v.stop - v.start
            dz = buffer[:n] if in_place else buffer[: shape[0] * shape[1]].view(shape)
            source.form(r, v, dz, share)
            if into.bias is not None:
                part = _column_sums(dz, share)
                bias_sums = part if bias_sums is None else bias_sums.add_(part)
            if dhidden is not None:
                _product(dhidden[r], dz, weight, transposed=False, add=entries < vocab, bound=share)
            if into.weight is None:
                continue
            x = rows.block(hidden, r.start, r.stop, dtype)
            if sums is not None:
                _product(sums, dz, x, transposed=True, add=r.start > 0, bound=share)
            else:
                _product(into.weight[v], dz, x, transposed=True, add=into.accumulate_weight, bound=share)
            del x  # before the next block's
        if into.bias is not None and bias_sums is not None:
            write(into.bias[v], bias_sums, into.accumulate_bias)
        if into.weight is not None and sums is not None:
            write(into.weight[v], sums, into.accumulate_weight)
        del weight, sums  # before the next chunk's
    return dhidden


def write(destination: Tensor, part: Tensor, accumulate: bool) -> None:
    """The part in its place, or added to what is there."""
    if accumulate:
        destination.add_(part)
    else:
        destination.copy_(part)


def _column_sums(dz: Tensor, bound: int | None) -> Tensor:
    """In fp32, by a product with ones: torch.sum would widen a copy of a bf16 dz first, twice the memory of dz."""
    if dz.dtype == torch.float32:
        return dz.sum(0)
    sums = dz.new_empty(dz.shape[1], 1, dtype=torch.float32)
    _product(sums, dz, dz.new_ones(dz.shape[0], 1), transposed=True, add=False, bound=bound)
    return sums[:, 0]


def _product(out: Tensor, a: Tensor, b: Tensor, *, transposed: bool, add: bool, bound: int | None) -> None:
    """``out (+)= a @ b`` (``a.T @ b``); unrounded where out is wider than a, as a caller's buffer may be."""
    rows_are_contiguous = all(t.stride(1) == 1 or t.shape[1] <= 1 for t in (out, b))
    rounds = out.dtype == torch.bfloat16 and not add and a.numel() > 0 and bf16_product_is_native()
    if a.dtype == torch.bfloat16 and (out.dtype == torch.float32 or rounds) and rows_are_contiguous:
        torch.ops.srppo_native.linear_logprob_product(a, b, transposed, add, out, bound)
    elif a.dtype == out.dtype == torch.float32 and rows_are_contiguous and fp32_product_is_native():
        torch.ops.srppo_native.linear_logprob_product_fp32(a, b, transposed, add, out, bound)
    elif a.dtype == out.dtype and add:
        out.addmm_(a.T if transposed else a, b)
    elif a.dtype == out.dtype:
        torch.mm(a.T if transposed else a, b, out=out)
    else:
        whole = torch.zeros(out.shape, dtype=torch.float32)
        _product(whole, a, b.contiguous(), transposed=transposed, add=False, bound=bound)
        write(out, whole, add)
