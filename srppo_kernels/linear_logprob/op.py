"""``srppo::linear_logprob``: schema, fake, autograd, and the public function. reference.py has the maths.

    linear_logprob            validates, chooses the plan, calls the op
    srppo::linear_logprob     per-token outputs, and what the plan keeps for the backward
    srppo::linear_logprob_backward   dhidden, dweight, dbias from the gradients of the outputs

The plan is an argument of the op, so that a compiled graph and an eager one keep the same things.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from srppo_kernels._library import Op
from srppo_kernels.linear_logprob import backward as grads
from srppo_kernels.linear_logprob import gpu, spare, vocab_parallel
from srppo_kernels.linear_logprob.checks import assert_targets, check_head, check_targets, check_temperatures
from srppo_kernels.linear_logprob.chunked import (
    Head,
    Residual,
    RowOutputs,
    accumulation_dtype,
    forward,
    kept_columns,
    kept_dtype,
    maxima_of,
)
from srppo_kernels.linear_logprob.plan import choose, problem_of
from srppo_kernels.linear_logprob.reference import linear_logprob_reference
from srppo_kernels.linear_logprob.rows import Rows

__all__ = ["LinearLogprob", "linear_logprob"]


class LinearLogprob(NamedTuple):
    """Per-token results of the shape of ``targets``, in fp32 (fp64 for fp64 inputs); 0 where masked."""

    logprob: Tensor  # in nats
    entropy: Tensor | None  # in nats
    lse: Tensor | None  # log of the sum of the exponentials of the logits


def live_rows(targets: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """Which rows count, ``[N]`` bool, from flat targets and a mask of any shape."""
    limits = torch.iinfo(targets.dtype)  # a comparison with what does not fit would wrap around
    fits = limits.min <= ignore_index <= limits.max
    live = targets != ignore_index if fits else torch.ones_like(targets, dtype=torch.bool)
    return live if mask is None else live & mask.reshape(-1)


def prepare(
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    ignore_index: int,
    vocab: int,
    group: str,
    backend: str,
    *,
    op: str = "linear_logprob",
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat ``(hidden [N, D], targets local to this rank's shard [N], live [N])``, with the values of targets and
    temperatures checked."""
    flat, x = targets.reshape(-1), hidden.reshape(-1, hidden.shape[-1])
    if backend in gpu.FAMILY and not group and flat.device.type != "cpu":
        live, fit = gpu.live_targets(flat, mask, ignore_index, vocab)
        assert_targets(fit)
        return x, flat, live
    live = live_rows(flat, mask, ignore_index)
    start, total = vocab_parallel.shard_range(vocab, group, targets.device)
    check_targets(op, flat, live, total, targets.shape)
    if row_temperature is not None:
        check_temperatures(op, row_temperature.reshape(-1), live, targets.shape)
    return x, flat - start if group else flat, live


def _run_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    grad_weight_out: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    entropy: bool,
    plan: str,
    backend: str,
    chunk: int,  # rows at a time (plan precompute), or bytes of dz (recompute; 0: the default)
    # Bytes of workspace (None: the default), kept to by score and recompute on native code; of exponentials where a
    # cut vocabulary's are cached.
    bound: int | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y, live = prepare(hidden, targets, mask, row_temperature, ignore_index, weight.shape[0], group, backend)
    head = Head(weight, bias, _flat(row_temperature), temperature, logit_scale, softcap)
    acc = accumulation_dtype(hidden)
    rows = Rows.of(live, backend=backend, dense=mask is None)
    if plan == "cache" and bound is not None:
        size = x.shape[0] * kept_columns(max(1, weight.shape[0]), backend) * kept_dtype(hidden, weight).itemsize
        vocab_parallel.require_cache(size, bound, group, hidden.device)
        bound = None  # it was on these alone
    kept, group_max = _kept_like(hidden, weight, plan, backend, every_row=rows.index is None)
    with torch.autocast(hidden.device.type, enabled=False):
        if plan == "precompute":
            outputs = [x.new_zeros(x.shape[0], dtype=acc) for _ in RowOutputs._fields]
            chunk = vocab_parallel.fewest_rows(chunk, bound, group, hidden.device)
            residual = new_residual(hidden, weight, min(chunk, rows.count), backend)
            for a in range(0, rows.count, chunk):
                part = rows.part(a, a + chunk)
                result = forward(x, head, y, part, entropy=False, backend=backend, residual=residual, group=group)
                part.put(kept, grads.context(x, head, y, part, result, residual, backend, group))
                for whole, values in zip(outputs, result, strict=True):
                    part.put(whole, values)
        else:
            cache = Residual(kept[:, : weight.shape[0]], group_max) if plan == "cache" else None
            result = forward(
                x, head, y, rows, entropy=entropy, backend=backend, residual=cache, kept_rows=rows.index, group=group,
                bound=bound,
            )  # fmt: skip
            outputs = [rows.whole(values, x.shape[0]) for values in result]
    logprob, h, lse = (t.view(targets.shape) for t in outputs[:3])
    return logprob, h, lse, torch.stack(outputs[3:]), kept, group_max


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)


def _kept_like(
    hidden: Tensor, weight: Tensor, plan: str, backend: str, *, every_row: bool = True
) -> tuple[Tensor, Tensor]:
    """What a plan keeps for the backward; on a CPU zeros in the exponentials of rows that are not computed."""
    n, vocab = hidden.numel() // max(1, hidden.shape[-1]), weight.shape[0]
    if plan == "cache":
        dtype, empty = kept_dtype(hidden, weight), every_row or hidden.device.type != "cpu"
        shape = (n, kept_columns(vocab, backend))
        return (
            spare.empty(hidden, shape, dtype) if empty else hidden.new_zeros(shape, dtype=dtype),
            hidden.new_zeros(n, maxima_of(vocab, backend), dtype=accumulation_dtype(hidden)),
        )
    if plan == "precompute":
        return hidden.new_zeros(n, hidden.shape[-1]), hidden.new_zeros(0)
    return hidden.new_zeros(0), hidden.new_zeros(0)


def new_residual(hidden: Tensor, weight: Tensor, rows: int, backend: str) -> Residual:
    """Room for a chunk's exponentials."""
    vocab = weight.shape[0]
    return Residual(
        spare.empty(hidden, (rows, kept_columns(vocab, backend)), kept_dtype(hidden, weight))[:, :vocab],
        hidden.new_empty(rows, maxima_of(vocab, backend), dtype=accumulation_dtype(hidden)),
    )


_linear_logprob = Op("linear_logprob", _run_linear_logprob)


@_linear_logprob.register_fake
def _(hidden, weight, targets, bias, mask, row_temperature, grad_weight_out, *options):  # type: ignore[no-untyped-def]
    plan, backend = options[5:7]
    outputs = [hidden.new_empty(targets.shape, dtype=accumulation_dtype(hidden)) for _ in range(3)]
    norm = hidden.new_empty(2, targets.numel(), dtype=accumulation_dtype(hidden))
    return (*outputs, norm, *_kept_like(hidden, weight, plan, backend))


def _run_linear_logprob_backward(
    g: Tensor | None,
    h: Tensor | None,
    dlse: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    norm: Tensor,
    kept: Tensor,
    group_max: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    grad_weight_out: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    plan: str,
    backend: str,
    chunk: int,
    bound: int | None,
    group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    flat = targets.reshape(-1)
    start, _ = vocab_parallel.shard_range(weight.shape[0], group, targets.device)
    x, y = hidden.reshape(-1, hidden.shape[-1]), flat - start
    rows = Rows.of(live_rows(flat, mask, ignore_index), backend=backend, dense=mask is None)
    head = Head(weight, bias, _flat(row_temperature), temperature, logit_scale, softcap)
    upstream = grads.Upstream(_flat(g), _flat(h), _flat(dlse), logprob.reshape(-1), entropy.reshape(-1), *norm)
    dweight = spare.empty(weight, weight.shape) if need_weight else weight.new_empty(0)
    dbias = torch.empty_like(bias) if bias is not None and need_bias else weight.new_empty(0)
    into = grads.Destination(
        hidden=need_hidden,
        weight=grad_weight_out if grad_weight_out is not None else (dweight if need_weight else None),
        bias=dbias if need_bias else None,
        accumulate_weight=grad_weight_out is not None,
        accumulate_bias=False,
    )
    with torch.autocast(hidden.device.type, enabled=False):
        dhidden: Tensor | None
        if plan == "precompute":
            wanted, dhidden = grads.from_context(head, y, rows, upstream, kept, group)
        else:
            residual = Residual(kept[:, : weight.shape[0]], group_max) if plan == "cache" else None
            wanted, dhidden = grads.gradients(
                x, head, y, rows, upstream, into, residual=residual, kept_rows=rows.index, group=group, backend=backend,
                dz_bytes=chunk, bound=bound,
            )  # fmt: skip
    if dhidden is None:
        return hidden.new_empty(0), dweight, dbias
    if wanted.index is not None or wanted.live is not None or dhidden.dtype != hidden.dtype:
        dhidden = wanted.put(x.new_zeros(x.shape), dhidden)
    return dhidden.view(hidden.shape), dweight, dbias


_linear_logprob_backward = Op("linear_logprob_backward", _run_linear_logprob_backward, writes="grad_weight_out")


@_linear_logprob_backward.register_fake
def _(g, h, dlse, logprob, entropy, norm, kept, group_max, hidden, weight, targets, bias, *options):  # type: ignore[no-untyped-def]
    need_hidden, need_weight, need_bias = options[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        bias.new_empty(bias.shape) if bias is not None and need_bias else weight.new_empty(0),
    )


_linear_logprob_backward.differentiate_no_further("linear_logprob")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, bias, mask, row_temperature, grad_weight_out, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*output[:2], *output[3:], hidden, weight, targets, bias, mask, row_temperature)
    # Not through save_for_backward: another micro-batch adds to it in between, which is its purpose.
    ctx.grad_weight_out = grad_weight_out
    ctx.scalars = options[:4]
    ctx.plan = options[5:]  # plan, backend, chunk, bound, group


def _backward(ctx: Any, g: Tensor | None, h: Tensor | None, dlse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 17
    if g is None and h is None and dlse is None:
        return nothing
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    out = ctx.grad_weight_out
    dhidden, dweight, dbias = torch.ops.srppo.linear_logprob_backward(
        g, h, dlse, *ctx.saved_tensors, out, *ctx.scalars, *ctx.plan,
        need_hidden, need_weight and out is None, need_bias,
    )  # fmt: skip
    return (
        dhidden if need_hidden else None,
        dweight if need_weight and out is None else None,
        None,
        dbias if need_bias else None,
        *nothing[4:],
    )


_linear_logprob.register_autograd(_backward, setup_context=_setup)


def group_name(group: Any) -> str:
    """A process group's name, which an op's schema can carry; "" for none."""
    if group is None:
        return ""
    if not hasattr(group, "group_name"):
        raise TypeError(
            f"group={group!r} is a {type(group).__name__}; pass a process group of torch.distributed, or None"
        )
    return group.group_name


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    lse: bool = False,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
    group: Any = None,
    grad_weight_out: Tensor | None = None,
) -> LinearLogprob:
    """``log softmax(z)[target]`` of every token, with entropy and lse on request, without the logits.

    ``z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``. Logits exist only as fp32 accumulators, a
    block at a time; inputs are read in their own dtype, under autocast too.

    Args:
        hidden: ``[..., D]`` last hidden states, float32, bfloat16, float16 or float64.
        weight: ``[V, D]``, as ``lm_head.weight``; may differ from ``hidden`` in dtype (not for float64).
        targets: ``[...]`` int64 or int32 token ids.
        bias: ``[V]``. An entry of -inf takes that token out of the vocabulary, unless a softcap follows, which makes
            -softcap of it. Such a token as a target has a log-prob below -1e38, and -inf with ``"reference"`` alone.
        mask: ``[...]`` bool, True on tokens that count. A masked token costs nothing, has outputs and gradients 0,
            and what its hidden state holds, NaN included, reaches nobody. So does one whose target is ``ignore_index``.
        temperature: a positive number, or one a token, ``[...]``; it gets no gradient.
        softcap: ``softcap * tanh(z / softcap)`` before the temperature (Gemma), or None.
        entropy, lse: whether to return them; their gradients are supported.
        plan: ``"auto"``, ``"score"`` (no gradient), ``"precompute"``, ``"cache"`` or ``"recompute"``: see plan.py.
        workspace_bytes: bound on the exponentials that ``cache`` keeps, by default the size of an fp32 dweight; on
            those of a chunk of ``precompute``, by default the same, on a CPU the size of the head or 64 MiB; and on
            what ``recompute`` and, on native code, ``score`` hold at a time, by default 64 MiB there, down to what one
            thread's smallest blocks take.
        backend: ``"auto"``, ``"native"`` (C++, CPU), ``"triton"`` (GPU), ``"sm90"`` (``"triton"`` with GEMM 1 in CUDA
            C++, for bf16 on Hopper, where ``"auto"`` takes it), ``"torch"``, or ``"reference"`` (all logits).
        group: process group over which the vocabulary is cut in rank order; ``weight`` and ``bias`` are then this
            rank's shard (sizes may differ), all else is the same on every rank, and so are the results and dhidden.
        grad_weight_out: float32 ``[V, D]`` (float64 for a float64 head) to which dweight is added in place of
            ``weight.grad``, in every backward, also that of ``torch.autograd.grad`` by other inputs; not with
            ``"reference"``.

    Returns:
        ``LinearLogprob(logprob, entropy, lse)``; differentiable once, any number of times with ``retain_graph``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; on a CPU also the first target outside the
            vocabulary, on a GPU a device-side assertion.

    Exactness: log-probs are fp32-exact (errors of a few 1e-6) whatever the inputs' dtype; those of ``"triton"`` as far
    as tensor cores are, which truncate (4e-5 to 1e-4 at D = 4096 on an H100, as a GEMM with fp32 results has). A
    token's bits do not depend on the tokens it shares a call with, nor on the plan: the PPO ratio of an unchanged model
    is exactly 1. ``"torch"``, which float64 takes on a CPU, has that as far as the BLAS has (README.md), and
    ``"reference"`` has not.
    """
    check_head(
        "linear_logprob", hidden, weight, targets, bias=bias, mask=mask, temperature=temperature,
        logit_scale=logit_scale, softcap=softcap, grad_weight_out=grad_weight_out,
    )  # fmt: skip
    problem = problem_of(
        "linear_logprob", hidden, weight, bias, entropy=entropy, lse=lse, mask=mask, softcap=softcap, group=group,
        grad_weight_out=grad_weight_out,
    )  # fmt: skip
    chosen = choose(problem, plan=plan, workspace_bytes=workspace_bytes, backend=backend)
    per_row = temperature if isinstance(temperature, Tensor) else None
    scalar = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    if plan == "score" or chosen.plan == "score":
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    if chosen.backend == "reference":
        outputs = _reference(
            hidden, weight, targets, bias, mask, ignore_index, temperature, logit_scale, softcap, group
        )
    else:
        outputs = torch.ops.srppo.linear_logprob(
            hidden, weight, targets, bias, mask, per_row, grad_weight_out, ignore_index, scalar, float(logit_scale),
            softcap, entropy, chosen.plan, chosen.backend, chosen.rows_per_chunk or chosen.dz_bytes, chosen.bound,
            group_name(group),
        )  # fmt: skip
    return LinearLogprob(outputs[0], outputs[1] if entropy else None, outputs[2] if lse else None)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    group: Any,
) -> tuple[Tensor, ...]:
    if group is not None:
        raise ValueError("linear_logprob: backend='reference' has no vocabulary-parallel form; pass backend='auto'")
    acc = accumulation_dtype(hidden)
    rows = _flat(temperature) if isinstance(temperature, Tensor) else None
    x, y, live = prepare(hidden, targets, mask, rows, ignore_index, weight.shape[0], "", "reference")
    outputs = linear_logprob_reference(
        x.to(acc),
        weight.to(acc),
        y,
        live,
        bias=None if bias is None else bias.to(acc),
        temperature=temperature if rows is None else rows,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    return tuple(t.view(targets.shape) for t in outputs)
