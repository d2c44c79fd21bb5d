"""What every loss of this package has in common: its arguments, its checks, its sums.

A loss is a function

    loss(logprob, entropy, mask, *tensors, normalizer=n, **options) -> (scalar, aux)

``logprob`` and ``entropy`` are what a head gives for the tokens taken, fp32 and in nats; ``mask`` is bool, True on
tokens that count; the tensors follow. What masked places hold, NaN included, is not read and gets no gradient. The
scalar is ``sum of terms / normalizer``, so it adds up over chunks, micro-batches and ranks as long as the normalizer
is that of the whole. ``aux`` holds sums as well (0-d tensors without a graph): divide by ``aux["tokens"]`` or its like
after adding up.

``level`` says what a loss must see at once:

    token      any rows: flat ``[n]`` or ``[B, T]``; linear_loss may call it chunk by chunk
    sequence   whole sequences, ``[B, T]``
    pair       whole pairs, ``[2P, T]``: P chosen sequences, then the P rejected ones in the same order
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from srppo_kernels._arguments import bounded, check_mask, check_number, check_same_shape, compute_dtype, sum_dtype
from srppo_kernels.ppo_loss.op import check_normalizer

__all__ = ["Aux", "LossFn", "LossResult", "level_of"]

Aux = dict[str, Tensor]
LossResult = tuple[Tensor, Aux]
LossFn = Callable[..., LossResult]
_F = TypeVar("_F", bound=Callable[..., LossResult])

LEVELS = ("token", "sequence", "pair")
LOG_RATIO_BOUND = 20.0  # as srppo_kernels.ppo_loss: beyond it a token is off-policy beyond use, and exp would overflow

# What to do about an argument that is missing.
_WHERE_FROM = {
    "old_logprobs": "the log-probs under the policy that sampled, kept from the rollout; for the one update that is on "
    "policy pass logprob.detach()",
    "init_logprobs": "the log-probs under the policy that training starts from, scored before the first update",
    "ref_logprobs": "the log-probs of the same tokens under the frozen reference model",
    "opponent_logprobs": "the log-probs of the same tokens under the model of the iteration before",
    "teacher_logprobs": "the log-probs of the same tokens under the teacher",
    "base_logprobs": "the log-probs of the same tokens under the base model",
    "rollout_logprobs": "the log-probs that the sampler reported for its tokens",
    "aligned_mean_logprobs": "the mean log-prob of each sequence under each aligned model, [B] or [models, B]",
    "advantages": "one number a token, or a sequence where the loss works on sequences",
}


def level(name: str) -> Callable[[_F], _F]:
    """Marks a loss with what it must see at once."""
    assert name in LEVELS

    def mark(function: _F) -> _F:
        function.level = name  # type: ignore[attr-defined]
        return function

    return mark


def unbound(loss: LossFn) -> LossFn:
    """The function itself, below ``functools.partial``."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def level_of(loss: LossFn) -> str:
    """``"token"``, ``"sequence"`` or ``"pair"``; seen through ``functools.partial``. A function without the mark is
    taken for a token-level one, which is what ``linear_loss`` expects."""
    return getattr(unbound(loss), "level", "token")


def name_of(loss: LossFn) -> str:
    """What messages call it."""
    loss = unbound(loss)
    return getattr(loss, "__name__", type(loss).__name__)


# -- arguments --------------------------------------------------------------------------------------------------------


def require(op: str, **tensors: Any) -> None:
    """Refuses a tensor that was left out, with where it comes from."""
    for name, value in tensors.items():
        if value is None:
            raise ValueError(f"{op}: {name} is missing; it is {_WHERE_FROM[name]}")


def tokens(op: str, logprob: Tensor, mask: Tensor, **others: Tensor | None) -> tuple[Tensor, ...]:
    """``logprob`` and the others in the dtype that is computed in, 0 where masked; ones for ``weights=None``.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit, by name.
    """
    check_mask(op, mask)
    for name, value in others.items():
        if isinstance(value, Tensor) and value.shape != logprob.shape and value.dim() == logprob.dim() - 1:
            raise ValueError(
                f"{op}: {name} has shape {tuple(value.shape)} but logprob has {tuple(logprob.shape)}; where a number "
                f"belongs to a whole sequence, spread it: {name}[:, None].expand_as(mask)"
            )
    check_same_shape(op, "logprob", logprob, optional=("entropy", "weights"), mask=mask, **others)
    if logprob.dim() not in (1, 2):
        raise ValueError(f"{op}: logprob has shape {tuple(logprob.shape)}; pass [B, T] or [n]")
    dtype = compute_dtype(logprob, *others.values())
    ones = torch.ones((), dtype=dtype, device=logprob.device).expand_as(logprob)
    given = (logprob, *(ones if value is None else value for value in others.values()))
    return tuple(value.to(dtype).masked_fill(~mask, 0) for value in given)


def whole(op: str, logprob: Tensor, mask: Tensor, *, what: str = "sequences, [B, T]") -> None:
    """Refuses what is not ``[B, T]``: a flat vector is a chunk of rows, which may have cut a sequence."""
    if isinstance(logprob, Tensor) and logprob.dim() == 1:
        raise ValueError(
            f"{op}: needs whole {what}, and got {logprob.shape[0]} rows in a flat vector. linear_loss calls "
            f"a loss on a chunk of rows, which would cut sequences: use srppo.losses.linear, or "
            f"srppo.losses.whole_sequences with a plan that calls the loss once (plan='recompute')"
        )
    if logprob.dim() != 2:
        raise ValueError(f"{op}: logprob has shape {tuple(logprob.shape)}; pass [B, T]")
    check_mask(op, mask)
    check_same_shape(op, "logprob", logprob, mask=mask)


def sequence_sums(logprob: Tensor, mask: Tensor) -> Tensor:
    """``[B]``: the sum over each row's tokens, added in float64; 0 for a row without any."""
    dtype = compute_dtype(logprob)
    return logprob.masked_fill(~mask, 0).sum(-1, dtype=sum_dtype(mask.device)).to(dtype)


def sequence_means(logprob: Tensor, mask: Tensor) -> Tensor:
    """``[B]``: the mean over each row's tokens; 0 for a row without any."""
    return sequence_sums(logprob, mask) / mask.sum(-1).clamp(min=1)


def per_sequence(op: str, name: str, value: Tensor, mask: Tensor, *, mean: bool = False) -> Tensor:
    """``[B]``, a constant: of ``[B, T]`` log-probs their sum (or mean), and ``[B]`` as it is, in rows without tokens
    too."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be a floating-point tensor; got {getattr(value, 'dtype', type(value))}")
    if value.device != mask.device:
        raise ValueError(f"{op}: {name} is on {value.device} but mask on {mask.device}; move one of them")
    value = value.detach()
    if value.shape == mask.shape:
        return (sequence_means if mean else sequence_sums)(value, mask)
    if value.shape == mask.shape[:1]:
        return value.to(compute_dtype(value))
    batch, time = mask.shape
    raise ValueError(
        f"{op}: {name} has shape {tuple(value.shape)}; pass one value a token, ({batch}, {time}), or one a sequence, "
        f"({batch},)"
    )


def halves(op: str, per_row: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected rows, ``[P]`` each."""
    rows = per_row.shape[0]
    if rows % 2:
        raise ValueError(
            f"{op}: got {rows} sequences, which are no pairs; pass the chosen ones and after them, in the same order, "
            f"the rejected ones"
        )
    return per_row[: rows // 2], per_row[rows // 2 :]


def live_pairs(op: str, mask: Tensor) -> Tensor:
    """``[P]`` bool: pairs of which both sequences have tokens; others, such as padding, have no part in the loss."""
    chosen, rejected = halves(op, mask.any(-1))
    return chosen & rejected


# -- sums -------------------------------------------------------------------------------------------------------------


def divided(op: str, terms: Tensor, normalizer: float | Tensor) -> Tensor:
    """``sum of terms / normalizer``, added in float64; a normalizer of 0, of a batch without tokens, counts as 1."""
    check_normalizer(op, normalizer, zero=True)
    total = terms.sum(dtype=sum_dtype(terms.device))
    if isinstance(normalizer, Tensor):
        divisor = normalizer.detach().reshape(()).to(total)
        total = total / torch.where(divisor == 0, 1, divisor)
    else:
        total = total / (normalizer or 1)
    return total.to(terms.dtype)


def sums(**counts: Tensor) -> Aux:
    """Statistics that add up: each tensor summed, without a graph."""
    return {name: value.detach().sum(dtype=torch.float32) for name, value in counts.items()}


def check_positive(op: str, **options: float) -> None:
    """Refuses an option that must be above 0."""
    for name, value in options.items():
        check_number(op, name, value, lambda x: x > 0, "be positive")


def log_one_minus_exp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` of x < 0 without cancellation; x is kept at -1e-7 or below, where the result is -16."""
    x = bounded(x, high=-1e-7)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
