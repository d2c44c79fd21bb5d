"""Hugging Face models: cross-entropy and per-token log-probs from the last hidden states, without logits.

    loss = -1/n sum_t log softmax(z_t)[y_{t+1}],    z_t = softcap(scale * (W h_t + b)),    n = num_items_in_batch

over labels that are not -100; n is their count where the trainer passes none. The model's ``forward`` is replaced on
the instance: called with labels it runs the backbone and ``linear_loss`` on its hidden states, in three multiplications
by the head (two where it is frozen); called in any other way, as by ``generate``, it is the forward that it was.

    trainer = Trainer(model=use_fused_cross_entropy(model), ...)

The head and what the architecture does to logits are read on every call, so that peft, FSDP and a change of dtype after
the patch are seen. Whether both together give the model's own log-probs is checked once, before any training.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srppo.errors import UserError
from srppo.models import Head, head_of, is_peft, trunk_of
from srppo.roles import Role, check_head, evaluating
from srppo.sharding import is_sharded
from srppo_kernels import LinearLogprob, linear_logprob, linear_loss
from srppo_kernels.parallel import full_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["causal_lm", "use_fused_cross_entropy"]

IGNORE = -100
REQUEST = "fused_logprobs"  # keyword of forward that asks for per-token log-probs; trl.py passes it
M = TypeVar("M", bound=nn.Module)


@dataclass(slots=True)
class FusedForward:
    """What the replaced forward of a model needs; kept on the model, so that a deep copy has its own."""

    original: Any  # the bound forward that was there before
    cross_entropy: bool = False
    eval_logits: bool = False
    workspace_bytes: int | None = None  # of cross_entropy
    autocast: bool = True  # whether autocast reaches the head; not where a trainer keeps it in float32


def use_fused_cross_entropy(model: M, *, eval_logits: bool = False, workspace_bytes: int | None = None) -> M:
    """Makes ``model(labels=...)`` compute its loss without logits, and returns the same model.

    Loss and gradients are those of the model's own cross-entropy in fp32; for weights in 16 bit they are more exact, as
    logits are never rounded. The output has no ``logits`` where a loss was computed this way. A batch without a single
    label has loss 0, where the mean over no tokens would be NaN. A deep copy does the same; a model that was pickled
    comes back with its own forward, so call this again.

    Args:
        model: a transformers causal LM, or a LoRA peft model around one. The head may be tied, may have a bias, and may
            be scaled (Cohere, Granite) or soft-capped (Gemma).
        eval_logits: in evaluation mode use the model's own forward, which returns logits: for ``compute_metrics`` and
            ``predict``.
        workspace_bytes: bound on the exponentials that are kept at a time, as in ``linear_loss``.

    Raises:
        UserError: no causal LM; an adapter on the LM head; prompt learning; a loss other than the next-token
            cross-entropy; a mixture of experts that adds its balancing loss; logits that the head does not reproduce.
    """
    inner = causal_lm(model)
    require_next_token_loss(inner)
    fused = fuse(inner)
    if not fused.cross_entropy:
        check_loss(inner, fused.original)
    fused.cross_entropy, fused.eval_logits, fused.workspace_bytes = True, eval_logits, workspace_bytes
    return model


# -- the model --------------------------------------------------------------------------------------------------------


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM inside ``model``, with adapter layers in place.

    Raises:
        UserError: it is none, or adapted by something else than layers inside it.
    """
    from transformers import PreTrainedModel

    if is_peft(model):
        if any(config.is_prompt_learning for config in model.peft_config.values()):  # type: ignore[operator]
            raise UserError("the adapter is a learned prompt, whose tokens the labels do not count: use LoRA")
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{type(model).__name__} is no transformers model or peft model: pass the model as it was loaded, before "
            "it is compiled or wrapped for several devices"
        )
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder model: only causal language models are supported"
        )
    return model


def require_next_token_loss(model: PreTrainedModel) -> None:
    """Refuses a model whose own loss is not the cross-entropy that replaces it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", model.loss_function)
        raise UserError(f"{type(model).__name__} is trained with {name}, not with the next-token cross-entropy")
    refuse_router_loss(model)


def refuse_router_loss(model: PreTrainedModel, asked: bool | None = None) -> None:
    """``asked`` is what a call says; without it the configuration decides, which may have been changed since."""
    if asked if asked is not None else getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UserError(
            "output_router_logits adds a load-balancing loss of the experts, which needs the model's own forward: "
            "set config.output_router_logits = False"
        )


def fuse(model: PreTrainedModel) -> FusedForward:
    """Replaces the forward of a causal LM once, after checking its head; what it does is set on the result."""
    fused = vars(model).get("_srppo_fused")
    # pickle gives a method back by its name, so what was unpickled has the mark and the forward of its class
    if fused is None or getattr(model.forward, "__func__", None) is type(model).forward:
        if is_sharded(model):
            raise UserError(f"{type(model).__name__} is cut over ranks already: make this call before fully_shard")
        with evaluating(model), outside_autocast(model):
            read_head(model)
            check_head(Role("model", model))
        fused = vars(model)["_srppo_fused"] = FusedForward(model.forward)
        model.forward = types.MethodType(forward_of(type(model)), model)
    return fused


@contextmanager
def outside_autocast(model: PreTrainedModel) -> Iterator[None]:
    """With the forward below the autocast that Accelerate's ``prepare`` put around it: its parts do without it, too."""
    outer, inner = model.forward, vars(model).get("_original_forward")
    if inner is None:
        yield
        return
    model.forward = inner
    try:
        yield
    finally:
        model.forward = outer


@torch.no_grad()
def check_loss(model: PreTrainedModel, forward: Any) -> None:
    """Stops if the model's loss is not the next-token cross-entropy alone: Bamba adds a z-loss, and the decoders of
    encoder-decoder models do not shift labels.

    Args:
        forward: the model's own.
    """
    ids = torch.arange(8, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    with evaluating(model):
        loss = forward(input_ids=ids, labels=ids, use_cache=False, return_dict=True).loss.item()
        # asked for apart: with labels, the forward that TRL's chunked loss gave a model before 1.15 has no logits
        logits = forward(input_ids=ids, use_cache=False, return_dict=True).logits
    plain = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device)).item()
    if not abs(loss - plain) <= 1e-3 * plain:
        raise UserError(
            f"{type(model).__name__} has a loss of {loss:.6g} where the next-token cross-entropy is "
            f"{plain:.6g}: what it adds, such as a z-loss, would be gone; switch that off in its configuration"
        )


def read_head(model: PreTrainedModel) -> Head:
    """The head as it is now, whole: gathered if FSDP has cut it."""
    head = head_of(model)
    if hasattr(head.weight, "ds_id"):
        raise UserError("DeepSpeed ZeRO-3 holds the LM head in pieces that the fused ops cannot gather: use ZeRO-2")
    if head.weight.is_meta:
        raise UserError("the LM head's weight is not in memory (meta device): load it, or keep it from offloading")
    weight, bias = full_head(head.weight, head.bias)
    return Head(weight, bias, head.logit_scale, head.softcap)


# -- the forward ------------------------------------------------------------------------------------------------------


def forward_of(cls: type[PreTrainedModel]) -> Any:
    """A forward with the signature of the class's, which ``generate`` and ``Trainer`` inspect."""
    names = list(inspect.signature(cls.forward).parameters)[1:]

    @functools.wraps(cls.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        fused: FusedForward = vars(self)["_srppo_fused"]
        named = dict(zip(names, args, strict=False)) | kwargs
        if REQUEST in named:
            return token_logprobs(self, named)
        # fused_lm_head: TRL asks for its own head in this way, and has its own forward below this one
        has_labels = named.get("labels") is not None or named.get("shift_labels") is not None
        logits = (fused.eval_logits and not self.training) or named.get("fused_lm_head")
        if fused.cross_entropy and has_labels and not logits:
            return cross_entropy(self, fused, named)
        return fused.original(*args, **kwargs)

    # Accelerate's unwrap_model follows __wrapped__ to take its own wrapper off, and would take this one off with it.
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__
    return forward


def cross_entropy(model: PreTrainedModel, fused: FusedForward, named: dict[str, Any]) -> Any:
    """A ``CausalLMOutputWithPast`` with the loss and without logits (a tuple with ``return_dict=False``)."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    labels, shift_labels = named.pop("labels", None), named.pop("shift_labels", None)
    items, as_dict = named.pop("num_items_in_batch", None), named.pop("return_dict", None)
    ignored = named.pop("ignore_index", IGNORE)
    refuse_router_loss(model, named.get("output_router_logits"))
    named.pop("logits_to_keep", None)
    outputs = backbone(model, named)
    targets = next_tokens(labels, ignored) if shift_labels is None else shift_labels
    hidden, head = head_inputs(model, outputs.last_hidden_state)
    targets = targets.to(hidden.device)
    count = (targets != ignored).sum() if items is None else torch.as_tensor(items, device=hidden.device)
    loss, _ = linear_loss(
        hidden, head.weight, targets, negative_log_likelihood, count.clamp(min=1), ignore_index=ignored,
        workspace_bytes=fused.workspace_bytes, **head.options,
    )  # fmt: skip
    # a state-space model has no attentions to give
    extras = {name: getattr(outputs, name, None) for name in ("hidden_states", "attentions")}
    result = CausalLMOutputWithPast(loss=loss, **extras)
    return result if as_dict in (None, True) else result.to_tuple()


def negative_log_likelihood(logprob: Tensor, entropy: Tensor, count: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A chunk's share of the mean; masked rows come as 0."""
    return -logprob.sum() / count, {}


def next_tokens(labels: Tensor, ignored: int) -> Tensor:
    """Each position's target: the label after it, and none for the last. Shifting labels instead of hidden states saves
    a copy of the latter."""
    return F.pad(labels[:, 1:], (0, 1), value=ignored)


def token_logprobs(model: PreTrainedModel, named: dict[str, Any]) -> LinearLogprob:
    """Log-prob (and entropy) of every label under the position before it: ``[B, T]`` fp32, 0 where the label is -100.

    ``named[REQUEST]`` holds options of ``linear_logprob``, and ``keep``: how many last positions are looked at.
    """
    options = dict(named.pop(REQUEST))
    keep, labels = options.pop("keep"), named.pop("labels")
    hidden = backbone(model, named).last_hidden_state[:, -keep - 1 : -1]
    hidden, head = head_inputs(model, hidden)
    return linear_logprob(hidden, head.weight, labels[:, -keep:].to(hidden.device), **head.options, **options)


def backbone(model: PreTrainedModel, named: dict[str, Any]) -> Any:
    """The output of the model under its head."""
    return trunk_of(model)(**{**named, "use_cache": False, "return_dict": True})


def head_inputs(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Head]:
    """Hidden states and head where and as the ops read them: on the head's device, and under autocast in its dtype."""
    fused: FusedForward = vars(model)["_srppo_fused"]
    head = read_head(model)
    weight, bias, device = head.weight, head.bias, head.weight.device
    hidden = hidden.to(device)
    if fused.autocast and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden, Head(weight, bias, head.logit_scale, head.softcap)
