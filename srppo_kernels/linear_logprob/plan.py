"""Which backend and plan a call takes, what it costs, and why. One GEMM is 2 N D V floating-point operations.

plan         GEMMs  when                                                      extra memory
score        1      no gradient is wanted                                     blocks only
precompute   3      the loss is given (linear_loss, linear_ppo_loss); 2 with  a chunk of rows' exponentials, fp32 dW
                    a frozen head. Gradients are formed in the forward.
precompute   2      linear_logprob, frozen head, no entropy or lse wanted:    N x D in the inputs' dtype
                    dhidden is a row's scalar times a vector that the
                    forward has
cache        3      linear_logprob, and exp(z) of all rows fits in            N x V, 2 bytes (4 for fp32 inputs)
                    workspace_bytes; 2 with a frozen head
recompute    4      else; 3 with a frozen head                                blocks only; of dz, native code at most
                                                                              32 MiB, a GPU N x 16384 in 2 bytes

On native code score and recompute keep within 64 MiB, or within workspace_bytes where that is given, for any number of
threads: their blocks shrink until each thread has one, then fewer threads work. In any case they take what belongs to
the rows (dhidden in fp32, four numbers a vocabulary group) and what one thread's smallest blocks need. Where rows leave
less than 16 MiB of the default, threads have 32 MiB beside them. What torch's own GEMMs pack into is not counted.

On a CPU the memory of exponentials, dz and dweight stays with the process for the next call until the system wants it
(spare.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srppo_kernels._arguments import check_choice
from srppo_kernels.linear_logprob import gpu, native, native_gradients, sm90
from srppo_kernels.linear_logprob.checks import cache_does_not_fit
from srppo_kernels.linear_logprob.chunked import (
    GROUP,
    backward_rows,
    kept_columns,
    maxima_of,
    narrow_operands,
    row_block,
)

OPS = ("linear_logprob", "linear_loss", "linear_ppo_loss", "linear_log_ratio")
PLANS = ("auto", "score", "precompute", "cache", "recompute")
BACKENDS = ("auto", "reference", "torch", "native", "triton", "sm90")
CALL_BYTES = 96  # of a chunked loss's vectors, for each row of the whole call
ROW_PANEL = 32  # rows that AMX tiles take at a time, and pad to
FROZEN_CHUNK_BYTES = 64 << 20  # on a CPU, exponentials of a frozen head's chunk by default, or as many as the head has


@dataclass(frozen=True)
class Problem:
    """What a choice depends on, and nothing else."""

    op: str
    rows: int
    width: int
    vocab: int
    device: torch.device
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    entropy: bool
    # Whether linear_logprob's lse is wanted. W_y is not in its gradient but in what precompute keeps, and taken out
    # again it left 8 % of rounding in a flat row's dhidden in bf16.
    lse: bool = False
    weight_in_rows: bool = True  # contiguous rows at multiples of 16 bytes, as TMA reads them
    masked: bool = True
    cut: bool = False  # the vocabulary, over the ranks of a group
    plain: bool = False  # neither cut nor with a softcap
    wide_weight: bool = False  # dweight is added to an fp32 one that the caller has

    @property
    def native_gradients(self) -> bool:
        """Whether gradients come from native_gradients.py."""
        return native_gradients.serves(self.device, self.hidden_dtype, self.weight_dtype)

    @property
    def dz_dtype(self) -> torch.dtype:
        """Of the native gradients' dz and GEMMs."""
        return native_gradients.dz_dtype(self.hidden_dtype, self.weight_dtype)

    @property
    def needs_any(self) -> bool:
        """Whether any gradient is wanted."""
        return self.needs_hidden or self.needs_weight or self.needs_bias

    @property
    def entries(self) -> int:
        """Of the vocabulary; an empty shard counts as one, so that by default as many rows fit as on other ranks."""
        return max(1, self.vocab)

    @property
    def accumulator_bytes(self) -> int:
        """Of one number in the accumulation dtype."""
        return 8 if self.hidden_dtype == torch.float64 else 4

    @property
    def kept_bytes(self) -> int:
        """Of one kept exponential."""
        return 2 if 2 in (self.hidden_dtype.itemsize, self.weight_dtype.itemsize) else self.accumulator_bytes


@dataclass(frozen=True)
class Plan:
    """How a call runs. ``rows_per_chunk`` is what a loss sees at a time."""

    backend: str
    plan: str
    gemms: int
    workspace_bytes: int
    reason: str
    rows_per_chunk: int = 0
    dz_bytes: int = 0  # of plan recompute, where workspace_bytes asks for less than the default
    # workspace_bytes as it was given: on all of it in plans score and recompute, on exponentials in the others
    bound: int | None = None

    def __str__(self) -> str:
        chunk = f", {self.rows_per_chunk} rows a chunk" if self.rows_per_chunk else ""
        return (
            f"{self.backend} backend, plan {self.plan}: {self.gemms} GEMM{'s' if self.gemms != 1 else ''}, "
            f"{self.workspace_bytes / 2**20:.1f} MiB of workspace{chunk}\n  because {self.reason}"
        )


def choose_backend(problem: Problem, backend: str) -> tuple[str, str]:
    """``(backend, why)`` for the forward scan; on a CPU gradients are native passes and GEMMs where native_gradients.py
    serves the inputs, whichever made the forward but "reference", and torch's elsewhere."""
    check_choice(problem.op, "backend", backend, BACKENDS)
    if backend in ("reference", "torch"):
        return backend, f"backend={backend!r} was asked for"
    dtypes = (problem.hidden_dtype, problem.weight_dtype)
    if backend == "sm90":
        obstacle = sm90.call_obstacle(problem.device, dtypes, problem.width)
        obstacle = obstacle or ("" if problem.weight_in_rows else sm90.NOT_IN_ROWS)
        if obstacle:
            raise ValueError(f"{problem.op}: backend='sm90' cannot run: {obstacle}; pass backend='auto' or 'torch'")
        return "sm90", "backend='sm90' was asked for"
    taken = backend == "auto" and problem.weight_in_rows
    if taken and not sm90.call_obstacle(problem.device, dtypes, problem.width):
        return "sm90", "the CUDA C++ scan for sm_90a is there, beside the Triton kernels"
    if backend == "triton" or (backend == "auto" and problem.device.type == "cuda"):
        obstacle = gpu.obstacle(problem.device, dtypes)
        if not obstacle:
            return "triton", "backend='triton' was asked for" if backend == "triton" else "the Triton kernels are there"
        if backend == "triton":
            raise ValueError(f"{problem.op}: backend='triton' cannot run: {obstacle}; pass backend='auto' or 'torch'")
        return "torch", f"on torch, as {obstacle}"
    obstacle = native.obstacle(problem.device, dtypes)
    if backend == "native":
        if obstacle:
            raise ValueError(f"{problem.op}: backend='native' cannot run: {obstacle}; pass backend='auto' or 'torch'")
        return "native", "backend='native' was asked for"
    obstacle = obstacle or native.not_faster()
    return ("torch", f"on torch, as {obstacle}") if obstacle else ("native", "the native CPU scan is there")


def choose(problem: Problem, *, plan: str, workspace_bytes: int | None, backend: str) -> Plan:
    """The plan of a call.

    Raises:
        TypeError: a workspace_bytes that is no whole number.
        ValueError: an unknown plan or backend, or one that cannot serve the call, with what to do instead.
    """
    op = problem.op
    check_choice(op, "plan", plan, PLANS)
    if isinstance(workspace_bytes, (float, str)):
        kind = type(workspace_bytes).__name__
        raise TypeError(f"{op}: workspace_bytes={workspace_bytes} is a {kind}; pass a whole number of bytes, int(...)")
    if workspace_bytes is not None and workspace_bytes < 0:
        raise ValueError(f"{op}: workspace_bytes={workspace_bytes} is negative; pass a number of bytes, or None")
    workspace_bytes = None if workspace_bytes is None else min(workspace_bytes, 2**63 - 1)  # what an op can be told
    chosen, why = choose_backend(problem, backend)
    if chosen == "reference":
        if problem.wide_weight and problem.needs_weight and plan != "score":
            raise ValueError(
                f"{op}: backend='reference' leaves dweight to autograd and adds nothing to grad_weight_out; "
                f"drop it, or pass backend='auto' or 'torch'"
            )
        size = problem.rows * problem.vocab * problem.hidden_dtype.itemsize
        return Plan("reference", "autograd", 1 + problem.needs_hidden + problem.needs_weight, 3 * size, why)
    default = problem.width * kept_columns(problem.entries, chosen) * 4
    budget = default if workspace_bytes is None else workspace_bytes
    if plan in ("auto", "score") and not problem.needs_any:
        return _score(problem, workspace_bytes, chosen, f"no input needs a gradient; {why}")
    if plan == "score":
        return _score(problem, workspace_bytes, chosen, f"plan='score' was asked for: no gradient; {why}")
    asked = "" if plan == "auto" else f"plan={plan!r} was asked for; "
    if op in ("linear_loss", "linear_ppo_loss") and plan in ("auto", "precompute"):
        if not problem.needs_any:
            reason = f"{asked}no input needs a gradient, so only the score runs"
            return _score(problem, workspace_bytes, chosen, reason)
        return _precomputed_loss(problem, budget, workspace_bytes is None, chosen, asked)
    return _per_token(problem, plan, budget, workspace_bytes is None, chosen, asked)


def _score(problem: Problem, bound: int | None, backend: str, reason: str) -> Plan:
    return Plan(backend, "score", 1, _scan_bytes(problem, backend, bound), reason, bound=bound)


def _precomputed_loss(problem: Problem, budget: int, default: bool, backend: str, asked: str) -> Plan:
    chunk = _rows_per_chunk(problem, budget, default, backend)
    chunks = -(-problem.rows // chunk)
    size = _chunk_bytes(problem, backend, chunk, adds=problem.needs_weight and chunks > 1)
    waits = problem.weight_dtype == torch.float16 or (chunks > 1 and problem.weight_dtype.itemsize == 2)
    if problem.needs_weight and (problem.wide_weight or waits):
        # Of its own, before it is added or rounded; fp16, which waits for the loss scale, beside its product with it.
        copies = 2 if problem.weight_dtype == torch.float16 and not problem.wide_weight else 1
        size += copies * problem.vocab * problem.width * problem.accumulator_bytes
    if problem.needs_hidden and problem.hidden_dtype == torch.float16:
        size += problem.rows * problem.width * 8  # likewise (fused.stored_dtype)
    gemms = 1 + problem.needs_hidden + problem.needs_weight
    reason = f"{asked}the loss is known, so its gradients are formed in the forward, {chunks} chunk(s) of rows"
    reason += _how(problem, backend)
    return Plan(backend, "precompute", gemms, size, reason, chunk, bound=None if default else budget)


def _rows_per_chunk(problem: Problem, budget: int, default: bool, backend: str) -> int:
    """Rows whose exponentials fit in ``budget``: a multiple of the row block, at least one, no more than there are.

    The default on a CPU is as large as the head where that is frozen, or 64 MiB: a chunk reads it twice (README.md).
    Chunks of a trainable head are larger, as each reads and writes all of dweight; in bf16 several need one in fp32 to
    add up in, so that one chunk of all rows is no larger than two beside it, up to twice its size. Native code, which
    reads the head once a chunk and pads no more than a panel, gets as many rows as fit, as even as can be.
    """
    if default and problem.device.type == "cpu":
        adds_up_apart = problem.weight_dtype == torch.bfloat16 and not problem.wide_weight
        if not problem.needs_weight:
            head = problem.width * problem.vocab * problem.weight_dtype.itemsize
            budget = min(budget, max(FROZEN_CHUNK_BYTES, head))
        elif adds_up_apart and problem.rows * problem.vocab * problem.kept_bytes <= 2 * budget:
            budget *= 2
    block = row_block(problem.device)
    fitting = budget // (kept_columns(problem.entries, backend) * problem.kept_bytes)
    if backend == "native" and block < fitting < problem.rows:
        chunks = -(-problem.rows // (fitting // ROW_PANEL * ROW_PANEL))
        return max(block, -(-problem.rows // (ROW_PANEL * chunks)) * ROW_PANEL)
    if fitting >= problem.rows:
        return max(block, -(-problem.rows // block) * block)
    return max(block, fitting // block * block)


def _per_token(problem: Problem, plan: str, budget: int, default: bool, backend: str, asked: str) -> Plan:
    frozen = not (problem.needs_weight or problem.needs_bias)
    gradient_gemms = problem.needs_hidden + problem.needs_weight
    if plan == "precompute" and not (frozen and not problem.entropy):
        what = "entropy=True" if frozen else "a head that needs a gradient"
        raise ValueError(
            f"{problem.op}: plan='precompute' serves a frozen head without entropy, and this call has {what}; "
            f"use linear_loss, whose loss is known in the forward, or plan='auto'"
        )
    if plan == "precompute" or (plan == "auto" and frozen and not problem.entropy and not problem.lse):
        chunk = _rows_per_chunk(problem, budget, default, backend)
        size = problem.rows * problem.width * problem.hidden_dtype.itemsize + _chunk_bytes(problem, backend, chunk)
        what = "" if problem.lse else " and neither entropy nor lse is wanted"
        reason = f"{asked}the head is frozen{what}: dhidden is formed in the forward up to a row's scalar"
        reason += _how(problem, backend)
        return Plan(backend, "precompute", 2, size, reason, chunk, bound=None if default else budget)
    kept = problem.rows * kept_columns(problem.entries, backend) * problem.kept_bytes
    fits = kept <= budget
    if plan == "cache" and not fits and (default or not problem.cut):
        raise cache_does_not_fit(problem.op, kept, budget)
    if plan == "cache" or (plan == "auto" and fits):
        fit = "fit" if fits else "do not fit, which stops all ranks"
        reason = f"{asked}the exponentials of all rows {fit}: {_mib(kept)} of {_mib(budget)} MiB"
        reason += _how(problem, backend)
        # Scan and backward are one after the other.
        size = max(_backward_bytes(problem, backend, kept=True), _scan_bytes(problem, backend, keeps=True))
        size += _kept_bytes(problem, backend, problem.rows)
        # Over a cut vocabulary the op asks all ranks whether it fits, as each knows its own shard alone.
        bound = budget if plan == "cache" and problem.cut and not default else None
        return Plan(backend, "cache", 1 + gradient_gemms, size, reason, bound=bound)
    reason = f"{asked}the exponentials of all rows would be {_mib(kept)} MiB, above {_mib(budget)} MiB"
    reason = (asked.rstrip("; ") if asked else reason) + _how(problem, backend)
    bound = None if default else budget
    dz_bytes = 0 if bound is None else _bounded_dz_bytes(problem, backend, bound)
    if dz_bytes:
        reason += f"; blocks of dz of {dz_bytes / 2**20:g} MiB, for a workspace of {_mib(budget)} MiB"
    size = _recompute_bytes(problem, backend, dz_bytes, bound)
    return Plan(backend, "recompute", 2 + gradient_gemms, size, reason, dz_bytes=dz_bytes, bound=bound)


def _recompute_bytes(problem: Problem, backend: str, dz_bytes: int, bound: int | None) -> int:
    """Of plan recompute: the forward's scan, or the backward, which on native code scans again beside dz."""
    scan = _scan_bytes(problem, backend, bound)
    if backend in gpu.FAMILY or not problem.native_gradients:
        return max(_backward_bytes(problem, backend, dz_bytes=dz_bytes), scan)
    return max(scan, native_gradients.recompute_bytes(_gradient_sizes(problem), dz_bytes=dz_bytes, bound=bound))


def _bounded_dz_bytes(problem: Problem, backend: str, bound: int) -> int:
    """Of dz in a workspace of ``bound``; 0 for the default."""
    if backend not in gpu.FAMILY and problem.native_gradients:
        return native_gradients.bounded_dz_bytes(_gradient_sizes(problem), bound)
    dz_bytes, least = 0, native_gradients.LEAST_CHUNK_BYTES
    if backend not in gpu.FAMILY:
        least = backward_rows(problem.accumulator_bytes, 1) * GROUP * problem.accumulator_bytes
    while _recompute_bytes(problem, backend, dz_bytes, bound) > bound and (dz_bytes == 0 or dz_bytes > least):
        dz_bytes = (dz_bytes or native_gradients.CHUNK_BYTES) // 2
    return dz_bytes


def _gradient_sizes(problem: Problem, rows: int = 0) -> native_gradients.Sizes:
    """Of the native gradients; ``rows``: of a chunk."""
    return native_gradients.Sizes(
        rows or problem.rows, problem.width, problem.vocab, problem.dz_dtype.itemsize,
        native_gradients.widens(problem.hidden_dtype, problem.weight_dtype), problem.needs_hidden, problem.needs_weight,
    )  # fmt: skip


def _mib(size: int) -> str:
    """For a reason, which nobody reads while a compiler traces, whose sizes may be symbols without digits."""
    return "?" if torch.compiler.is_compiling() else f"{size / 2**20:.1f}"


def _how(problem: Problem, backend: str) -> str:
    """How GEMMs 2 and 3 run, for a reason's end."""
    if problem.device.type != "cpu" or backend in gpu.FAMILY or not problem.needs_any:
        return ""
    if problem.native_gradients:
        beaten = native_gradients.beaten_by_native_products(problem.dz_dtype)
        why = f", native ones, which beat {beaten} on this CPU" if beaten else ""
        return f"; gradients by a native pass and GEMMs in {str(problem.dz_dtype).removeprefix('torch.')}{why}"
    return f"; gradients by torch in {'float64' if problem.accumulator_bytes == 8 else 'float32'}, block by block"


def _weight_copy_bytes(problem: Problem) -> int:
    """A vocabulary group's weight widened to what the GEMMs read."""
    if narrow_operands(problem.device) or problem.weight_dtype.itemsize == problem.accumulator_bytes:
        return 0
    return min(GROUP, problem.vocab) * problem.width * problem.accumulator_bytes


def _kept_bytes(problem: Problem, backend: str, rows: int) -> int:
    """Exponentials of so many rows, and what they are around: on Triton a number for 32 of them."""
    exponentials = kept_columns(problem.vocab, backend) * problem.kept_bytes
    return rows * (exponentials + maxima_of(problem.vocab, backend) * problem.accumulator_bytes)


def _chunk_bytes(problem: Problem, backend: str, chunk: int, *, adds: bool = False) -> int:
    """Of plan precompute, one chunk's after the other: exponentials, beside the scan or what follows it."""
    scan = _scan_bytes(problem, backend, rows=chunk, keeps=True)
    size = _kept_bytes(problem, backend, chunk) + max(_backward_bytes(problem, backend, chunk, adds=adds), scan)
    return size + (CALL_BYTES * problem.rows if chunk < problem.rows else 0)


def _scan_bytes(problem: Problem, backend: str, bound: int | None = None, *, rows: int = 0, keeps: bool = False) -> int:
    """Blocks of the forward: logits and exponentials, the rows, the weight copy, and four numbers a row.

    ``rows``: of a chunk. ``keeps``: exponentials, each tile's around a number of its own until all of them are there.
    """
    rows = rows or problem.rows
    if backend in gpu.FAMILY:
        group = sm90.GROUP if backend == "sm90" else gpu.GROUP
        tiles = -(-problem.vocab // sm90.TILE) if backend == "sm90" and keeps else 0
        item = problem.hidden_dtype.itemsize
        return gpu.scan_bytes(rows, problem.width, problem.vocab, item, group, tiles)
    if backend == "native":
        bf16 = problem.hidden_dtype == problem.weight_dtype == torch.bfloat16
        return native.workspace_bytes(rows, problem.width, problem.vocab, GROUP, bf16, bound)
    block, group = row_block(problem.device), min(GROUP, problem.vocab)
    numbers = (3 if keeps else 2) * block * group + block * problem.width + 8 * rows
    return numbers * problem.accumulator_bytes + _weight_copy_bytes(problem)


def _backward_bytes(
    problem: Problem, backend: str, in_place_rows: int = 0, dz_bytes: int = 0, *, kept: bool = False, adds: bool = False
) -> int:
    """Blocks of the backward: log p and dz, the rows, dhidden, and one vocabulary group's dweight.

    ``in_place_rows``: of a chunk whose exponentials may be overwritten; 0: they may not, or are none. ``kept``: they
    are kept, not to be overwritten. ``adds``: a chunk's dweight to those before.
    """
    if backend in gpu.FAMILY:
        # sm90's exponentials are multiplied as they are, where only a log-prob's gradient comes in.
        straight = backend == "sm90" and (kept or in_place_rows > 0)
        only = problem.plain and not (problem.entropy or problem.lse or problem.needs_bias)
        adds = not problem.masked and problem.needs_weight and (adds or problem.wide_weight)
        return max(
            gpu.backward_bytes(
                in_place_rows or problem.rows, problem.width, problem.vocab, problem.hidden_dtype.itemsize,
                problem.kept_bytes, in_place=in_place_rows > 0, straight=way, adds=adds and problem.kept_bytes == 2,
                fp16=problem.hidden_dtype == torch.float16, dz_bytes=dz_bytes,
            )
            for way in ([straight] if only or not straight else [True, False])
        )  # fmt: skip
    if problem.native_gradients:
        return native_gradients.workspace_bytes(_gradient_sizes(problem, in_place_rows), in_place=in_place_rows > 0)
    group = min(GROUP, problem.vocab)
    block = min(problem.rows, backward_rows(problem.accumulator_bytes, dz_bytes))
    # log p, dz, a copy of either; with dL/dentropy or a softcap what its factor is made of.
    numbers = (3 if problem.plain and not problem.entropy else 5) * block * group
    numbers += block * problem.width + 8 * problem.rows
    if problem.needs_weight:
        numbers += group * problem.width
    if problem.needs_hidden and problem.hidden_dtype.itemsize != problem.accumulator_bytes:
        numbers += problem.rows * problem.width
    return numbers * problem.accumulator_bytes + _weight_copy_bytes(problem)


def problem_of(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    entropy: bool,
    lse: bool = False,
    mask: Tensor | None,
    softcap: float | None,
    group: Any,
    grad_weight_out: Tensor | None,
) -> Problem:
    """The problem that a call's arguments pose; gradients are wanted only while grad mode is on."""
    on = torch.is_grad_enabled()
    return Problem(
        op=op,
        rows=hidden.numel() // max(1, hidden.shape[-1]),
        width=hidden.shape[-1],
        vocab=weight.shape[0],
        device=hidden.device,
        hidden_dtype=hidden.dtype,
        weight_dtype=weight.dtype,
        needs_hidden=on and hidden.requires_grad,
        needs_weight=on and weight.requires_grad,
        needs_bias=on and bias is not None and bias.requires_grad,
        entropy=entropy,
        lse=lse,
        weight_in_rows=sm90.in_rows(weight),
        masked=mask is not None or op == "linear_ppo_loss",  # which has one, though explain may not be told
        cut=group is not None,
        plain=softcap is None and group is None,
        wide_weight=grad_weight_out is not None,
    )
