"""The fused ops as ``nn.Module``: options at construction, tensors at the call, no parameters of their own.

A module takes the head that the model has, an ``nn.Linear`` (its bias included) or its ``[V, D]`` weight, so it goes
where ``CrossEntropyLoss()(lm_head(hidden).view(-1, V), targets.view(-1))`` was, and the logits are gone::

    criterion = srppo.modules.LinearCrossEntropy()
    loss = criterion(hidden, model.lm_head, targets)

(``srppo.LinearLogprob`` is the named tuple that the op returns; the module of that name lives here.)
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeGuard

from torch import Tensor, nn

from srppo import losses
from srppo_kernels import LinearLogprob as LinearLogprobOutput
from srppo_kernels import PPOStats, linear_logprob, linear_loss, linear_ppo_loss
from srppo_kernels._arguments import check_choice, check_mask, check_tensor

__all__ = ["LinearCrossEntropy", "LinearLogprob", "LinearPPOLoss"]

Head = Tensor | nn.Linear


def is_plain_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Whether a module is its weight and bias and nothing else: a subclass may compute something else."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


class _OnHead(nn.Module):
    """The options of the head that all three share."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        plan: str = "auto",
        workspace_bytes: int | None = None,
        backend: str = "auto",
        group: Any = None,
    ) -> None:
        """
        Args:
            ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, backend, group: as in
                ``srppo_kernels.linear_logprob``.
        """
        super().__init__()
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "plan": plan,
            "workspace_bytes": workspace_bytes,
            "backend": backend,
            "group": group,
        }

    def extra_repr(self) -> str:
        """What differs from the defaults of the ops."""
        plain = {"ignore_index": -100, "temperature": 1.0, "logit_scale": 1.0, "plan": "auto", "backend": "auto"}
        shown = {k: v for k, v in {**self.options, **self._own_options()}.items() if v != plain.get(k)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def _own_options(self) -> dict[str, Any]:
        return {}

    def _head(self, op: str, head: Head, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        if is_plain_linear(head):
            if bias is not None:
                raise ValueError(f"{op}: bias goes with a weight; the nn.Linear given brings its own")
            return head.weight, head.bias
        if not isinstance(head, Tensor):
            kind = type(head)  # with its module: peft's Linear is another one
            raise TypeError(
                f"{op}: the head must be an nn.Linear or its [V, D] weight; got {kind.__module__}.{kind.__qualname__}: "
                "merge an adapter that is on it, and of another wrapper give the nn.Linear inside"
            )
        return head, bias


class LinearLogprob(_OnHead):
    """Log-probs of targets (with entropies, logsumexps) under a head, without the logits; see ``linear_logprob``."""

    def __init__(self, *, entropy: bool = False, lse: bool = False, **head_options: Any) -> None:
        super().__init__(**head_options)
        self.entropy, self.lse = entropy, lse

    def forward(
        self, hidden: Tensor, head: Head, targets: Tensor, *, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> LinearLogprobOutput:
        """``[..., D]``, an ``nn.Linear`` or ``[V, D]``, ``[...]`` -> ``(logprob, entropy, lse)``, fp32 ``[...]``."""
        weight, bias = self._head("LinearLogprob", head, bias)
        return linear_logprob(
            hidden, weight, targets, bias=bias, mask=mask, entropy=self.entropy, lse=self.lse, **self.options
        )

    def _own_options(self) -> dict[str, Any]:
        return {name: True for name in ("entropy", "lse") if getattr(self, name)}


class LinearPPOLoss(_OnHead):
    """The clipped PPO loss of a head's log-probs, without the logits; see ``linear_ppo_loss``."""

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        entropy_coef: float = 0.0,
        **head_options: Any,
    ) -> None:
        super().__init__(**head_options)
        self.loss_options: dict[str, Any] = {
            "clip_low": clip_low,
            "clip_high": clip_high,
            "dual_clip": dual_clip,
            "entropy_coef": entropy_coef,
        }

    def forward(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        bias: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> tuple[Tensor, PPOStats]:
        """``(loss, PPOStats)``; the last three tensors are of ``targets``' shape.

        ``normalizer`` is the number of tokens of the whole batch; without it that of this call is taken, which is wrong
        where gradients of several micro-batches or ranks are added up.
        """
        weight, bias = self._head("LinearPPOLoss", head, bias)
        return linear_ppo_loss(
            hidden, weight, targets, old_logprobs, advantages, mask, bias=bias, normalizer=normalizer,
            **self.loss_options, **self.options,
        )  # fmt: skip

    def _own_options(self) -> dict[str, Any]:
        plain = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "entropy_coef": 0.0}
        return {name: value for name, value in self.loss_options.items() if value != plain[name]}


class LinearCrossEntropy(_OnHead):
    """Cross-entropy of a head, without the logits: the mean over targets as ``nn.CrossEntropyLoss`` has it.

    Differs from it in one place: a batch without targets has loss 0, not NaN.
    """

    def __init__(self, *, reduction: str = "mean", **head_options: Any) -> None:
        super().__init__(**head_options)
        check_choice("LinearCrossEntropy", "reduction", reduction, ("mean", "sum", "none"))
        self.reduction = reduction

    def forward(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss, 0-d fp32, or of ``targets``' shape with ``reduction="none"``.

        Args:
            hidden, head, targets: ``[..., D]``, an ``nn.Linear`` or ``[V, D]``, ``[...]``. Targets are those of their
                own row: shift them before.
            mask: bool ``[...]``, True on rows that count; besides those whose target is ``ignore_index``.
            normalizer: what the sum is divided by instead of the rows that count here: Hugging Face's
                ``num_items_in_batch``. Goes with ``reduction="mean"``.

        Raises:
            ValueError, TypeError: an argument that does not fit, by name.
        """
        weight, bias = self._head("LinearCrossEntropy", head, bias)
        if normalizer is not None and self.reduction != "mean":
            raise ValueError(f"LinearCrossEntropy: normalizer goes with reduction='mean', not {self.reduction!r}")
        if self.reduction == "none":
            return -linear_logprob(hidden, weight, targets, bias=bias, mask=mask, **self.options).logprob
        check_tensor("LinearCrossEntropy", "targets", targets)
        live = targets != self.options["ignore_index"]
        if mask is not None:
            check_mask("LinearCrossEntropy", mask)
        if mask is not None and mask.shape == live.shape:  # another shape is refused by the op, by name
            live = live & mask
        if self.reduction == "sum":
            normalizer = 1.0
        elif normalizer is None:
            normalizer = live.sum()
        fn = partial(losses.sft, normalizer=normalizer)
        return linear_loss(hidden, weight, targets, fn, live, bias=bias, mask=mask, **self.options)[0]

    def _own_options(self) -> dict[str, Any]:
        return {} if self.reduction == "mean" else {"reduction": self.reduction}
