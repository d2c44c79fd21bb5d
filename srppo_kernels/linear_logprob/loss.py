"""``linear_loss``: any loss of per-token log-probs and entropies, straight from hidden states, in three GEMMs.

    L = sum over chunks c of loss_fn(logprob_c, entropy_c, *loss_args_c)          g = dL/dlogprob, h = dL/dentropy

The loss runs between GEMM 1 and GEMMs 2 and 3 (fused.py); autograd on vectors as long as a chunk gives g and h.

Under ``torch.compile`` a Python callable cannot run inside an op, so there the loss is traced on the outputs of the
per-token op: the same values, with that op's plan (``cache`` or ``recompute``). So it is for tensors without values
(device meta, fake ones), of which the chunks would ask some.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from srppo_kernels._arguments import sum_dtype
from srppo_kernels._library import differentiable_once
from srppo_kernels.linear_logprob import fused
from srppo_kernels.linear_logprob.checks import check_head
from srppo_kernels.linear_logprob.chunked import Head
from srppo_kernels.linear_logprob.op import _flat, group_name, linear_logprob, live_rows, prepare
from srppo_kernels.linear_logprob.plan import Plan, choose, problem_of

__all__ = ["linear_loss"]

LossFn = Callable[..., tuple[Tensor, dict[str, Tensor]]]


class _Call:
    """What a forward needs beyond tensors, and what it hands back beyond them."""

    def __init__(self, loss_fn: LossFn, args: tuple[Any, ...], head: dict[str, Any], plan: Plan, group: str) -> None:
        self.loss_fn, self.args, self.head, self.plan, self.group = loss_fn, args, head, plan, group
        self.names: list[str] = []
        self.grad_mode = torch.is_grad_enabled()  # the caller's: in a forward it is off


class _LinearLoss(torch.autograd.Function):
    """Gradients are formed in the forward; ``backward`` scales them, any number of times."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        mask: Tensor | None,
        *differentiable: Tensor,
    ) -> tuple[Tensor, ...]:
        _, need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        wide = call.head["grad_weight_out"] is not None
        wanted = fused.Wanted(need_hidden, need_weight, need_bias, wide_weight=wide)
        head = Head(weight, bias, *(call.head[k] for k in ("row_temperature", "temperature", "logit_scale", "softcap")))
        backend, group, vocab = call.plan.backend, call.group, weight.shape[0]
        x, y, live = prepare(
            hidden, targets, mask, head.row_temperature, call.head["ignore_index"], vocab, group, backend,
            op="linear_loss",
        )  # fmt: skip
        chunks = _ChunkLosses(call.loss_fn, call.args, differentiable, targets.shape, live, call.grad_mode)
        formed = fused.run(
            x, head, y, live, chunks, wanted,
            chunk=call.plan.rows_per_chunk or x.shape[0], backend=backend, group=group, dense=mask is None,
            bound=call.plan.bound,
        )  # fmt: skip
        call.names = list(chunks.aux)
        ctx.save_for_backward(*formed, *chunks.argument_gradients())
        ctx.shapes = [hidden.shape, weight.shape, None if bias is None else bias.shape]
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        ctx.grad_weight_out = call.head["grad_weight_out"]
        aux = chunks.joined_aux()
        ctx.mark_non_differentiable(*aux)
        ctx.set_materialize_grads(False)
        return (chunks.total(), *aux)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        out: list[Any] = [None] * len(ctx.needs_input_grad)
        if grad is None:
            return tuple(out)
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint gives each but once
        head, arguments = saved[:3], saved[3:]
        for i in range(3):
            if not ctx.needs_input_grad[1 + i]:
                continue
            if i == 1 and ctx.grad_weight_out is not None:
                ctx.grad_weight_out.addcmul_(head[i], grad.to(head[i].dtype))
            else:
                out[1 + i] = fused.scale(head[i], grad, ctx.dtypes[i]).view(ctx.shapes[i])
        for i, formed in enumerate(arguments):
            out[6 + i] = fused.scale(formed, grad, formed.dtype)
        return tuple(out)


class _ChunkLosses:
    """Calls the caller's loss on chunk after chunk, and gathers scalars, aux and gradients of its arguments."""

    def __init__(
        self,
        loss_fn: LossFn,
        args: tuple[Any, ...],
        differentiable: tuple[Tensor, ...],
        shape: torch.Size,
        live: Tensor,
        grad_mode: bool,
    ) -> None:
        self.loss_fn, self.shape, self.live, self.grad_mode = loss_fn, shape, live, grad_mode
        kind = live.device.type  # the caller's autocast, too: the head's is off
        self.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
        self.args = list(args)  # those that need a gradient are None here and come in `differentiable`
        self.differentiable = [t.detach() for t in differentiable]
        self.gradients = [torch.zeros_like(t) for t in self.differentiable]
        self.scalars: list[Tensor] = []
        self.rows: list[int] = []
        self.aux: dict[str, list[Tensor]] = {}

    def _cut(self, value: Any, r: slice) -> Any:
        """A chunk's rows of an argument of the targets' shape, zero where masked; anything else as it is."""
        if not (isinstance(value, Tensor) and value.shape == self.shape):
            return value
        return value.reshape(-1)[r].masked_fill(~self.live[r], 0)  # keeps the dtype: a mask stays bool

    def __call__(self, start: int, stop: int, logprob: Tensor, entropy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        r = slice(start, stop)
        # This graph is not the caller's: torch.utils.checkpoint's hooks on it would run the caller's region again, for
        # each chunk. Under no_grad there is none, and nothing to refuse of what loss_fn closes over.
        hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved)
        with torch.set_grad_enabled(self.grad_mode), self.autocast, hooks:
            logprob = logprob.detach().requires_grad_()
            entropy = entropy.detach().requires_grad_()
            leaves = [t.detach().requires_grad_() for t in self.differentiable]
            given = iter(leaves)
            args = [self._cut(next(given) if isinstance(a, _Hole) else a, r) for a in self.args]
            scalar, aux = call_loss(self.loss_fn, logprob, entropy, args)
            if not self.scalars:
                refuse_foreign_leaves(scalar, [logprob, entropy, *leaves])
            inputs = [logprob, entropy, *leaves]
            derivatives: tuple[Tensor | None, ...] = (None,) * len(inputs)
            if scalar.requires_grad:
                derivatives = torch.autograd.grad(scalar, inputs, allow_unused=True)
        self.scalars.append(scalar.detach())
        self.rows.append(stop - start)
        if self.aux and list(self.aux) != list(aux):
            raise ValueError(
                f"linear_loss: loss_fn's aux has keys {list(aux)} now and {list(self.aux)} before; return the same"
            )
        for name, value in aux.items():
            self.aux.setdefault(name, []).append(value.detach())
        for gradient, part in zip(self.gradients, derivatives[2:], strict=True):
            if part is not None:
                gradient += part
        return derivatives[0], derivatives[1]

    def total(self) -> Tensor:
        """The sum over chunks, in order, in float64."""
        total = torch.stack(self.scalars).to(sum_dtype(self.live.device)).sum()
        return total.to(self.scalars[0].dtype)

    def argument_gradients(self) -> list[Tensor]:
        """dL/d(loss_args that need one)."""
        return self.gradients

    def joined_aux(self) -> list[Tensor]:
        """Per-row tensors joined to the targets' shape, all others summed."""
        return [self._join(parts) for parts in self.aux.values()]

    def _join(self, parts: list[Tensor]) -> Tensor:
        if all(p.dim() > 0 and p.shape[0] == n for p, n in zip(parts, self.rows, strict=True)):
            return torch.cat(parts).reshape(self.shape + parts[0].shape[1:])
        return torch.stack(parts).sum(0)


class _Hole:
    """Stands in ``loss_args`` for a tensor that autograd must see as an input."""


def call_loss(loss_fn: LossFn, logprob: Tensor, entropy: Tensor, args: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The caller's function, with what it returns checked."""
    result = loss_fn(logprob, entropy, *args)
    if not (
        isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor) and isinstance(result[1], dict)
    ):
        raise TypeError(
            "linear_loss: loss_fn must return (scalar, aux): a 0-d tensor and a dict of tensors, {} for none"
        )
    if result[0].dim() != 0:
        raise ValueError(
            f"linear_loss: loss_fn returned a loss of shape {tuple(result[0].shape)}; return its sum, a 0-d tensor"
        )
    for name, value in result[1].items():
        if not isinstance(value, Tensor):
            raise TypeError(f"linear_loss: loss_fn's aux[{name!r}] is {type(value).__name__}; return a tensor")
    return result


def refuse_foreign_leaves(scalar: Tensor, known: list[Tensor]) -> None:
    """A tensor that ``loss_fn`` closes over would get no gradient, silently: refuse it.

    Raises:
        ValueError: the loss depends on a tensor that needs a gradient and is not among ``loss_args``.
    """
    seen: set[Any] = set()
    stack = [scalar.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is t for t in known):
            raise ValueError(
                f"linear_loss: loss_fn uses a tensor of shape {tuple(variable.shape)} that needs a gradient and is not "
                f"in loss_args; pass it (or what is computed from it) as one of loss_args, or detach it"
            )
        stack.extend(following for following, _ in node.next_functions)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: LossFn,
    *loss_args: Any,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
    group: Any = None,
    grad_weight_out: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``loss_fn(logprob, entropy, *loss_args) -> (scalar, aux)`` of a head's tokens, without the logits.

    ``loss_fn`` is called on a chunk of rows at a time, with flat ``[rows]`` fp32 vectors, and those of ``loss_args``
    that have ``targets``' shape are cut likewise. Masked rows come as 0 in all of them, so a sum over rows needs no
    mask as long as zeros give 0 (pass ``mask`` as one of ``loss_args`` otherwise). The scalars are summed over
    chunks: a loss that divides by a count takes that count from outside.

    Args:
        hidden, weight, targets, bias, mask, ignore_index, temperature, logit_scale, softcap, backend, group,
            grad_weight_out: as in ``linear_logprob``.
        loss_fn: returns a 0-d tensor and a dict of tensors. Tensors that need a gradient must come in through
            ``loss_args``, where they get it; one that ``loss_fn`` closes over is refused where the loss is called on
            chunks.
        plan: ``"precompute"`` (the default where a gradient is wanted), ``"score"``, or ``"cache"`` and
            ``"recompute"``, which call ``loss_fn`` once, on all rows.
        workspace_bytes: bound on a chunk's exponentials, which sets how many rows a chunk has; by default the size of
            an fp32 dweight (twice that on a CPU, where all rows of bf16 are then one chunk), and with a frozen head on
            a CPU that of the head, or 64 MiB. For the other plans as in ``linear_logprob``.

    Returns:
        ``(loss, aux)``: an aux tensor whose first dimension is the chunk's rows is joined to ``targets``' shape, any
        other is summed over chunks. ``aux`` carries no graph.

    Raises:
        TypeError, ValueError: an argument or a result of ``loss_fn`` that does not fit.
    """
    op = "linear_loss"
    if not callable(loss_fn):
        raise TypeError(
            f"{op}: loss_fn must be a function of (logprob, entropy, *loss_args), got {type(loss_fn).__name__}"
        )
    check_head(
        op, hidden, weight, targets, bias=bias, mask=mask, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, grad_weight_out=grad_weight_out,
    )  # fmt: skip
    problem = problem_of(
        op, hidden, weight, bias, entropy=True, mask=mask, softcap=softcap, group=group, grad_weight_out=grad_weight_out
    )
    chosen = choose(problem, plan=plan, workspace_bytes=workspace_bytes, backend=backend)
    traced = torch.compiler.is_compiling() or hidden.is_meta or isinstance(hidden, FakeTensor)
    if traced or chosen.plan not in ("precompute", "score"):
        per_token_plan = "score" if chosen.plan == "score" else "auto" if plan == "precompute" else plan
        out = linear_logprob(
            hidden, weight, targets, bias=bias, mask=mask, ignore_index=ignore_index, temperature=temperature,
            logit_scale=logit_scale, softcap=softcap, entropy=True, plan=per_token_plan,
            workspace_bytes=workspace_bytes, backend=backend, group=group, grad_weight_out=grad_weight_out,
        )  # fmt: skip
        return _on_all_rows(out.logprob, out.entropy, targets, mask, ignore_index, loss_fn, loss_args)
    if chosen.plan == "score":
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    per_row = isinstance(temperature, Tensor)
    head = {
        "row_temperature": _flat(temperature) if isinstance(temperature, Tensor) else None,
        "temperature": 1.0 if per_row else float(temperature),
        "logit_scale": float(logit_scale),
        "softcap": softcap,
        "ignore_index": ignore_index,
        "grad_weight_out": grad_weight_out,
    }
    differentiable = [a for a in loss_args if isinstance(a, Tensor) and a.requires_grad and torch.is_grad_enabled()]
    held = tuple(_Hole() if any(a is d for d in differentiable) else a for a in loss_args)
    call = _Call(loss_fn, held, head, chosen, group_name(group))
    loss, *aux = _LinearLoss.apply(call, hidden, weight, bias, targets, mask, *differentiable)
    return loss, dict(zip(call.names, aux, strict=True))


def _on_all_rows(
    logprob: Tensor,
    entropy: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    ignore_index: int,
    loss_fn: LossFn,
    loss_args: tuple[Any, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on the per-token op's outputs: one chunk with all rows."""
    assert entropy is not None
    live = live_rows(targets.reshape(-1), mask, ignore_index)
    args = [
        a.reshape(-1).masked_fill(~live, 0) if isinstance(a, Tensor) and a.shape == targets.shape else a
        for a in loss_args
    ]
    scalar, aux = call_loss(loss_fn, logprob.reshape(-1), entropy.reshape(-1), args)
    rows = live.shape[0]
    joined = {}
    for name, value in aux.items():
        per_row = value.dim() > 0 and value.shape[0] == rows
        joined[name] = (value.reshape(targets.shape + value.shape[1:]) if per_row else value).detach()
    return scalar, joined
