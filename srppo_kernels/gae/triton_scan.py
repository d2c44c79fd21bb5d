# mypy: allow-untyped-defs
"""GAE on Triton: two scans a tile, and a float64 carry between tiles. `reference.py` has the maths.

Written for the return R = A + V (csrc/gae/step.h), a step of the recursion is the affine map

    R_t = (r_t + gamma (1 - lambda) V') + gamma lambda R'        with V', R' of the step to the right

so a tile of tokens, rightmost first, takes a take-right scan for V' (the next valid value; in "zero" mode it is simply
the neighbour's) and an associative scan of the pairs (a, b) for R = b + a R_carried. Tiles of a row are chained through
R_carried in float64: with gamma = lambda = 1 a row is a plain sum of 10^5 rewards, and a float32 carry would lose its
last digits. Tiles are counted from the row's last valid token, so padded and packed rows have the same bits.

    gae_rows            a program walks a row from right to left: the one launch of an ordinary batch; it also sums up
                        the moments of the advantages, for whitening, where they are asked for
    row_ends, tile_maps, fold_tiles, tile_outputs, row_moments
                        a program a tile, for few and very long rows, where one program would walk alone: every tile
                        becomes a map, the maps are folded with the same arithmetic, and every tile is scanned again
                        from its carry. The bits are those of gae_rows, the moments' too.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels._triton import CompileCase, finish_counter, interpreted, on_device
from srppo_kernels._triton_language import arrived_last
from srppo_kernels.gae.triton_whiten import join_moments, leave_moments, merge_moments, row_moments, tile_moments_of

__all__ = [
    "clear",
    "coefficients",
    "compile_cases",
    "compose",
    "end_of_valid",
    "gae_triton",
    "leftmost",
    "row_of",
]

TILE = 1024
WARPS = 4
LONG = 32 * TILE  # from here on a row is spread over programs, if there are few rows
FEW = 64
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}  # an fma where the source says so, as on the CPU


@triton.jit
def _take_right(value, found, new_value, new_found):
    return tl.where(new_found != 0, new_value, value), found | new_found


@triton.jit
def compose(a, b, new_a, new_b):
    return a * new_a, tl.fma(new_a, b, new_b)


@triton.jit
def row_of(starts, row, steps):
    """Where the row begins, in 64 bits, and its length: places within a row are counted in 32."""
    if starts is None:
        begin = row * steps
        length = steps
    else:
        begin = tl.load(starts + row).to(tl.int64)
        length = (tl.load(starts + row + 1) - begin).to(tl.int32)
    return begin, length


@triton.jit
def end_of_valid(mask, length, TILE: tl.constexpr):
    """One past the row's last valid token, or 0."""
    lane = tl.arange(0, TILE)
    end = tl.zeros([], tl.int32)
    right = tl.zeros([], tl.int32) + length
    while right > 0:
        at = right - 1 - lane
        valid = tl.load(mask + at, mask=at >= 0, other=0) != 0
        end = tl.max(tl.where(valid, at + 1, 0), 0)
        right = tl.where(end > 0, 0, right - TILE)  # leave the loop where one is found
    return end


@triton.jit
def clear(advantages, returns, start, length, TILE: tl.constexpr):
    """0 from `start` on."""
    lane = tl.arange(0, TILE)
    while start < length:
        zero = tl.zeros([TILE], tl.float32)
        tl.store(advantages + start + lane, zero, mask=start + lane < length)
        tl.store(returns + start + lane, zero, mask=start + lane < length)
        start += TILE


@triton.jit
def coefficients(row, gamma, lam, gamma_rows, lam_rows):
    """gamma, gamma (1 - lambda) and gamma lambda, formed in float64 and rounded once."""
    gamma = tl.zeros([], tl.float64) + gamma
    lam = tl.zeros([], tl.float64) + lam
    if gamma_rows is not None:
        gamma = tl.load(gamma_rows + row).to(tl.float64)
    if lam_rows is not None:
        lam = tl.load(lam_rows + row).to(tl.float64)
    return gamma.to(tl.float32), (gamma * (1.0 - lam)).to(tl.float32), (gamma * lam).to(tl.float32)


@triton.jit
def _bootstrap(bootstrap, row):
    value = tl.zeros([], tl.float32)
    if bootstrap is not None:
        value = tl.load(bootstrap + row).to(tl.float32)
    return value


@triton.jit
def _scan_tile(rewards, values, mask, right, end, next_value, through, decay, CARRY: tl.constexpr, TILE: tl.constexpr):
    """The tile that ends at `right` -> places, masks, values, each token's map (a, b) from the tile's right, and V'.

    `next_value` is V' of the rightmost token where the tile itself does not hold it.
    """
    at = right - 1 - tl.arange(0, TILE)
    inside = at >= 0
    valid = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    reward = tl.load(rewards + at, mask=valid, other=0.0).to(tl.float32)
    value = tl.load(values + at, mask=valid, other=0.0).to(tl.float32)
    # The same one token to the right: an inclusive scan of this is the exclusive scan that is needed.
    neighbour = inside & (at + 1 < end)
    held = neighbour & (tl.load(mask + at + 1, mask=neighbour, other=0) != 0)
    following = tl.load(values + at + 1, mask=held, other=0.0).to(tl.float32)
    if CARRY:
        following, found = tl.associative_scan((following, held.to(tl.int32)), 0, _take_right)
        following = tl.where(found != 0, following, next_value)
        step = valid
    else:
        following = tl.where(at + 1 < end, following, next_value)
        step = inside
    a = tl.where(step, decay, 1.0)
    b = tl.where(step, tl.fma(tl.zeros([TILE], tl.float32) + through, following, reward), 0.0)
    a, b = tl.associative_scan((a, b), 0, compose)
    return at, inside, valid, value, a, b, following


@triton.jit
def _store_tile(advantages, returns, at, inside, valid, value, a, b, carried):
    """-> R of every token in float64, and the advantages; writes both outputs."""
    ret = b.to(tl.float64) + a.to(tl.float64) * carried
    advantage = tl.where(valid, (ret - value.to(tl.float64)).to(tl.float32), 0.0)
    tl.store(advantages + at, advantage, mask=inside)
    tl.store(returns + at, tl.where(valid, ret.to(tl.float32), 0.0), mask=inside)
    return ret, advantage


@triton.jit
def leftmost(x, TILE: tl.constexpr):
    """Of the last lane, the leftmost token of a tile that is walked from the right."""
    return tl.sum(tl.where(tl.arange(0, TILE) == TILE - 1, x, 0.0), 0)


@triton.jit
def gae_rows(
    rewards,  # [B, T], or packed [total]; any float dtype
    values,  # the same
    mask,  # the same, bool
    gamma: tl.float64,  # where there is no gamma_rows
    lam: tl.float64,
    gamma_rows,  # [B], any float dtype, or None
    lam_rows,
    bootstrap,  # [B] or None
    starts,  # [B + 1] or None
    steps,  # T
    advantages,  # float32, as rewards
    returns,
    partials,  # [3, B] float64 and the next two, or None: the advantages' moments for whitening
    finished,
    moments,  # [3] float64: count, mean, squared deviations
    CARRY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, length = row_of(starts, row, steps)
    rewards += begin
    values += begin
    mask += begin
    advantages += begin
    returns += begin
    end = end_of_valid(mask, length, TILE)
    clear(advantages, returns, end, length, TILE)
    _, through, decay = coefficients(row, gamma, lam, gamma_rows, lam_rows)
    next_value = _bootstrap(bootstrap, row)
    carried = next_value.to(tl.float64)
    count = tl.zeros([], tl.float64)
    mean = tl.zeros([], tl.float64)
    squares = tl.zeros([], tl.float64)
    right = end
    while right > 0:
        at, inside, valid, value, a, b, following = _scan_tile(
            rewards, values, mask, right, end, next_value, through, decay, CARRY, TILE
        )
        ret, advantage = _store_tile(advantages, returns, at, inside, valid, value, a, b, carried)
        carried = leftmost(ret, TILE)
        if CARRY:
            next_value = leftmost(following, TILE)
        if moments is not None:
            n, tile_mean, tile_squares = tile_moments_of(advantage, valid)
            count, mean, squares = join_moments(count, mean, squares, n, tile_mean, tile_squares)
        right -= TILE
    if moments is not None:
        leave_moments(partials, tl.program_id(0), tl.num_programs(0), count, mean, squares)
        if arrived_last(finished):
            merge_moments(partials, moments, tl.num_programs(0), TILE)


@triton.jit
def row_ends(mask, starts, steps, advantages, returns, ends, TILE: tl.constexpr):
    """`ends[row]`: one past its last valid token, from its beginning; what lies beyond becomes 0."""
    row = tl.program_id(0).to(tl.int64)
    begin, length = row_of(starts, row, steps)
    end = end_of_valid(mask + begin, length, TILE)
    clear(advantages + begin, returns + begin, end, length, TILE)
    tl.store(ends + row, end)


@triton.jit
def _value_from(values, mask, start, end, default, TILE: tl.constexpr):
    """The value of the first valid token in [start, end), or `default`."""
    lane = tl.arange(0, TILE)
    found = default
    while start < end:
        at = start + lane
        valid = (at < end) & (tl.load(mask + at, mask=at < end, other=0) != 0)
        first = tl.min(tl.where(valid, lane, TILE), 0)
        if first < TILE:
            found = tl.load(values + start + first).to(tl.float32)
            start = end
        start += TILE
    return found


@triton.jit
def _lone_tile(
    rewards, values, mask, gamma, lam, gamma_rows, lam_rows, bootstrap, ends, row, tile,
    CARRY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`_scan_tile` for a program that did not walk the row to come here."""
    end = tl.load(ends + row)
    right = end - tile * TILE
    _, through, decay = coefficients(row, gamma, lam, gamma_rows, lam_rows)
    next_value = _bootstrap(bootstrap, row)
    if CARRY and right > 0:
        # From two to the right on: the token at `right` is the rightmost one's neighbour, which the tile itself sees.
        next_value = _value_from(values, mask, right + 1, end, next_value, TILE)
    return _scan_tile(rewards, values, mask, right, end, next_value, through, decay, CARRY, TILE)


@triton.jit
def tile_maps(
    rewards, values, mask, gamma: tl.float64, lam: tl.float64, gamma_rows, lam_rows, bootstrap, starts, steps, ends,
    maps,  # [B, tiles, 2] float32: a and b of every tile; those beyond the row are the identity
    CARRY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    begin, _ = row_of(starts, row, steps)
    _, _, _, _, a, b, _ = _lone_tile(
        rewards + begin, values + begin, mask + begin, gamma, lam, gamma_rows, lam_rows, bootstrap, ends, row, tile,
        CARRY, TILE,
    )  # fmt: skip
    place = maps + (row * tl.num_programs(0) + tile) * 2
    tl.store(place, leftmost(a, TILE))
    tl.store(place + 1, leftmost(b, TILE))


@triton.jit
def fold_tiles(maps, bootstrap, ends, carries, tiles, TILE: tl.constexpr):
    """`carries[row, tile]` float64: R on the right of the tile; tiles beyond the row have none."""
    row = tl.program_id(0).to(tl.int64)
    carried = _bootstrap(bootstrap, row).to(tl.float64)
    for tile in range(tl.cdiv(tl.load(ends + row), TILE)):
        place = row * tiles + tile
        tl.store(carries + place, carried)
        a = tl.load(maps + place * 2)
        b = tl.load(maps + place * 2 + 1)
        carried = b.to(tl.float64) + a.to(tl.float64) * carried


@triton.jit
def tile_outputs(
    rewards, values, mask, gamma: tl.float64, lam: tl.float64, gamma_rows, lam_rows, bootstrap, starts, steps, ends,
    carries, advantages, returns,
    tile_moments,  # [B, tiles, 3] float64, or None
    CARRY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    begin, _ = row_of(starts, row, steps)
    at, inside, valid, value, a, b, _ = _lone_tile(
        rewards + begin, values + begin, mask + begin, gamma, lam, gamma_rows, lam_rows, bootstrap, ends, row, tile,
        CARRY, TILE,
    )  # fmt: skip
    place = row * tl.num_programs(0) + tile
    carried = tl.load(carries + place)
    _, advantage = _store_tile(advantages + begin, returns + begin, at, inside, valid, value, a, b, carried)
    if tile_moments is not None:
        n, mean, squares = tile_moments_of(advantage, valid)
        tl.store(tile_moments + 3 * place, n)
        tl.store(tile_moments + 3 * place + 1, mean)
        tl.store(tile_moments + 3 * place + 2, squares)


def gae_triton(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    gamma_rows: Tensor | None,
    lam_rows: Tensor | None,
    bootstrap: Tensor | None,
    carry: bool,
    cu_seqlens: Tensor | None,
    with_moments: bool = False,
    tile: int | None = None,
    spread: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gae` of float32 or narrower inputs. `tile` and `spread` (a program a tile) are for tests."""
    rewards, values, mask = (x.contiguous() for x in (rewards, values, mask))
    rows = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    steps = rewards.numel() if cu_seqlens is not None else rewards.shape[1]  # packed: no row is longer than all of them
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    moments = torch.empty(3 if with_moments else 0, dtype=torch.float64, device=rewards.device)
    if rewards.numel() == 0:
        return advantages, returns, moments.zero_()
    tile = tile or (32 if interpreted() else TILE)
    if spread is None:
        # How long packed rows are only the device knows; the host knows how long they are on average.
        spread = rows <= FEW and steps >= LONG * (1 if cu_seqlens is None else rows)
    by_row = [None if x is None else x.contiguous() for x in (gamma_rows, lam_rows, bootstrap, cu_seqlens)]
    *_, bootstrap, starts = by_row
    inputs = (rewards, values, mask, gamma, lam, *by_row, steps)
    sums: tuple[Tensor | None, ...] = (None, None, None)
    with on_device(rewards):
        if with_moments:
            partials = torch.empty((3, rows), dtype=torch.float64, device=rewards.device)
            sums = (partials, finish_counter(rewards.device), moments)
        if not spread:
            gae_rows[(rows,)](*inputs, advantages, returns, *sums, CARRY=carry, TILE=tile, **OPTIONS)
            return advantages, returns, moments
        tiles = triton.cdiv(steps, tile)
        ends = torch.empty(rows, dtype=torch.int32, device=rewards.device)
        maps = torch.empty((rows, tiles, 2), dtype=torch.float32, device=rewards.device)
        carries = torch.empty((rows, tiles), dtype=torch.float64, device=rewards.device)
        parts = torch.empty((rows, tiles, 3), dtype=torch.float64, device=rewards.device) if with_moments else None
        row_ends[(rows,)](mask, starts, steps, advantages, returns, ends, TILE=tile, **OPTIONS)
        # Tiles come first: a device's grid ends at 65535 in its second dimension.
        tile_maps[(tiles, rows)](*inputs, ends, maps, CARRY=carry, TILE=tile, **OPTIONS)
        fold_tiles[(rows,)](maps, bootstrap, ends, carries, tiles, TILE=tile, num_warps=1, enable_fp_fusion=False)
        outputs = (carries, advantages, returns, parts)
        tile_outputs[(tiles, rows)](*inputs, ends, *outputs, CARRY=carry, TILE=tile, **OPTIONS)
        if with_moments:
            row_moments[(rows,)](parts, ends, tiles, *sums, TILE=tile, **OPTIONS)
    return advantages, returns, moments


def compile_cases() -> Iterator[CompileCase]:
    tokens = {"rewards": "*fp32", "values": "*fp32", "mask": "*i1", "gamma": "fp64", "lam": "fp64", "steps": "i32"}
    outputs = {"advantages": "*fp32", "returns": "*fp32", "ends": "*i32", "maps": "*fp32", "carries": "*fp64"}
    by_row = {"gamma_rows": "*fp32", "lam_rows": "*fp32", "bootstrap": "*fp32", "starts": "*i64"}
    sums = {"partials": "*fp64", "finished": "*i32", "moments": "*fp64"}
    types = {**tokens, **outputs, **by_row, **sums, "tile_moments": "*fp64", "tiles": "i32"}
    plain, unsummed = dict.fromkeys(by_row), dict.fromkeys(sums)
    options = {"enable_fp_fusion": False}
    for carry in (True, False):
        mode = "carry" if carry else "zero"
        fixed = {"CARRY": carry, "TILE": TILE}
        for name, kernel, constants in (
            (f"gae_rows: {mode}, padded", gae_rows, {**plain, **unsummed, **fixed}),
            (f"gae_rows: {mode}, packed, by row, moments", gae_rows, fixed),
            (f"tile_maps: {mode}", tile_maps, {**plain, **fixed}),
            (f"tile_outputs: {mode}", tile_outputs, {**plain, **fixed}),
        ):
            yield CompileCase(name, kernel, types, constants, WARPS, options=options)
    yield CompileCase("row_ends", row_ends, types, {"starts": None, "TILE": TILE}, WARPS, options=options)
    yield CompileCase("fold_tiles", fold_tiles, types, {"TILE": TILE}, 1, options=options)
    yield CompileCase("row_moments", row_moments, types, {"TILE": TILE}, WARPS, options=options)
