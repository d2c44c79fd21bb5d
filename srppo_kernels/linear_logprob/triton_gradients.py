"""Gradients on a GPU; chunked.py has the maths: dZ (triton_dz.py), then ``dX = dZ W`` and ``dW = dZ^T X``.

All rows that have a gradient are in them, and no others: dW has K = all of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels.linear_logprob import triton_dz, triton_passes
from srppo_kernels.linear_logprob.chunked import add_mm, mm
from srppo_kernels.linear_logprob.gpu import WIDE_PART, chunk_entries, whole_columns
from srppo_kernels.linear_logprob.triton_products import columns_product, rows_product, rows_product_back
from srppo_kernels.linear_logprob.triton_scan import options
from srppo_kernels.linear_logprob.triton_tiles import RowList, gather_rows, group_size, row_list

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.backward import Destination, RowScalars
    from srppo_kernels.linear_logprob.chunked import Head, Residual


def dz_dtype(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """bf16, with the range of fp32, for 16-bit inputs; fp32 otherwise."""
    return torch.bfloat16 if 2 in (hidden.itemsize, weight.itemsize) else torch.float32


def over_vocabulary(
    hidden: Tensor,  # [n, D]
    head: "Head",
    y: Tensor,  # [n]
    wanted: Tensor,  # [n] bool: rows that have a gradient
    scalars: "RowScalars",  # [n] each, chain included
    temperature: Tensor | None,  # [n]
    into: "Destination",
    residual: "Residual | None",
    kept: Tensor | None,  # [n] bool: the rows that the residual holds, in order
    *,
    consume: bool,
    dense: bool,
    dz_bytes: int,
) -> Tensor | None:
    """Writes dweight and dbias and returns dhidden ``[n, D]``, with zeros in rows that are not wanted.

    ``dense``: most rows are wanted, so the products run over all of them, on cuBLAS.
    """
    n, vocab, device = hidden.shape[0], head.weight.shape[0], hidden.device
    if min(n, vocab) == 0:
        return _nothing(hidden, into)
    dtype = dz_dtype(hidden.dtype, head.weight.dtype)
    rows = row_list(wanted)
    x = gather_rows(hidden, rows)
    packed = _packed(scalars, temperature, head, rows)
    target = y.index_select(0, rows.index)
    in_place = residual is not None and consume and residual.kept.dtype == dtype
    entries = vocab if in_place else chunk_entries(n, vocab, dtype.itemsize, dz_bytes, group_size(device))
    buffer = None if in_place else torch.empty(n, whole_columns(entries), dtype=dtype, device=device)
    dhidden = None
    if into.hidden:
        # Several products add up in fp32; fp16 would round to 0 what a loss over many tokens is yet to be scaled from.
        rounded = entries == vocab and hidden.dtype != torch.float16
        dhidden = torch.empty(n, x.shape[1], dtype=hidden.dtype if rounded else torch.float32, device=device)
    source = None
    if residual is not None:
        assert kept is not None
        source = (kept.cumsum(0) - 1).index_select(0, rows.index)
    products = _Products(rows.count, cublas=dense and _same_dtype(x, head.weight, dtype))
    for v0 in range(0, vocab, entries):
        v = slice(v0, min(v0 + entries, vocab))
        weight = head.weight[v]
        if in_place:
            assert residual is not None
            dz = residual.kept[:n]
        else:
            assert buffer is not None
            dz = buffer[:, : v.stop - v0]
        switches = {**options(head, scalars.h is not None), "ZERO_ALL": products.cublas}
        with _triton.on_device(hidden):
            if residual is not None:
                triton_dz.from_kept(residual, source, target - v0, packed, rows, v, dz, head, switches)
            else:
                triton_dz.from_logits(x, head, target - v0, packed, rows, v, dz, switches)
        if into.bias is not None:
            triton_dz.column_sums(dz, rows, into.bias[v], into.accumulate_bias)
        if dhidden is not None:
            products.rows(dz, weight, dhidden, accumulate=v0 > 0)
        if into.weight is not None:
            products.columns(dz, x, into.weight[v], accumulate=into.accumulate_weight)
    if dhidden is None:
        return None
    return triton_passes.gather(dhidden, rows.index, rows.count, scatter=True)


def _packed(scalars: "RowScalars", temperature: Tensor | None, head: "Head", rows: RowList) -> Tensor:
    """What dz's kernels read of a row, ``[6, n]`` by position."""
    inverse = torch.ones_like(scalars.b) if temperature is None else temperature.reciprocal()
    if temperature is None:
        inverse = inverse / head.temperature
    h = torch.zeros_like(scalars.b) if scalars.h is None else scalars.h
    planes = [scalars.b, h, scalars.at_target, scalars.row_max, scalars.log_sum, inverse]
    return torch.stack([plane.index_select(0, rows.index) for plane in planes])


def from_exponentials(
    hidden: Tensor,  # [n, D]
    head: "Head",
    g: Tensor,  # [n], dL/dlogprob
    log_sum: Tensor,  # [n]
    temperature: Tensor | None,  # [n]
    into: "Destination",
    residual: "Residual",
    live: Tensor,  # [n] bool: the rows that the residual holds, in order
    *,
    consume: bool,
    dense: bool,
) -> Tensor | None:
    """``dX = F (E W)`` and ``dW = E^T (F X)``, with a row's F and the E of triton_reference.py: no dz is formed.

    Else as :func:`over_vocabulary`. Rows with no gradient have F = 0. They are multiplied all the same on cuBLAS and
    where E is still needed; else those of E that have one take their places. What E holds beyond them is finite, and X
    zero there.
    """
    kept = residual.kept[: hidden.shape[0]]
    scale = -head.logit_scale / (head.temperature if temperature is None else 1.0)
    index, count, factor = triton_passes.place(kept, live, g, log_sum, temperature, scale, moves=consume and not dense)
    products = _Products(count, cublas=dense and _same_dtype(hidden, head.weight, kept.dtype))
    if into.weight is not None:
        x = triton_passes.gather(hidden, index, count, factor=factor)
        products.columns(kept, x, into.weight, accumulate=into.accumulate_weight)
    if not into.hidden:
        return None
    if products.cublas:
        sums = mm(kept, head.weight, torch.float32)
        return triton_passes.gather(sums, index, count, factor=factor, dtype=hidden.dtype, scatter=True)
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    rows_product_back(kept, head.weight, dhidden, RowList(index, count), factor)
    return dhidden


def _nothing(hidden: Tensor, into: "Destination") -> Tensor | None:
    """Of no rows, or no vocabulary."""
    for destination, accumulate in ((into.weight, into.accumulate_weight), (into.bias, into.accumulate_bias)):
        if destination is not None and not accumulate:
            destination.zero_()
    return torch.zeros_like(hidden) if into.hidden else None


def _same_dtype(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch has a GEMM for these that returns fp32: on a CPU, where only tests come, for fp32 alone."""
    return x.dtype == weight.dtype == dtype and (x.device.type == "cuda" or dtype == torch.float32)


@dataclass(frozen=True)
class _Products:
    """GEMMs 2 and 3, on cuBLAS over all rows or on kernels that end at the count."""

    count: Tensor
    cublas: bool

    def rows(self, dz: Tensor, weight: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """``out (+)= dz @ weight``."""
        if not self.cublas:
            rows_product(dz, weight, out, self.count, accumulate=accumulate)
        else:
            _mm_into(out, dz, weight, accumulate)

    def columns(self, dz: Tensor, x: Tensor, out: Tensor, *, accumulate: bool) -> None:
        """``out (+)= dz.T @ x``."""
        if not self.cublas:
            columns_product(dz, x, out, self.count, accumulate=accumulate)
            return
        for v0 in range(0, out.shape[0], WIDE_PART):  # what is added comes as an fp32 tensor of its own
            part = slice(v0, v0 + WIDE_PART) if accumulate or out.dtype != dz.dtype else slice(None)
            _mm_into(out[part], dz.T[part], x, accumulate)
            if part.stop is None:
                return


def _mm_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    if accumulate:
        add_mm(out, a, b)
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b, out_dtype=out.dtype))
