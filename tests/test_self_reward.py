"""SelfReward: the log-ratio of two models' own logits, by token ids and by text, and what it leaves untouched."""

from __future__ import annotations

import copy
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a folder that is not found is an error at once

import pytest
import torch
from tiny import save, tiny_model, tiny_tokenizer
from tiny_runs import tiny_models  # noqa: F401
from torch import nn
from transformers import AutoModelForCausalLM

import srppo
from srppo import SelfReward, UserError
from srppo.roles import Role

PROMPTS = [[10, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20]]
COMPLETIONS = [[30, 31, 0], [0], [32, 33, 34, 35], [36, 0]]  # the third was cut


def own_score(sft: nn.Module, base: nn.Module, prompt: list[int], completion: list[int], temperature: float = 1.0):
    """``[len(completion)]`` float64 from the models' logits, one sequence at a time, unpadded."""
    ids = torch.tensor([prompt + completion])
    logp = []
    for model in (sft, base):
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double() / temperature
        logp.append(logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
    return logp[0] - logp[1]


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return tiny_model(seed=0), tiny_model(seed=1)


def test_folders_may_be_paths(tiny_models):  # noqa: F811
    made = SelfReward(Path(tiny_models.base), Path(tiny_models.sft), Path(tiny_models.base))
    assert torch.equal(
        made.reward(PROMPTS, COMPLETIONS), SelfReward(tiny_models.base, tiny_models.sft).reward(PROMPTS, COMPLETIONS)
    )


def in_memory(pair, **options) -> SelfReward:
    options = {"stop_token_ids": [0], **options}
    return SelfReward(Role("base", pair[0]), Role("sft", pair[1]), **options)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_the_models_own_log_probs(pair, batch_size):
    reward = in_memory(pair, batch_size=batch_size)
    want = [own_score(pair[1], pair[0], p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    got = reward.reward(PROMPTS, COMPLETIONS)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert got.shape == (4,)
    torch.testing.assert_close(got.double(), torch.stack([w.sum() for w in want]), atol=2e-5, rtol=1e-5)
    tokens, mask = reward.token_rewards(PROMPTS, COMPLETIONS)
    for row, values in enumerate(want):
        torch.testing.assert_close(tokens[row, : len(values)].double(), values, atol=2e-5, rtol=1e-5)
        assert mask[row].tolist() == [True] * len(values) + [False] * (mask.shape[1] - len(values))
        assert tokens[row, len(values) :].abs().sum() == 0
    assert got.abs().min() > 1e-2


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "cohere2", "granite", "bias"])
def test_heads_that_scale_cap_or_shift_their_logits(kind):
    base, sft = (tiny_model("llama" if kind == "bias" else kind, seed=seed) for seed in range(2))
    if kind == "bias":
        for model in (base, sft):
            model.lm_head.bias = nn.Parameter(torch.randn(264))
    want = [own_score(sft, base, p, c).sum() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    got = SelfReward(base, sft, stop_token_ids=[0]).reward(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(got.double(), torch.stack(want), atol=5e-5, rtol=1e-5)


def test_adapter_folder_stands_on_one_base(tiny_models):  # noqa: F811
    reward = SelfReward(tiny_models.base, tiny_models.adapter)
    assert reward.base.model is reward.sft.model
    merged = SelfReward(tiny_models.base, tiny_models.sft)
    assert merged.base.model is not merged.sft.model
    base = AutoModelForCausalLM.from_pretrained(tiny_models.base)
    want = [own_score(merged.sft.model, base, p, c).sum() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(merged.reward(PROMPTS, COMPLETIONS).double(), torch.stack(want), atol=5e-5, rtol=1e-5)
    on_memory = SelfReward(base, tiny_models.adapter, tiny_tokenizer())
    assert torch.equal(on_memory.reward(PROMPTS, COMPLETIONS), reward.reward(PROMPTS, COMPLETIONS))
    assert reward.reward(PROMPTS, COMPLETIONS).abs().min() > 1e-3


def test_no_logits_are_built(pair, monkeypatch):
    reward = in_memory(pair)
    for model in pair:
        monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the head was applied to hidden states"))
    assert reward.reward(PROMPTS, COMPLETIONS).isfinite().all()


def test_models_of_their_own_are_read_in_evaluation_mode_and_left_in_theirs():
    pair, modes = [tiny_model(seed=seed).train() for seed in range(2)], []
    reward = in_memory(pair)
    for model in pair:
        model.model.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    reward.reward(PROMPTS, COMPLETIONS)
    assert modes == [False, False] and all(model.training for model in pair)


def test_options_are_those_of_the_trainer(pair):
    scores = in_memory(pair).reward(PROMPTS, COMPLETIONS)
    lengths = torch.tensor([3.0, 1.0, 4.0, 2.0])
    cut = torch.tensor([0.0, 0.0, 1.0, 0.0])
    for options, want in (
        ({"normalize": "length"}, scores / lengths),
        ({"scale": 0.5}, scores * 0.5),
        ({"clip": 0.3}, scores.clamp(-0.3, 0.3)),
        ({"missing_eos_penalty": 7.0}, scores - 7.0 * cut),
        ({"normalize": "running"}, scores / scores.std()),
    ):
        torch.testing.assert_close(in_memory(pair, **options).reward(PROMPTS, COMPLETIONS), want, msg=str(options))
    assert scores.abs().max() > 0.3
    cold = [own_score(pair[1], pair[0], p, c, 0.7).sum() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    got = in_memory(pair, temperature=0.7).reward(PROMPTS, COMPLETIONS).double()
    torch.testing.assert_close(got, torch.stack(cold), atol=3e-5, rtol=1e-5)


def test_running_moments_span_calls(pair):
    reward, plain = in_memory(pair, normalize="running"), in_memory(pair)
    reward.reward(PROMPTS[:2], COMPLETIONS[:2])
    scores = plain.reward(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(reward.reward(PROMPTS[2:], COMPLETIONS[2:]), scores[2:] / scores.std())
    with pytest.raises(UserError, match="placement='eos'"):
        reward.token_rewards(PROMPTS, COMPLETIONS)


def test_what_follows_a_stop_token_counts_for_nothing(pair):
    reward = in_memory(pair)
    padded = [[*c, 1, 0, 77] if c[-1] == 0 else c for c in COMPLETIONS]
    assert torch.equal(reward.reward(PROMPTS, padded), reward.reward(PROMPTS, COMPLETIONS))
    assert torch.equal(reward.reward(PROMPTS[:1], [[]]), torch.zeros(1))
    assert reward.reward([], []).shape == (0,)
    cut = in_memory(pair, missing_eos_penalty=3.0)
    assert cut.reward([[5]], [[]]) == 0  # no token to carry a penalty


def test_text_messages_and_ids_agree(tiny_models):  # noqa: F811
    reward = SelfReward(tiny_models.base, tiny_models.adapter)
    tokenizer = tiny_tokenizer()
    prompts, texts = ["ab:", "cde:"], ["ba", "edc"]
    prompt_ids = [tokenizer(p)["input_ids"] for p in prompts]
    ids = [[*tokenizer(t, add_special_tokens=False)["input_ids"], 0] for t in texts]
    by_ids = reward(prompts=prompts, completions=["ignored", "as ids win"], completion_ids=ids, prompt_ids=prompt_ids)
    assert by_ids == reward.reward(prompt_ids, ids).tolist()
    assert all(isinstance(x, float) for x in by_ids)
    assert reward(prompts=prompts, completions=texts) == by_ids
    assert reward(prompts, texts) == by_ids
    assert reward(prompts=prompts, completions=texts, completion_ids=ids, trainer_state=None) == by_ids
    assert reward.__name__ == "self_reward"

    chat = [[{"role": "user", "content": p}] for p in prompts]
    answers = [[{"role": "assistant", "content": t}] for t in texts]
    rendered = [tokenizer(f"<|user|>{p}<|end|><|assistant|>")["input_ids"] for p in prompts]
    want = reward.reward(rendered, ids).tolist()
    assert reward(prompts=chat, completions=answers) == want
    assert reward(prompts=chat, completions=answers, completion_ids=ids) == want
    assert want != by_ids


def test_text_that_keeps_its_stop_token_tells_what_was_cut(tiny_models):  # noqa: F811
    options = {"append_eos": False, "missing_eos_penalty": 5.0}
    reward = SelfReward(tiny_models.base, tiny_models.adapter, **options)
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("ab:")["input_ids"]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("ba<|end|>", "ba")]
    assert ids[0][-1] == 0
    assert reward(prompts=["ab:", "ab:"], completions=["ba<|end|>", "ba"]) == reward.reward([prompt] * 2, ids).tolist()
    plain = SelfReward(tiny_models.base, tiny_models.adapter)
    difference = plain.reward([prompt], ids[1:]) - reward.reward([prompt], ids[1:])
    torch.testing.assert_close(difference, torch.tensor([5.0]))
    with pytest.raises(UserError, match="which completions were cut"):
        SelfReward(tiny_models.base, tiny_models.adapter, missing_eos_penalty=5.0)(["ab:"], ["ba"])


def test_metrics_for_the_trainer(pair):
    told = {}
    reward = in_memory(pair)
    reward(prompt_ids=PROMPTS, completion_ids=COMPLETIONS, log_metric=lambda name, value: told.update({name: value}))
    assert told["self_reward/truncated"] == 0.25
    assert told["self_reward/per_token"] == pytest.approx(reward.reward(PROMPTS, COMPLETIONS).sum().item() / 10)


def test_a_policy_in_the_same_model_is_left_as_it_was(tiny_models):  # noqa: F811
    """peft's own switches set requires_grad, too: a policy must come back trainable, and in training mode."""
    from peft import LoraConfig, PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_models.base)
    model = PeftModel.from_pretrained(base, tiny_models.adapter, adapter_name="sft")
    model.add_adapter("policy", LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.set_adapter("policy")
    model.train()
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(needs.values())
    reward = SelfReward.from_peft(model, "sft", tiny_tokenizer())
    got = reward.reward(PROMPTS, COMPLETIONS)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needs
    assert model.active_adapter == "policy"
    assert all(module.training for module in model.modules())
    assert torch.equal(got, SelfReward(tiny_models.base, tiny_models.adapter).reward(PROMPTS, COMPLETIONS))
    with pytest.raises(UserError, match=r"no adapter 'other'.*'sft', 'policy'"):
        SelfReward.from_peft(model, "other")


def test_several_active_adapters_come_back_and_adapters_that_are_off(tiny_models):  # noqa: F811
    """A policy may be SFT's adapter with another on top, of which peft's own set_adapter would put one back; and SFT is
    no base where the adapters are off."""
    from peft import LoraConfig, PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_models.base)
    model = PeftModel.from_pretrained(base, tiny_models.adapter, adapter_name="sft")
    model.add_adapter("policy", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["sft", "policy"])
    reward = SelfReward.from_peft(model, "sft", tiny_tokenizer())
    got = reward.reward(PROMPTS, COMPLETIONS)
    assert model.active_adapters == ["sft", "policy"] and model.active_adapter == "sft"
    with model.disable_adapter():
        assert torch.equal(reward.reward(PROMPTS, COMPLETIONS), got)
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True and model.active_adapters == ["sft", "policy"]


def test_models_that_do_not_belong_together_are_refused(pair, tiny_models, tmp_path):  # noqa: F811
    base = pair[0]
    with pytest.raises(UserError, match="different vocabularies"):
        SelfReward(Role("base", base), Role("sft", tiny_model(vocab_size=280)), stop_token_ids=[0])
    with pytest.raises(UserError, match="same model"):
        SelfReward(base, base, stop_token_ids=[0])
    for again in (tiny_models.base, f"{tiny_models.base}/../base", Path(tiny_models.base)):
        with pytest.raises(UserError, match=r"same model \(.*base\), so every reward would be 0"):
            SelfReward(tiny_models.base, again)
    with pytest.raises(UserError, match="same adapter"):
        SelfReward(Role("base", base), Role("sft", base), stop_token_ids=[0])
    wide = tiny_model().double()
    for models in ((wide, base), (Role("base", base), Role("sft", wide))):
        with pytest.raises(UserError, match=r"has weights in float64.*give model.float\(\)"):
            SelfReward(*models, stop_token_ids=[0])
    with pytest.raises(UserError, match="both be roles"):
        SelfReward(Role("base", base), base, stop_token_ids=[0])
    capped, plain = tiny_model("gemma2"), tiny_model("gemma2")
    capped.config.final_logit_softcapping = 3.0
    with pytest.raises(UserError, match="transform their logits differently"):
        SelfReward(Role("base", plain), Role("sft", capped), stop_token_ids=[0])

    vocabulary = tiny_tokenizer()
    vocabulary.add_tokens(["<extra>"])
    with pytest.raises(UserError, match=r"is not that of the model in .*first at token 260"):
        SelfReward(tiny_models.base, tiny_models.adapter, vocabulary)
    other = save(tiny_model(), tmp_path / "other", vocabulary)
    with pytest.raises(UserError, match="tokenizers of base and SFT model differ"):
        SelfReward(other, tiny_models.sft)
    reward = SelfReward(tiny_models.base, tiny_models.adapter)
    reward.check_tokenizer(tiny_tokenizer())
    with pytest.raises(UserError, match="the policy's tokenizer is not that of base and SFT, first at token 260"):
        reward.check_tokenizer(vocabulary)
    vocabulary.add_tokens([f"<extra {i}>" for i in range(9)])
    with pytest.raises(UserError, match="tokenizer has token 269"):
        in_memory(pair).check_tokenizer(vocabulary)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "needs prompts"),
        ({"prompts": ["a"]}, "needs completions"),
        ({"prompts": ["a"], "completions": ["b"]}, "no tokenizer"),
        ({"prompt_ids": [[5]], "completions": ["b"]}, "need prompts as text"),
        ({"prompt_ids": [[5]], "completion_ids": [[264]]}, r"completion_ids\[0\] has token 264.*another tokenizer"),
        ({"prompt_ids": [[5], [-1]], "completion_ids": [[1], [1]]}, r"prompt_ids\[1\] has token -1"),
        ({"prompt_ids": [[5], []], "completion_ids": [[1], [1]]}, r"prompt_ids\[1\] is empty"),
        ({"prompt_ids": [5, 6], "completion_ids": [6, 7]}, r"prompt_ids\[0\] must be a list of token ids.*got '5'"),
        (
            {"prompt_ids": [[5]], "completion_ids": [[6.5]]},
            r"completion_ids\[0\] must be .* whole numbers; got '\[6.5\]'",
        ),
        (
            {"prompt_ids": [[5]], "completion_ids": [torch.tensor([6.0])]},
            r"completion_ids\[0\] must be .* whole numbers",
        ),
        ({"prompt_ids": ["ab"], "completion_ids": ["c"]}, r"prompt_ids\[0\] must be a list of token ids.*got 'ab'"),
        ({"prompt_ids": "ab", "completion_ids": [[1]]}, "prompt_ids must hold a list of token ids for each sequence"),
        ({"prompt_ids": 5, "completion_ids": [[1]]}, "prompt_ids must hold a list of token ids for each sequence"),
        ({"prompts": "a", "completions": "b"}, "prompts must be a list, got the text 'a'"),
        ({"prompts": ["a"], "completions": "b"}, "completions must be a list, got the text 'b'"),
        ({"prompt_ids": [[5]], "completion_ids": [[1], [2]]}, "1 prompts and 2 completions"),
        ({"prompt_ids": torch.ones(2, 3), "completion_ids": [[1], [2]]}, "hides what is padding"),
        ({"prompt_ids": [[5] * 100], "completion_ids": [[6] * 29]}, "129 tokens, and the model has 128 positions"),
    ],
)
def test_bad_calls_are_refused(pair, arguments, text):
    with pytest.raises(UserError, match=text):
        in_memory(pair)(**arguments)


def test_bad_options_are_refused(pair):
    for options, text in (
        ({"batch_size": 0}, "batch_size"),
        ({"normalize": "mean"}, "reward_normalization must be one of"),
        ({"clip": -1.0}, "reward_clip"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
    ):
        with pytest.raises(UserError, match=text):
            in_memory(pair, **options)
    headless = copy.deepcopy(pair)
    for model in headless:
        model.config.eos_token_id = None
    with pytest.raises(UserError, match="set stop_token_ids"):
        SelfReward(Role("base", headless[0]), Role("sft", headless[1]))
    assert srppo.SelfReward is SelfReward
