"""``srppo::linear_ppo_loss``: the clipped PPO loss of a head's log-probs, in three GEMMs (two with a frozen head).

    loss = 1/n sum_i [ max(-A_i r_i, -A_i clip(r_i, 1 - low, 1 + high)) - entropy_coef H_i ]     r = exp(logprob - old)

over live tokens, n the normalizer. The scalar maths is srppo_kernels.ppo_loss's; a clipped token has g = 0 and, with no
entropy bonus, costs no backward GEMM.
"""

from typing import Any

import torch
from torch import Tensor

from srppo_kernels._arguments import check_finite, check_floating, check_tensor, sum_dtype
from srppo_kernels._library import Op, differentiable_once
from srppo_kernels.linear_logprob import fused
from srppo_kernels.linear_logprob.checks import check_head
from srppo_kernels.linear_logprob.chunked import Head
from srppo_kernels.linear_logprob.op import _flat, group_name, linear_logprob, live_rows, prepare
from srppo_kernels.linear_logprob.plan import choose, problem_of
from srppo_kernels.ppo_loss import PPOStats, ppo_loss, ppo_terms
from srppo_kernels.ppo_loss.op import check_clips, check_normalizer

__all__ = ["linear_ppo_loss"]


def _run_linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    normalizer_tensor: Tensor | None,
    grad_weight_out: Tensor | None,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    normalizer: float | None,
    backend: str,
    chunk: int,
    bound: int | None,
    group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, y, live = prepare(
        hidden, targets, mask, row_temperature, ignore_index, weight.shape[0], group, backend, op="linear_ppo_loss"
    )
    head = Head(weight, bias, _flat(row_temperature), temperature, logit_scale, softcap)
    old, advantage = old_logprobs.reshape(-1), advantages.reshape(-1)
    divisor: Tensor | float = live.sum().clamp(min=1) if normalizer is None else normalizer
    if normalizer_tensor is not None:
        divisor = normalizer_tensor.where(normalizer_tensor != 0, 1)  # as in ppo_loss: a batch without tokens
    losses: list[Tensor] = []
    stats: list[PPOStats] = []

    def loss(start: int, stop: int, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        r = slice(start, stop)
        terms = ppo_terms(
            logprob, old[r], advantage[r], live[r], entropy=entropy, clip_low=clip_low, clip_high=clip_high,
            dual_clip=dual_clip, entropy_coef=entropy_coef,
        )  # fmt: skip
        losses.append(terms.loss)
        stats.append(terms.stats)
        h = terms.d_entropy
        return terms.d_logprobs / divisor, None if h is None or entropy_coef == 0 else h / divisor

    wanted = fused.Wanted(need_hidden, need_weight, need_bias, wide_weight=grad_weight_out is not None)
    formed = fused.run(x, head, y, live, loss, wanted, chunk=chunk, backend=backend, group=group, bound=bound)
    # The chunks' losses in float64 and in order: the sum then moves by no more than a rounding with the chunk size.
    whole = losses[0] if len(losses) == 1 else torch.stack(losses).to(sum_dtype(x.device)).sum()
    total = (whole / divisor).to(losses[0].dtype)
    merged = PPOStats.merge(stats)
    vector = torch.stack([field for field in merged if field is not None])
    dhidden = formed.hidden.view(hidden.shape) if need_hidden else formed.hidden
    return total, vector, dhidden, formed.weight, formed.bias


_linear_ppo_loss = Op("linear_ppo_loss", _run_linear_ppo_loss)


@_linear_ppo_loss.register_fake
def _(hidden, weight, targets, old_logprobs, advantages, mask, bias, *options):  # type: ignore[no-untyped-def]
    need_hidden, need_weight, need_bias = options[-3:]
    wanted = fused.Wanted(need_hidden, need_weight, need_bias, wide_weight=options[2] is not None)
    dtype = torch.float64 if torch.float64 in (hidden.dtype, old_logprobs.dtype, advantages.dtype) else torch.float32
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(PPOStats._fields), dtype=torch.float32),
        *fused.formed_like(hidden, weight, bias, wanted),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in (0, 1, 6)]
    ctx.grad_weight_out = inputs[9]


@differentiable_once
def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing: list[Any] = [None] * 26
    if grad is None:
        return tuple(nothing)
    for position, formed, dtype in zip((0, 1, 6), ctx.saved_tensors, ctx.dtypes, strict=True):
        if not ctx.needs_input_grad[position]:
            continue
        if position == 1 and ctx.grad_weight_out is not None:
            ctx.grad_weight_out.addcmul_(formed, grad.to(formed.dtype))
        else:
            nothing[position] = fused.scale(formed, grad, dtype)
    return tuple(nothing)


_linear_ppo_loss.register_autograd(_backward, setup_context=_setup)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
    group: Any = None,
    grad_weight_out: Tensor | None = None,
) -> tuple[Tensor, PPOStats]:
    """The clipped PPO loss straight from hidden states: ``(loss, PPOStats)``.

    Equal to ``ppo_loss(linear_logprob(...).logprob, ...)``, a GEMM cheaper: the loss is known, so its gradients are
    formed while the exponentials of a chunk of rows are at hand.

    Args:
        hidden, weight, targets, bias, ignore_index, temperature, logit_scale, softcap, backend, group,
            grad_weight_out: as in ``linear_logprob``.
        old_logprobs, advantages: ``[...]``, of ``targets``' shape; constants. What masked places hold is not read.
        mask: ``[...]`` bool, True on tokens that count.
        clip_low, clip_high, dual_clip, entropy_coef: as in ``ppo_loss``.
        normalizer: what the sum over tokens is divided by, computed by the caller over the whole global batch; by
            default the number of live tokens of this call. A count of 0 counts as 1.
        plan: ``"precompute"`` (the default where a gradient is wanted), ``"score"``, or ``"cache"`` and
            ``"recompute"``, which go through ``linear_logprob``.
        workspace_bytes: bound on a chunk's exponentials as in ``linear_loss``; for the other plans as in
            ``linear_logprob``.

    Returns:
        The loss, an fp32 0-d tensor differentiable in ``hidden``, ``weight`` and ``bias``, and the statistics of
        ``ppo_loss``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; asymmetric and dual clip as in ``ppo_loss``.
    """
    op = "linear_ppo_loss"
    check_head(
        op, hidden, weight, targets, bias=bias, mask=mask, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, grad_weight_out=grad_weight_out,
    )  # fmt: skip
    check_clips(op, clip_low, clip_high, dual_clip)
    check_finite(op, entropy_coef=entropy_coef)
    for name, values in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        check_tensor(op, name, values)
        check_floating(op, name, values)
        if values.shape != targets.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(values.shape)} but targets {tuple(targets.shape)}; pass one number for "
                f"every target"
            )
        if values.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {values.device} but hidden on {hidden.device}; move one of them")
    if normalizer is not None:
        check_normalizer(op, normalizer)
    problem = problem_of(
        op, hidden, weight, bias, entropy=True, mask=mask, softcap=softcap, group=group, grad_weight_out=grad_weight_out
    )
    chosen = choose(problem, plan=plan, workspace_bytes=workspace_bytes, backend=backend)
    if chosen.plan not in ("precompute", "score"):
        return _per_token(
            hidden, weight, targets, old_logprobs, advantages, mask, normalizer,
            {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "entropy_coef": entropy_coef},
            {"bias": bias, "ignore_index": ignore_index, "temperature": temperature, "logit_scale": logit_scale,
             "softcap": softcap, "workspace_bytes": workspace_bytes, "backend": backend, "group": group,
             "grad_weight_out": grad_weight_out, "plan": plan},
        )  # fmt: skip
    scored = chosen.plan == "score"
    if scored:
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    per_row = temperature if isinstance(temperature, Tensor) else None
    loss, vector, *_ = torch.ops.srppo.linear_ppo_loss(
        hidden, weight, targets, old_logprobs.detach(), advantages.detach(), mask, bias, per_row,
        normalizer.detach().reshape(()) if isinstance(normalizer, Tensor) else None, grad_weight_out, ignore_index,
        1.0 if per_row is not None else float(temperature), float(logit_scale), softcap,
        float(clip_low), float(clip_high), dual_clip, float(entropy_coef),
        None if isinstance(normalizer, Tensor) or normalizer is None else float(normalizer),
        chosen.backend, chosen.rows_per_chunk or problem.rows, chosen.bound, group_name(group),
        problem.needs_hidden and not scored, problem.needs_weight and not scored, problem.needs_bias and not scored,
    )  # fmt: skip
    return loss, PPOStats.from_vector(vector, True)


def _per_token(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    normalizer: float | Tensor | None,
    loss_options: dict[str, Any],
    head_options: dict[str, Any],
) -> tuple[Tensor, PPOStats]:
    """The loss on top of the per-token op, for plans that are the op's."""
    out = linear_logprob(hidden, weight, targets, mask=mask, entropy=True, **head_options)
    live = live_rows(targets.reshape(-1), mask, head_options["ignore_index"]).view(targets.shape)
    shape = (-1,) if targets.dim() == 0 else targets.shape
    return ppo_loss(
        out.logprob.view(shape), old_logprobs.detach().view(shape), advantages.detach().view(shape), live.view(shape),
        entropy=None if out.entropy is None else out.entropy.view(shape), normalizer=normalizer, **loss_options,
    )  # fmt: skip
