"""``linear_log_ratio``: the self-reward's per-token term, straight from the hidden states of two models.

    log pi_sft(y_t | .) - log pi_base(y_t | .)

Both log-probs come from the same scan over the same vocabulary groups, so the ratio of a model with itself is exactly
0; with the torch backend where both models' tensors are aligned alike, which MKL's rounding may depend on.
"""

from typing import Any

import torch
from torch import Tensor

from srppo_kernels.linear_logprob.checks import check_head
from srppo_kernels.linear_logprob.op import linear_logprob

__all__ = ["linear_log_ratio"]


def linear_log_ratio(
    hidden_sft: Tensor,
    weight_sft: Tensor,
    hidden_base: Tensor,
    weight_base: Tensor,
    targets: Tensor,
    *,
    bias_sft: Tensor | None = None,
    bias_base: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
    group: Any = None,
) -> Tensor:
    """``log pi_sft - log pi_base`` of every target, fp32, of ``targets``' shape; 0 where masked, exactly 0 for equal
    models.

    Args:
        hidden_sft, hidden_base: ``[..., D]``; the two models may differ in hidden size and dtype.
        weight_sft, weight_base: ``[V, D]`` of one vocabulary.
        bias_sft, bias_base: ``[V]`` each, or None.
        The rest as in ``linear_logprob``; the logit transform is the same for both models.

    Returns:
        ``[...]`` in nats. An input that needs a gradient gets one.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Source: the coherent reward of Self-Rewarding PPO (arXiv 2510.21090): summed over a completion it is the reward.
    """
    op = "linear_log_ratio"
    transform = {"mask": mask, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    for model, hidden, weight, bias in (
        ("sft", hidden_sft, weight_sft, bias_sft),
        ("base", hidden_base, weight_base, bias_base),
    ):
        check_head(
            op, hidden, weight, targets, bias=bias, **transform, hidden_name=f"hidden_{model}",  # type: ignore[arg-type]
            weight_name=f"weight_{model}", bias_name=f"bias_{model}",
        )  # fmt: skip
    if weight_sft.shape[0] != weight_base.shape[0]:
        raise ValueError(
            f"{op}: weight_sft has {weight_sft.shape[0]} vocabulary entries and weight_base {weight_base.shape[0]}; "
            f"a ratio needs one vocabulary: cut the longer head to the entries that both have"
        )
    options: dict[str, Any] = {
        **transform, "ignore_index": ignore_index, "plan": plan, "workspace_bytes": workspace_bytes, "backend": backend,
        "group": group,
    }  # fmt: skip
    sft = linear_logprob(hidden_sft, weight_sft, targets, bias=bias_sft, **options).logprob
    base = linear_logprob(hidden_base, weight_base, targets, bias=bias_base, **options).logprob
    # Where both rule a token out, or overflow, the difference of infinities is no number; equal models still give 0.
    # Nowhere else: a constant in place of the difference would have no gradient, and training starts from equal models.
    return torch.where(sft.isinf() & (sft == base), torch.zeros_like(sft), sft - base)
