"""The memory estimate: what it counts is what is there, and a run stays within a stated factor of it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from apart import run_apart
from rich.console import Console as RichConsole
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import QUIET, ROWS, config, examples
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BltConfig, BltForCausalLM, MambaConfig, MambaForCausalLM

import srppo
from srppo import SRPPOTrainer, memory
from srppo.console import Console
from srppo.metrics import peak_memory_gib
from srppo.roles import build_roles

FACTOR, SLACK = 1.5, 16 * 2**20  # of a run's memory against its estimate, and what allocators take however small it is


def held(roles) -> int:
    """Bytes of all weights that the roles hold, shared ones once."""
    parameters = {id(p): p for role in (roles.base, roles.sft, roles.policy, roles.critic)
                  for p in [*role.model.parameters()]}  # fmt: skip
    return sum(p.numel() * p.element_size() for p in parameters.values())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("adapter", {"use_peft": True}),
        ("adapter", {"use_peft": True, "value_model": "separate"}),
        ("sft", {"use_peft": True}),
        ("sft", {"use_peft": True, "lora_target_modules": ["q_proj", "down_proj"], "lora_r": 3}),
        ("sft", {"use_peft": False}),
    ],
)
def test_weights_and_what_learns_are_counted_exactly_before_anything_is_loaded(tiny_models, tmp_path, kind, settings):
    args = config(tmp_path, **settings)
    path = getattr(tiny_models, kind)
    told = memory.estimate(args, tiny_models.base, path, longest_prompt=10)
    roles = build_roles(args, tiny_models.base, path)
    assert sum(told.weights.values()) == held(roles)
    trained = sum(p.numel() for role in (roles.policy, roles.critic) for _, p in role.parameters())
    head = roles.critic.value_head.weight.numel() + 1
    unused = 0 if roles.critic.adapter else roles.critic.head.weight.numel()  # a critic of its own trains no LM head
    assert told.learning == 12 * (trained - head + unused)


def test_a_tied_head_is_counted_once_and_gpt2_has_linear_layers_too(tmp_path):
    for kind in ("qwen2", "gpt2"):
        model = tiny_model(kind)
        model.save_pretrained(tmp_path / kind)
        skeleton = memory.skeleton(str(tmp_path / kind), config(tmp_path))
        assert memory.count(skeleton) == memory.count(model) and skeleton.device.type == "meta"
        assert memory.new_adapter_size(skeleton, config(tmp_path)) > 0


def test_a_peak_is_that_of_the_update_or_that_of_sampling():
    parts = {"weights": {"base": 1}, "learning": 2, "activations": 3, "head": 4}
    assert [memory.Estimate(**parts, sampling=size).peak for size in (6, 9)] == [10, 12]


def test_more_tokens_and_less_checkpointing_take_more(tiny_models, tmp_path):
    def peak(**settings) -> int:
        args = config(tmp_path, **settings)
        return memory.estimate(args, tiny_models.base, tiny_models.sft, longest_prompt=100).peak

    assert peak(per_device_train_batch_size=8) > peak(per_device_train_batch_size=4) > peak(gradient_checkpointing=True)


def test_a_token_limit_is_no_more_than_a_mini_batch_and_no_less_than_a_sequence(tiny_models, tmp_path):
    def activations(limit: int | None, sequences: int) -> int:
        args = config(tmp_path, max_tokens_per_micro_batch=limit, per_device_train_batch_size=sequences)
        assert args.mini_batch_size == 2 * sequences
        return memory.estimate(args, tiny_models.base, tiny_models.sft, longest_prompt=100).activations

    assert activations(10**6, 4) == activations(None, 8)
    assert activations(1, 4) == activations(None, 1)
    assert activations(210, 4) == activations(None, 2)


def test_adapters_in_float32_keep_inputs_of_their_own_beside_16_bit_weights(tiny_models, tmp_path):
    def activations(dtype: str, sft: str, **settings) -> int:
        args = config(tmp_path, dtype=dtype, **settings)
        return memory.estimate(args, tiny_models.base, sft, longest_prompt=100).activations

    hidden, mlp, layers = 32, 64, 2  # of the tiny model
    full = activations("bfloat16", tiny_models.sft, use_peft=False)
    lora = activations("bfloat16", tiny_models.adapter, use_peft=True)
    assert lora / full == pytest.approx(1 + 4 * (6 * hidden + mlp) / (2 * (10 * hidden + 4 * mlp)))
    assert 2 * full == activations("float32", tiny_models.adapter, use_peft=True)
    args = config(tmp_path, dtype="bfloat16", use_peft=True, gradient_checkpointing=True)
    tokens = args.per_device_train_batch_size * (100 + args.max_completion_length)
    checkpointed = activations("bfloat16", tiny_models.adapter, use_peft=True, gradient_checkpointing=True)
    assert checkpointed == lora / layers + tokens * layers * hidden * 2


def test_the_estimate_is_said_before_the_models_are_loaded_and_the_peak_after(tiny_models, tmp_path, monkeypatch):
    said, console = io.StringIO(), Console()
    console.rich = RichConsole(file=said, width=250)
    before: list[str] = []
    build = srppo.trainer.build_roles
    monkeypatch.setattr(srppo.trainer, "build_roles", lambda *a: (before.append(said.getvalue()), build(*a))[1])
    args = config(tmp_path, max_steps=1, use_peft=True)
    run = SRPPOTrainer(tiny_models.adapter, tiny_models.base, args, examples(ROWS), console=console)
    assert "memory: about" in before[0] and "adapters SFT, policy, critic float32" in before[0]
    run.train()
    assert "at the peak, of the whole process" in said.getvalue()


def test_a_model_that_cannot_be_read_is_an_error_of_loading_and_not_of_the_estimate(tmp_path):
    assert "not estimated" in memory.expectation(config(tmp_path), "nowhere", "nowhere", examples(ROWS))
    with pytest.raises(srppo.UserError, match="no causal language model could be loaded"):
        SRPPOTrainer("nowhere", "nowhere", config(tmp_path), examples(ROWS), console=QUIET,
                     processing_class=tiny_tokenizer())  # fmt: skip


def test_a_model_of_parts_that_says_no_size_is_left_to_the_checks_behind_the_estimate(tmp_path):
    """BLT has encoder, patches and decoder: the estimate before its refusal ended in an AttributeError."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    parts = {f"{part}_config": {**sizes, "vocab_size": 64, "head_dim": 8} for part in ("encoder", "decoder", "patcher")}
    whole = BltConfig(
        **parts, global_config={**sizes, "hidden_size": 32, "head_dim": 16}, vocab_size=64,
        encoder_hash_byte_group_vocab=50, encoder_hash_byte_group_size=[3],
    )  # fmt: skip
    models = [BltForCausalLM(whole) for _ in range(2)]
    assert memory.estimate(config(tmp_path), *models, longest_prompt=4) is None


def test_a_state_space_model_has_no_cache_of_tokens(tmp_path):
    """Nor a number of heads, for want of which the run ended in transformers' AttributeError."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    models = [MambaForCausalLM(MambaConfig(**sizes)) for _ in range(2)]
    args = config(tmp_path)
    told = memory.estimate(args, *models, longest_prompt=8)
    assert told.sampling == args.batch_size * 12 * 300, "a few rows of logits"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of another system is measured otherwise")
@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_of_several_sizes_count_as_the_largest(tmp_path, kind):
    """A list of sizes, and sizes that the model's own configuration does not tell, ended the run before its start."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    sizes = {
        "vocab_size": 264, "vocab_size_per_layer_input": 264, "hidden_size": 32, "hidden_size_per_layer_input": 8,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_kv_shared_layers": 0, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
        **({"global_head_dim": 16} if kind == "gemma4_text" else {"activation_sparsity_pattern": None}),
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))
    args = config(tmp_path)
    told = memory.estimate(args, model, model, longest_prompt=100)
    tokens, head_dim = 100 + args.max_completion_length, {"gemma3n_text": 8, "gemma4_text": 16}[kind]
    assert told.activations == args.per_device_train_batch_size * tokens * 2 * (10 * 32 + 4 * 64) * 4
    assert told.sampling == args.batch_size * (2 * 2 * 2 * head_dim * 4 * tokens + 3 * 4 * 264)


def test_a_process_is_not_charged_with_the_memory_of_the_one_that_started_it():
    held = bytearray(b"x") * (400 * 2**20)
    code = "from srppo.metrics import peak_memory_gib; print(peak_memory_gib())"
    root = Path(srppo.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert 0 < float(done.stdout) < peak_memory_gib() - len(held) / 2**31


@pytest.mark.parametrize(("size", "kind"), [("small", "lora"), ("small", "full"), ("smollm2", "lora")])
def test_a_run_takes_its_estimate_within_the_stated_factor(tmp_path, size, kind):
    done = run_apart("memory_run.py", tmp_path, size, kind)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["estimated"] / FACTOR <= told["taken"] <= told["estimated"] * FACTOR + SLACK, told
