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
    rows_in_float64,
)

__all__ = ["compile_cases", "gae_backward_triton"]


@triton.jit
def _sum_of_gradients(d_advantages, d_returns, mask, at, inside):
    """Valid tokens, and the gradients of advantage and of both, 0 where not valid."""
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    of_advantage = tl.load(d_advantages + at, mask=valid, other=0.0).to(tl.float32)
    of_return = tl.load(d_returns + at, mask=valid, other=0.0).to(tl.float32)
    return valid, of_advantage, of_advantage + of_return


@triton.jit
def gae_adjoint_rows(
    d_advantages,  # [B, T], or packed [total]
    d_returns,
    mask,
    gamma,  # float32, as the next two
    through,  # gamma (1 - lambda)
    decay,  # gamma lambda
    gamma_rows,  # [B] float64, or None; then lam_rows too
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
    d_advantages += begin
    d_returns += begin
    mask += begin
    d_rewards += begin
    d_values += begin
    end = end_of_valid(mask, length, TILE)
    clear(d_rewards, d_values, end, length, TILE)
    through, decay = coefficients(row, through, decay, gamma_rows, lam_rows)
    if gamma_rows is not None:
        gamma = tl.load(gamma_rows + row).to(tl.float32)

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
    d_advantages: Tensor,
    d_returns: Tensor,
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
    d_advantages, d_returns, mask = (x.contiguous() for x in (d_advantages, d_returns, mask))
    rows = d_advantages.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_rewards = torch.empty(d_advantages.shape, dtype=torch.float32, device=d_advantages.device)
    d_values = torch.empty_like(d_rewards)
    d_bootstrap = d_rewards.new_zeros(rows)
    if d_rewards.numel():
        by_row = rows_in_float64(gamma, lam, gamma_rows, lam_rows, d_rewards, rows)
        starts = None if cu_seqlens is None else cu_seqlens.contiguous()
        steps = d_rewards.numel() if cu_seqlens is not None else d_rewards.shape[1]
        with on_device(d_rewards):
            gae_adjoint_rows[(rows,)](
                d_advantages, d_returns, mask, gamma, gamma * (1.0 - lam), gamma * lam, *by_row, starts, steps,
                d_rewards, d_values, d_bootstrap, CARRY=carry, TILE=tile or (32 if interpreted() else TILE), **OPTIONS,
            )  # fmt: skip
    return d_rewards, d_values, d_bootstrap


def compile_cases() -> Iterator[CompileCase]:
    tensors = ("d_advantages", "d_returns", "d_rewards", "d_values", "d_bootstrap")
    types = {
        **dict.fromkeys(tensors, "*fp32"), **dict.fromkeys(("gamma", "through", "decay"), "fp32"), "mask": "*i1",
        "gamma_rows": "*fp64", "lam_rows": "*fp64", "starts": "*i64", "steps": "i32",
    }  # fmt: skip
    options = {"enable_fp_fusion": False}
    for carry in (True, False):
        fixed = {"gamma_rows": None, "lam_rows": None, "starts": None, "CARRY": carry, "TILE": TILE}
        name = f"gae_adjoint_rows: {'carry' if carry else 'zero'}"
        yield CompileCase(name, gae_adjoint_rows, types, fixed, WARPS, options=options)
