"""OpenRLHF: the self-reward, by token ids as an agent, or by text as a reward function.

OpenRLHF loads a Python file of the user's by path. By token ids, ``my_agent.py``::

    from srppo.integrations.openrlhf import self_reward_agent
    AgentExecutor = self_reward_agent("my-base", "my-sft", clip_range=(-1000, 1000))

    --train.agent_func_path my_agent.py --reward.clip_range -1000 1000

Or as text, which OpenRLHF decodes and this file encodes again, ``my_reward.py``::

    from srppo.integrations.openrlhf import self_reward_func
    reward_func = self_reward_func("my-base", "my-sft", clip_range=(-1000, 1000))

    --reward.remote_url my_reward.py --reward.clip_range -1000 1000

**The clip.** ``--reward.clip_range`` is -10 10 unless set. A summed log-ratio leaves that range with a few dozen
tokens, and then every good answer earns the same 10. Nothing of OpenRLHF's configuration reaches this file, so say here
what was set; left out, the default is assumed, and a warning says so.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from srppo.errors import UserError
from srppo.self_reward import SelfReward

__all__ = ["self_reward_agent", "self_reward_func"]

DEFAULT_CLIP = (-10.0, 10.0)  # of --reward.clip_range
Ids = Sequence[int]


def self_reward_func(
    base: Any, sft: Any, tokenizer: Any = None, *, clip_range: tuple[float, float] | None = None, **options: Any
) -> Callable[[list[str], list[str], list[Any]], dict[str, Any]]:
    """``reward_func(queries, prompts, labels)`` for ``--reward.remote_url``.

    A query is prompt and completion as text with their special tokens; both are encoded again, so a completion whose
    tokens are not those that its text encodes to is scored as other tokens: ``self_reward_agent`` is exact.

    Args:
        base, sft, tokenizer, options: as in :class:`srppo.SelfReward`. A tokenizer is needed with models in memory.
        clip_range: what ``--reward.clip_range`` is set to.

    Raises:
        UserError: what SelfReward refuses; a clip_range in the wrong order. The function itself raises one where a
            query does not begin with its prompt, as when OpenRLHF has cut the prompt; OpenRLHF logs what a reward
            function raises, and trains on.
    """
    scorer = _Scorer(base, sft, tokenizer, clip_range, options)
    encode = scorer.reward.tokenizer
    if encode is None:
        raise UserError("a reward function gets text: pass tokenizer")

    def reward_func(queries: list[str], prompts: list[str], labels: list[Any] | None = None) -> dict[str, Any]:
        pairs = []
        for query, prompt in zip(queries, prompts, strict=True):
            if not query.startswith(prompt):
                raise UserError(
                    f"a query does not begin with its prompt ({prompt[:40]!r}...): it was cut, or decoded to other "
                    "text; raise --data.max_len, or use self_reward_agent, which needs no text"
                )
            texts = (prompt, query[len(prompt) :])
            pairs.append([encode(text, add_special_tokens=False)["input_ids"] for text in texts])
        return scorer([prompt for prompt, _ in pairs], [completion for _, completion in pairs])

    return reward_func


def self_reward_agent(
    base: Any, sft: Any, tokenizer: Any = None, *, clip_range: tuple[float, float] | None = None, **options: Any
) -> type:
    """An ``AgentExecutor`` for ``--train.agent_func_path``: OpenRLHF's single turn, scored by the sampled token ids.

    Args:
        base, sft, tokenizer, options: as in :class:`srppo.SelfReward`; the models are loaded when this is called.
        clip_range: what ``--reward.clip_range`` is set to.

    Raises:
        ImportError: no OpenRLHF.
        UserError: what SelfReward refuses; when an episode starts, a tokenizer other than that of base and SFT.
    """
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    scorer = _Scorer(base, sft, tokenizer, clip_range, options)

    class AgentExecutor(SingleTurnAgentExecutor):
        """One completion, rewarded with ``log pi_sft - log pi_base``."""

        async def execute(
            self,
            prompt: str,
            label: Any,
            sampling_params: Any,
            max_length: int,
            hf_tokenizer: Any,
            llm_engine: Any,
            images: Any = None,
        ) -> dict[str, Any]:
            scorer.check_tokenizer(hf_tokenizer)
            if images:
                raise UserError("the self-reward reads text alone, and this prompt has images")
            output = await super().execute(
                prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=images
            )
            ids, (start, end) = list(output["observation_tokens"]), output["action_ranges"][-1]
            result = await asyncio.to_thread(scorer, [ids[:start]], [ids[start:end]])
            logs = {name: value.item() for name, value in result["extra_logs"].items()}
            reward = result["rewards"].item()
            return {**output, "reward": reward, "scores": reward, "extra_logs": logs}

    return AgentExecutor


class _Scorer:
    """The self-reward in the shape of OpenRLHF's results, for several threads, with an eye on the clip."""

    def __init__(
        self, base: Any, sft: Any, tokenizer: Any, clip_range: tuple[float, float] | None, options: dict[str, Any]
    ) -> None:
        if clip_range is None:
            warnings.warn(
                "OpenRLHF clips rewards to [-10, 10] unless --reward.clip_range is set, and a summed log-ratio is "
                "often larger: pass for example --reward.clip_range -1000 1000, and the same here as clip_range",
                stacklevel=3,
            )
        self.low, self.high = clip_range or DEFAULT_CLIP
        if not self.low < self.high:
            raise UserError(f"clip_range={clip_range} must be (low, high) with low < high, as --reward.clip_range")
        self.reward = SelfReward(base, sft, tokenizer, **options)
        self.lock = threading.Lock()  # adapters are switched while scoring, and OpenRLHF calls from many threads
        self.checked: Any = None
        self.warned = False

    def __call__(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> dict[str, Any]:
        """``{"rewards": [B], "scores": [B], "extra_logs": {"self_reward_per_token": [B]}}``, fp32 on the CPU."""
        with self.lock:
            rewards = self.reward.reward(prompts, completions).cpu()
        outside = (rewards < self.low) | (rewards > self.high)
        if bool(outside.any()) and not self.warned:
            self.warned = True
            warnings.warn(
                f"a self-reward of {rewards[outside][0]:.1f} nats lies outside clip_range ({self.low:g}, "
                f"{self.high:g}): OpenRLHF clips it, and answers beyond it are all alike; widen --reward.clip_range",
                stacklevel=2,
            )
        lengths = torch.tensor([max(1, len(ids)) for ids in completions])
        return {"rewards": rewards, "scores": rewards, "extra_logs": {"self_reward_per_token": rewards / lengths}}

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Once for each tokenizer: comparing vocabularies takes a while."""
        if tokenizer is not self.checked:
            self.reward.check_tokenizer(tokenizer)
            self.checked = tokenizer
