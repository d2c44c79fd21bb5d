# mypy: allow-untyped-defs
"""GEMM 1 on a GPU with the softmax's state in its epilogue; chunked.py has the maths.

    scan_kernel     a program takes a row block and a vocabulary group: z by tiles, absorbed into (m, s, t) in
                    registers. The target's logit is stored by the one program that meets it; exponentials are kept
                    on request
    merge_kernel    a row's groups, merged
    outputs_kernel  a row's log-prob, entropy and lse

Logits exist as fp32 accumulators only. Row blocks run fastest inside a band of SUPER: the programs that run at one time
then share the band's rows and walk through the same few weight tiles, and both stay in L2.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo_kernels import _triton
from srppo_kernels._triton_language import exp_expm1, log1p
from srppo_kernels.linear_logprob.gpu import GROUP
from srppo_kernels.linear_logprob.rows import Rows
from srppo_kernels.linear_logprob.triton_tiles import (
    BUSY_SCAN_TILES,
    LOG2E,
    LOWEST,
    SCAN_TILES,
    SUPER,
    RowList,
    Tile,
    arithmetic,
    column_part,
    for_width,
    gather_rows,
    group_size,
    head_tile,
    logits,
    operand,
    placed,
    row_list,
    tile_of,
)

if TYPE_CHECKING:
    from srppo_kernels.linear_logprob.chunked import Head, Residual

MERGED = (32, 32)  # rows and groups that a step of merge_kernel takes
OUTPUTS = 128  # rows of a program of outputs_kernel
OUTPUTS_OPTIONS = {"enable_fp_fusion": False}  # or a log-prob's bits might differ with the entropy and without


@triton.jit
def absorb(z, v, target, m, s, t, target_logit, ENTROPY: tl.constexpr, RULED_OUT: tl.constexpr):
    """Takes columns ``v`` into the online state; returns their exponentials around the new maximum as well."""
    at_target = v[None, :] == target[:, None]
    target_logit += tl.sum(tl.where(at_target, z, 0.0), 1)
    m_new = tl.maximum(m, tl.max(z, 1))
    shifted = z - m_new[:, None]
    e = tl.exp2(shifted * LOG2E)
    rest = tl.where(at_target, 0.0, e)  # the target stays out of s: beside a 1 it would keep no digit of 1 - p_y
    if RULED_OUT:  # a bias of -inf: where it is all that there was so far, m is LOWEST too, and e is 1
        rest = tl.where(z <= LOWEST, 0.0, rest)
    a = tl.exp2((m - m_new) * LOG2E)
    if ENTROPY:
        t = a * (t + s * (m - m_new)) + tl.sum(rest * shifted, 1)
    s = a * s + tl.sum(rest, 1)
    return e, m_new, s, t, target_logit


@triton.jit
def store_pairs(at, e, inside):
    """Stores ``e`` ``[BM, H]`` in bf16, two columns at a time, from the threads that hold them.

    ``at``, ``inside``: ``[BM, H // 2]``, of every other column. A tl.store moves its operand through shared memory
    first, for 16 bytes a thread; beside an accumulator of 128 x 256 that spills registers, and it waits for barriers.
    """
    left, right = tl.split(tl.reshape(e.to(tl.bfloat16), (e.shape[0], e.shape[1] // 2, 2)))
    left = left.to(tl.uint16, bitcast=True).to(tl.uint32)
    right = right.to(tl.uint16, bitcast=True).to(tl.uint32)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [at.to(tl.int64), left | (right << 16), inside.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def scan_kernel(
    x,  # [n, D] live rows, compacted
    w,  # [V, D]
    bias,  # [V] fp32
    y,  # [n] int64, target of a position
    inverse_temperatures,  # [n] fp32
    count,  # [1] int32
    state,  # [3, groups, n] fp32: m, s, t
    target_logits,  # [n] fp32
    kept,  # [n, V] exponentials
    kept_max,  # [n, parts of tiles] fp32: the maximum that they are around
    n,
    width,
    vocab,
    stride_xr,
    stride_wv,
    stride_wd,
    stride_kept,
    stride_max,
    groups,
    scale,
    softcap,
    inverse_temperature,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SUPER: tl.constexpr,
    PARTS: tl.constexpr,
    FLAT: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    PAIRS: tl.constexpr,
):
    r0, group = placed(tl.program_id(0), n, groups, BM, SUPER)
    live = tl.load(count)
    if r0 >= live:
        return
    r = r0 + tl.arange(0, BM)
    target = tl.load(y + r, mask=r < live, other=-1)
    target = tl.where(target < vocab, target, -1).to(tl.int32)  # of another rank's shard: not one of the columns beyond
    inverse = inverse_temperature
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_temperatures + r, mask=r < live, other=1.0)
    m = tl.full((BM,), LOWEST, tl.float32)
    s = tl.zeros((BM,), tl.float32)
    t = tl.zeros((BM,), tl.float32)
    target_logit = tl.zeros((BM,), tl.float32)
    first = group * GROUP
    H: tl.constexpr = BN // PARTS
    for tile in tl.range(0, tl.cdiv(tl.minimum(GROUP, vocab - first), BN), flatten=FLAT):
        v0 = first + tile * BN
        acc = head_tile(
            x, w, r0, v0, n, vocab, width, stride_xr, stride_wv, stride_wd, BM, BN, BK, TMA_X, TMA_W, WIDEN, PRECISION
        )
        for part in tl.static_range(PARTS):
            v = v0 + part * H + tl.arange(0, H)
            z = column_part(acc, part, PARTS, BM, BN)
            z = logits(z, v, vocab, bias, scale, softcap, inverse, BIAS, SOFTCAP, ROW_TEMPERATURE)
            e, m, s, t, target_logit = absorb(z, v, target, m, s, t, target_logit, ENTROPY, BIAS)
            if KEEP:
                if PAIRS:
                    left = v0 + part * H + tl.arange(0, H // 2) * 2
                    at = kept + r.to(tl.int64)[:, None] * stride_kept + left[None, :]
                    store_pairs(at, e, (r < live)[:, None] & (left < vocab)[None, :])
                else:
                    at = kept + r.to(tl.int64)[:, None] * stride_kept + v[None, :]
                    tl.store(at, e.to(kept.dtype.element_ty), mask=(r < live)[:, None] & (v < vocab)[None, :])
                at_max = kept_max + r.to(tl.int64) * stride_max + v0 // H + part
                tl.store(at_max, m, mask=r < live)
    at = state + group.to(tl.int64) * n + r
    plane = tl.cast(groups, tl.int64) * n  # a size of 1 is a constant here, which has no .to
    tl.store(at, m, mask=r < live)
    tl.store(at + plane, s, mask=r < live)
    tl.store(at + 2 * plane, t, mask=r < live)
    tl.store(target_logits + r, target_logit, mask=(r < live) & (target >= first) & (target < first + GROUP))


@triton.jit
def merge_kernel(
    state,  # [3, groups, n]
    target_logits,  # [n]
    y,  # [n] int64, target of a position
    index,  # [n] int64, row of a position
    count,
    live,  # [n] bool, by row
    out,  # [4, n] m, s, t and the target's logit, by row
    n,
    groups,
    vocab,
    BM: tl.constexpr,
    BG: tl.constexpr,
):
    """Twice over the groups, BG at a time: the maximum of all first, so that no load waits for an exponential.

    A target that is in no group (another rank's) has a logit of 0, and a masked row the state of no entry at all.
    """
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    here = r < tl.load(count)
    n64 = tl.cast(n, tl.int64)  # a size of 1 is a constant here, which has no .to
    plane = tl.cast(groups, tl.int64) * n64
    m = tl.full((BM,), LOWEST, tl.float32)
    for g0 in range(0, groups, BG):
        g = g0 + tl.arange(0, BG)
        inside = (g < groups)[:, None] & here[None, :]
        at = state + g.to(tl.int64)[:, None] * n64 + r[None, :]
        m = tl.maximum(m, tl.max(tl.load(at, mask=inside, other=LOWEST), 0))
    s = tl.zeros((BM,), tl.float32)
    t = tl.zeros((BM,), tl.float32)
    for g0 in range(0, groups, BG):
        g = g0 + tl.arange(0, BG)
        inside = (g < groups)[:, None] & here[None, :]
        at = state + g.to(tl.int64)[:, None] * n64 + r[None, :]
        fall = tl.load(at, mask=inside, other=LOWEST) - m[None, :]
        s_group = tl.load(at + plane, mask=inside, other=0.0)
        t_group = tl.load(at + 2 * plane, mask=inside, other=0.0)
        c = tl.exp2(fall * LOG2E)
        s += tl.sum(c * s_group, 0)
        t += tl.sum(c * (t_group + s_group * fall), 0)
    row = tl.load(index + r, mask=here, other=0)
    tl.store(out + row, m, mask=here)
    tl.store(out + n64 + row, s, mask=here)
    tl.store(out + 2 * n64 + row, t, mask=here)
    target = tl.load(y + r, mask=here, other=-1)
    met = here & (target >= 0) & (target < vocab)
    tl.store(out + 3 * n64 + row, tl.load(target_logits + r, mask=met, other=0.0), mask=here)
    masked = tl.load(live + r, mask=r < n, other=1) == 0  # as a row
    tl.store(out + r, LOWEST, mask=masked)
    for plane_of in tl.static_range(1, 4):
        tl.store(out + plane_of * n64 + r, 0.0, mask=masked)


def merge(state: Tensor, target_logits: Tensor, y: Tensor, rows: RowList, live: Tensor, vocab: int) -> Tensor:
    """``[3, groups, n]`` states by position, merged into ``(m, s, t, z_y)`` by row, ``[4, n]``."""
    n, groups = state.shape[2], state.shape[1]
    out = state.new_empty(4, n)
    with _triton.on_device(state):
        merge_kernel[(-(-n // MERGED[0]),)](
            state, target_logits, y, rows.index, rows.count, live.contiguous(), out, n, groups, vocab, BM=MERGED[0],
            BG=MERGED[1],
        )  # fmt: skip
    return out


@triton.jit
def outputs_kernel(
    state,  # [4, n] m, s, t, z_y
    live,  # [n] bool
    logprob,  # [n] fp32, and so below
    entropy,
    lse,
    norm,  # [2, n] m, log S
    n,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """chunked.RowOutputs.of, and 0 in masked rows."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = r < n
    here = inside & (tl.load(live + r, mask=inside, other=0) != 0)
    n64 = tl.cast(n, tl.int64)  # a size of 1 is a constant here, which has no .to
    m = tl.load(state + r, mask=here, other=0.0)
    s = tl.load(state + n64 + r, mask=here, other=0.0)
    d = tl.load(state + 3 * n64 + r, mask=here, other=0.0) - m
    e_y, less_one = exp_expm1(d)
    log_s = log1p(s + less_one)
    h = tl.zeros((BLOCK,), tl.float32)
    if ENTROPY:
        t = tl.load(state + 2 * n64 + r, mask=here, other=0.0)
        h = log_s - tl.div_rn(t + d * e_y, s + e_y)
    tl.store(logprob + r, tl.where(here, d - log_s, 0.0), mask=inside)
    tl.store(entropy + r, tl.where(here, h, 0.0), mask=inside)
    tl.store(lse + r, tl.where(here, m + log_s, 0.0), mask=inside)
    tl.store(norm + r, m, mask=inside)
    tl.store(norm + n64 + r, tl.where(here, log_s, 0.0), mask=inside)


def outputs(state: Tensor, live: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of chunked.RowOutputs, ``[n]`` each, of a scan's ``(m, s, t, z_y)``; 0 in masked rows."""
    n = state.shape[1]
    logprob, h, lse = (state.new_empty(n) for _ in range(3))
    norm = state.new_empty(2, n)
    if n > 0:
        with _triton.on_device(state):
            outputs_kernel[(-(-n // OUTPUTS),)](
                state.contiguous(), live.contiguous(), logprob, h, lse, norm, n, BLOCK=OUTPUTS, ENTROPY=entropy,
                **OUTPUTS_OPTIONS,
            )  # fmt: skip
    return logprob, h, lse, norm[0], norm[1]


def scan(
    hidden: Tensor,  # [N, D]
    head: "Head",
    y: Tensor,  # [count]
    temperature: Tensor | None,  # [count]
    rows: Rows,
    entropy: bool,
    residual: "Residual | None",
    kept_rows: Tensor | None,
) -> Tensor:
    """The online state ``(m, s, t, z_y)``, ``[4, count]``; chunked._scan has the meaning of the arguments.

    A residual is filled by position among the live rows, not by row.
    """
    assert rows.live is not None and kept_rows is None, "on this backend rows are compacted on the device"
    n, width, vocab = rows.count, hidden.shape[1], head.weight.shape[0]
    hidden = hidden[rows.start : rows.stop]
    if min(n, vocab) == 0:
        out = hidden.new_zeros(4, n, dtype=torch.float32)
        out[0] = LOWEST.value
        return out
    listed = row_list(rows.live)
    device, weight = hidden.device, head.weight
    switches = options(head, entropy)
    tile = scan_tile(switches, device, (hidden.dtype, weight.dtype), residual)
    size = group_size(device)
    groups = -(-vocab // size)
    x = gather_rows(hidden, listed)
    targets = y.index_select(0, listed.index)
    state = hidden.new_empty(3, groups, n, dtype=torch.float32)
    target_logits = state.new_empty(n)
    unused = state
    x_matrix, tma_x = operand(x, tile.bm, tile.bk, tile.tma)
    w_matrix, tma_w = operand(weight, tile.bn, tile.bk, tile.tma)
    inverse = None if temperature is None else temperature.reciprocal().index_select(0, listed.index)
    with _triton.on_device(hidden):
        scan_kernel[(-(-n // tile.bm) * groups,)](
            x_matrix, w_matrix,
            unused if head.bias is None else head.bias.float().contiguous(),
            targets,
            unused if inverse is None else inverse,
            listed.count, state, target_logits,
            unused if residual is None else residual.kept,
            unused if residual is None else residual.group_max,
            n, width, vocab, x.stride(0), *weight.stride(),
            0 if residual is None else residual.kept.stride(0),
            0 if residual is None else residual.group_max.stride(0),
            groups, head.logit_scale, 0.0 if head.softcap is None else head.softcap, 1 / head.temperature,
            GROUP=size, SUPER=SUPER, PARTS=tile.parts, FLAT=tile.flat, TMA_X=tma_x, TMA_W=tma_w, **tile.blocks,
            **arithmetic(device, hidden.dtype, weight.dtype), **switches, KEEP=residual is not None,
            PAIRS=tile.pairs and residual is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return merge(state, target_logits, targets, listed, rows.live, vocab)


def scan_tile(
    switches: dict[str, bool],
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    residual: "Residual | None" = None,
) -> Tile:
    """The configuration of a GEMM whose epilogue does what ``switches`` say, and fills ``residual``, if any.

    A row's bits are the same in all of them: an epilogue takes PART columns at a time, in order.
    """
    tile = tile_of(SCAN_TILES, device, dtypes)
    busy = switches["BIAS"] or switches["SOFTCAP"]
    if residual is not None and not (tile.pairs and pairs_fit(residual.kept)):
        busy = True
    return tile_of(BUSY_SCAN_TILES, device, dtypes) if busy else tile


def pairs_fit(kept: Tensor) -> bool:
    """Whether every pair of exponentials starts at a multiple of its size."""
    return kept.shape[1] % 2 == 0 and kept.stride() == (kept.stride(0) // 2 * 2, 1) and kept.data_ptr() % 4 == 0


def options(head: "Head", entropy: bool) -> dict[str, bool]:
    """Compile-time switches of a call."""
    return {
        "BIAS": head.bias is not None,
        "SOFTCAP": head.softcap is not None,
        "ROW_TEMPERATURE": head.row_temperature is not None,
        "ENTROPY": entropy,
    }


def compile_cases() -> Iterator[_triton.CompileCase]:
    """The scan for scores, with the entropy, with exponentials kept, and with every option at once."""
    plain: dict[str, dict[str, bool]] = {
        "score": {},
        "score, entropy": {"ENTROPY": True},
        "row temperature": {"ROW_TEMPERATURE": True, "ENTROPY": True},
    }
    kept: dict[str, dict[str, bool]] = {
        "keep": {"KEEP": True},
        "keep, entropy": {"ENTROPY": True, "KEEP": True},
        "keep, row temperature": {"ROW_TEMPERATURE": True, "ENTROPY": True, "KEEP": True},
    }
    busy: dict[str, dict[str, bool]] = {
        "softcap": {"SOFTCAP": True, "ENTROPY": True},
        "every option": dict.fromkeys(("BIAS", "SOFTCAP", "ROW_TEMPERATURE", "ENTROPY", "KEEP"), True),
    }
    kept_tiles = {arch: tile if tile.pairs else BUSY_SCAN_TILES[arch] for arch, tile in SCAN_TILES.items()}
    for table, variants in ((SCAN_TILES, plain), (kept_tiles, kept), (BUSY_SCAN_TILES, busy)):
        for arch, tile in table.items():
            for name, on in variants.items():
                yield _case(f"{name}, bf16", arch, tile, "bf16", on)
                if on.get("KEEP") and on.get("ENTROPY") and name != "keep, row temperature":
                    yield _case(f"{name}, fp32", arch, for_width(tile, 4), "fp32", on)
    yield _case("transposed head, bf16", 90, SCAN_TILES[90], "bf16", {"ENTROPY": True}, transposed=True)
    yield _case("one row, one group, bf16", 90, SCAN_TILES[90], "bf16", {"ENTROPY": True}, sizes={"n": 1, "groups": 1})
    types = {
        "state": "*fp32", "target_logits": "*fp32", "y": "*i64", "index": "*i64", "count": "*i32", "live": "*i1",
        "out": "*fp32", **dict.fromkeys(("n", "groups", "vocab"), "i32"),
    }  # fmt: skip
    blocks = dict(zip(("BM", "BG"), MERGED, strict=True))
    yield _triton.CompileCase("merge", merge_kernel, types, blocks)
    yield _triton.CompileCase("merge: one row, one group", merge_kernel, types, {**blocks, "n": 1, "groups": 1})
    made = dict.fromkeys(("logprob", "entropy", "lse", "norm"), "*fp32")
    yield _triton.CompileCase(
        "outputs", outputs_kernel, {"state": "*fp32", "live": "*i1", **made, "n": "i32"},
        {"BLOCK": OUTPUTS, "ENTROPY": True}, options=OUTPUTS_OPTIONS,
    )  # fmt: skip


def _case(
    name: str,
    arch: int,
    tile: Tile,
    dtype: str,
    on: dict[str, bool],
    *,
    transposed: bool = False,
    sizes: dict[str, int] | None = None,  # that a launch takes for constants, as it does a 1
) -> _triton.CompileCase:
    kept = "bf16" if dtype == "bf16" else "fp32"
    signature = {
        "x": f"tensordesc<{dtype}[{tile.bm},{tile.bk}]>" if tile.tma else f"*{dtype}",
        "w": f"tensordesc<{dtype}[{tile.bn},{tile.bk}]>" if tile.tma and not transposed else f"*{dtype}",
        "bias": "*fp32", "y": "*i64", "inverse_temperatures": "*fp32", "count": "*i32", "state": "*fp32",
        "target_logits": "*fp32", "kept": f"*{kept}", "kept_max": "*fp32",
        **dict.fromkeys(("n", "width", "vocab", "stride_xr", "stride_wv", "stride_wd", "stride_kept", "stride_max",
                         "groups"), "i32"),
        **dict.fromkeys(("scale", "softcap", "inverse_temperature"), "fp32"),
    }  # fmt: skip
    one = "stride_wv" if transposed else "stride_wd"
    del signature[one]
    constants: dict[str, Any] = {
        one: 1, "GROUP": GROUP, "SUPER": SUPER, "PARTS": tile.parts, "FLAT": tile.flat, "TMA_X": tile.tma,
        "TMA_W": tile.tma and not transposed, "WIDEN": False, "PRECISION": "tf32" if dtype == "bf16" else "tf32x3",
        **dict.fromkeys(("BIAS", "SOFTCAP", "ROW_TEMPERATURE", "ENTROPY", "KEEP"), False), **on, **tile.blocks,
        "PAIRS": tile.pairs and on.get("KEEP", False), **(sizes or {}),
    }  # fmt: skip
    return _triton.CompileCase(
        f"scan: {name}", scan_kernel, signature, constants, tile.warps, tile.stages, gemm=True, architectures=(arch,),
        multiples_of_16=tuple({"width", "vocab", "stride_xr", "stride_wv", "stride_wd", "stride_kept"} - {one}),
    )  # fmt: skip
