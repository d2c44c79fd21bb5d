"""Any loss of this package straight from hidden states and a head, without the logits.

Token-level losses run on ``linear_loss``: chunk by chunk, gradients formed in the forward, three GEMMs, two with a
frozen head, and less where tokens are masked or clipped. Losses of sequences and pairs need all rows at once; they run
on the per-token op: two GEMMs with a frozen head, else three where the exponentials of all rows fit and four where not.
``explain`` tells:

    srppo.explain(hidden, weight, targets, op="linear_loss")         # token level
    srppo.explain(hidden, weight, targets, op="linear_logprob")      # sequences and pairs
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from srppo.losses.contract import LossFn, LossResult, level_of, name_of, unbound
from srppo_kernels import linear_logprob, linear_loss

__all__ = ["linear", "whole_sequences"]


def linear(
    loss: LossFn, hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *tensors: Tensor | None, **head: Any
) -> LossResult:
    """``loss(logprob, entropy, mask, *tensors)`` of a head's tokens.

    ::

        loss, aux = losses.linear(
            partial(losses.dpo, beta=0.1, normalizer=pairs), hidden, lm_head.weight, targets, mask, ref_logprobs
        )

    Args:
        loss: one of ``srppo.losses``, its options bound by ``functools.partial``; or any function of that shape, which
            is taken for a token-level one.
        hidden, weight, targets: ``[B, T, D]``, ``[V, D]``, ``[B, T]`` (token level: any leading dimensions).
        mask: bool, of ``targets``' shape. Masked rows cost no GEMM; so do targets of ``ignore_index``, which are masked
            for the loss as well.
        tensors: what the loss takes after ``mask``. (The entropy is there at token level, and None at the others.)
        head: the other options of ``linear_loss``: ``bias``, ``temperature``, ``softcap``, ``plan``, ...

    Returns:
        ``(loss, aux)`` as the loss gives them, ``aux`` summed over chunks.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == targets.shape:
        mask = mask & (targets != head.get("ignore_index", -100))
    if level_of(loss) == "token":
        refuse_other_shapes(loss, targets, tensors)
        return linear_loss(hidden, weight, targets, loss, mask, *tensors, mask=mask, **head)
    if targets.dim() != 2:
        raise ValueError(
            f"{name_of(loss)}: needs whole sequences, and targets has shape {tuple(targets.shape)}; pass [B, T]"
        )
    out = linear_logprob(hidden, weight, targets, mask=mask, **head)
    return loss(out.logprob, None, mask, *tensors)


def refuse_other_shapes(loss: LossFn, targets: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
    """What is not of ``targets``' shape is not cut into chunks: one number a sequence would pass for one a row in
    chunks of as many rows as there are sequences. Functions of others may take what they like."""
    function = unbound(loss)
    if not hasattr(function, "level"):
        return
    names = list(inspect.signature(function).parameters)[3:]
    for name, value in zip(names, tensors, strict=False):
        if isinstance(value, Tensor) and value.shape != targets.shape:
            raise ValueError(
                f"{name_of(loss)}: {name} has shape {tuple(value.shape)} but targets has {tuple(targets.shape)}; where "
                f"a number belongs to a whole sequence, spread it: {name}[:, None].expand_as(mask)"
            )


def whole_sequences(loss: LossFn, shape: torch.Size | tuple[int, int]) -> LossFn:
    """A loss of sequences or pairs as a ``loss_fn`` of ``linear_loss``, which must call it once, on all rows.

    ::

        fn = losses.whole_sequences(partial(losses.gspo, normalizer=n), targets.shape)
        loss, aux = linear_loss(hidden, weight, targets, fn, mask, old, advantages, mask=mask, plan="recompute")

    Args:
        loss: one of ``srppo.losses``, its options bound by ``functools.partial``.
        shape: ``[B, T]``, of the targets.

    Raises:
        ValueError: when called with fewer rows: the batch was cut into chunks, and a chunk holds parts of sequences.
    """
    batch, time = shape
    name = name_of(loss)

    def on_all_rows(logprob: Tensor, entropy: Tensor | None, *tensors: Tensor | None) -> LossResult:
        rows = math.prod(shape)
        if logprob.numel() != rows:
            raise ValueError(
                f"{name}: got {logprob.numel()} of {rows} rows: linear_loss cut the batch into chunks, and with it "
                f"sequences, and this loss needs whole ones; use srppo.losses.linear, or pass plan='recompute' or "
                f"plan='cache', or a workspace_bytes that holds all rows in one chunk"
            )
        flat = torch.Size([rows])
        given = [x.view(batch, time) if isinstance(x, Tensor) and x.shape == flat and time > 1 else x for x in tensors]
        if time == 1 and given and isinstance(given[0], Tensor):
            given[0] = given[0].view(batch, 1)  # the mask; what else is [B] may as well be one a sequence
        return loss(logprob.view(batch, time), None if entropy is None else entropy.view(batch, time), *given)

    on_all_rows.__name__ = name
    return on_all_rows
