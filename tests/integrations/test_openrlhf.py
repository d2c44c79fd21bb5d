"""The self-reward as OpenRLHF loads it: a file with a reward function, and an agent by token ids."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import re
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import save, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from srppo import UserError
from srppo.integrations.openrlhf import DEFAULT_CLIP, self_reward_agent, self_reward_func
from srppo.self_reward import SelfReward

WIDE = (-1000.0, 1000.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    base, sft = (save(tiny_model(seed=seed), folder / str(seed)) for seed in (0, 1))
    return base, sft


def test_a_file_that_openrlhf_loads_by_path(models: tuple[str, str], tmp_path: Path) -> None:
    """As its executor does it: by file name, then one query at a time."""
    file = tmp_path / "my_reward.py"
    file.write_text(
        "from srppo.integrations.openrlhf import self_reward_func\n"
        f"reward_func = self_reward_func({models[0]!r}, {models[1]!r}, clip_range=(-1000, 1000))\n"
    )
    spec = importlib.util.spec_from_file_location("reward_func", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = tiny_tokenizer()
    prompt, completion = "<|user|>2+2=<|end|><|assistant|>", "4<|end|>"
    result = module.reward_func([prompt + completion], [prompt], [None])
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
    expected = SelfReward(*models).reward([ids[0]], [ids[1]])
    assert result["rewards"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert result["scores"] is result["rewards"]
    per_token = result["extra_logs"]["self_reward_per_token"]
    assert per_token.tolist() == pytest.approx([expected.item() / len(ids[1])], abs=1e-5)


def test_several_queries_at_once(models: tuple[str, str]) -> None:
    func = self_reward_func(*models, clip_range=WIDE)
    prompts, queries = ["ab:", "c:"], ["ab:xyz<|end|>", "c:w"]
    together = func(queries, prompts)["rewards"].tolist()
    alone = [func([q], [p])["rewards"].item() for q, p in zip(queries, prompts, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together[0] != together[1]
    begins = tiny_tokenizer()
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 2)])
    func = self_reward_func(tiny_model(seed=0), tiny_model(seed=1), begins, clip_range=WIDE)
    assert func(queries, prompts)["rewards"].tolist() == pytest.approx(together, abs=1e-5)  # it is in the text


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_the_default_clip_is_warned_of(models: tuple[str, str], scale: float) -> None:
    with pytest.warns(UserWarning, match=r"--reward\.clip_range"):
        func = self_reward_func(*models, scale=scale)
    with pytest.warns(UserWarning, match="outside clip_range"):
        reward = func(["ab:xyz"], ["ab:"])["rewards"]
    assert reward.abs().max() > 10  # told, not changed: the clip is OpenRLHF's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        func(["ab:xyz"], ["ab:"])  # told once
        self_reward_func(*models, clip_range=WIDE)(["ab:xyz"], ["ab:"])  # nothing to tell


def test_what_is_refused(models: tuple[str, str]) -> None:
    func = self_reward_func(*models, clip_range=WIDE)
    with pytest.raises(UserError, match="does not begin with its prompt"):
        func(["b:xyz"], ["ab:"])
    with pytest.raises(UserError, match="low < high"):
        self_reward_func(*models, clip_range=(10, -10))
    with pytest.raises(UserError, match="pass tokenizer"):
        self_reward_func(tiny_model(seed=0), tiny_model(seed=1), clip_range=WIDE)


def test_calls_from_several_threads_score_one_after_the_other(models: tuple[str, str], monkeypatch) -> None:
    """Scoring switches adapters. The first stays inside until another one is there too, or it has waited for it."""
    busy, another = threading.Lock(), threading.Event()

    def reward(self: SelfReward, prompts: Sequence[Any], completions: Sequence[Any]) -> torch.Tensor:
        if busy.acquire(blocking=False):
            another.wait(0.2)
            busy.release()
        else:
            another.set()
        return torch.zeros(len(prompts))

    monkeypatch.setattr(SelfReward, "reward", reward)
    func = self_reward_func(*models, clip_range=WIDE)
    threads = [threading.Thread(target=func, args=(["ab:x"], ["ab:"])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not another.is_set()


# -- against OpenRLHF itself ------------------------------------------------------------------------------------------


class Engine:
    """Stands in for vLLM: a fixed completion by token ids, one that its text does not encode to."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    async def generate(self, prompt_ids: list[int], sampling: Any, multi_modal_data: Any = None) -> Any:
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.ids, finish_reason="stop", logprobs=None)])


def test_the_agent_scores_the_sampled_ids(models: tuple[str, str]) -> None:
    pytest.importorskip("openrlhf.utils.agent", reason="needs openrlhf and aiohttp", exc_type=ImportError)
    from openrlhf.utils.agent import AgentExecutorBase

    agent = self_reward_agent(*models, clip_range=WIDE)
    assert issubclass(agent, AgentExecutorBase)
    tokenizer = tiny_tokenizer()
    euro = tokenizer("€", add_special_tokens=False)["input_ids"]
    completion = [euro[0], 40, 0]  # half of a character: as text it is a replacement character, which encodes otherwise
    assert tokenizer(tokenizer.decode(completion), add_special_tokens=False)["input_ids"] != completion
    prompt = "ab:"

    async def episodes() -> list[Any]:
        sampling = SimpleNamespace(max_tokens=8, logprobs=None)
        run = agent().execute
        return await asyncio.gather(*(run(prompt, None, sampling, 64, tokenizer, Engine(completion)) for _ in range(3)))

    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = SelfReward(*models).reward([ids], [completion]).item()
    for output in asyncio.run(episodes()):
        assert output["reward"] == output["scores"] == pytest.approx(expected, abs=1e-5)
        assert output["observation_tokens"] == ids + completion

    other = tiny_tokenizer()
    other.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match="policy's tokenizer is not that of base and SFT"):
        asyncio.run(agent().execute(prompt, None, SimpleNamespace(max_tokens=8), 64, other, Engine(completion)))


def test_the_default_is_the_one_in_openrlhf() -> None:
    """Read from its source, as the command line needs DeepSpeed to import."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        pytest.skip("needs openrlhf")
    source = (Path(inspect.getfile(importlib.import_module("openrlhf"))).parent / "cli/train_ppo_ray.py").read_text()
    found = re.search(r'"--reward\.clip_range".*default=\((-?\d+), (\d+)\)', source)
    assert found is not None
    assert tuple(map(float, found.groups())) == DEFAULT_CLIP
