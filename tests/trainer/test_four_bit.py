"""``dtype=nf4``: what is trained on 4-bit layers has the gradients of the same weights in 16 bit, runs go on where they
stopped, and what cannot work is refused in words. bitsandbytes runs on a CPU here, not yet on a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from ppo_steps import trained_head
from safetensors.torch import load_file
from tiny import save, tiny_model, tiny_tokenizer
from tiny_runs import QUIET, ROWS, TinyModels, config, examples, rollout, trainer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from srppo import UserError, memory, ppo, run_sft
from srppo.models import four_bit, load_model
from srppo.roles import Role, build_roles

FOUR_BIT = {"dtype": "nf4", "use_peft": True, "lora_r": 4}
CPU = torch.device("cpu")
installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """As wide as a block of bitsandbytes' scales, so that it would pack these layers (keep_unpacked)."""
    return save(tiny_model("llama", hidden=64), tmp_path_factory.mktemp("four_bit") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    """What SFT makes of it in 4 bit."""
    folder = tmp_path_factory.mktemp("four_bit")
    args = config(folder, base_model_name_or_path=base, sft_learning_rate=1e-2, **FOUR_BIT)
    run_sft(args, train_dataset=examples(ROWS), output_dir=folder / "sft", tokenizer=tiny_tokenizer(), console=QUIET)
    return str(folder / "sft")


def in_sixteen_bit(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """The model of 4-bit layers with the same weights as bfloat16's."""
    from bitsandbytes.functional import dequantize_4bit

    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.get_submodule(name).weight = nn.Parameter(weight.to(torch.bfloat16))
    return plain


@installed
def test_only_the_layers_under_the_head_are_in_four_bit(base, tmp_path):
    model = load_model(base, config(tmp_path, **FOUR_BIT))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert [name for name, kind in kinds.items() if kind != "Linear4bit"] == ["lm_head"] and len(kinds) == 15
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


@installed
def test_states_and_gradients_are_those_of_the_same_weights_in_sixteen_bit(base, adapter, tmp_path):
    """After scoring in evaluation mode, which is when bitsandbytes would pack the layers. The base has the same bits;
    with an adapter peft rounds the sum of the two to 16 bit here, and its parts there."""
    args, given, found = config(tmp_path, **FOUR_BIT), rollout(), []
    for model in (base, in_sixteen_bit(load_model(base, args), base)):
        roles = trained_head(build_roles(args, model, adapter))
        ppo.score(roles, given, args)
        with torch.no_grad(), roles.base.active():
            states = roles.base.hidden(given)
        with roles.policy.active():
            logp, _ = ppo.head_logprobs(roles.policy, roles.policy.hidden(given), given, 1.0)
            logp.sum().backward()
        with roles.critic.active():
            roles.critic.values(given).sum().backward()
        found.append([states, *(gradient(role) for role in (roles.policy, roles.critic))])
    (states, *ours), (wanted, *theirs) = found
    assert torch.equal(states, wanted)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.05 * other.norm()


def gradient(role: Role) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for _, parameter in role.parameters()])


@installed
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(base, adapter, tmp_path):
    models, ends = TinyModels(base, sft=base, adapter=adapter), []
    for folder, settings in ((tmp_path / "whole", {"save_steps": 1}), (tmp_path / "rest", {})):
        if not settings:
            settings = {"resume_from_checkpoint": str(tmp_path / "whole" / "run" / "checkpoint-1")}
        run = trainer(models, folder, kind="adapter", dtype="nf4", **settings)
        run.train()
        ends.append(load_file(folder / "run" / "adapter_model.safetensors"))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    start = load_file(Path(adapter) / "adapter_model.safetensors")
    assert any(not torch.equal(value, ends[0][name]) for name, value in start.items())


@installed
def test_what_was_packed_before_is_refused(base, adapter, tmp_path):
    """As where a 4-bit model was used in a notebook before it is given to a trainer."""
    model = load_model(base, config(tmp_path, **FOUR_BIT))
    layer = model.model.layers[0].self_attn.q_proj
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        pytest.skip("this bitsandbytes packs nothing")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match=r"the base was used in 4 bit on the CPU.*load it again"):
        build_roles(config(tmp_path, **FOUR_BIT), model, adapter)
    with pytest.raises(UserError, match="the model to fine-tune was used in 4 bit"):
        run_sft(
            config(tmp_path, base_model_name_or_path=base, **FOUR_BIT), train_dataset=examples(ROWS),
            output_dir=tmp_path / "sft", tokenizer=tiny_tokenizer(), model=model, console=QUIET,
        )  # fmt: skip


@installed
def test_an_adapter_is_not_merged_into_four_bits(base, adapter, tmp_path):
    with pytest.raises(UserError, match="most of it lost to their rounding"):
        load_model(adapter, config(tmp_path, base_model_name_or_path=base, **FOUR_BIT))


@installed
@pytest.mark.parametrize("settings", [{"use_peft": False}, {"use_peft": True, "value_model": "separate"}])
def test_a_quantized_model_in_memory_is_not_trained_whole(base, adapter, tmp_path, settings):
    model = load_model(base, config(tmp_path, **FOUR_BIT))
    with pytest.raises(UserError, match="quantized model in memory, whose weights cannot be trained"):
        build_roles(config(tmp_path, **settings), model, adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_peft": False}, "it needs use_peft=true"),
        ({"use_peft": True, "value_model": "separate"}, "value_model=separate trains all"),
        ({"use_peft": True}, "pip install 'bitsandbytes"),
    ],
)
def test_where_four_bit_cannot_work_the_reason_is_said(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        four_bit(config(tmp_path, dtype="nf4", **settings), CPU)
    assert four_bit(config(tmp_path, **settings), CPU) == {}, "and only where it was asked for"


def test_the_estimate_counts_linear_layers_in_four_bit_and_the_rest_in_sixteen(tmp_path):
    model = tiny_model()
    linear = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    rest = sum(p.numel() for p in model.parameters()) - linear
    told = memory.estimate(config(tmp_path, use_peft=True, dtype="nf4"), model, model, longest_prompt=8)
    assert told is not None and told.weights["base nf4"] == 2 * rest + linear * 9 // 16


@pytest.mark.gpu
def test_a_four_bit_base_loads_with_a_head_that_the_fused_ops_can_read(tiny_models, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load_model(tiny_models.base, config(tmp_path, use_peft=True, dtype="nf4"))
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
