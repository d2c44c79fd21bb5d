# mypy: allow-untyped-defs
"""The policy and value losses on Triton: gradient, loss, every statistic in one launch. `reference.py` has the maths.

A program takes 512 tokens of a row: it writes their gradient and leaves one float64 partial of every sum; the program
that finishes last adds the partials and writes loss and statistics. Nothing waits, and nothing is counted beforehand:
where the divisor is a count of the mask (valid tokens, or rows that have some), the gradient is left undivided, and
`weight`, what it is still to be multiplied by, is written beside the loss. The backward multiplies by it together with
the upstream gradient, in one launch for all gradients (`scale`). A row's length is counted by its own programs.

Bits: a row's tokens are counted from its first valid one, and programs with nothing to add add exact zeros at the end
of the order (`_triton_language.py`). So padding, on either side of the rows, changes no bit of loss, statistics and
gradients. A packed `[N]` is one row: its sums are the same numbers in another order, equal to the padded ones within
float64's rounding before the last rounding to float32.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels._triton import CompileCase, finish_counter, on_device
from srppo_kernels._triton_language import (
    TOKENS,
    arrived_last,
    blocks_of,
    clamp,
    exp_parts,
    grid_max,
    grid_sum,
    row_length,
    row_tokens,
)
from srppo_kernels.ppo_loss.reference import LOG_RATIO_BOUND, POLICY_STATS, VALUE_STATS

__all__ = ["compile_cases", "ppo_loss_triton", "scale_triton", "value_loss_triton"]

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
POLICY_SUMS = 12
VALUE_SUMS = 8
_BOUND = tl.constexpr(LOG_RATIO_BOUND)
# Where the divisor comes from; from _COUNT on it is known at the end, and gradients wait for it.
_GIVEN, _TENSOR, _COUNT, _ROWS = (tl.constexpr(i) for i in range(4))


@triton.jit
def _reciprocal(divisor, divisor_tensor, FROM: tl.constexpr):
    """Of a divisor that is known, float32; one of 0 counts as 1. 1 where it is still to be counted."""
    by = tl.zeros([], tl.float32) + divisor
    if FROM == _TENSOR:
        by = tl.load(divisor_tensor).to(tl.float32)
    return tl.div_rn(tl.zeros([], tl.float32) + 1.0, tl.where(by == 0.0, 1.0, by))


@triton.jit
def _store_loss(loss, weight, total, by):
    """The sum over its divisor, in float64, and what the gradients are to be multiplied by."""
    by = tl.where(by == 0.0, 1.0, by)
    tl.store(loss, (total / by).to(tl.float32))
    tl.store(weight, (1.0 / by).to(tl.float32))


@triton.jit
def _leave(partials, which, x, programs):
    """This program's partial of sum `which`."""
    tl.store(partials + which * programs + tl.program_id(0), tl.sum(x.to(tl.float64), 0))


@triton.jit
def _variance(total, squares, count):
    mean = total / count
    square = squares / count
    variance = square - mean * mean
    return tl.where(variance < 1e-13 * square, 0.0, variance)  # what rounding leaves of numbers that do not vary


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
    rows,
    steps,
    d_logprobs,  # float32; from _COUNT on still to be multiplied by the weight
    d_entropy,
    partials,  # [POLICY_SUMS, programs] float64
    finished,
    loss,  # 0-d float32
    weight,  # 0-d float32, or None
    stats,  # float32, in the order of POLICY_STATS
    FROM: tl.constexpr,
    BY_ROW: tl.constexpr,  # every row's tokens weigh 1 / length
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row, at, inside, valid = row_tokens(mask, rows, steps, TOKENS)
    each = _reciprocal(divisor, divisor_tensor, FROM)
    if BY_ROW:
        length = row_length(mask, row, steps)
        each = tl.div_rn(each, tl.maximum(length, 1).to(tl.float32))
        if FROM == _ROWS:
            first_of_row = (program < rows) & (length > 0)
            tl.store(partials + 11 * programs + program, first_of_row.to(tl.float64))

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
    tl.store(d_logprobs + at, gradient * each, mask=inside)
    token_loss = tl.where(valid, -(advantage * used), 0.0).to(tl.float64)
    if entropy is not None:
        h = tl.load(entropy + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(d_entropy + at, tl.where(valid, -entropy_coef * each, 0.0), mask=inside)
        token_loss -= (entropy_coef * h).to(tl.float64)
        _leave(partials, 8, h, programs)
    off = tl.where(valid, ratio - 1.0, 0.0).to(tl.float64)  # around 1, where ratios are: the variance does not cancel

    _leave(partials, 0, token_loss * each.to(tl.float64), programs)
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
        total = grid_sum(partials, 0, programs)
        if FROM == _COUNT:
            _store_loss(loss, weight, total, count)
        elif FROM == _ROWS:
            _store_loss(loss, weight, total, grid_sum(partials, 11, programs))
        else:
            tl.store(loss, total.to(tl.float32))
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
    rows,
    steps,
    d_values,  # float32, as d_logprobs above
    partials,  # [VALUE_SUMS, programs] float64
    finished,
    loss,
    weight,
    stats,  # float32, in the order of VALUE_STATS
    FROM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    programs = tl.num_programs(0)
    _, at, inside, valid = row_tokens(mask, rows, steps, TOKENS)
    each = _reciprocal(divisor, divisor_tensor, FROM)

    value = tl.load(values + at, mask=valid, other=0.0).to(tl.float32)
    old = tl.load(old_values + at, mask=valid, other=0.0).to(tl.float32)
    target = tl.load(targets + at, mask=valid, other=0.0).to(tl.float32)
    error = value - target
    moved = value - old
    clipped_error = (old + clamp(moved, clip)) - target
    square = error * error
    clipped_square = clipped_error * clipped_error
    clipped = valid & ((moved > clip) | (moved < -clip)) & (clipped_square > square)
    tl.store(d_values + at, tl.where(clipped, 0.0, error) * each, mask=inside)
    token_loss = 0.5 * tl.where(clipped, clipped_square, square)
    error64 = error.to(tl.float64)
    target64 = target.to(tl.float64)

    _leave(partials, 0, token_loss.to(tl.float64) * each.to(tl.float64), programs)
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
        total = grid_sum(partials, 0, programs)
        if FROM == _COUNT:
            _store_loss(loss, weight, total, count)
        else:
            tl.store(loss, total.to(tl.float32))
        tl.store(stats, (grid_sum(partials, 1, programs) / n).to(tl.float32))
        tl.store(stats + 1, (squares / n).to(tl.float32))
        tl.store(stats + 2, (grid_sum(partials, 4, programs) / n).to(tl.float32))
        tl.store(stats + 3, (target_sum / n).to(tl.float32))
        of_targets = _variance(target_sum, grid_sum(partials, 6, programs), n)
        of_errors = _variance(grid_sum(partials, 2, programs), squares, n)
        varies = of_targets > 0.0
        explained = tl.where(varies, 1.0 - of_errors / tl.where(varies, of_targets, 1.0), 0.0)
        tl.store(stats + 4, of_targets.to(tl.float32))
        tl.store(stats + 5, of_errors.to(tl.float32))
        tl.store(stats + 6, explained.to(tl.float32))
        tl.store(stats + 7, count.to(tl.float32))


@triton.jit
def scale(
    upstream,  # 0-d, any float dtype
    weight,  # 0-d float32, or None
    first,  # float32 gradients
    second,  # or None
    total,
    out_first,
    out_second,
    TOKENS: tl.constexpr,
):
    by = tl.load(upstream).to(tl.float32)
    if weight is not None:
        by *= tl.load(weight)
    at = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = at < total
    tl.store(out_first + at, tl.load(first + at, mask=inside) * by, mask=inside)
    if second is not None:
        tl.store(out_second + at, tl.load(second + at, mask=inside) * by, mask=inside)


class _Launch:
    """Outputs, scratch and the source of the divisor of one loss over tokens of this shape."""

    def __init__(
        self, mask: Tensor, reduction: str, divisor: float | None, divisor_tensor: Tensor | None, sums: int, stats: int
    ) -> None:
        device = mask.device
        self.rows, self.steps, self.programs = blocks_of(mask.shape)
        self.by_row = reduction == "sequence_mean"
        number, source = 1.0, _GIVEN
        if divisor_tensor is not None:
            source = _TENSOR
        elif divisor is not None:
            number = divisor
        elif reduction == "sequence_mean":
            source = _ROWS
        elif reduction == "token_mean":
            source = _COUNT
        elif reduction == "constant_length":
            number = float(mask.numel())
        self.source = source.value
        self.divisor = (number, divisor_tensor)
        self.loss = torch.empty((), dtype=torch.float32, device=device)
        self.weight = torch.empty((), dtype=torch.float32, device=device) if self.source >= _COUNT.value else None
        self.stats = torch.empty(stats, dtype=torch.float32, device=device)
        self.scratch = (torch.empty((sums, self.programs), dtype=torch.float64, device=device), finish_counter(device))

    @property
    def weight_or_empty(self) -> Tensor:
        return self.loss.new_empty(0) if self.weight is None else self.weight


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, d_logprobs, d_entropy (empty without entropy), statistics, weight (empty where it is applied)."""
    tokens = [x.contiguous() for x in (logprobs, old_logprobs, advantages, mask)]
    d_logprobs = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
    d_entropy = d_logprobs.new_empty(0) if entropy is None else torch.empty_like(d_logprobs)
    bounds = (1.0 - clip_low, 1.0 + clip_high, math.inf if dual_clip is None else dual_clip, entropy_coef)
    with on_device(logprobs):
        launch = _Launch(tokens[3], reduction, divisor, divisor_tensor, POLICY_SUMS, len(POLICY_STATS))
        policy_loss[(launch.programs,)](
            *tokens, None if entropy is None else entropy.contiguous(), *bounds, *launch.divisor, launch.rows,
            launch.steps, d_logprobs, d_entropy, *launch.scratch, launch.loss, launch.weight, launch.stats,
            FROM=launch.source, BY_ROW=launch.by_row, TOKENS=TOKENS, **OPTIONS,
        )  # fmt: skip
    return launch.loss, d_logprobs, d_entropy, launch.stats, launch.weight_or_empty


def value_loss_triton(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    divisor: float | None,
    divisor_tensor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss, d_values, statistics, weight (empty where it is applied)."""
    tokens = [x.contiguous() for x in (values, old_values, returns, mask)]
    d_values = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    with on_device(values):
        launch = _Launch(tokens[3], "token_mean", divisor, divisor_tensor, VALUE_SUMS, len(VALUE_STATS))
        value_loss[(launch.programs,)](
            *tokens, math.inf if clip is None else clip, *launch.divisor, launch.rows, launch.steps, d_values,
            *launch.scratch, launch.loss, launch.weight, launch.stats, FROM=launch.source, TOKENS=TOKENS, **OPTIONS,
        )  # fmt: skip
    return launch.loss, d_values, launch.stats, launch.weight_or_empty


def scale_triton(upstream: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients (the second may be empty) times `upstream`, and times `weight` unless that is empty."""
    out_first, out_second = torch.empty_like(first), torch.empty_like(second)
    if first.numel():
        with on_device(first):
            scale[(triton.cdiv(first.numel(), 2 * TOKENS),)](
                upstream, weight if weight.numel() else None, first, second if second.numel() else None, first.numel(),
                out_first, out_second, TOKENS=2 * TOKENS, **OPTIONS,
            )  # fmt: skip
    return out_first, out_second


def compile_cases() -> Iterator[CompileCase]:
    tokens = ("logprobs", "old_logprobs", "advantages", "entropy", "values", "old_values", "targets", "divisor_tensor")
    outputs = ("d_logprobs", "d_entropy", "d_values", "loss", "weight", "stats")
    numbers = ("low", "high", "dual", "entropy_coef", "divisor", "clip")
    types = {
        **dict.fromkeys((*tokens, *outputs), "*fp32"), **dict.fromkeys(numbers, "fp32"), "mask": "*i1",
        **dict.fromkeys(("rows", "steps"), "i32"), "partials": "*fp64", "finished": "*i32",
    }  # fmt: skip
    options = {"enable_fp_fusion": False}
    for name, source, by_row, entropy in (
        ("token mean", _COUNT, False, False),
        ("token mean, entropy", _COUNT, False, True),
        ("sequence mean, entropy", _ROWS, True, True),
        ("normalizer, entropy", _TENSOR, False, True),
    ):
        given: dict[str, Any] = {"FROM": source.value, "TOKENS": TOKENS}
        given |= {"weight": None} if source.value == _TENSOR.value else {"divisor_tensor": None}
        policy = {**given, "BY_ROW": by_row, **({} if entropy else {"entropy": None})}
        yield CompileCase(f"policy_loss: {name}", policy_loss, types, policy, 4, options=options)
        if not by_row and not (entropy and source.value == _COUNT.value):
            name = name.removesuffix(", entropy")
            yield CompileCase(f"value_loss: {name}", value_loss, types, given, 4, options=options)
    gradients = dict.fromkeys(("upstream", "weight", "first", "second", "out_first", "out_second"), "*fp32")
    types = {**gradients, "total": "i32"}
    yield CompileCase("scale: two gradients", scale, types, {"TOKENS": 2 * TOKENS}, 4, options=options)
