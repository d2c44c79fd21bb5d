"""The losses registered with verl against verl's own, and the reward manager against the self-reward."""

from __future__ import annotations

import asyncio
import importlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import save, tiny_model, tiny_tokenizer
from torch import Tensor

from srppo import UserError
from srppo.self_reward import SelfReward

pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl and its requirements", exc_type=ImportError)
pytest.importorskip(
    "verl.experimental.reward_loop.reward_manager.base", reason="needs verl and its requirements", exc_type=ImportError
)

from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from srppo.integrations.verl import LOSSES, SelfRewardManager, aggregation, token_ids

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
PEERS = {"srppo_ppo": "vanilla", "srppo_dppo_tv": "dppo_tv", "srppo_dppo_kl": "dppo_kl", "srppo_cispo": "cispo"}


def actor(**settings: Any) -> ActorConfig:
    """verl's own configuration of an actor."""
    batch = settings.pop("global_batch_info", {})
    defaults = {"strategy": "fsdp", "ppo_micro_batch_size_per_gpu": 1, "rollout_n": 1, "use_dynamic_bsz": True}
    config = ActorConfig(**{**defaults, **settings})
    config.global_batch_info.update(batch)
    return config


def problem() -> dict[str, Tensor]:
    """Ratios on both sides of every bound; rows of one token and of none."""
    rows, time = 6, 9
    log_prob = -torch.rand(rows, time, dtype=torch.float64) * 3
    mask = torch.arange(time) < torch.tensor([9, 5, 1, 0, 7, 3])[:, None]
    return {
        "old_log_prob": (log_prob + 0.6 * torch.randn_like(log_prob)).clamp(max=-1e-3),
        "log_prob": log_prob.clamp(max=-1e-3),
        "advantages": torch.randn(rows, time, dtype=torch.float64),
        "response_mask": mask.long(),
    }


def evaluate(
    name: str, config: Any, inputs: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor, dict[str, float]]:
    log_prob = inputs["log_prob"].clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(name)(**{**inputs, "log_prob": log_prob}, config=config, **options)
    loss.backward()
    return loss.detach(), log_prob.grad, metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_metrics_are_verls(name: str, mode: str) -> None:
    inputs, config = problem(), actor(clip_ratio=0.15, clip_ratio_low=0.15, clip_ratio_high=0.15, clip_ratio_c=1.5)
    random = torch.rand_like(inputs["log_prob"])
    for weights in (None, 0.5 + random, random.where(random > 0.5, 0)):
        options = {"loss_agg_mode": mode, "rollout_is_weights": weights}
        theirs, expected, their_metrics = evaluate(PEERS[name], config, inputs, **options)
        ours, gradient, metrics = evaluate(name, config, inputs, **options)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)
        assert gradient.abs().max() > 1e-3
        assert metrics.keys() == their_metrics.keys()
        for key, value in their_metrics.items():
            if key == "actor/pg_clipfrac_lower" and "dppo" in name:  # verl counts them only inside the trust region
                ratio = (inputs["log_prob"] - inputs["old_log_prob"])[inputs["response_mask"].bool()].exp()
                value = (ratio > 1.5).double().mean().item()
                assert value > 0
            assert metrics[key] == pytest.approx(value, abs=1e-6), key
        assert their_metrics["actor/pg_clipfrac"] > 0


def test_asymmetric_clip_and_defaults() -> None:
    inputs = problem()
    for config in (actor(), actor(clip_ratio_low=0.1, clip_ratio_high=0.28)):
        for name in ("srppo_ppo", "srppo_cispo"):
            theirs, expected, _ = evaluate(PEERS[name], config, inputs)
            ours, gradient, _ = evaluate(name, config, inputs)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_counts_of_the_global_batch(mode: str) -> None:
    """Two micro-batches on two ranks, whose gradients verl averages: the same as all in one."""
    inputs = problem()
    mask = inputs["response_mask"]
    scale = {"loss_scale_factor": 2 * mask.shape[-1]}
    whole, gradient, _ = evaluate("srppo_ppo", actor(global_batch_info=scale), inputs, loss_agg_mode=mode)
    if mode == "seq-mean-token-sum-norm":
        torch.testing.assert_close(whole, evaluate("srppo_ppo", actor(), inputs, loss_agg_mode=mode)[0] / 2)
    batch = {
        "dp_size": 2, "batch_num_tokens": int(mask.sum()), "global_batch_size": int(mask.any(-1).sum()), **scale,
    }  # fmt: skip
    config, losses, gradients = actor(global_batch_info=batch), [], []
    for rows in (slice(0, 2), slice(2, 6)):
        part = {key: value[rows] for key, value in inputs.items()}
        loss, part_gradient, _ = evaluate("srppo_ppo", config, part, loss_agg_mode=mode)
        losses.append(loss / 2)
        gradients.append(part_gradient / 2)
    torch.testing.assert_close(sum(losses), whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.cat(gradients), gradient, atol=1e-6, rtol=1e-6)


def test_nan_in_padding_reaches_nobody() -> None:
    inputs = problem()
    clean = evaluate("srppo_ppo", actor(), inputs)
    pad = inputs["response_mask"] == 0
    dirty = {k: v if k == "response_mask" else v.masked_fill(pad, torch.nan) for k, v in inputs.items()}
    loss, gradient, metrics = evaluate("srppo_ppo", actor(), dirty)
    assert torch.equal(loss, clean[0]) and torch.equal(gradient, clean[1]) and metrics == clean[2]


def test_losses_are_registered_when_the_module_is_imported() -> None:
    module = importlib.import_module("srppo.integrations.verl")
    for name in module.LOSSES:
        del core_algos.POLICY_LOSS_REGISTRY[name]
    importlib.reload(module)
    assert set(module.LOSSES) <= set(core_algos.POLICY_LOSS_REGISTRY)


def test_what_a_loss_refuses() -> None:
    inputs = problem()
    with pytest.raises(UserError, match="config is missing"):
        evaluate("srppo_ppo", None, inputs)
    with pytest.raises(UserError, match="one radius"):
        evaluate("srppo_dppo_tv", actor(clip_ratio_low=0.1, clip_ratio_high=0.2), inputs)
    with pytest.raises(UserError, match="unknown"):
        evaluate("srppo_ppo", actor(), inputs, loss_agg_mode="median")
    with pytest.raises(UserError, match="needs batch_num_tokens"):
        aggregation(inputs["response_mask"].bool(), "token-mean", {"dp_size": 2})


# -- the reward manager -----------------------------------------------------------------------------------------------

PROMPTS = [[10, 11, 12], [13], [14, 15]]
RESPONSES = [[20, 21, 0], [22, 23, 24, 25], [0]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save(tiny_model(seed=seed), folder / name) for seed, name in enumerate(("base", "sft"))}


def settings(options: Any) -> Any:
    return SimpleNamespace(reward={"reward_kwargs": options})


def item(prompt: list[int], response: list[int], *, width: int = 5) -> Any:
    """A verl batch of one: the prompt padded on the left, the response on the right."""
    from tensordict import TensorDict
    from verl import DataProto

    left, right = width - len(prompt), width - len(response)
    attention = torch.tensor([[0] * left + [1] * (len(prompt) + len(response)) + [0] * right])
    batch = {
        "prompts": torch.tensor([[1] * left + prompt]),
        "responses": torch.tensor([response + [1] * right]),
        "attention_mask": attention,
        "response_mask": attention[:, width:].clone(),
    }
    return DataProto(batch=TensorDict(batch, batch_size=1))


def test_rewards_by_token_ids_in_batches(models: dict[str, str]) -> None:
    from verl import DataProto

    expected = SelfReward(**models).reward(PROMPTS, RESPONSES).tolist()
    sizes = []

    async def run() -> list[dict[str, Any]]:
        manager = SelfRewardManager(config=settings(models), tokenizer=tiny_tokenizer(), compute_score=None)
        original = manager.reward.reward
        manager.reward.reward = lambda p, c: sizes.append(len(p)) or original(p, c)
        data = [item(p, c) for p, c in zip(PROMPTS, RESPONSES, strict=True)]
        data[2] = DataProto.concat([data[0], data[2]])  # of several turns the last counts
        return await asyncio.gather(*(manager.run_single(one) for one in data))

    results = asyncio.run(run())
    assert [result["reward_score"] for result in results] == pytest.approx(expected, abs=1e-5)
    each = [result["reward_extra_info"]["self_reward_per_token"] for result in results]
    assert each == pytest.approx([r / n for r, n in zip(expected, (3, 4, 1), strict=True)], abs=1e-5)
    assert sum(sizes) == 3 and len(sizes) == 2  # the first one alone, those that waited for it together


def test_verl_finds_the_manager(models: dict[str, str]) -> None:
    from verl.utils.import_utils import load_extern_object

    found = load_extern_object("pkg://srppo.integrations.verl", "SelfRewardManager")
    assert found.__name__ == "SelfRewardManager"


def test_what_the_manager_refuses(models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set \+reward.reward_kwargs.base"):
        SelfRewardManager(config=settings(None), tokenizer=tiny_tokenizer())
    other = tiny_tokenizer()
    other.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match="policy's tokenizer is not that of base and SFT"):
        SelfRewardManager(config=settings(models), tokenizer=other)
    data = item(PROMPTS[0], RESPONSES[0])
    assert token_ids(data.batch) == (PROMPTS[0], RESPONSES[0])
    data.batch["response_mask"][0, 1] = 0
    with pytest.raises(UserError, match="tools"):
        token_ids(data.batch)


def test_an_error_reaches_every_caller(models: dict[str, str]) -> None:
    async def run() -> list[Any]:
        manager = SelfRewardManager(config=settings(models), tokenizer=tiny_tokenizer())
        data = [item([], [5]), item([10], [5]), item([10], [5])]
        return await asyncio.gather(*(manager.run_single(one) for one in data), return_exceptions=True)

    first, *others = asyncio.run(run())
    assert isinstance(first, UserError) and "is empty" in str(first)
    assert all(isinstance(other, dict) for other in others)


def test_a_cancelled_call_leaves_nobody_waiting(models: dict[str, str]) -> None:
    expected = SelfReward(**models).reward(PROMPTS, RESPONSES).tolist()

    async def run() -> list[Any]:
        manager = SelfRewardManager(config=settings(models), tokenizer=tiny_tokenizer())
        data = [item(p, c) for p, c in zip(PROMPTS, RESPONSES, strict=True)]
        first, second, third = (asyncio.ensure_future(manager.run_single(one)) for one in data)
        original = manager.reward.reward

        def reward(prompts: Any, responses: Any) -> Any:
            if len(prompts) == 2:  # the second call scores for itself and the third
                loop.call_soon_threadsafe(second.cancel)
                time.sleep(0.2)
            return original(prompts, responses)

        loop, manager.reward.reward = asyncio.get_running_loop(), reward
        return await asyncio.wait_for(asyncio.gather(first, second, third, return_exceptions=True), 60)

    first, second, third = asyncio.run(run())
    assert isinstance(second, asyncio.CancelledError)
    assert [r["reward_score"] for r in (first, third)] == pytest.approx([expected[0], expected[2]], abs=1e-5)
