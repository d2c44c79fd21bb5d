# mypy: allow-untyped-defs
"""Device functions that several ops' Triton kernels call. Imports triton: only `triton_*.py` modules import this.

Rows. An elementwise kernel that sums up takes `[rows, steps]` in blocks of `TOKENS`, counted in each row from its first
valid token on; program p takes block p // rows of row p % rows. Padding on either side then moves no token to another
lane, and only appends programs, whose partials are zeros.

Grid-wide sums. Every program leaves one float64 partial a sum in `partials[sum, program]`; the program that finishes
last adds them up. It adds in the order of the programs, not of their finishing, so a result has the same bits every
time. It also sets the counter back to 0 for the next launch (`_triton.finish_counter`). That makes a loss with all its
statistics one launch and no wait.
"""

import math

import triton
import triton.language as tl

__all__ = [
    "TOKENS",
    "arrived_last",
    "blocks_of",
    "clamp",
    "exp_expm1",
    "exp_parts",
    "first_valid",
    "grid_max",
    "grid_sum",
    "log1p",
    "row_length",
    "row_tokens",
]

TOKENS = 512  # that a program of an elementwise kernel takes: 64 programs for 32k tokens
_CHUNK = tl.constexpr(1024)  # partials that are added at a time
_SEARCH = tl.constexpr(2048)  # tokens of a mask that are read at a time: 16 a thread


def blocks_of(shape: tuple[int, ...], tokens: int = TOKENS) -> tuple[int, int, int]:
    """`(rows, steps, programs)` of a kernel over tokens of this shape, time last, `tokens` of a row a program.

    An empty batch is one row of no steps and one program, to write its zeros.
    """
    if 0 in shape:
        return 1, 0, 1
    rows, steps = math.prod(shape[:-1]), shape[-1] if shape else 1
    return rows, steps, rows * triton.cdiv(steps, tokens)


@triton.jit
def first_valid(mask, steps):
    """Place of a row's first valid token, int64, or 0; `mask` points to the row."""
    steps = tl.zeros([], tl.int64) + steps
    lane = tl.arange(0, _SEARCH)
    first = tl.zeros([], tl.int64)
    start = tl.zeros([], tl.int64)
    if steps > 0:
        start = tl.where(tl.load(mask) != 0, steps, start)  # as where rows are padded on the right: no search
    while start < steps:
        valid = tl.load(mask + start + lane, mask=lane < steps - start, other=0) != 0
        nearest = tl.min(tl.where(valid, lane, _SEARCH), 0)
        first = tl.where(nearest < _SEARCH, start + nearest, first)
        start = tl.where(nearest < _SEARCH, steps, start + _SEARCH)  # leave the loop where one is found
    return first


@triton.jit
def row_tokens(mask, rows, steps, TOKENS: tl.constexpr):
    """This program's tokens, as above -> row, places [TOKENS], whether they exist, and whether they are valid."""
    row = (tl.program_id(0) % rows).to(tl.int64)
    block = (tl.program_id(0) // rows).to(tl.int64)
    steps = tl.zeros([], tl.int64) + steps
    mask += row * steps
    place = block * TOKENS + tl.arange(0, TOKENS)
    inside = place < steps
    at = first_valid(mask, steps) + place
    at = tl.where(at < steps, at, at - steps)  # the tokens before the first valid one come last
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    return row, row * steps + at, inside, valid


@triton.jit
def row_length(mask, row, steps):
    """Valid tokens of a row."""
    steps = tl.zeros([], tl.int64) + steps
    lane = tl.arange(0, _SEARCH)
    count = tl.zeros([_SEARCH], tl.int32)
    start = tl.zeros([], tl.int64)
    while start < steps:
        here = tl.load(mask + row * steps + start + lane, mask=lane < steps - start, other=0)
        count += (here != 0).to(tl.int32)
        start += _SEARCH
    return tl.sum(count, 0)


@triton.jit
def clamp(x, bound):
    """By comparison: `tl.clamp` may drop a NaN, and a NaN on a valid token must be seen."""
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))


@triton.jit
def exp_parts(x):
    """`(e^x, e^x - 1 - x)` for |x| <= 20, the second without cancellation near 0; as csrc/common/scalar_math.h."""
    n = tl.floor(tl.fma(x, 1.44269504089, 0.5))
    r = tl.fma(n, -0.693359375, x)  # ln 2 in two parts: n times the first, of 9 bits, is exact
    r = tl.fma(n, 2.12194440e-4, r)
    q = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    q = tl.fma(q, r, 1.0 / 120)
    q = tl.fma(q, r, 1.0 / 24)
    q = tl.fma(q, r, 1.0 / 6)
    q = tl.fma(q, r, 0.5)
    tail = (r * r) * q
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    e = (1.0 + (r + tail)) * power
    return e, tl.where(n == 0, tail, (e - 1.0) - x)


@triton.jit
def exp_expm1(x):
    """`(e^x, e^x - 1)` of any x, without cancellation near 0."""
    # A NaN stays. No result needs x bounded, but registers do: without it place_kernel spills on sm_90.
    e, tail = exp_parts(tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x)))
    e = tl.where(x < -87.0, 0.0, tl.where(x > 88.0, float("inf"), e))
    return e, tl.where((x > -0.34) & (x < 0.34), x + tail, e - 1.0)  # there n of exp_parts is 0


@triton.jit
def log1p(x):
    """log(1 + x), without losing the digits of a small x."""
    u = 1.0 + x
    lost = ((u - 1.0) - x) / u  # of x, in 1 + x; no number where that is 0 or infinite
    return tl.log(u) - tl.where(lost == lost, lost, 0.0)


@triton.jit
def arrived_last(finished):
    """Whether all other programs have left their partials; then they can be read. Called once by each program."""
    tl.debug_barrier()  # the partials are stored by any of the threads, the ticket is drawn by one
    ticket = tl.atomic_add(finished, 1, sem="acq_rel")
    last = ticket == tl.num_programs(0) - 1
    if last:
        tl.store(finished, 0)
    return last


@triton.jit
def grid_sum(partials, which, programs):
    """Sum `which` over the programs."""
    at = tl.arange(0, _CHUNK)
    total = tl.zeros([_CHUNK], tl.float64)
    start = 0
    while start < programs:
        # .cg reads L2, where the other programs' stores are; L1 knows nothing of them.
        place = which * programs + start + at
        total += tl.load(partials + place, mask=start + at < programs, other=0.0, cache_modifier=".cg")
        start += _CHUNK
    return tl.sum(total, 0)


@triton.jit
def grid_max(partials, which, programs):
    """Maximum `which` of values that are not negative; drops a NaN."""
    at = tl.arange(0, _CHUNK)
    largest = tl.zeros([_CHUNK], tl.float64)
    start = 0
    while start < programs:
        place = which * programs + start + at
        part = tl.load(partials + place, mask=start + at < programs, other=0.0, cache_modifier=".cg")
        largest = tl.maximum(largest, part)
        start += _CHUNK
    return tl.max(largest, 0)
