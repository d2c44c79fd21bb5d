# mypy: allow-untyped-defs
"""Masked moments and whitening on Triton: a launch each, in float64. `reference.py` has the maths.

A program takes 2048 tokens of a row, held in registers, to their count, mean and sum of squared deviations from that
mean: two passes that read memory once. The last program merges all of them by Chan's formula, in a fixed order.

They are two launches because no token can be whitened before the last one is counted, and an op between them merges the
moments of a process group. `gae(..., moments=True)` leaves the moments in its own launch, and whitening is then one.

Bits: padding a batch, on either side of its rows, changes none (`_triton_language.py` says why). A packed `[N]` is one
row here, and its moments are those of the padded batch within float64's rounding; `gae`'s moments, which know the rows,
are the same bits packed and padded.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels._triton import CompileCase, finish_counter, interpreted, on_device
from srppo_kernels._triton_language import arrived_last, blocks_of, first_valid, grid_sum

__all__ = [
    "compile_cases",
    "join_moments",
    "leave_moments",
    "merge_moments",
    "row_moments",
    "tile_moments_of",
    "whiten_apply_triton",
    "whiten_moments_triton",
]

WHITEN_TOKENS = 512 if interpreted() else 2048  # the interpreter's tests have small rows
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def leave_moments(partials, program, programs, count, mean, squares):
    """One program's count, sum and squared deviations from its own mean."""
    tl.store(partials + program, count)
    tl.store(partials + programs + program, mean * count)
    tl.store(partials + 2 * programs + program, squares)


@triton.jit
def merge_moments(partials, moments, programs, CHUNK: tl.constexpr):
    """Chan's merge of what all programs left, in their order -> count, mean, squared deviations in `moments`."""
    count = grid_sum(partials, 0, programs)
    mean = grid_sum(partials, 1, programs) / tl.maximum(count, 1.0)
    squares = grid_sum(partials, 2, programs)
    lane = tl.arange(0, CHUNK)
    between = tl.zeros([CHUNK], tl.float64)
    start = 0
    while start < programs:
        there = start + lane < programs
        n = tl.load(partials + start + lane, mask=there, other=0.0, cache_modifier=".cg")
        sums = tl.load(partials + programs + start + lane, mask=there, other=0.0, cache_modifier=".cg")
        off = tl.where(n > 0, sums / tl.maximum(n, 1.0) - mean, 0.0)
        between += n * off * off
        start += CHUNK
    tl.store(moments, count)
    tl.store(moments + 1, mean)
    tl.store(moments + 2, squares + tl.sum(between, 0))


@triton.jit
def tile_moments_of(x, valid):
    """Count, mean and squared deviations of a tile, in two passes over registers."""
    x = x.to(tl.float64)
    n = tl.sum(valid.to(tl.float64), 0)
    mean = tl.sum(x, 0) / tl.maximum(n, 1.0)
    off = tl.where(valid, x - mean, 0.0)
    return n, mean, tl.sum(off * off, 0)


@triton.jit
def join_moments(count, mean, squares, n, tile_mean, tile_squares):
    """Chan's merge of a row's moments so far with those of a tile; a tile without tokens changes nothing."""
    both = tl.maximum(count + n, 1.0)
    shift = tl.where(n > 0, tile_mean - mean, 0.0)
    squares += tile_squares + shift * shift * (count * n / both)
    return count + n, mean + shift * (n / both), squares


@triton.jit
def row_moments(tile_moments, ends, tiles, partials, finished, moments, TILE: tl.constexpr):
    """Joins a row's tiles, right to left, as `triton_scan.gae_rows` does; the last program merges the rows."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], tl.float64)
    mean = tl.zeros([], tl.float64)
    squares = tl.zeros([], tl.float64)
    for tile in range(tl.cdiv(tl.load(ends + row), TILE)):
        place = tile_moments + 3 * (row * tiles + tile)
        n = tl.load(place)
        count, mean, squares = join_moments(count, mean, squares, n, tl.load(place + 1), tl.load(place + 2))
    leave_moments(partials, tl.program_id(0), tl.num_programs(0), count, mean, squares)
    if arrived_last(finished):
        merge_moments(partials, moments, tl.num_programs(0), TILE)


@triton.jit
def whiten_moments(
    x,  # [rows, steps], any float dtype
    mask,  # bool
    rows,
    steps,
    partials,  # [3, programs] float64
    finished,
    moments,  # [3] float64
    TOKENS: tl.constexpr,
):
    row = (tl.program_id(0) % rows).to(tl.int64)
    block = (tl.program_id(0) // rows).to(tl.int64)
    begin = first_valid(mask + row * steps, steps) + block * TOKENS
    lane = tl.arange(0, TOKENS)
    inside = lane < steps - begin
    place = row * steps + begin
    valid = inside & (tl.load(mask + place + lane, mask=inside, other=0) != 0)
    # The load does not wait for the mask.
    x = tl.where(valid, tl.load(x + place + lane, mask=inside, other=0.0), 0.0)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    count, mean, squares = tile_moments_of(x, valid)
    leave_moments(partials, program, programs, count, mean, squares)
    if arrived_last(finished):
        merge_moments(partials, moments, programs, TOKENS)


@triton.jit
def whiten_apply(
    x,
    mask,
    moments,
    total,
    eps,
    out,  # float32
    SHIFT_MEAN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = at < total
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    x = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
    count = tl.load(moments)
    mean = tl.load(moments + 1)
    variance = tl.load(moments + 2) / tl.maximum(count - 1.0, 1.0)
    whitened = (x - mean) * (1.0 / tl.sqrt(variance + eps))
    if not SHIFT_MEAN:
        whitened += mean
    tl.store(out + at, tl.where(valid, whitened, 0.0).to(tl.float32), mask=inside)


def whiten_moments_triton(x: Tensor, mask: Tensor) -> Tensor:
    rows, steps, programs = blocks_of(x.shape, WHITEN_TOKENS)
    partials = torch.empty((3, programs), dtype=torch.float64, device=x.device)
    moments = torch.empty(3, dtype=torch.float64, device=x.device)
    with on_device(x):
        whiten_moments[(programs,)](
            x.contiguous(), mask.contiguous(), rows, steps, partials, finish_counter(x.device), moments,
            TOKENS=WHITEN_TOKENS, **OPTIONS,
        )  # fmt: skip
    return moments


def whiten_apply_triton(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            whiten_apply[(triton.cdiv(x.numel(), WHITEN_TOKENS),)](
                x.contiguous(), mask.contiguous(), moments.contiguous(), x.numel(), eps, out,
                SHIFT_MEAN=shift_mean, TOKENS=WHITEN_TOKENS, **OPTIONS,
            )  # fmt: skip
    return out


def compile_cases() -> Iterator[CompileCase]:
    tensors = {"x": "*fp32", "mask": "*i1", "partials": "*fp64", "finished": "*i32", "moments": "*fp64", "out": "*fp32"}
    types = {**tensors, **dict.fromkeys(("rows", "steps", "total"), "i32"), "eps": "fp32"}
    fixed, options, warps = {"TOKENS": WHITEN_TOKENS}, {"enable_fp_fusion": False}, OPTIONS["num_warps"]
    yield CompileCase("whiten_moments", whiten_moments, types, fixed, warps, options=options)
    for shift in (True, False):
        name = f"whiten_apply: {'mean removed' if shift else 'mean kept'}"
        yield CompileCase(name, whiten_apply, types, {**fixed, "SHIFT_MEAN": shift}, warps, options=options)
