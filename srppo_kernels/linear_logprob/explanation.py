"""``explain``: which backend and plan a call would take, what it costs, and why, without running it."""

from typing import Any

from torch import Tensor

from srppo_kernels._arguments import check_choice
from srppo_kernels.linear_logprob.checks import check_head
from srppo_kernels.linear_logprob.plan import OPS, Plan, choose, problem_of

__all__ = ["Plan", "explain"]


def explain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *args: Any,
    op: str = "linear_logprob",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    lse: bool = False,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    backend: str = "auto",
    grad_weight_out: Tensor | None = None,
    **options: Any,
) -> Plan:
    """What ``op`` would do with these arguments: ``Plan(backend, plan, gemms, workspace_bytes, reason,
    rows_per_chunk)``.

    Takes the op's own arguments (those that do not matter, such as ``loss_fn``, are accepted and ignored); whether a
    gradient is wanted is read off the tensors and the grad mode. For ``linear_log_ratio`` pass one model's hidden
    states and head. ``gemms`` counts multiplications by the head, forward and backward; ``workspace_bytes`` is what
    the op holds at its peak beyond inputs, outputs and gradients, as an upper bound by arithmetic, save for what the
    GEMMs of torch's libraries pack into. Printing it gives the reason too.

    Raises:
        TypeError, ValueError: as the op itself would for what the head's arguments are; values of targets, and a loss's
            own options, are not looked at.
    """
    check_choice("explain", "op", op, OPS)
    check_head(
        op, hidden, weight, targets, bias=bias, mask=mask, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, grad_weight_out=grad_weight_out,
    )  # fmt: skip
    fused_loss = op in ("linear_loss", "linear_ppo_loss")
    problem = problem_of(
        op, hidden, weight, bias, entropy=entropy or fused_loss, lse=lse, mask=mask, softcap=softcap,
        group=options.get("group"), grad_weight_out=grad_weight_out,
    )  # fmt: skip
    return choose(problem, plan=plan, workspace_bytes=workspace_bytes, backend=backend)
