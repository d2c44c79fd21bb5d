"""What a run says and checks before it trains: the choices that decide its outcome, and that it starts as it must."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from srppo import distributed, ppo
from srppo.config import SRPPOConfig
from srppo.errors import UserError
from srppo.packing import Layout
from srppo.roles import Role, Roles
from srppo.rollout import Rollout


def describe(args: SRPPOConfig, roles: Roles, *, prompts: int, held_out: int) -> list[str]:
    """The first lines of a run: what plays which role, the arithmetic, and the choices that decide the outcome.

    Args:
        prompts: in the training data.
        held_out: demonstrations that the guard watches.
    """
    clip = "off" if args.cliprange_value is None else f"{args.cliprange_value} nats"
    penalty = f" minus {args.missing_eos_penalty} nats" if args.missing_eos_penalty else "; missing_eos_penalty is off"
    held = "" if args.kl_target is None else f", adapted to hold {args.kl_target} nats a sequence"
    ranks = distributed.size()
    return [
        *roles.describe(),
        f"batch: {args.batch_size * ranks} prompts = "
        + f"{ranks} processes x " * (ranks > 1)
        + f"{args.per_device_train_batch_size} a micro-batch x "
        f"{args.gradient_accumulation_steps} accumulation x {args.num_mini_batches} mini-batches; "
        f"{args.num_ppo_epochs * args.num_mini_batches} optimizer steps an iteration, {args.max_steps} iterations, "
        f"{prompts} prompts in all",
        "micro-batches: "
        + (
            f"{args.per_device_train_batch_size} sequences"
            if args.max_tokens_per_micro_batch is None
            else f"at most {args.max_tokens_per_micro_batch} tokens"
        )
        + LAYOUTS[roles.policy.layout],
        f"KL penalty: beta {args.kl_coef}{held} towards {args.kl_reference}, estimator {args.kl_estimator}",
        f"old log-probs: from the training forward, before the update; value clip: {clip}",
        f"a completion cut at {args.max_completion_length} tokens keeps its score{penalty}",
        "guard: KL to SFT, length"
        + (
            f", and the likelihood of {held_out} held-out demonstrations"
            if held_out > 1
            else "; of a single held-out demonstration the likelihood is logged, and too little to warn by"
            if held_out
            else " only, as the evaluation data has no demonstrations whose likelihood could be followed"
        ),
    ]


LAYOUTS = {
    Layout.PADDED: ", padded, as this model mixes packed sequences",
    Layout.PACKED: ", packed without padding",
    Layout.SHARED: ", packed without padding, what sequences begin with alike computed once",
}


def check_start(
    roles: Roles,
    args: SRPPOConfig,
    rollout: Rollout,
    scores: ppo.Scores,
    micro_batches: Sequence[torch.Tensor],
    apart: float = 0.0,
) -> str:
    """Stops unless the policy is SFT, and SFT is not base; returns what was found.

    Args:
        apart: :func:`forwards_apart` of the policy.
    """
    if not rollout.completion_mask.any():
        raise UserError(
            "every completion of the first rollout is empty, so there is no token to score: whatever samples must give "
            "at least one token for each prompt, the stop token if it ends at once; check the engine, or the rollouts "
            "saved in from_rollouts"
        )
    if args.temperature == args.score_temperature:
        sft = scores.sft
    elif args.kl_reference == "sft":
        sft = scores.reference
    else:  # nothing so far needed SFT at this temperature; in the same micro-batches it is equal to the last bit
        sft = distributed.summed(ppo.score_role(roles.sft, rollout, args.temperature, micro_batches))
    difference = (scores.policy - sft)[rollout.completion_mask]
    gap = difference.abs().max().item()
    if not difference.square().mean().sqrt().item() <= apart:
        raise UserError(
            f"the policy does not start as the SFT model: log-probs of the first rollout differ by up to {gap:.3g} "
            "nats. Is something random in the forward (dropout), or were the weights changed after loading?"
        )
    if not (scores.sft - scores.base).abs().max() > 0:
        raise UserError(
            "SFT and base model give the same log-probs on every token: the reward is 0 everywhere; check the two paths"
        )
    tokens = int(rollout.completion_mask.sum())
    if gap > 0:
        return f"start: log-probs of policy and SFT differ by rounding, up to {gap:.2g} nats on {tokens} tokens"
    return f"start: KL(policy || SFT) = {gap:g} on {tokens} tokens"


def forwards_apart(role: Role) -> float:
    """How far log-probs of two forwards of the same weights may be apart, in nats, as the root of a mean square.

    On a CPU they are equal mostly to the last bit. But torch takes another product for a weight that is trained than
    for a frozen one where what it multiplies is strided, as in Mamba's layers. A GPU's attention may take another
    kernel where gradients are wanted, and some kernels add up in another order each time: 16-bit states are then
    rounded otherwise.
    """
    if role.device.type == "cpu":
        return 1e-4
    return 1e-3 if role.head.weight.dtype.itemsize >= 4 else 0.1


SAMPLER_APART = 0.1  # nats a token on average; rounding to 16 bits, of states and where experts route, stays below


def sampler_apart(metrics: Mapping[str, float], top_p: float) -> str | None:
    """What to warn of where the first rollout was sampled from something else than the policy that is scored.

    Args:
        metrics: of :func:`srppo.engines.sampling_metrics`.
        top_p: of sampling; what it leaves out raises the log-probs of the others by up to ``-log top_p``.
    """
    mean = metrics.get("sampling/logp_difference/mean", 0.0)
    if mean <= SAMPLER_APART - math.log(top_p):
        return None
    return (
        f"the sampler's log-probs are {mean:.2f} nats a token from the policy's, so PPO would learn from another "
        "model's samples: is there a setting of the checkpoint's configuration (sliding_window, rope_scaling) that its "
        "key-value cache or server takes and its forward does not, or does a server serve another model than the one "
        "that the adapter stands on? importance_cap weighs the difference in"
    )


def check_first_ratio(result: ppo.UpdateResult, apart: float = 0.0) -> str:
    """Stops if the ratio is not 1 before the first step, on a mini-batch that has a token; returns what was found.

    Args:
        apart: :func:`forwards_apart` of the policy.
    """
    first = result.first
    if not first.count > 0:
        return "start: no token in the first mini-batch, whose PPO ratio would be exactly 1"
    mean = first.ratio_mean.item() - 1
    spread = max(abs(first.ratio_max.item() - 1), abs(mean))
    if not (spread <= 1e-3 or math.hypot(mean, math.sqrt(first.ratio_var.item())) <= apart):
        raise UserError(
            f"the PPO ratio on the first mini-batch is off 1 by {spread:.3g}: scoring and training forward differ"
        )
    return (
        f"start: PPO ratio on the first mini-batch {'exactly 1' if spread == 0 else f'1 +- {spread:.2g}, by rounding'}"
    )
