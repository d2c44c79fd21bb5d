# mypy: allow-untyped-defs
"""The policy and value losses on Triton: gradient, loss and every statistic. `reference.py` has the maths.

A program takes 512 tokens: it writes their gradient and leaves one float64 partial of every sum; the program that
finishes last adds the partials and writes loss and statistics. So a loss is one launch that waits for nothing, unless
its divisor is a count of the mask that must be known before the first gradient: up to `COUNT_HERE` tokens every
program counts the whole mask itself, out of L2, which is quicker than a launch; beyond, and for the lengths of the
rows, a first launch counts.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels._triton import CompileCase, finish_counter, on_device
from srppo_kernels._triton_language import TOKENS, arrived_last, clamp, exp_parts, grid_max, grid_sum
from srppo_kernels.ppo_loss.reference import LOG_RATIO_BOUND, POLICY_STATS, VALUE_STATS

__all__ = ["compile_cases", "ppo_loss_triton", "value_loss_triton"]

COUNT_HERE = 65536
SHARE = 32768  # tokens that a program of the counting launch takes
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
POLICY_SUMS = 11
VALUE_SUMS = 8
_BOUND = tl.constexpr(LOG_RATIO_BOUND)
# Where the divisor comes from.
_GIVEN, _TENSOR, _MASK, _COUNTS, _ROWS = (tl.constexpr(i) for i in range(5))


@triton.jit
def _count(mask, begin, end, CHUNK: tl.constexpr):
    lane = tl.arange(0, CHUNK)
    count = tl.zeros([CHUNK], tl.int32)
    start = begin
    while start < end:
        at = start + lane
        count += tl.load(mask + at, mask=at < end, other=0).to(tl.int32)
        start += CHUNK
    return tl.sum(count.to(tl.int64), 0)


@triton.jit
def count_valid(mask, share, total, counts, CHUNK: tl.constexpr):
    """`counts[p]` int64: valid tokens of `mask[p share : (p + 1) share]`."""
    begin = tl.program_id(0).to(tl.int64) * share
    tl.store(counts + tl.program_id(0), _count(mask, begin, tl.minimum(begin + share, total), CHUNK))


@triton.jit
def _divisor(divisor, divisor_tensor, mask, counts, shares, total, FROM: tl.constexpr, CHUNK: tl.constexpr):
    """What the sum is divided by, float32; a divisor of 0 counts as 1."""
    by = divisor
    if FROM == _TENSOR:
        by = tl.load(divisor_tensor).to(tl.float32)
    elif FROM == _MASK:
        by = _count(mask, tl.zeros([], tl.int64), total, CHUNK).to(tl.float32)
    elif FROM == _COUNTS or FROM == _ROWS:  # noqa: SIM109 - Triton compares constexprs one by one
        lane = tl.arange(0, CHUNK)
        sums = tl.zeros([CHUNK], tl.int64)
        start = 0
        while start < shares:
            n = tl.load(counts + start + lane, mask=start + lane < shares, other=0)
            sums += (n > 0).to(tl.int64) if FROM == _ROWS else n
            start += CHUNK
        by = tl.sum(sums, 0).to(tl.float32)
    return tl.where(by == 0.0, 1.0, by)


@triton.jit
def _leave(partials, which, x, programs):
    """This program's partial of sum `which`."""
    tl.store(partials + which * programs + tl.program_id(0), tl.sum(x.to(tl.float64), 0))


@triton.jit
def _variance(total, squares, count):
    mean = total / count
    variance = squares / count - mean * mean
    return tl.where(variance < 0.0, 0.0, variance)


@triton.jit
def policy_loss(
    logprobs,  # [B, T] or [N], any float dtype; the next two and entropy likewise
    old_logprobs,
    advantages,
    mask,  # bool
    entropy,  # or None
    low,  # 1 - clip_low
    high,  # 1 + clip_high
    dual,  # infinity for none
    entropy_coef,
    divisor,  # float32, where it is given as a number
    divisor_tensor,  # 0-d, or None
    counts,  # int64 of count_valid, or None
    shares,  # how many
    steps,
    total,
    d_logprobs,  # float32
    d_entropy,
    partials,  # [POLICY_SUMS, programs] float64
    finished,
    loss,  # 0-d float32
    stats,  # float32, in the order of POLICY_STATS
    FROM: tl.constexpr,
    BY_ROW: tl.constexpr,  # every row's tokens weigh 1 / length
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    at = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = at < total
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    by = _divisor(divisor, divisor_tensor, mask, counts, shares, total, FROM, 4 * TOKENS)
    weight = tl.div_rn(tl.zeros([TOKENS], tl.float32) + 1.0, tl.zeros([TOKENS], tl.float32) + by)
    if BY_ROW:
        length = tl.load(counts + at // steps, mask=inside, other=1)
        weight = tl.div_rn(weight, tl.maximum(length, 1).to(tl.float32))

    new = tl.load(logprobs + at, mask=valid, other=0.0).to(tl.float32)
    old = tl.load(old_logprobs + at, mask=valid, other=0.0).to(tl.float32)
    advantage = tl.load(advantages + at, mask=valid, other=0.0).to(tl.float32)
    raw = new - old
    d = clamp(raw, _BOUND)
    ratio, k3 = exp_parts(d)
    is_high = valid & (advantage > 0.0) & (ratio > high)
    is_low = valid & (advantage < 0.0) & (ratio < low)
    is_dual = valid & (advantage < 0.0) & (ratio > dual)
    used = tl.where(is_high, high, tl.where(is_low, low, tl.where(is_dual, dual, ratio)))
    flat = is_high | is_low | is_dual | (raw > _BOUND) | (raw < -_BOUND)  # a NaN is not: it must be seen
    gradient = tl.where(valid & (flat == 0), -(advantage * ratio), 0.0)
    tl.store(d_logprobs + at, gradient * weight, mask=inside)
    token_loss = tl.where(valid, -(advantage * used), 0.0).to(tl.float64)
    if entropy is not None:
        h = tl.load(entropy + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(d_entropy + at, tl.where(valid, -entropy_coef * weight, 0.0), mask=inside)
        token_loss -= (entropy_coef * h).to(tl.float64)
        _leave(partials, 8, h, programs)
    off = tl.where(valid, ratio - 1.0, 0.0).to(tl.float64)  # around 1, where ratios are: the variance does not cancel

    _leave(partials, 0, token_loss * weight.to(tl.float64), programs)
    _leave(partials, 1, tl.where(valid, k3, 0.0), programs)
    _leave(partials, 2, tl.where(valid, d, 0.0), programs)
    _leave(partials, 3, off, programs)
    _leave(partials, 4, off * off, programs)
    _leave(partials, 5, is_low, programs)
    _leave(partials, 6, is_high, programs)
    _leave(partials, 7, is_dual, programs)
    _leave(partials, 9, valid, programs)
    largest = tl.max(tl.where(valid, ratio, 0.0), 0)
    tl.store(partials + 10 * programs + program, largest.to(tl.float64))

    if arrived_last(finished):
        count = grid_sum(partials, 9, programs)
        n = tl.maximum(count, 1.0)
        off_sum = grid_sum(partials, 3, programs)
        mean = tl.where(count > 0.0, 1.0 + off_sum / n, 0.0)
        ratio_max = grid_max(partials, 10, programs)
        ratio_max = tl.where(mean == mean, ratio_max, mean)  # the maximum drops a NaN, the mean has it
        entropy_mean = tl.zeros([], tl.float64)
        if entropy is not None:
            entropy_mean = grid_sum(partials, 8, programs) / n
        tl.store(loss, grid_sum(partials, 0, programs).to(tl.float32))
        tl.store(stats, (grid_sum(partials, 1, programs) / n).to(tl.float32))
        tl.store(stats + 1, (-grid_sum(partials, 2, programs) / n).to(tl.float32))
        tl.store(stats + 2, (grid_sum(partials, 5, programs) / n).to(tl.float32))
        tl.store(stats + 3, (grid_sum(partials, 6, programs) / n).to(tl.float32))
        tl.store(stats + 4, (grid_sum(partials, 7, programs) / n).to(tl.float32))
        tl.store(stats + 5, mean.to(tl.float32))
        tl.store(stats + 6, ratio_max.to(tl.float32))
        tl.store(stats + 7, _variance(off_sum, grid_sum(partials, 4, programs), n).to(tl.float32))
        tl.store(stats + 8, entropy_mean.to(tl.float32))
        tl.store(stats + 9, count.to(tl.float32))


@triton.jit
def value_loss(
    values,  # [B, T] or [N], any float dtype; the next two likewise
    old_values,
    targets,  # returns
    mask,  # bool
    clip,  # infinity for none
    divisor,
    divisor_tensor,
    counts,
    shares,
    total,
    d_values,  # float32
    partials,  # [VALUE_SUMS, programs] float64
    finished,
    loss,
    stats,  # float32, in the order of VALUE_STATS
    FROM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    at = program.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = at < total
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    by = _divisor(divisor, divisor_tensor, mask, counts, shares, total, FROM, 4 * TOKENS)
    weight = tl.div_rn(tl.zeros([TOKENS], tl.float32) + 1.0, tl.zeros([TOKENS], tl.float32) + by)

    value = tl.load(values + at, mask=valid, other=0.0).to(tl.float32)
    old = tl.load(old_values + at, mask=valid, other=0.0).to(tl.float32)
    target = tl.load(targets + at, mask=valid, other=0.0).to(tl.float32)
    error = value - target
    moved = value - old
    clipped_error = (old + clamp(moved, clip)) - target
    square = error * error
    clipped_square = clipped_error * clipped_error
    clipped = valid & ((moved > clip) | (moved < -clip)) & (clipped_square > square)
    tl.store(d_values + at, tl.where(clipped, 0.0, error) * weight, mask=inside)
    token_loss = 0.5 * tl.where(clipped, clipped_square, square)
    error64 = error.to(tl.float64)
    target64 = target.to(tl.float64)

    _leave(partials, 0, token_loss.to(tl.float64) * weight.to(tl.float64), programs)
    _leave(partials, 1, clipped, programs)
    _leave(partials, 2, error64, programs)
    _leave(partials, 3, error64 * error64, programs)
    _leave(partials, 4, value, programs)
    _leave(partials, 5, target, programs)
    _leave(partials, 6, target64 * target64, programs)
    _leave(partials, 7, valid, programs)

    if arrived_last(finished):
        count = grid_sum(partials, 7, programs)
        n = tl.maximum(count, 1.0)
        squares = grid_sum(partials, 3, programs)
        target_sum = grid_sum(partials, 5, programs)
        tl.store(loss, grid_sum(partials, 0, programs).to(tl.float32))
        tl.store(stats, (grid_sum(partials, 1, programs) / n).to(tl.float32))
        tl.store(stats + 1, (squares / n).to(tl.float32))
        tl.store(stats + 2, (grid_sum(partials, 4, programs) / n).to(tl.float32))
        tl.store(stats + 3, (target_sum / n).to(tl.float32))
        tl.store(stats + 4, _variance(target_sum, grid_sum(partials, 6, programs), n).to(tl.float32))
        tl.store(stats + 5, _variance(grid_sum(partials, 2, programs), squares, n).to(tl.float32))
        tl.store(stats + 6, count.to(tl.float32))


class _Launch:
    """Outputs, scratch and the source of the divisor of one loss over `mask`."""

    def __init__(
        self, mask: Tensor, reduction: str, divisor: float | None, divisor_tensor: Tensor | None, sums: int, stats: int
    ) -> None:
        device, self.total = mask.device, mask.numel()
        self.steps = max(mask.shape[-1], 1)
        # One program at least, to write the zeros of an empty batch.
        self.programs = max(1, triton.cdiv(self.total, TOKENS))
        self.partials = torch.empty((sums, self.programs), dtype=torch.float64, device=device)
        self.loss = torch.empty((), dtype=torch.float32, device=device)
        self.stats = torch.empty(stats, dtype=torch.float32, device=device)
        self.by_row = reduction == "sequence_mean"
        self.counts: Tensor | None = None
        number, source = 1.0, _GIVEN
        if divisor_tensor is not None:
            source = _TENSOR
        elif divisor is not None:
            number = divisor
        elif reduction == "sequence_mean":
            source = _ROWS
        elif reduction == "token_mean":
            source = _MASK if self.total <= COUNT_HERE else _COUNTS
        elif reduction == "constant_length":
            number = float(self.total)
        self.source = source.value
        if self.total and (self.by_row or source.value == _COUNTS.value):
            share = self.steps if self.by_row else SHARE
            self.counts = torch.empty(triton.cdiv(self.total, share), dtype=torch.int64, device=device)
            count_valid[(len(self.counts),)](mask, share, self.total, self.counts, CHUNK=4 * TOKENS, **OPTIONS)
        elif not self.total:
            self.source, self.by_row = _GIVEN.value, False
        shares = 0 if self.counts is None else len(self.counts)
        self.divisor = (number, divisor_tensor, self.counts, shares)


def ppo_loss_triton(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    reduction: str,
    divisor: float | None,
    divisor_tensor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss, d_logprobs, d_entropy (empty without entropy), statistics."""
    tokens = [x.contiguous() for x in (logprobs, old_logprobs, advantages, mask)]
    d_logprobs = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
    d_entropy = d_logprobs.new_empty(0) if entropy is None else torch.empty_like(d_logprobs)
    bounds = (1.0 - clip_low, 1.0 + clip_high, math.inf if dual_clip is None else dual_clip, entropy_coef)
    with on_device(logprobs):
        launch = _Launch(tokens[3], reduction, divisor, divisor_tensor, POLICY_SUMS, len(POLICY_STATS))
        policy_loss[(launch.programs,)](
            *tokens, None if entropy is None else entropy.contiguous(), *bounds, *launch.divisor, launch.steps,
            launch.total, d_logprobs, d_entropy, launch.partials, finish_counter(logprobs.device), launch.loss,
            launch.stats, FROM=launch.source, BY_ROW=launch.by_row, TOKENS=TOKENS, **OPTIONS,
        )  # fmt: skip
    return launch.loss, d_logprobs, d_entropy, launch.stats


def value_loss_triton(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    divisor: float | None,
    divisor_tensor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, d_values, statistics."""
    tokens = [x.contiguous() for x in (values, old_values, returns, mask)]
    d_values = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    with on_device(values):
        launch = _Launch(tokens[3], "token_mean", divisor, divisor_tensor, VALUE_SUMS, len(VALUE_STATS))
        value_loss[(launch.programs,)](
            *tokens, math.inf if clip is None else clip, *launch.divisor, launch.total, d_values, launch.partials,
            finish_counter(values.device), launch.loss, launch.stats, FROM=launch.source, TOKENS=TOKENS, **OPTIONS,
        )  # fmt: skip
    return launch.loss, d_values, launch.stats


def compile_cases() -> Iterator[CompileCase]:
    tokens = ("logprobs", "old_logprobs", "advantages", "entropy", "values", "old_values", "targets", "divisor_tensor")
    outputs = ("d_logprobs", "d_entropy", "d_values", "loss", "stats")
    numbers = ("low", "high", "dual", "entropy_coef", "divisor", "clip")
    types = {
        **dict.fromkeys((*tokens, *outputs), "*fp32"), **dict.fromkeys(numbers, "fp32"), "mask": "*i1",
        **dict.fromkeys(("shares", "steps", "share"), "i32"), "total": "i64", "counts": "*i64", "partials": "*fp64",
        "finished": "*i32",
    }  # fmt: skip
    options = {"enable_fp_fusion": False}
    fixed = {"TOKENS": TOKENS}
    for name, source, by_row, entropy in (
        ("token mean", _MASK, False, False),
        ("token mean, many tokens, entropy", _COUNTS, False, True),
        ("sequence mean, entropy", _ROWS, True, True),
        ("normalizer, entropy", _TENSOR, False, True),
    ):
        given: dict[str, Any] = {} if entropy else {"entropy": None}
        given |= {} if source.value == _TENSOR.value else {"divisor_tensor": None}
        given |= {} if source.value in (_COUNTS.value, _ROWS.value) else {"counts": None}
        given |= {"FROM": source.value, **fixed}
        yield CompileCase(f"policy_loss: {name}", policy_loss, types, {**given, "BY_ROW": by_row}, 4, options=options)
        if not by_row:
            given.pop("entropy", None)
            yield CompileCase(
                f"value_loss: {name.removesuffix(', entropy')}", value_loss, types, given, 4, options=options
            )
    yield CompileCase("count_valid", count_valid, types, {"CHUNK": 4 * TOKENS}, 4, options=options)
