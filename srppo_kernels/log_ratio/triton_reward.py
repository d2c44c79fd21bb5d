# mypy: allow-untyped-defs
"""The self-reward on Triton: one launch, a program a row. `reference.py` has the maths and the order of operations.

One walk over a row writes every token's reward and its KL penalty, sums log pi_sft - log pi_base (in float64, a sum a
lane) and finds the last valid token, which gets the rest at the end. It begins at the row's first
valid token, so padding on either side moves no token to another lane and changes no bit. At 512 x 4096 there are four
rows a multiprocessor: what a walk takes is the latency of its loads, and 8 warps have twice as many on their way.

The gradient is plain torch (op.py): rewards are constants in training.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels._triton import CompileCase, on_device
from srppo_kernels._triton_language import clamp, exp_parts, first_valid, row_length

__all__ = ["compile_cases", "log_ratio_reward_triton"]

TILE = 1024
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _difference(a, b, at, valid):
    """a - b on valid tokens, 0 elsewhere."""
    left = tl.load(a + at, mask=valid, other=0.0).to(tl.float32)
    return left - tl.load(b + at, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _kl(d, ESTIMATOR: tl.constexpr):
    """Of one token, from d = log pi - log pi_ref."""
    if ESTIMATOR == 1:
        return d
    elif ESTIMATOR == 2:
        return 0.5 * d * d
    else:
        c = clamp(-d, 20.0)
        _, remainder = exp_parts(c)
        return remainder + (c + d)  # e^c - 1 + d with c = -d, but where it was clamped


@triton.jit
def reward_rows(
    sft,  # [B, T], any float dtype; base, policy and ref likewise
    base,
    mask,  # [B, T] bool
    policy,  # None without a KL penalty
    ref,
    truncated,  # [B] bool, or None
    std_tensor,  # 0-d, or None
    std,  # a number, where std_tensor is None
    scale,
    clip,  # infinity for none
    missing_eos,
    kl_coef,
    steps,
    reward,  # [B, T] float32
    penalty,  # [B, T] float32: -kl_coef kl; only with PARTS, as the next two
    score,  # [B] float32: the row's log-ratio as it is
    shaped,  # [B] float32: the row's reward before the KL penalty
    PER_TOKEN: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = row * steps  # in 64 bits; places within a row are counted in 32
    sft += first
    base += first
    mask += first
    reward += first
    if policy is not None:
        policy += first
        ref += first
    if PARTS:
        penalty += first
    lane = tl.arange(0, TILE)
    begin = first_valid(mask, steps).to(tl.int32)
    divisor = tl.zeros([], tl.float32) + std
    if std_tensor is not None:
        divisor = tl.load(std_tensor).to(tl.float32)
    if BY_LENGTH and PER_TOKEN:
        divisor = tl.maximum(row_length(mask, 0, steps), 1).to(tl.float32)
    cut = tl.zeros([], tl.float32)
    if truncated is not None:
        cut = tl.where(tl.load(truncated + row) != 0, missing_eos, 0.0).to(tl.float32)

    start = tl.zeros([], tl.int32)
    while start < begin:
        tl.store(reward + start + lane, tl.zeros([TILE], tl.float32), mask=start + lane < begin)
        if PARTS:
            tl.store(penalty + start + lane, tl.zeros([TILE], tl.float32), mask=start + lane < begin)
        start += TILE
    total = tl.zeros([TILE], tl.float64)
    shaped_sum = tl.zeros([TILE], tl.float64)
    count = tl.zeros([TILE], tl.int32)
    latest = tl.full([TILE], -1, tl.int32)
    start = begin
    while start < steps:
        at = start + lane
        inside = at < steps
        # All loads of a tile are on their way together: none waits for the mask.
        valid = tl.load(mask + at, mask=inside, other=0) != 0
        ratio = tl.where(valid, _difference(sft, base, at, inside), 0.0)
        total += ratio.to(tl.float64)
        if BY_LENGTH and not PER_TOKEN:
            count += valid.to(tl.int32)
        latest = tl.where(valid, at, latest)
        value = tl.zeros([TILE], tl.float32)
        if PER_TOKEN:
            value = clamp(tl.div_rn(ratio, tl.zeros([TILE], tl.float32) + divisor) * scale, clip)
            value = tl.where(valid, value, 0.0)
            shaped_sum += value.to(tl.float64)
        if policy is not None:
            kl = kl_coef * _kl(tl.where(valid, _difference(policy, ref, at, inside), 0.0), ESTIMATOR)
            value -= kl
            if PARTS:
                tl.store(penalty + at, -kl, mask=inside)
        elif PARTS:
            tl.store(penalty + at, tl.zeros([TILE], tl.float32), mask=inside)
        tl.store(reward + at, tl.where(valid, value, 0.0), mask=inside)
        start += TILE

    row_total = tl.sum(total, 0).to(tl.float32)
    last = tl.max(latest, 0)
    there = last >= 0
    at_last = tl.zeros([], tl.float32)
    if not PER_TOKEN:
        if BY_LENGTH:
            divisor = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
        at_last = clamp(tl.div_rn(row_total, divisor) * scale, clip)
    tl.debug_barrier()  # another thread has stored what the last valid token has so far
    value = tl.load(reward + last, mask=there, other=0.0) + at_last - cut
    tl.debug_barrier()  # every thread stores what it read
    tl.store(reward + last, value, mask=there)
    if PARTS:
        before_kl = (tl.sum(shaped_sum, 0) + at_last.to(tl.float64) - cut.to(tl.float64)).to(tl.float32)
        tl.store(score + row, row_total)
        tl.store(shaped + row, tl.where(there, before_kl, 0.0))


def log_ratio_reward_triton(
    sft: Tensor,
    base: Tensor,
    mask: Tensor,
    per_token: bool,
    by_length: bool,
    std: float,
    std_tensor: Tensor | None,
    scale: float,
    clip: float | None,
    truncated: Tensor | None,
    missing_eos: float,
    policy: Tensor | None,
    ref: Tensor | None,
    kl_coef: float,
    estimator: int,
    parts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> reward, and with `parts` the penalty, score and shaped score (else empty)."""
    rows, steps = sft.shape
    reward = torch.empty((rows, steps), dtype=torch.float32, device=sft.device)
    penalty = torch.empty_like(reward) if parts else reward.new_empty(0)
    score, shaped = (reward.new_empty(rows if parts else 0) for _ in range(2))
    if kl_coef == 0:
        policy = ref = None  # not read, so that a NaN there reaches nobody
    tokens = [None if x is None else x.contiguous() for x in (sft, base, mask, policy, ref)]
    row_inputs = [None if x is None else x.contiguous() for x in (truncated, std_tensor)]
    numbers = (std, scale, math.inf if clip is None else clip, missing_eos, kl_coef, steps)
    if rows:
        with on_device(sft):
            reward_rows[(rows,)](
                *tokens, *row_inputs, *numbers, reward, penalty, score, shaped,
                PER_TOKEN=per_token, BY_LENGTH=by_length, ESTIMATOR=estimator, PARTS=parts, TILE=TILE, **OPTIONS,
            )  # fmt: skip
    return reward, penalty, score, shaped


def compile_cases() -> Iterator[CompileCase]:
    tokens = dict.fromkeys(("sft", "base", "policy", "ref", "reward", "penalty", "score", "shaped"), "*fp32")
    numbers = dict.fromkeys(("std", "scale", "clip", "missing_eos", "kl_coef"), "fp32")
    types = {**tokens, **numbers, "mask": "*i1", "truncated": "*i1", "std_tensor": "*fp32", "steps": "i32"}
    options = {"enable_fp_fusion": False}
    for per_token in (False, True):
        for estimator in (1, 3):
            fixed = {
                "PER_TOKEN": per_token, "BY_LENGTH": per_token, "ESTIMATOR": estimator, "PARTS": True, "TILE": TILE,
            }  # fmt: skip
            name = f"reward_rows: {'token' if per_token else 'eos'}, k{estimator}"
            yield CompileCase(name, reward_rows, types, fixed, OPTIONS["num_warps"], options=options)
    plain = {
        "policy": None, "ref": None, "truncated": None, "std_tensor": None,
        "PER_TOKEN": False, "BY_LENGTH": False, "ESTIMATOR": 1, "PARTS": False, "TILE": TILE,
    }  # fmt: skip
    yield CompileCase("reward_rows: eos, no KL", reward_rows, types, plain, OPTIONS["num_warps"], options=options)
