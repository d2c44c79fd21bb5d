"""Which weights play base, SFT, policy and critic, what learns and what stays frozen, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from ppo_steps import one_update, trained_head
from safetensors.torch import load_file, save_file
from tiny import save, tiny_model, tiny_tokenizer
from tiny_runs import (
    QUIET,
    ROWS,
    STOPS,
    config,
    examples,
    full_roles,
    learners,
    role,
    rollout,
    snapshot,
    trainer,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertGenerationConfig,
    BertGenerationDecoder,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaModel,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Phi3Config,
    RecurrentGemmaConfig,
    SiglipVisionConfig,
)

from srppo import SelfReward, SRPPOConfig, SRPPOTrainer, UserError, ppo, run_sft
from srppo import roles as roles_module
from srppo.checkpoint import save_weights
from srppo.data import Example
from srppo.evaluation import evaluate_policy
from srppo.models import (
    attach_adapter,
    check_adapter,
    check_positions,
    check_prompts,
    disable_dropout,
    load_model,
    load_tokenizer,
    tokenizer_for,
)
from srppo.roles import Role, build_roles, check_head, frozen_roles, made_on
from srppo.rollout import generate
from srppo.sft import sft_role

CELLS = [
    ("adapter", True, "auto"),
    ("adapter", True, "separate"),
    ("adapter", False, "auto"),
    ("sft", True, "auto"),
    ("sft", True, "separate"),
    ("sft", False, "auto"),
    ("sft", False, "separate"),
]


def own_logprobs(model: nn.Module, given) -> torch.Tensor:
    """Log-probs of a rollout from the model's logits in float64, 0 where masked."""
    with torch.no_grad():
        logits = model(
            input_ids=given.input_ids, attention_mask=given.attention_mask, position_ids=given.position_ids
        ).logits.double()
    logp = logits[:, given.prompt_length - 1 : -1].log_softmax(-1).gather(-1, given.completions[..., None]).squeeze(-1)
    return logp.masked_fill(~given.completion_mask, 0)


@pytest.mark.parametrize(("kind", "use_peft", "value_model"), CELLS)
def test_every_cell_starts_from_sft_trains_policy_and_critic_and_leaves_the_frozen_weights_alone(
    tiny_models, tmp_path, kind, use_peft, value_model
):
    run = trainer(tiny_models, tmp_path, kind=kind, use_peft=use_peft, value_model=value_model, max_steps=1)
    roles, given = run.roles, rollout()
    base = AutoModelForCausalLM.from_pretrained(tiny_models.base)
    expected = {"base": own_logprobs(base, given)}
    if kind == "adapter":
        expected["sft"] = own_logprobs(PeftModel.from_pretrained(base, tiny_models.adapter).eval(), given)
    else:
        expected["sft"] = own_logprobs(AutoModelForCausalLM.from_pretrained(tiny_models.sft), given)
    expected["policy"] = expected["sft"]
    assert (expected["sft"] - expected["base"]).abs().max() > 1e-2

    for name, logp in expected.items():
        got = ppo.logprobs(getattr(roles, name), given)[0].double()
        torch.testing.assert_close(got, logp, atol=2e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    learning = {id(p) for r in (roles.policy, roles.critic) for _, p in r.parameters()}
    assert run.critic.scheduler.base_lrs[0] == run.args.learning_rate, "the critic has no rate of its own unless asked"
    for r in (roles.base, roles.sft):
        assert not any(p.requires_grad for p in r.model.parameters() if id(p) not in learning), r.name
    with roles.critic.active(), torch.no_grad():
        assert roles.critic.values(given).abs().max() == 0
        trunk = roles.critic.hidden(given)
    with roles.sft.active(), torch.no_grad():
        torch.testing.assert_close(trunk, roles.sft.hidden(given), atol=2e-5, rtol=1e-4)

    everything = {
        f"{r.name}.{name}": p
        for r in (roles.base, roles.sft, roles.policy, roles.critic)
        for name, p in r.model.named_parameters()
        if not (r is roles.critic and name == "lm_head.weight")
    }
    before = {name: p.detach().clone() for name, p in everything.items()}
    policy = [p.detach().clone() for _, p in roles.policy.parameters()]
    critic = [p.detach().clone() for _, p in roles.critic.parameters()]
    assert not {id(p) for _, p in roles.policy.parameters()} & {id(p) for _, p in roles.critic.parameters()}
    run.train()

    frozen = [name for name, p in everything.items() if id(p) not in learning]
    assert frozen
    for name in frozen:
        assert torch.equal(before[name], everything[name]), f"{name} is frozen and changed"
    for r, old in ((roles.policy, policy), (roles.critic, critic)):
        changed = sum(not torch.equal(a, b) for a, (_, b) in zip(old, r.parameters(), strict=True))
        assert changed > len(old) // 2, f"{r.name}: {changed} of {len(old)} parameters changed"
    # the frozen roles still compute what they did
    for name in ("base", "sft"):
        torch.testing.assert_close(
            ppo.logprobs(getattr(roles, name), given)[0].double(), expected[name], atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize(("kind", "use_peft"), [("adapter", True), ("sft", True), ("sft", False)])
def test_saved_policy_loads_with_plain_transformers_and_peft_and_gives_its_log_probs(
    tiny_models, tmp_path, kind, use_peft
):
    run = trainer(tiny_models, tmp_path, kind=kind, use_peft=use_peft, max_steps=1)
    run.train()
    folder = tmp_path / "run"
    if use_peft:
        under = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert under == (tiny_models.base if kind == "adapter" else tiny_models.sft)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(under), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    given = rollout()
    trained = ppo.logprobs(run.roles.policy, given)[0].double()
    torch.testing.assert_close(own_logprobs(model.eval(), given), trained, atol=2e-5, rtol=1e-5)
    assert (trained - ppo.logprobs(run.roles.sft, given)[0]).abs().max() > 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_the_tokenizer_is_the_first_that_a_folder_has_and_of_a_hub_the_bases(tiny_models, tmp_path, monkeypatch):
    """Weights alone, as an adapter's folder may have them, go with the base's; a name is not looked up for it."""
    loaded = []
    monkeypatch.setattr("srppo.models.load_tokenizer", lambda path, _: loaded.append(path))
    bare, base, sft = tmp_path / "bare", tiny_models.base, tiny_models.sft
    bare.mkdir()
    args = config(tmp_path)
    for pair in ((sft, base), (str(bare), base), (sft, "hub/base"), ("hub/sft", "hub/base"), ("hub/sft", None)):
        tokenizer_for(*pair, args)
    assert loaded == [sft, base, sft, "hub/base", "hub/sft"]
    with pytest.raises(UserError, match="give processing_class"):
        tokenizer_for(tiny_model(), tiny_model(), args)


# -- gradients of adapters that share a model -------------------------------------------------------------------------


def adapter_gradients(tiny_models, tmp_path, *, checkpointing: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of policy and critic after one interleaved update over shared weights, nothing stepped."""
    args = config(tmp_path, use_peft=True, gradient_checkpointing=checkpointing)
    roles = build_roles(args, tiny_models.base, tiny_models.adapter)
    with torch.no_grad():
        roles.critic.value_head.weight.fill_(0.1)  # at 0 the critic's trunk has no gradient
    given, count = rollout(), torch.tensor(10.0)
    policy, critic = learners(roles, args)
    scores = ppo.score(roles, given, args)
    targets = ppo.advantages(given, scores, args)
    for rows in ([0, 1], [2, 3]):
        part = given.select(rows)
        cut = lambda x, rows=rows, part=part: part.of_tokens(x[rows])  # noqa: E731
        ppo.policy_backward(policy.role, part, cut(scores.policy), cut(targets.advantages), count, args)
        ppo.value_backward(critic.role, part, cut(scores.values), cut(targets.returns), count, args)
    frozen = [p for _, p in roles.sft.parameters()]
    assert frozen and all(p.grad is None for p in frozen)
    return {r.name: {n: p.grad.clone() for n, p in r.parameters()} for r in (roles.policy, roles.critic)}


def alone(tiny_models, tmp_path, which: str) -> dict[str, torch.Tensor]:
    """The same gradient from a model that has nothing but this one adapter, by plain autograd over logits."""
    args = config(tmp_path, use_peft=True)
    roles = build_roles(args, tiny_models.base, tiny_models.adapter)
    with torch.no_grad():
        roles.critic.value_head.weight.fill_(0.1)
    given = rollout()
    scores = ppo.score(roles, given, args)
    targets = ppo.advantages(given, scores, args)
    base = AutoModelForCausalLM.from_pretrained(tiny_models.base)
    single = PeftModel.from_pretrained(base, tiny_models.adapter, is_trainable=True).eval()
    inputs = {"attention_mask": given.attention_mask, "position_ids": given.position_ids}
    output = single(input_ids=given.input_ids, output_hidden_states=True, **inputs)
    span, mask = slice(given.prompt_length - 1, -1), given.completion_mask
    if which == "policy":
        logp = output.logits[:, span].log_softmax(-1).gather(-1, given.completions[..., None]).squeeze(-1)
        ratio = (logp - scores.policy)[mask].exp()
        advantage = targets.advantages[mask]
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum() / 10
    else:
        values = output.hidden_states[-1][:, span].sum(-1) * 0.1
        loss = 0.5 * ((values - targets.returns)[mask] ** 2).sum() / 10
    loss.backward()
    return {n.replace(".default.", "."): p.grad for n, p in single.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_adapters_gradient_is_that_of_a_model_with_this_adapter_alone(tiny_models, tmp_path, checkpointing):
    shared = adapter_gradients(tiny_models, tmp_path, checkpointing=checkpointing)
    for which, adapter in (("policy", "policy"), ("critic", "critic")):
        expected = alone(tiny_models, tmp_path, which)
        got = {n.replace(f".{adapter}.", "."): g for n, g in shared[which].items() if not n.startswith("value_head")}
        assert got.keys() == expected.keys()
        scale = max(g.abs().max() for g in expected.values())
        assert scale > 1e-6
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name], atol=2e-4 * scale, rtol=1e-3, msg=f"{which} {name}")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2", "cohere2", "granite"])
def test_full_gradient_is_that_of_autograd_over_the_models_logits(tmp_path, kind):
    """Tied heads get their gradient from both ends; scaled and capped logits pass it through the transform."""
    args = config(tmp_path, entropy_coef=0.1, temperature=0.8, cliprange=0.05)
    roles, given = full_roles(args, kind), rollout()
    scores = ppo.score(roles, given, args)
    targets = ppo.advantages(given, scores, args)
    count, mask = torch.tensor(10.0), given.completion_mask
    with torch.no_grad():
        for _, p in roles.policy.parameters():  # so that ratios are not 1 and some are clipped
            p.mul_(1.05)
    twin = copy.deepcopy(roles.policy.causal_lm)
    old, advantages = given.of_tokens(scores.policy), given.of_tokens(targets.advantages)
    loss, _ = ppo.policy_backward(roles.policy, given, old, advantages, count, args)

    logits = twin(
        input_ids=given.input_ids, attention_mask=given.attention_mask, position_ids=given.position_ids
    ).logits[:, given.prompt_length - 1 : -1]
    all_logp = (logits / 0.8).log_softmax(-1)
    logp = all_logp.gather(-1, given.completions[..., None]).squeeze(-1)
    entropy = -(all_logp.exp() * all_logp).sum(-1)
    ratio, advantage = (logp - scores.policy)[mask].exp(), targets.advantages[mask]
    assert ((ratio - 1).abs() > 0.05).any()
    plain = -torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage).sum() - 0.1 * entropy[mask].sum()
    (plain / 10).backward()
    assert loss == pytest.approx(plain.item() / 10, abs=1e-4)
    expected = {name: p.grad for name, p in twin.named_parameters()}
    got = dict(roles.policy.parameters())
    assert got.keys() == expected.keys()
    scale = max(g.abs().max().item() for g in expected.values())
    for name, p in got.items():
        torch.testing.assert_close(p.grad, expected[name], atol=2e-4 * scale, rtol=2e-3, msg=f"{kind} {name}")


def test_active_adapter_comes_back_after_an_error(tiny_models, tmp_path):
    roles = build_roles(config(tmp_path, use_peft=True), tiny_models.base, tiny_models.adapter)
    before = roles.policy.model.active_adapter
    for r in (roles.base, roles.sft, roles.policy, roles.critic):
        with pytest.raises(ZeroDivisionError), r.active():
            raise ZeroDivisionError
        assert roles.policy.model.active_adapter == before
    given = rollout()
    assert torch.equal(ppo.logprobs(roles.policy, given)[0], ppo.logprobs(roles.sft, given)[0])
    assert not torch.equal(ppo.logprobs(roles.base, given)[0], ppo.logprobs(roles.sft, given)[0])


def test_a_role_inside_another_leaves_the_outer_one_as_it_was(tiny_models, tmp_path):
    roles, given = build_roles(config(tmp_path, use_peft=True), tiny_models.base, tiny_models.adapter), rollout()
    with roles.policy.active():
        expected = ppo.head_logprobs(roles.policy, roles.policy.hidden(given), given, 1.0)[0]
        for inner in (roles.sft, roles.base, roles.critic, roles.policy):
            ppo.score_role(inner, given, 1.0, [torch.arange(4)])
            assert all(p.requires_grad for _, p in roles.policy.parameters())
        logp = ppo.head_logprobs(roles.policy, roles.policy.hidden(given), given, 1.0)[0]
        assert torch.equal(logp, expected)
        logp.sum().backward()
    assert all(p.grad is not None for _, p in roles.policy.parameters())
    assert not any(p.requires_grad for _, p in roles.sft.parameters())
    with roles.base.active(), roles.critic.active():
        assert torch.equal(ppo.logprobs(roles.sft, given)[0], expected)


@pytest.fixture
def switches(monkeypatch) -> list[str | None]:
    """The adapters that were switched on; None: all were switched off."""
    names: list[str | None] = []
    switched = roles_module.switched
    monkeypatch.setattr(roles_module, "switched", lambda model, name: names.append(name) or switched(model, name))
    return names


def test_adapters_are_switched_for_a_mini_batch_and_not_for_each_micro_batch(tiny_models, tmp_path, switches):
    args = config(
        tmp_path, use_peft=True, per_device_train_batch_size=1, gradient_accumulation_steps=4, num_ppo_epochs=3
    )
    roles = build_roles(args, tiny_models.base, tiny_models.adapter)
    switches.clear()
    one_update(roles, args, rollout())
    on = [name for name in switches if name in ("policy", "critic")]
    assert on == ["policy", "critic"] * 4  # scores, and three epochs of one mini-batch
    switches.clear()
    rows = examples(ROWS)
    evaluate_policy(roles.policy, roles.sft, roles.base, rows, args, tiny_tokenizer(), stop_token_ids=STOPS)
    assert switches.count("policy") == 3  # sampling, and the log-probs of samples and of demonstrations


def test_an_evaluation_switches_adapters_as_often_however_many_micro_batches_it_has(tiny_models, tmp_path, switches):
    counts, scores = [], []
    for size in (1, 6):
        run = trainer(tiny_models, tmp_path / str(size), kind="adapter", eval_dataset=examples(ROWS),
                      per_device_train_batch_size=size)  # fmt: skip
        switches.clear()
        scores.append(run.evaluate()["eval/objective/scores"])
        counts.append(list(switches))
    assert counts[0] == counts[1] and scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_sft_switches_its_adapter_on_once_and_not_for_each_step(tiny_models, tmp_path, switches):
    counts = []
    for epochs in (1, 4):
        switches.clear()
        args = config(tmp_path, base_model_name_or_path=tiny_models.base, use_peft=True, sft_num_train_epochs=epochs)
        run_sft(args, train_dataset=examples(ROWS), output_dir=tmp_path / str(epochs), console=QUIET)
        counts.append(list(switches))
    assert counts[0] == counts[1]


@torch.no_grad()
def test_a_switch_computes_what_pefts_own_do(tiny_models):
    """Of an adapter with modules of its own, one without, and none; where they were merged, too."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_models.base),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"]), adapter_name="one",
    )  # fmt: skip
    model.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if ".one." in name or ".two." in name:
            parameter.normal_()
    ids = torch.arange(8)[None]

    def logits() -> torch.Tensor:
        return model.get_base_model()(input_ids=ids).logits

    expected = {}
    for name in ("two", "one"):
        model.set_adapter(name)
        expected[name] = logits()
    with model.disable_adapter():
        expected[None] = logits()
    assert len({tuple(values.flatten().tolist()) for values in expected.values()}) == 3
    needs = [p.requires_grad for p in model.parameters()]
    for outer in expected:
        for inner in expected:
            with roles_module.switched(model, outer):
                with roles_module.switched(model, inner):
                    assert torch.equal(logits(), expected[inner])
                assert torch.equal(logits(), expected[outer])
            assert torch.equal(logits(), expected["one"])
    assert [p.requires_grad for p in model.parameters()] == needs
    model.merge_adapter(["one"])
    for name in expected:
        with roles_module.switched(model, name):
            assert (logits() - expected[name]).abs().max() < 1e-4


def test_base_with_adapters_off_equals_the_plain_base_bit_for_bit(tiny_models, tmp_path):
    base, _ = frozen_roles(config(tmp_path), tiny_models.base, tiny_models.adapter)
    plain = role(AutoModelForCausalLM.from_pretrained(tiny_models.base), layout=base.layout)
    assert torch.equal(ppo.logprobs(base, rollout())[0], ppo.logprobs(plain, rollout())[0])


def test_lora_dropout_acts_in_sft_and_not_in_ppo(tiny_models, tmp_path):
    folder = run_sft(
        config(tmp_path, use_peft=True, lora_dropout=0.5, base_model_name_or_path=tiny_models.base),
        train_dataset=examples(ROWS), output_dir=tmp_path / "dropped", console=QUIET,
    )  # fmt: skip
    assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == 0.5
    roles = build_roles(config(tmp_path, use_peft=True, gradient_checkpointing=True), tiny_models.base, str(folder))
    first, second = (ppo.logprobs(roles.policy, rollout())[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("use_peft", [False, True])
def test_models_in_memory_that_were_left_in_training_mode_are_taken_out_of_it(tmp_path, use_peft):
    """A router's noise (Mixtral's, PhiMoE's) is none of the dropouts that are switched off."""
    models = [tiny_model(seed=seed).train() for seed in range(2)]
    for model in models:
        model.model.norm.register_forward_hook(lambda module, _, out: out + module.training * torch.randn_like(out))
    roles = build(tmp_path, *models, use_peft=use_peft)
    assert not any(role.causal_lm.model.norm.training for role in roles)


def test_dropout_of_a_model_in_training_mode_is_off_after_disabling(tmp_path):
    noisy = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    quiet = copy.deepcopy(noisy)
    disable_dropout(quiet)
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)
    assert sft_role(config(tmp_path), noisy).model.training, "in SFT it acts, and hides nothing of the model before"
    for made in build_roles(config(tmp_path), noisy.train(), copy.deepcopy(noisy).train()):
        assert torch.equal(*(ppo.logprobs(made, rollout())[0] for _ in range(2))), made.name
    functional = nn.Module()
    functional.hidden_dropout, functional.layerdrop = 0.1, 0.2
    disable_dropout(functional)
    assert (functional.hidden_dropout, functional.layerdrop) == (0.0, 0.0)


# -- heads of several architectures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2", "cohere2", "granite"])
def test_head_gives_the_log_probs_of_the_models_own_logits(kind):
    model = tiny_model(kind)
    check_head(role(model))
    torch.testing.assert_close(
        ppo.logprobs(role(model), rollout())[0].double(), own_logprobs(model, rollout()), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "attribute", "neutral"),
    [("gemma2", "final_logit_softcapping", None), ("cohere2", "logit_scale", 1.0), ("granite", "logits_scaling", 1.0)],
)
def test_head_transform_of_each_architecture_matters(kind, attribute, neutral):
    """Without it the log-probs would be others: the tests above would not pass by accident."""
    model = tiny_model(kind)
    with_it = ppo.logprobs(role(model), rollout())[0]
    setattr(model.config, attribute, neutral)
    assert (ppo.logprobs(role(model), rollout())[0] - with_it).abs().max() > 0.1


@pytest.mark.parametrize(
    ("config_class", "own", "scale", "softcap"),
    [
        (FalconH1Config, {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16,
                          "lm_head_multiplier": 0.3}, 0.3, None),
        (RecurrentGemmaConfig, {"lru_width": 32, "logits_soft_cap": 5.0}, 1.0, 5.0),
        (GraniteConfig, {"logits_scaling": 4.0}, 0.25, None),
    ],
)  # fmt: skip
def test_a_factor_and_a_cap_under_other_names_are_known(config_class, own, scale, softcap):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(config_class(**sizes, **own)).eval()
    check_head(role(model))
    head = role(model).head
    assert (head.logit_scale, head.softcap) == (scale, softcap)


def test_logits_scaling_is_a_divisor_and_hyperclovas_a_factor():
    model = tiny_model("granite")
    scale = role(model).head.logit_scale
    model.config.model_type = "hyperclovax"  # a class that the oldest transformers do not have
    assert role(model).head.logit_scale == 1 / scale == model.config.logits_scaling


def test_a_head_transform_that_nobody_knows_is_refused(tmp_path):
    model = tiny_model("llama")
    plain = model.forward

    def squared(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits.square()
        return output

    model.forward = squared
    args, other = config(tmp_path), tiny_model("llama", seed=1)
    for use in (
        lambda: check_head(role(model)),
        lambda: sft_role(args, model),
        lambda: frozen_roles(args, model, other),
        lambda: frozen_roles(args, other, model),
    ):
        with pytest.raises(UserError, match=r"LlamaForCausalLM computes its logits in a way .* not supported"):
            use()


def test_a_model_in_memory_that_lies_elsewhere_than_the_other_is_refused(tiny_models, tmp_path):
    """As on a Mac's GPU beside a base that is given by its folder; here on torch's device without memory."""
    sft = tiny_model("llama", seed=1).to("meta")
    with pytest.raises(UserError, match=r"base is on cpu and SFT on meta: move one .* by its name is loaded to cpu"):
        build_roles(config(tmp_path), tiny_models.base, sft)


@pytest.mark.parametrize("causal", [True, False])
def test_a_model_that_reads_later_tokens_is_refused(causal):
    """As BertGeneration's decoder where its configuration does not say that it is one, here untrained."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = BertGenerationDecoder(BertGenerationConfig(**sizes, vocab_size=64, is_decoder=causal)).eval()
    with nullcontext() if causal else pytest.raises(UserError, match="reads the tokens behind"):
        check_head(role(model))


def test_a_model_for_images_too_has_the_cap_of_its_text_configuration():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = Gemma2Config(
        **sizes, vocab_size=64, num_hidden_layers=1, num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0,
        initializer_range=0.2,
    )  # fmt: skip
    vision = SiglipVisionConfig(**sizes, num_hidden_layers=1, image_size=14, patch_size=14)
    config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=16, image_token_index=63)
    model = PaliGemmaForConditionalGeneration(config).eval()
    # Before transformers 5.23 its forward has no cap, whatever the configuration says, and it is refused. That of 5.1
    # also lets a prompt read itself both ways, and is refused for that.
    capped = "final_logit_softcapping" in inspect.getsource(PaliGemmaForConditionalGeneration.forward)
    with nullcontext() if capped else pytest.raises(UserError, match=r"does not reproduce|reads the tokens behind"):
        check_head(role(model))
    assert role(model).head.softcap == 5.0


@pytest.mark.parametrize("what", ["tokens alone", "a mask", "its adapter"])
def test_a_model_whose_forward_fails_is_refused_in_words(tmp_path, monkeypatch, what):
    """As Gemma 4's assistants, which are half of a model, Reformer beyond a chunk, and PhiMoE with LoRA on its router:
    each ended in a traceback out of transformers or peft."""
    model, plain = tiny_model(), LlamaModel.forward

    def fails(self, **given):
        if what == "tokens alone" or (what == "a mask" and given.get("attention_mask") is not None):
            raise KeyError("sliding_attention")
        return plain(self, **given)

    if what == "its adapter":
        monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: (x @ self.weight.T,))
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(
            UserError, match=r"LlamaForCausalLM with its adapter .*lora_target_modules.* fails on .*tuple"
        ):
            check_head(role(adapted, adapter="default"))
        return
    monkeypatch.setattr(LlamaModel, "forward", fails)
    with pytest.raises(UserError, match=r"LlamaForCausalLM fails on a few tokens .*KeyError: 'sliding_attention'\)"):
        build_roles(config(tmp_path), model, tiny_model(seed=1))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_head_of_no_numbers_is_refused_in_words(weight):
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = weight
    with pytest.raises(UserError, match=r"differ by nan"):
        check_head(role(model))


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_training_runs_with_tied_heads_and_other_module_names(tmp_path, kind):
    for use_peft in (False, True):
        args = config(tmp_path / str(use_peft), max_steps=1, use_peft=use_peft)
        run = SRPPOTrainer(
            tiny_model(kind, seed=1), tiny_model(kind), args, ROWS[:3], processing_class=tiny_tokenizer(), console=QUIET
        )
        run.train()
        head, embedding = run.roles.policy.head.weight, run.roles.policy.causal_lm.get_input_embeddings().weight
        assert head is embedding
        assert not torch.equal(ppo.logprobs(run.roles.policy, rollout())[0], ppo.logprobs(run.roles.sft, rollout())[0])


def test_an_adapter_on_the_embeddings_is_trained_and_saved(tiny_models, tmp_path):
    """peft names its parameters lora_embedding_A.<adapter>, with nothing behind the adapter's name."""
    settings = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    run = trainer(tiny_models, tmp_path, kind="sft", use_peft=True, peft_config=settings, max_steps=1)
    names = [name for name, _ in run.roles.policy.parameters()]
    assert any("lora_embedding_B" in name for name in names)
    run.train()
    moved = [p for name, p in run.roles.policy.parameters() if "lora_embedding_B" in name]
    assert moved[0].abs().max() > 0


@pytest.mark.parametrize("which", [["embed_tokens"], ["lm_head"]])
def test_an_adapter_on_a_tied_embedding_or_head_is_not_merged_into_both(tmp_path, which):
    settings = LoraConfig(r=2, target_modules=which, task_type="CAUSAL_LM", init_lora_weights=False)
    base = save(tiny_model("qwen2"), tmp_path / "base")
    adapted = get_peft_model(tiny_model("qwen2"), settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_model(tmp_path / "adapter", config(tmp_path, base_model_name_or_path=base))
    merged.save_pretrained(tmp_path / "merged")
    given = rollout()
    for model in (merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()):
        torch.testing.assert_close(own_logprobs(model, given), own_logprobs(adapted, given), atol=2e-5, rtol=1e-5)


def test_a_policy_is_saved_whole_beside_the_critic_whatever_its_modules_are_called(tmp_path):
    """BERT's attention calls a projection "value": peft left the policy's adapters on it out of what it saved, as they
    had the name of the critic's adapter in theirs."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    models = [BertGenerationDecoder(BertGenerationConfig(**sizes, vocab_size=64, is_decoder=True)) for _ in range(2)]
    settings = LoraConfig(r=2, target_modules=["query", "value"], task_type="CAUSAL_LM", init_lora_weights=False)
    roles = build_roles(config(tmp_path, use_peft=True), *models, settings)
    save_weights(roles.policy, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(roles.policy.parameters()) == 4 == len(roles.critic.parameters()) - 2


# -- what is refused --------------------------------------------------------------------------------------------------


def build(tmp_path, base, sft, peft_config=None, **settings):
    return build_roles(config(tmp_path, **settings), base, sft, peft_config)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_lora_on_the_head_is_refused(tiny_models, tmp_path, targets):
    with pytest.raises(UserError, match="lora_target_modules has 'lm_head', the LM head"):
        build(tmp_path, tiny_models.base, tiny_models.sft, use_peft=True, lora_target_modules=targets)
    with pytest.raises(UserError, match="the LM head"):
        run_sft(
            config(
                tmp_path, use_peft=True, lora_target_modules=targets, base_model_name_or_path=tiny_models.base
            ),
            train_dataset=examples(ROWS), output_dir=tmp_path / "never", console=QUIET,
        )  # fmt: skip
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("how", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_changes_the_head_is_refused_as_folder_and_as_peft_config(tiny_models, tmp_path, how):
    settings = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **how})
    get_peft_model(tiny_model("llama"), settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter or a modules_to_save on lm_head is not supported"):
        build(tmp_path, tiny_models.base, str(tmp_path / "adapter"), use_peft=True)
    with pytest.raises(UserError, match=r"adapter or a modules_to_save on lm_head is not supported"):
        build(tmp_path, tiny_models.base, tiny_models.sft, settings, use_peft=True)


def test_a_model_of_several_heads_is_refused(tmp_path):
    """As MusicGen's decoder, with a head for each codebook."""
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "num_codebooks": 2}
    models = [MusicgenForCausalLM(MusicgenDecoderConfig(**sizes, vocab_size=64)) for _ in range(2)]
    with pytest.raises(UserError, match="the LM head is a ModuleList, not a plain linear layer"):
        build(tmp_path, *models)


def test_vocabularies_of_different_size_are_refused(tiny_models, tmp_path):
    other = save(tiny_model(vocab_size=270), tmp_path / "other")
    with pytest.raises(UserError, match=r"different vocabularies \(264 and 270 tokens\)"):
        build(tmp_path, tiny_models.base, other)


def test_tokenizers_that_differ_are_refused_and_the_first_difference_is_named(tiny_models, tmp_path):
    other = Path(shutil.copytree(tiny_models.sft, tmp_path / "other"))
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace("<|user|>", "<|human|>"), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizers of base and SFT model differ, first at token 2"):
        build(tmp_path, tiny_models.base, str(other))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_fine_tuning_in_16_bit_is_refused(tiny_models, tmp_path, dtype):
    with pytest.raises(UserError, match=f"policy would be trained in {dtype}.* use dtype=float32, or use_peft=true"):
        build(tmp_path, tiny_models.base, tiny_models.sft, dtype=dtype)
    with pytest.raises(UserError, match=f"would be trained in {dtype}"):
        run_sft(
            config(tmp_path, dtype=dtype, base_model_name_or_path=tiny_models.base),
            train_dataset=examples(ROWS), output_dir=tmp_path / "never", console=QUIET,
        )  # fmt: skip


@pytest.mark.parametrize("value_model", ["adapter", "separate"])
def test_lora_on_a_bfloat16_model_trains_float32_weights(tiny_models, tmp_path, value_model):
    run = trainer(tiny_models, tmp_path, kind="adapter", dtype="bfloat16", value_model=value_model, max_steps=1)
    assert run.roles.base.causal_lm.dtype == torch.bfloat16
    learning = [p for r in (run.roles.policy, run.roles.critic) for _, p in r.parameters()]
    assert {p.dtype for p in learning} == {torch.float32}
    run.train()  # ratio and KL are checked in it


def test_value_adapter_without_lora_is_refused(tiny_models, tmp_path):
    with pytest.raises(UserError, match="value_model=adapter needs use_peft=true"):
        build(tmp_path, tiny_models.base, tiny_models.sft, value_model="adapter")


def test_lora_targets_that_match_nothing_are_refused(tiny_models, tmp_path):
    with pytest.raises(UserError, match=r"check lora_target_modules.*no_such_layer"):
        build(tmp_path, tiny_models.base, tiny_models.sft, use_peft=True, lora_target_modules=["no_such_layer"])


def test_all_linear_may_be_asked_for_by_name(tiny_models, tmp_path):
    default, named = (
        build(tmp_path, tiny_models.base, tiny_models.sft, use_peft=True, lora_target_modules=targets)
        for targets in (None, ["all-linear"])
    )
    names = [name for name, _ in default.policy.parameters()]
    assert [name for name, _ in named.policy.parameters()] == names
    assert not any("lm_head" in name for name in names)


def test_peft_model_in_memory_is_refused_as_it_would_be_scored_with_its_adapter_off(tiny_models, tmp_path):
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for base, sft in ((wrapped, tiny_models.sft), (tiny_models.base, wrapped)):
        with pytest.raises(UserError, match="peft model in memory: give its adapter folder"):
            build(tmp_path, base, sft)


@pytest.mark.parametrize("use_peft", [False, True])
def test_sft_refuses_a_model_with_adapters_which_what_it_writes_would_be_without(tmp_path, use_peft):
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(UserError, match="the model to fine-tune has adapter layers in it"):
            run_sft(
                config(tmp_path, use_peft=use_peft), model=model, tokenizer=tiny_tokenizer(),
                train_dataset=examples(ROWS), output_dir=tmp_path / "never", console=QUIET,
            )  # fmt: skip


@pytest.mark.parametrize("sft", ["adapter", "sft"])
def test_a_base_in_memory_that_another_run_put_adapters_into_is_refused(tiny_models, tmp_path, sft):
    """peft would load the second adapter into what is there of the first; a full SFT model would leave the first on."""
    base = AutoModelForCausalLM.from_pretrained(tiny_models.base)
    earlier = build(tmp_path, base, tiny_models.sft)  # and one that was made before is told when it reads its base
    first = SelfReward(base, tiny_models.adapter, tiny_tokenizer())
    before = first.reward([[10, 11]], [[12, 0]])
    with pytest.raises(UserError, match="adapters were put into the model that plays base"):
        ppo.score(earlier, rollout(), config(tmp_path))
    with pytest.raises(UserError, match=r"the base has (an adapter 'sft'|adapter layers) in it"):
        build(tmp_path, base, getattr(tiny_models, sft), use_peft=True)
    assert torch.equal(first.reward([[10, 11]], [[12, 0]]), before)


def test_an_sft_model_in_memory_is_not_taken_for_a_second_run_over_the_adapters_of_the_first(tiny_models, tmp_path):
    sft = AutoModelForCausalLM.from_pretrained(tiny_models.sft)
    build(tmp_path, tiny_models.base, sft, use_peft=True)
    with pytest.raises(UserError, match="the SFT model has adapter layers in it"):
        build(tmp_path, tiny_models.base, sft, use_peft=True)


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_model_in_memory_in_float64_is_refused_by_its_name(tiny_models, tmp_path, use_peft):
    wide = tiny_model("llama").double()
    for name, models in (("base", (wide, tiny_models.sft)), ("SFT model", (tiny_models.base, wide))):
        with pytest.raises(UserError, match=rf"^the {name} has weights in float64.*give model.float\(\)"):
            build(tmp_path, *models, use_peft=use_peft)


def test_adapter_that_is_no_lora_is_refused(tiny_models, tmp_path):
    prompts = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    prompts.save_pretrained(tmp_path / "prompts")
    with pytest.raises(UserError, match="PROMPT_TUNING: only LoRA is supported"):
        build(tmp_path, tiny_models.base, str(tmp_path / "prompts"), use_peft=True)


@pytest.mark.parametrize(
    "how",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"trainable_token_indices": [5, 6]},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [5]},
    ],
)
def test_an_adapter_that_is_more_than_lora_on_a_base_that_stays_is_refused(tmp_path, how):
    """peft writes biases over the base's, takes PiSSA's start out of its weights, or repeats its layers: what base,
    SFT, policy and critic share would not be base again. An activated LoRA is on where peft's own forward says."""
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **how)
    base = save(tiny_model("llama"), tmp_path / "base")
    made = get_peft_model(tiny_model("llama"), settings)
    made.save_pretrained(tmp_path / "adapter")
    for sft, given in ((str(tmp_path / "adapter"), None), (base, settings)):
        with pytest.raises(UserError, match=f"has {next(iter(how))}=.*: only LoRA on whole layers is supported"):
            build(tmp_path, base, sft, given, use_peft=True)


def test_kasa_which_drops_singular_values_of_the_base_is_refused():
    with pytest.raises(UserError, match=r"it has kasa_config=.*: only LoRA on whole layers is supported"):
        check_adapter("it", SimpleNamespace(peft_type="LORA", kasa_config={"beta": 1e-4}))  # new in peft 0.21


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("use_peft", [False, True])
def test_an_adapter_that_comes_without_some_of_its_weights_is_refused(tiny_models, tmp_path, use_peft):
    """peft warns of the first one loaded and says nothing of others, and what is missing stays as it starts."""
    part = Path(shutil.copytree(tiny_models.adapter, tmp_path / "part"))
    weights = load_file(part / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1.mlp.up_proj" not in k}, part / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"part could not be loaded .* whole.*layers\.1\.mlp"):
        build(tmp_path, tiny_models.base, str(part), use_peft=use_peft)
    shared = attach_adapter(tiny_model(), tiny_models.adapter, "sft")
    with pytest.raises(UserError, match=r"lacks weights or peft seeks them under other names, first .*layers\.1\.mlp"):
        attach_adapter(shared, part, "policy")


def test_an_adapter_that_peft_would_not_load_again_is_refused_before_it_is_trained(tiny_models, tmp_path, monkeypatch):
    """peft renames laguna's and Inkling's weights when it loads them, and those of an adapter with them."""
    load = peft.set_peft_model_state_dict

    def renaming(model, state, **options):
        return load(model, {k.replace("mlp.up_proj", "mlp.ups_proj"): v for k, v in state.items()}, **options)

    monkeypatch.setattr(peft, "set_peft_model_state_dict", renaming)
    with pytest.raises(UserError, match=r"peft would not load an adapter on LlamaForCausalLM again .*mlp\.up_proj"):
        build(tmp_path, tiny_models.base, tiny_models.sft, use_peft=True)
    build(tmp_path, tiny_models.base, tiny_models.sft, use_peft=True, lora_target_modules=["q_proj"])


def test_adapter_of_another_base_is_refused(tiny_models, tmp_path):
    wide = save(tiny_model(hidden=64), tmp_path / "wide")
    with pytest.raises(UserError, match="could not be loaded onto the base model, is it for another one"):
        build(tmp_path, wide, tiny_models.adapter, use_peft=True)


def test_an_adapter_of_another_folders_model_is_warned_of(tiny_models, tmp_path):
    """It fits, and may be a copy's; of a full SFT model it would make wrong rewards."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_models.base, copy)
    with pytest.warns(UserWarning, match=rf"was made on .* and is loaded onto the base {re.escape(str(copy))}: unless"):
        build(tmp_path, str(copy), tiny_models.adapter, use_peft=True)
    with pytest.warns(UserWarning, match=r"and is loaded onto the base"):
        load_model(tiny_models.adapter, config(tmp_path, base_model_name_or_path=str(copy)))


@pytest.mark.parametrize("named", [None, ""])
def test_an_adapter_of_a_model_in_memory_is_not_warned_of(tiny_models, tmp_path, named):
    """It names no folder: older pefts write "", which as a path is the working directory."""
    adapter = shutil.copytree(tiny_models.adapter, tmp_path / "adapter")
    said = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": named}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* was made on")
        build(tmp_path, tiny_models.base, str(adapter), use_peft=True)
    with pytest.raises(UserError, match="names no model that it was made on: if base or SFT"):
        made_on(str(adapter), {".": role(tiny_model())})
    with pytest.raises(UserError, match="does not say which model it was made on: give it as base_model_name_or_path"):
        load_model(adapter, config(tmp_path))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("use_peft", "name"), [(False, "sft"), (True, "critic")])
def test_an_sft_adapter_is_merged_onto_the_base_that_is_given(tiny_models, tmp_path, use_peft, name, in_memory):
    """And not onto the one that its folder names, which other weights are than those of the reward's base."""
    moved = tiny_model(seed=5)
    base = moved if in_memory else save(moved, tmp_path / "moved")
    with nullcontext() if in_memory else pytest.warns(UserWarning, match="and is loaded onto the base"):
        roles = build(tmp_path, base, tiny_models.adapter, use_peft=use_peft, value_model="separate")
    expected = PeftModel.from_pretrained(tiny_model(seed=5), tiny_models.adapter).merge_and_unload().state_dict()
    got = getattr(roles, name).causal_lm.state_dict()
    assert all(torch.allclose(got[key], value, atol=1e-6) for key, value in expected.items())
    assert roles.base.causal_lm is not getattr(roles, name).causal_lm


def test_peft_config_beside_an_sft_adapter_is_refused_as_it_would_be_ignored(tiny_models, tmp_path):
    with pytest.raises(UserError, match="peft_config is for a full SFT model"):
        build(tmp_path, tiny_models.base, tiny_models.adapter, LoraConfig(target_modules=["q_proj"]), use_peft=True)


def test_peft_config_without_use_peft_is_refused_as_all_weights_would_be_trained(tiny_models, tmp_path):
    with pytest.raises(UserError, match="peft_config is for adapters: set use_peft=true"):
        build(tmp_path, tiny_models.base, tiny_models.sft, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "runs/my/model", "~/model"])
def test_a_folder_that_is_not_there_is_refused_without_asking_a_hub(tmp_path, monkeypatch, path):
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", None)
    with pytest.raises(
        UserError, match=f"no causal language model could be loaded from {path}: there is no such folder"
    ):
        load_model(path, config(tmp_path))
    with pytest.raises(UserError, match=f"no tokenizer could be loaded from {path}: there is no such folder"):
        load_tokenizer(path)


def test_missing_and_damaged_models_are_named(tiny_models, tmp_path):
    with pytest.raises(UserError, match="no causal language model could be loaded from nowhere/at-all"):
        build(tmp_path, "nowhere/at-all", tiny_models.sft)
    broken = Path(shutil.copytree(tiny_models.sft, tmp_path / "broken"))
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"no causal language model could be loaded from .*broken"):
        build(tmp_path, tiny_models.base, str(broken))
    adapter = Path(shutil.copytree(tiny_models.adapter, tmp_path / "adapter"))
    description = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(description[: len(description) // 2])
    for use_peft in (True, False):
        with pytest.raises(UserError, match=rf"adapter_config\.json of {adapter} cannot be read: "):
            build(tmp_path, tiny_models.base, str(adapter), use_peft=use_peft)


def test_sequences_beyond_the_models_positions_are_refused_before_training(tiny_models, tmp_path):
    with pytest.raises(UserError, match=r"may reach \d+ tokens, and the model has 128 positions"):
        trainer(tiny_models, tmp_path, max_completion_length=124)
    check_positions(tiny_model().config, [128])  # as many as there are
    long = [*examples([{"prompt": "a" * 64, "completion": "b" * 63}]), Example([5] * 80, [6] * 60, None, "")]
    for rows, held_out in ((long, ()), (examples(ROWS), long)):
        with pytest.raises(UserError, match="128 positions"):
            run_sft(
                config(tmp_path, base_model_name_or_path=tiny_models.base), train_dataset=rows, eval_dataset=held_out,
                output_dir=tmp_path / "never", console=QUIET,
            )  # fmt: skip


def test_lengths_on_both_sides_of_a_switch_of_longrope_are_refused():
    """Phi 3 rotates all sequences of a batch as its longest asks for: a short one beside a long one had other log-probs
    than alone, by 0.9 nats in a tiny model."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "partial_rotary_factor": 1.0}
    settings = Phi3Config(
        hidden_size=16, num_attention_heads=2, max_position_embeddings=128, original_max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors}, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    for lengths in ([5, 32], [33, 128], []):
        check_positions(settings, lengths)
    with pytest.raises(UserError, match=r"from 5 to 33 tokens, and the model \(longrope\) computes short .* than 32"):
        check_positions(settings, [10, 33, 5])
    rows = [Example([7] * n, None, None, "") for n in (32, 40)]
    check_prompts(settings, rows, SRPPOConfig(max_completion_length=8))
    rows[0] = Example([7] * 31, None, None, "")
    with pytest.raises(UserError, match="from 32 to 48 tokens"):
        check_prompts(settings, rows, SRPPOConfig(max_completion_length=8))
    nested = SimpleNamespace(rope_parameters={"full_attention": settings.rope_parameters, "sliding_attention": None})
    nested.get_text_config = lambda: nested
    with pytest.raises(UserError, match="from 5 to 33 tokens"):
        check_positions(nested, [5, 33])


def test_full_roles_are_four_models_of_their_own(tmp_path):
    roles = full_roles(config(tmp_path))
    owners = [
        {p.data_ptr() for p in r.causal_lm.parameters()} for r in (roles.base, roles.sft, roles.policy, roles.critic)
    ]
    assert all(not a & b for i, a in enumerate(owners) for b in owners[:i])
    lines = roles.describe()
    assert [line.split(":")[0] for line in lines] == ["base", "sft", "policy", "critic"]
    assert ["frozen" in line for line in lines] == [True, True, False, False]


def test_generation_leaves_weights_mode_and_adapter_as_they_were(tiny_models, tmp_path):
    roles = build_roles(
        config(tmp_path, use_peft=True, gradient_checkpointing=True), tiny_models.base, tiny_models.adapter
    )
    before, state = snapshot(roles.policy.model), roles.policy.model.active_adapter
    assert roles.policy.causal_lm.training  # gradient checkpointing wants it
    generate(roles.policy, [[10, 11]], max_completion_length=3, pad_token_id=1, stop_token_ids=[0])
    assert roles.policy.causal_lm.training
    assert roles.policy.model.active_adapter == state
    assert all(torch.equal(value, before[name]) for name, value in roles.policy.model.state_dict().items())


def test_a_frozen_weight_that_changes_in_one_bit_is_told_at_the_end_of_the_run(tiny_models, tmp_path):
    """A callback that touches SFT or base would change the reward, and nothing else would show it."""

    def touch(run, step, metrics):
        with torch.no_grad():
            weight = run.roles.sft.causal_lm.get_input_embeddings().weight
            weight[200, 3] = torch.nextafter(weight[200, 3], torch.tensor(9.0))

    with pytest.raises(UserError, match="weights of base or SFT changed during the run"):
        trainer(tiny_models, tmp_path, callbacks=[touch], max_steps=1).train()


@pytest.mark.parametrize(("kind", "other"), [("adapter", "sft"), ("sft", "critic")])
def test_an_adapter_that_would_learn_for_two_roles_is_refused(tiny_models, tmp_path, monkeypatch, kind, other):
    """What an optimizer made from all parameters that require a gradient would be given."""
    own = Role.parameters

    def more(self):
        also = [(n, p) for n, p in self.model.named_parameters() if f".{other}." in n and self.name == "policy"]
        return own(self) + also

    monkeypatch.setattr(Role, "parameters", more)
    with pytest.raises(AssertionError, match="a weight has two roles"):
        build(tmp_path, tiny_models.base, getattr(tiny_models, kind), use_peft=True)


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_a_role_with_nothing_to_learn_is_refused(tiny_models, tmp_path, monkeypatch, name):
    own = Role.parameters
    monkeypatch.setattr(Role, "parameters", lambda self: [] if self.name == name else own(self))
    with pytest.raises(UserError, match=f"the {name} has no trainable parameters: check lora_target_modules"):
        build(tmp_path, tiny_models.base, tiny_models.adapter, use_peft=True)


def test_old_values_are_those_of_the_critics_own_adapter(tiny_models, tmp_path):
    args, given = config(tmp_path, use_peft=True), rollout()
    roles = trained_head(build_roles(args, tiny_models.base, tiny_models.adapter))
    with torch.no_grad():
        for _, p in roles.critic.parameters():
            p.mul_(1.5)
    found = {}
    for r in (roles.policy, roles.critic):
        with torch.no_grad(), r.active():
            found[r.name] = given.in_place(roles.critic.values(given))
    assert (found["critic"] - found["policy"]).abs().max() > 1e-2
    values = ppo.score(roles, given, args, [torch.arange(4)]).values
    torch.testing.assert_close(values, found["critic"], atol=1e-5, rtol=1e-5)


def test_a_policy_that_is_the_sft_model_itself_is_refused(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr("srppo.roles.copy", SimpleNamespace(deepcopy=lambda model: model))
    with pytest.raises(AssertionError, match="a weight has two roles"):
        build(tmp_path, tiny_models.base, tiny_models.sft)


def test_tokens_that_the_model_has_no_embedding_for_are_refused_before_training(tmp_path):
    """A tokenizer with more tokens than the model is no mistake as long as none of them is used."""
    small, same = tiny_model(vocab_size=200), tiny_model(vocab_size=200, seed=1)

    def run(rows, **settings):
        args = config(tmp_path, **{"stop_token_ids": [0], "max_steps": 1, "max_completion_length": 8, **settings})
        return SRPPOTrainer(same, small, args, rows, processing_class=tiny_tokenizer(), console=QUIET)

    run(ROWS).train()
    with pytest.raises(UserError, match=r"row 1: token 230 is outside of the model's vocabulary of 200 tokens"):
        run([{"prompt": "ab"}, {"input_ids": [5, 230]}])
    with pytest.raises(UserError, match=r"a stop token or the pad token: token 200 is outside"):
        run(ROWS, stop_token_ids=[0, 200])
    rows = [Example([5], [230, 0], None, "row 7")]
    with pytest.raises(UserError, match=r"row 7: token 230 is outside"):
        run_sft(
            config(tmp_path, stop_token_ids=[0]), model=small, tokenizer=tiny_tokenizer(), train_dataset=rows,
            output_dir=tmp_path / "never", console=QUIET,
        )  # fmt: skip


def test_an_adapter_folder_as_the_base_model_is_refused(tiny_models, tmp_path):
    args = {"base_model_name_or_path": tiny_models.adapter}
    with pytest.raises(UserError, match=r"the base model .*adapter is an adapter: give the model that it stands on"):
        build(tmp_path, tiny_models.adapter, tiny_models.sft, **args)
    with pytest.raises(UserError, match="is an adapter: give the model that it stands on"):
        run_sft(
            config(tmp_path, **args), train_dataset=examples(ROWS), output_dir=tmp_path / "never", console=QUIET
        )  # fmt: skip
