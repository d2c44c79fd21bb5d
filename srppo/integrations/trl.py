"""TRL: fused log-probs for GRPO and RLOO, fused cross-entropy for SFT, and the self-reward by token ids.

Each function takes a trainer that has been made and changes it in place, before ``train()``::

    trainer = GRPOTrainer(model, reward_funcs=SelfReward.from_peft(model, "sft", tokenizer), ...)
    use_fused_logprobs(trainer)      # log pi(y_t), and the entropy, from hidden states: no [B, T, V] logits
    use_exact_prompts(trainer)       # the self-reward scores the very token ids that were sampled from

``use_fused_logprobs`` replaces the trainer's ``_get_per_token_logps_and_entropies``, the one place from which policy,
old and reference log-probs come, so losses, clipping, KL and metrics stay TRL's own. The model is still called through
whatever wraps it (DDP, peft). Padding gets log-prob 0 and costs nothing.
"""

from __future__ import annotations

import importlib
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from srppo.errors import UserError
from srppo.integrations import hf
from srppo.integrations.hf import IGNORE, REQUEST
from srppo.self_reward import SelfReward

__all__ = ["use_exact_prompts", "use_fused_cross_entropy", "use_fused_logprobs"]

LOGPROBS = "_get_per_token_logps_and_entropies"
PLANS = ("recompute", "auto")


def refuse_other_forwards(trainer: Any) -> None:
    """What needs a forward of its own, or runs one that is not the model's."""
    if getattr(trainer, "aux_loss_enabled", False):
        raise UserError("a load-balancing loss of the experts needs the model's own forward: router_aux_loss_coef=0")
    if getattr(trainer.args, "use_liger_kernel", False):
        raise UserError("use_liger_kernel=True replaces the loss or the model's forward itself: choose one of the two")
    if trainer.args.n_gpu > 1:
        raise UserError(
            "nn.DataParallel, which one process with several GPUs gets, would run the forward of one copy in all: "
            "start with torchrun or accelerate launch, or show one GPU"
        )


# -- GRPO and RLOO ----------------------------------------------------------------------------------------------------


def use_fused_logprobs(trainer: Any, *, plan: str = "recompute") -> None:
    """Per-token log-probs and entropies of a GRPOTrainer or RLOOTrainer from hidden states, without logits.

    Batches with images go TRL's own way, and a warning says so once.

    Args:
        trainer: a trainer of one of the two classes or of a subclass, before ``train()``.
        plan: of ``linear_logprob``. ``"recompute"``: no tensor of the logits' size exists at any time, and the backward
            multiplies by the head once more. ``"auto"``: the exponentials are kept for the backward, in 16 bit for a
            model in 16 bit, where they are no larger than the head's float32 gradient.

    Raises:
        UserError: another kind of trainer or plan; what the head or the model does not support, see
            :func:`srppo.integrations.hf.use_fused_cross_entropy`; a load-balancing loss of experts; Liger's kernels;
            ``nn.DataParallel``.
    """
    original = getattr(trainer, LOGPROBS, None)
    if original is None:
        raise UserError(f"{type(trainer).__name__} computes no per-token log-probs: pass a GRPOTrainer or RLOOTrainer")
    if plan not in PLANS:
        raise UserError(f"plan={plan!r} does not serve log-probs with an entropy: pass one of {', '.join(PLANS)}")
    refuse_other_forwards(trainer)
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            fused = hf.fuse(hf.causal_lm(trainer.accelerator.unwrap_model(model)))
            fused.autocast = not getattr(trainer.args, "cast_lm_head_to_fp32", False)
    if not isinstance(original, _Logprobs):
        setattr(trainer, LOGPROBS, _Logprobs(trainer, original))
    getattr(trainer, LOGPROBS).plan = plan


class _Logprobs:
    """Stands in for the trainer's method, with its signature."""

    def __init__(self, trainer: Any, original: Callable[..., Any]) -> None:
        self.trainer, self.original = trainer, original
        self.three = "compute_aux_loss" in inspect.signature(original).parameters  # results; two in older versions
        # Without a head of its own, TRL takes no gradient through entropies that only feed metrics and masks
        self.entropy_gradient = hasattr(importlib.import_module("trl.trainer.utils"), "add_fused_lm_head")
        self.plan = "recompute"
        self.warned = False

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor | None, ...]:
        """``(log-probs, entropies[, None])``, each ``[B, logits_to_keep]`` fp32 and 0 on padding."""
        if any(value is not None and value is not False for value in inputs.values()):
            if not self.warned:
                warnings.warn("srppo: these batches have images, whose log-probs TRL computes itself", stacklevel=2)
                self.warned = True
            positional = (input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy)
            return self.original(model, *positional, **inputs)
        labels = input_ids.masked_fill(attention_mask == 0, IGNORE)
        options = {
            "keep": logits_to_keep,
            "temperature": float(self.trainer.temperature),
            "entropy": compute_entropy,
            "plan": self.plan,
        }
        chunk = batch_size or len(input_ids)
        parts = []
        for start in range(0, len(input_ids), chunk):
            rows = slice(start, start + chunk)
            given = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows], "labels": labels[rows]}
            with self.trainer.accelerator.autocast():
                parts.append(model(**given, **{REQUEST: options}))
        logprobs = torch.cat([part.logprob for part in parts])
        entropies = torch.cat([part.entropy for part in parts]) if compute_entropy else None
        gradient = self.entropy_gradient or getattr(self.trainer, "_entropy_bonus_enabled", False)
        if entropies is not None and not gradient:
            entropies = entropies.detach()
        return (logprobs, entropies, None) if self.three else (logprobs, entropies)


# -- SFT --------------------------------------------------------------------------------------------------------------


def use_fused_cross_entropy(trainer: Any, *, workspace_bytes: int | None = None) -> None:
    """The loss of an SFTTrainer from hidden states, without logits.

    The loss is TRL's ``nll``. The metrics entropy and mean token accuracy, which need logits, are not logged; the
    number of tokens is.

    Args:
        trainer: an SFTTrainer or a subclass that leaves ``compute_loss`` alone, before ``train()``.
        workspace_bytes: bound on the exponentials that are kept at a time, as in ``linear_loss``.

    Raises:
        UserError: another kind of trainer, another loss; what :func:`srppo.integrations.hf.use_fused_cross_entropy`
            refuses; ``compute_metrics``, which needs logits.
    """
    from transformers import Trainer
    from trl import SFTTrainer

    if not isinstance(trainer, SFTTrainer):
        raise UserError(
            f"{type(trainer).__name__} is no SFTTrainer; for transformers' own Trainer wrap the model with hf"
        )
    if trainer.args.loss_type not in ("nll", "chunked_nll"):
        raise UserError(f"loss_type={trainer.args.loss_type!r} is not the cross-entropy: only 'nll' is supported")
    for name, given in (
        ("compute_loss_func", trainer.compute_loss_func),
        ("label_smoothing_factor", trainer.label_smoother),
        ("compute_metrics", trainer.compute_metrics),
    ):
        if given:
            raise UserError(f"{name} needs logits or replaces the loss itself: leave it out, or do not fuse the loss")
    refuse_other_forwards(trainer)
    hf.use_fused_cross_entropy(trainer.model, workspace_bytes=workspace_bytes)

    def compute_loss(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            mask = inputs.get("attention_mask")  # absent where sequences are packed: every token counts
            local = torch.tensor(inputs["input_ids"].numel(), device=self.args.device) if mask is None else mask.sum()
            self._total_train_tokens += self.accelerator.gather_for_metrics(local).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)

    trainer.compute_loss = types.MethodType(compute_loss, trainer)


# -- the self-reward --------------------------------------------------------------------------------------------------


def use_exact_prompts(trainer: Any) -> None:
    """Every :class:`srppo.SelfReward` among the trainer's ``reward_funcs`` scores the token ids that the policy saw.

    TRL gives reward functions the completions' ids, but prompts as text or messages. Rendered again outside the trainer
    they may come out otherwise, as with ``chat_template_kwargs``; here the trainer's own tokenisation is used.

    Raises:
        UserError: no self-reward among the reward functions; a tokenizer other than base's and SFT's; tools or
            environments, whose answers would be scored as if the policy had written them.
    """
    rewards = [reward for reward in trainer.reward_funcs if isinstance(reward, SelfReward)]
    if not rewards:
        raise UserError("none of the trainer's reward_funcs is a SelfReward")
    if getattr(trainer, "tools", None) or getattr(trainer, "environments", None):
        raise UserError(
            "the self-reward would score what tools answer as if the policy had written it: leave out tools"
        )
    for reward in rewards:
        reward.check_tokenizer(trainer.processing_class)
    trainer.reward_funcs = [
        _Exact(trainer, reward) if isinstance(reward, SelfReward) else reward for reward in trainer.reward_funcs
    ]


class _Exact:
    """A self-reward with the trainer's own prompt ids."""

    def __init__(self, trainer: Any, reward: SelfReward) -> None:
        self.trainer, self.reward = trainer, reward
        self.__name__ = reward.__name__

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        ids, images, _ = self.trainer._tokenize_prompts(prompts)
        if images is not None:
            raise UserError("the self-reward reads text alone, and these prompts have images")
        return self.reward(prompts, completions, prompt_ids=ids, **kwargs)
