"""verl: the policy losses of ``srppo.losses`` by name, and the self-reward as a reward manager.

Importing this module registers the losses; verl imports it in every worker where it is named as external library::

    actor_rollout_ref.model.external_lib=srppo.integrations.verl
    actor_rollout_ref.actor.policy_loss.loss_mode=srppo_ppo      # or one of LOSSES

    reward.reward_manager.source=importlib
    reward.reward_manager.name=SelfRewardManager
    reward.reward_manager.module.path=pkg://srppo.integrations.verl
    +reward.reward_kwargs.base=my-base  +reward.reward_kwargs.sft=my-sft        # SelfReward's arguments

verl's aggregation modes are weights w and a divisor n of ``loss = sum_t w_t l_t / n`` over the global batch:

    token-mean             w = 1                n = number of tokens
    token-sum              w = 1                n = 1
    seq-mean-token-sum     w = 1                n = number of sequences        (-norm: times loss_scale_factor, or T)
    seq-mean-token-mean    w = 1 / length       n = number of sequences

n is divided by the number of data-parallel ranks, whose gradients verl averages; w is multiplied by the importance
weights of the rollout where verl gives them.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
    from verl.trainer.ppo.core_algos import register_policy_loss
except ImportError as error:
    raise ImportError(f"srppo.integrations.verl needs verl 0.9 with its requirements: {error}") from error

from srppo import losses
from srppo.errors import UserError
from srppo.losses.contract import LOG_RATIO_BOUND
from srppo.self_reward import SelfReward

__all__ = ["LOSSES", "SelfRewardManager"]

Loss = Callable[..., tuple[Tensor, dict[str, float]]]


# -- policy losses ----------------------------------------------------------------------------------------------------


def _ppo(config: Any) -> Any:
    low, high = _clips(config)
    return functools.partial(losses.ppo, clip_low=low, clip_high=high, dual_clip=config.get("clip_ratio_c", 3.0))


def _dppo(config: Any, divergence: str) -> Any:
    low, high = _clips(config)
    if low != high:
        raise UserError(
            f"srppo_dppo_{divergence} has one radius of the trust region, delta: set clip_ratio_low and "
            f"clip_ratio_high (now {low} and {high}) to the same, or leave them out and set clip_ratio"
        )
    cap = config.get("clip_ratio_c", 20.0)
    return functools.partial(losses.dppo, divergence=divergence, delta=low, ratio_cap=cap)


def _cispo(config: Any) -> Any:
    low, high = _clips(config)
    return functools.partial(losses.cispo, clip_low=low, clip_high=high)


def _clips(config: Any) -> tuple[float, float]:
    """verl's ``clip_ratio``, with ``clip_ratio_low`` and ``clip_ratio_high`` in its place where they are set."""
    sides = (config.clip_ratio_low, config.clip_ratio_high)
    low, high = (config.clip_ratio if side is None else side for side in sides)
    return low, high


LOSSES: dict[str, Callable[[Any], Any]] = {
    "srppo_ppo": _ppo,
    "srppo_dppo_tv": functools.partial(_dppo, divergence="tv"),
    "srppo_dppo_kl": functools.partial(_dppo, divergence="kl"),
    "srppo_cispo": _cispo,
}


def policy_loss(name: str) -> Loss:
    """One of LOSSES with verl's signature.

    Returns:
        ``(loss, metrics)``: the 0-d loss, and as floats ``actor/pg_clipfrac`` (tokens without gradient or with a
        clipped weight), ``actor/ppo_kl`` (mean of log pi_old - log pi) and ``actor/pg_clipfrac_lower`` (dual clip,
        or DPPO's cap on the ratio).
    """

    def loss(
        old_log_prob: Tensor,  # [B, T]
        log_prob: Tensor,  # [B, T]
        advantages: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T]
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # [B, T]
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise UserError(f"{name}: config is missing; it is the actor's, which holds the clips")
        mask = response_mask.bool()
        weights, divisor = aggregation(mask, loss_agg_mode, config.global_batch_info)
        if rollout_is_weights is not None:
            weights = rollout_is_weights if weights is None else weights * rollout_is_weights
        fn = LOSSES[name](config)
        value, aux = fn(log_prob, None, mask, old_log_prob, advantages, weights, normalizer=divisor)
        return value, metrics(aux, log_prob, old_log_prob, mask)

    loss.__name__ = loss.__qualname__ = name
    return loss


def aggregation(mask: Tensor, mode: str, batch: Any) -> tuple[Tensor | None, Tensor | float]:
    """``(weights [B, T] or None for 1, divisor)`` of an aggregation mode.

    Args:
        mask: ``[B, T]`` bool.
        mode: verl's ``loss_agg_mode``.
        batch: verl's ``global_batch_info``: ``dp_size``, ``batch_num_tokens``, ``global_batch_size``,
            ``loss_scale_factor``, each absent or None where there is one rank and one micro-batch.

    Raises:
        UserError: an unknown mode; several ranks without the count over all of them.
    """
    ranks = batch.get("dp_size") or 1
    if mode == "token-sum":
        return None, 1 / ranks
    by_token = mode == "token-mean"
    if not by_token and mode not in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        raise UserError(f"loss_agg_mode={mode!r} is unknown")
    key = "batch_num_tokens" if by_token else "global_batch_size"
    count = batch.get(key)
    if count is None:
        if ranks > 1:
            raise UserError(f"loss_agg_mode={mode!r} on {ranks} ranks needs {key}, the count over all of them")
        count = (mask if by_token else mask.any(-1)).sum()
    if mode == "seq-mean-token-sum-norm":
        count = count * (batch.get("loss_scale_factor") or mask.shape[-1])
    weights = losses.mean_weights(mask) if mode == "seq-mean-token-mean" else None
    return weights, count / ranks


@torch.no_grad()
def metrics(aux: dict[str, Tensor], log_prob: Tensor, old: Tensor, mask: Tensor) -> dict[str, float]:
    """verl's three, with one wait for the device instead of three."""
    zero = mask.new_zeros((), dtype=torch.float32)
    get = lambda *names: sum((aux[name] for name in names if name in aux), zero)  # noqa: E731
    drift = (old - log_prob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).masked_fill(~mask, 0).sum()
    sums = torch.stack([get("clipped_low", "clipped_high", "outside"), drift, get("clipped_dual", "capped")])
    clipped, kl, lower = (sums / mask.sum().clamp(min=1)).tolist()
    return {"actor/pg_clipfrac": clipped, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": lower}


for _name in LOSSES:
    register_policy_loss(_name)(policy_loss(_name))


# -- the reward manager -----------------------------------------------------------------------------------------------


class SelfRewardManager(RewardManagerBase):
    """``log pi_sft - log pi_base`` of each response, by the rollout's own token ids.

    verl asks for one response at a time, many at once; those that wait are scored in one batch. Each of
    ``reward.num_workers`` processes loads the models: set it to 1 where memory is short.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **_: Any) -> None:
        """
        Args:
            config: verl's; ``config.reward.reward_kwargs`` holds the arguments of :class:`srppo.SelfReward`.
            tokenizer: the policy's, which must be that of base and SFT.
            compute_score: verl's scoring by rules, not used.

        Raises:
            UserError: base or sft is missing; another tokenizer; whatever SelfReward refuses.
        """
        super().__init__(config, tokenizer, compute_score)
        options = dict(config.reward.get("reward_kwargs") or {})
        missing = [name for name in ("base", "sft") if not options.get(name)]
        if missing:
            raise UserError(f"the self-reward needs two models: set +reward.reward_kwargs.{missing[0]}")
        self.reward = SelfReward(**options)
        self.reward.check_tokenizer(tokenizer)
        self.waiting: list[tuple[list[int], list[int], asyncio.Future[float]]] = []
        self.turn = asyncio.Lock()

    async def run_single(self, data: Any) -> dict[str, Any]:
        """``{"reward_score": float, "reward_extra_info": {"self_reward_per_token": float}}`` of the last sequence."""
        prompt, response = token_ids(data[-1:].batch)
        done = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt, response, done))
        async with self.turn:
            batch, self.waiting = self.waiting, []
            if batch:
                scoring = asyncio.ensure_future(self._score(batch))
                try:
                    await asyncio.shield(scoring)
                except asyncio.CancelledError:
                    await scoring  # the others' too: a cancelled call ends when they have theirs
                    raise
        reward = await done
        return {"reward_score": reward, "reward_extra_info": {"self_reward_per_token": reward / max(1, len(response))}}

    async def _score(self, batch: list[tuple[list[int], list[int], asyncio.Future[float]]]) -> None:
        prompts, responses, futures = zip(*batch, strict=True)
        try:
            call = functools.partial(self.reward.reward, prompts, responses)
            rewards = (await asyncio.get_running_loop().run_in_executor(None, call)).tolist()
        except Exception as error:
            for future in futures:
                if not future.cancelled():
                    future.set_exception(error)
        else:
            for future, reward in zip(futures, rewards, strict=True):
                if not future.cancelled():
                    future.set_result(reward)


def token_ids(batch: Any) -> tuple[list[int], list[int]]:
    """Prompt and response of a batch of one, without padding.

    Raises:
        UserError: a response with tokens that the policy did not write, such as a tool's answer.
    """
    prompt, response, attention = batch["prompts"][0], batch["responses"][0], batch["attention_mask"][0].bool()
    attends = attention[-response.shape[0] :]
    written = batch.get("response_mask")
    if written is not None and bool((written[0].bool() != attends).any()):
        raise UserError("the response has tokens that the policy did not write (tools): the self-reward has no sense")
    return prompt[attention[: prompt.shape[0]]].tolist(), response[attends].tolist()
