"""Adapters to what others offer for per-token log-probs and losses from hidden states.

An adapter takes a case's inputs and returns ``(hidden, weight) -> log-probs [N]``; masked places may hold anything
finite. The op completes it: nothing for the score, the upstream gradient, the clipped loss, the mean. So each library
is written once, and a loss that a library fuses itself has an adapter of its own, ``(hidden, weight) -> scalar``.

A library that is missing, or that has no code for the device, raises :class:`Unavailable` with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core import Case, Unavailable
from bench.head import CLIP, IGNORE, HeadInputs, naive_logprob

Forward = Callable[[Tensor, Tensor], Tensor]  # (hidden, weight) -> [N], or -> scalar
Adapter = Callable[[HeadInputs], Forward]


@dataclass(frozen=True, slots=True)
class Peer:
    """A library's way, as ``--list`` shows it."""

    name: str
    note: str
    adapter: Adapter
    applies: Callable[[Case], bool] = lambda case: True


def require(package: str, module: str, name: str) -> Any:
    """``module.name`` of an optional package.

    Raises:
        Unavailable: it is not installed, does not import here, or has no such name in this version.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == module.split(".")[0]:
            raise Unavailable(f"{package} is not installed") from None
        if module.startswith(missing):
            raise Unavailable(f"this version of {package} has no {missing}") from None
        raise Unavailable(f"{package} needs {missing}, which is not installed") from None
    except Exception as error:  # an import can fail in any way, without a GPU above all
        raise Unavailable(f"{package} does not import here: {type(error).__name__}: {error}") from None
    if not hasattr(found, name):
        raise Unavailable(f"{module} has no {name} in this version of {package}")
    return getattr(found, name)


def needs_gpu(inputs: HeadInputs, what: str) -> None:
    if inputs.case.device != "cuda":
        raise Unavailable(f"{what} needs a GPU")


def not_endless(case: Case) -> bool:
    """Whether torch's chunked op is run unasked: on a CPU it takes 50 to 100 times the bare GEMMs, once is enough."""
    plain = case.op == "linear_logprob" and case.mask_density == 1 and case.rows == "random"
    return case.device != "cpu" or (plain and case.shape[-1] < 100_000)


# -- torch ------------------------------------------------------------------------------------------------------------


def torch_naive(inputs: HeadInputs) -> Forward:
    return lambda hidden, weight: naive_logprob(hidden, weight, inputs.targets)


def torch_compacted(inputs: HeadInputs) -> Forward:
    """Masked rows dropped first. On a GPU the boolean index waits for the device."""

    def forward(hidden: Tensor, weight: Tensor) -> Tensor:
        live = naive_logprob(hidden[inputs.mask], weight, inputs.targets[inputs.mask])
        return torch.zeros_like(inputs.upstream).masked_scatter(inputs.mask, live)

    return forward


def torch_linear_cross_entropy(inputs: HeadInputs) -> Forward:
    op = torch_op()
    return lambda hidden, weight: (
        -op(hidden, weight, inputs.masked_targets, ignore_index=IGNORE, reduction="none").float()
    )


def torch_linear_cross_entropy_chunked(inputs: HeadInputs) -> Forward:
    op, options = torch_op(), torch_options()
    return lambda hidden, weight: (
        -op(hidden, weight, inputs.masked_targets, ignore_index=IGNORE, reduction="none", options=options).float()
    )


def torch_op() -> Any:
    op = getattr(F, "linear_cross_entropy", None)
    if op is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    return op


def torch_options() -> Any:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable(f"torch {torch.__version__} has no LinearCrossEntropyOptions; 2.13 has")
    return options()


# -- per-token log-probs of libraries ---------------------------------------------------------------------------------


def liger_selective(inputs: HeadInputs) -> Forward:
    base = require("liger-kernel", "liger_kernel.chunked_loss.fused_linear_ppo", "LigerFusedLinearPPOBase")
    targets = inputs.targets[None]
    return lambda hidden, weight: base.chunk_forward(hidden[None], weight, targets)[0]


def trl_chunked(inputs: HeadInputs) -> Forward:
    function = require("trl", "trl.kernels", "ChunkedLogProbFunction")
    # Bias, targets, temperature, chunk of the vocabulary (what TRL's trainers pass), softcap, scale, optional outputs.
    return lambda hidden, weight: function.apply(hidden, weight, None, inputs.targets, 1.0, 32768, None, 1.0, ())[0]


def cce(inputs: HeadInputs) -> Forward:
    op = require("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
    needs_gpu(inputs, "CCE's kernel (its CPU fallback is the row torch-compile)")
    return lambda hidden, weight: (
        -op(hidden, weight, inputs.masked_targets, ignore_index=IGNORE, reduction="none").float()
    )


def verl_kernel(inputs: HeadInputs) -> Forward:
    op = require("verl", "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    needs_gpu(inputs, "verl's Triton kernel")
    return lambda hidden, weight: op(hidden, weight, inputs.targets, 1.0, "none")[0]


PER_TOKEN = (
    Peer("torch", "logits, then log_softmax in fp32 and gather", torch_naive),
    Peer("torch-compacted", "the same on hidden[mask]", torch_compacted, lambda case: case.mask_density < 1),
    Peer("F.linear_cross_entropy", "torch's own op, reference path", torch_linear_cross_entropy),
    Peer("F.linear_cross_entropy-chunked", "torch's own op, chunked", torch_linear_cross_entropy_chunked, not_endless),
    Peer("liger-selective", "Liger's chunked selective log-prob", liger_selective),
    Peer("trl-chunked", "TRL's chunked log-prob kernel", trl_chunked),
    Peer("cce", "Apple's cut cross-entropy", cce),
    Peer("verl", "verl's linear cross-entropy kernel", verl_kernel),
)


# -- losses that a library fuses itself -------------------------------------------------------------------------------


def liger_grpo(inputs: HeadInputs) -> Forward:
    """Liger's fused GRPO loss, no KL term: with sequences of one token its advantage is per token, and it is PPO's."""
    loss = require("liger-kernel", "liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
        beta=0.0, compiled=False, use_ref_model=False, chunk_size=inputs.hidden.shape[0], epsilon_low=CLIP,
        epsilon_high=CLIP, loss_type="bnpo",
    )  # fmt: skip
    ids, mask, old = inputs.targets[:, None], inputs.mask[:, None].float(), inputs.old_logprobs[:, None]

    def forward(hidden: Tensor, weight: Tensor) -> Tensor:
        result = loss(hidden[:, None], weight, ids, mask, inputs.advantages, old_per_token_logps=old)
        return result[0] if isinstance(result, tuple) else result

    return forward


def torch_mean(inputs: HeadInputs) -> Forward:
    targets = inputs.masked_targets
    return lambda hidden, weight: F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORE)


def torch_linear_mean(inputs: HeadInputs) -> Forward:
    op = torch_op()
    return lambda hidden, weight: op(hidden, weight, inputs.masked_targets, ignore_index=IGNORE).float()


def torch_linear_mean_chunked(inputs: HeadInputs) -> Forward:
    op, options = torch_op(), torch_options()
    return lambda hidden, weight: op(
        hidden, weight, inputs.masked_targets, ignore_index=IGNORE, options=options
    ).float()


def liger_mean(inputs: HeadInputs) -> Forward:
    op = require("liger-kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    needs_gpu(inputs, "Liger's fused linear cross-entropy (Triton)")
    return lambda hidden, weight: op(hidden, weight, inputs.masked_targets)


def cce_mean(inputs: HeadInputs) -> Forward:
    op = require("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
    needs_gpu(inputs, "CCE's kernel (its CPU fallback is the row torch-compile)")
    return lambda hidden, weight: op(hidden, weight, inputs.masked_targets, ignore_index=IGNORE)


def quack_mean(inputs: HeadInputs) -> Forward:
    op = require("quack-kernels", "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    needs_gpu(inputs, "QuACK's chunked linear cross-entropy (CuTe)")
    return lambda hidden, weight: op(hidden, weight, inputs.masked_targets)


FUSED_PPO = (Peer("liger-grpo", "Liger's fused GRPO loss, as PPO", liger_grpo),)
FUSED_MEAN = (
    Peer("torch", "logits, then cross_entropy in fp32", torch_mean),
    Peer("F.linear_cross_entropy", "torch's own op, reference path", torch_linear_mean),
    Peer("F.linear_cross_entropy-chunked", "torch's own op, chunked", torch_linear_mean_chunked, not_endless),
    Peer("liger-flce", "Liger's fused linear cross-entropy", liger_mean),
    Peer("cce", "Apple's cut cross-entropy", cce_mean),
    Peer("quack", "QuACK's chunked linear cross-entropy", quack_mean),
)
