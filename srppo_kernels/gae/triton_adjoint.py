# mypy: allow-untyped-defs
"""GAE's gradient on Triton: the same scan from left to right, a program a row. `reference.py` has the maths.

With g the sum of the gradients of advantage and return, and G' the sum of the step to the left,

    G_t = g_t + gamma lambda G'      dr_t = G_t      dV_t = gamma (1 - lambda) G' - dA_t      dbootstrap = gamma G_last

A tile scans the maps of the tokens one place to the left of its own, which gives every token its G'; the carry between
tiles is float64, as in `triton_scan.py`. Tiles are counted from the row's first token.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels._triton import CompileCase, interpreted, on_device
from srppo_kernels.gae.triton_scan import (
    OPTIONS,
    TILE,
    WARPS,
    clear,
    coefficients,
    compose,
    end_of_valid,
    leftmost,
    row_of,
)

__all__ = ["compile_cases", "gae_backward_triton"]


@triton.jit
def _sum_of_gradients(d_advantages, d_returns, mask, at, inside):
    """Valid tokens, and the gradients of advantage and of both, 0 where not valid."""
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    of_advantage = tl.zeros(at.shape, tl.float32)
    if d_advantages is not None:
        of_advantage = tl.load(d_advantages + at, mask=valid, other=0.0).to(tl.float32)
    both = of_advantage
    if d_returns is not None:
        both += tl.load(d_returns + at, mask=valid, other=0.0).to(tl.float32)
    return valid, of_advantage, both


@triton.jit
def gae_adjoint_rows(
    d_advantages,  # [B, T], or packed [total]; or None, as the next
    d_returns,
    mask,
    gamma: tl.float64,  # where there is no gamma_rows
    lam: tl.float64,
    gamma_rows,  # [B], any float dtype, or None
    lam_rows,
    starts,  # [B + 1] or None
    steps,
    d_rewards,  # float32, as d_advantages
    d_values,
    d_bootstrap,  # [B] float32
    CARRY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, length = row_of(starts, row, steps)
    if d_advantages is not None:
        d_advantages += begin
    if d_returns is not None:
        d_returns += begin
    mask += begin
    d_rewards += begin
    d_values += begin
    end = end_of_valid(mask, length, TILE)
    clear(d_rewards, d_values, end, length, TILE)
    gamma, through, decay = coefficients(row, gamma, lam, gamma_rows, lam_rows)

    lane = tl.arange(0, TILE)
    carried = tl.zeros([], tl.float64)  # G' of the tile's first token
    start = 0
    while start < end:
        at = start + lane
        inside = at < end
        valid, of_advantage, g = _sum_of_gradients(d_advantages, d_returns, mask, at, inside)
        step = valid if CARRY else inside
        # One place to the left; the first lane's left neighbour is in the carry already, and a lane beyond the end sees
        # the last token: its G' is what the row leaves.
        near = (at <= end) & (lane > 0)
        held, _, near_g = _sum_of_gradients(d_advantages, d_returns, mask, at - 1, near)
        a = tl.where(held if CARRY else near, decay, 1.0)
        a, b = tl.associative_scan((a, near_g), 0, compose)
        before = b.to(tl.float64) + a.to(tl.float64) * carried
        now = tl.where(step, g.to(tl.float64) + decay * before, before)
        d_value = through * before - of_advantage.to(tl.float64)
        tl.store(d_rewards + at, tl.where(valid, now.to(tl.float32), 0.0), mask=inside)
        tl.store(d_values + at, tl.where(valid, d_value.to(tl.float32), 0.0), mask=inside)
        carried = leftmost(now, TILE)  # that is, of the last lane
        start += TILE
    tl.store(d_bootstrap + row, (gamma * carried).to(tl.float32))


def gae_backward_triton(
    d_advantages: Tensor | None,
    d_returns: Tensor | None,
    mask: Tensor,
    gamma: float,
    lam: float,
    gamma_rows: Tensor | None,
    lam_rows: Tensor | None,
    carry: bool,
    cu_seqlens: Tensor | None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of rewards, values and bootstrap. `tile` is for tests."""
    mask = mask.contiguous()
    rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_rewards = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    d_values = torch.empty_like(d_rewards)
    if mask.numel() == 0:
        return d_rewards, d_values, d_rewards.new_zeros(rows)
    d_bootstrap = d_rewards.new_empty(rows)
    upstream = (None if x is None else x.contiguous() for x in (d_advantages, d_returns))
    by_row = (None if x is None else x.contiguous() for x in (gamma_rows, lam_rows, cu_seqlens))
    steps = mask.numel() if cu_seqlens is not None else mask.shape[1]
    with on_device(mask):
        gae_adjoint_rows[(rows,)](
            *upstream, mask, gamma, lam, *by_row, steps, d_rewards, d_values, d_bootstrap, CARRY=carry,
            TILE=tile or (32 if interpreted() else TILE), **OPTIONS,
        )  # fmt: skip
    return d_rewards, d_values, d_bootstrap


def compile_cases() -> Iterator[CompileCase]:
    tensors = ("d_advantages", "d_returns", "d_rewards", "d_values", "d_bootstrap", "gamma_rows", "lam_rows")
    numbers = {"gamma": "fp64", "lam": "fp64", "steps": "i32"}
    types = {**dict.fromkeys(tensors, "*fp32"), **numbers, "mask": "*i1", "starts": "*i64"}
    options = {"enable_fp_fusion": False}
    for carry in (True, False):
        fixed = {"gamma_rows": None, "lam_rows": None, "starts": None, "CARRY": carry, "TILE": TILE}
        mode = "carry" if carry else "zero"
        yield CompileCase(f"gae_adjoint_rows: {mode}", gae_adjoint_rows, types, fixed, WARPS, options=options)
    fixed |= {"d_returns": None}
    name = "gae_adjoint_rows: zero, of advantages alone"
    yield CompileCase(name, gae_adjoint_rows, types, fixed, WARPS, options=options)
