"""``dtype=nf4``: refused in words wherever it cannot work; loading itself needs a GPU and bitsandbytes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny import tiny_model
from tiny_runs import config, trainer

from srppo import UserError, memory
from srppo.models import four_bit, load_model

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({"use_peft": False}, GPU, "it needs use_peft=true"),
        ({"use_peft": True, "value_model": "separate"}, GPU, "value_model=separate trains all"),
        ({"use_peft": True}, CPU, "dtype=nf4 needs a GPU"),
        ({"use_peft": True}, GPU, "pip install bitsandbytes"),
    ],
)
def test_where_four_bit_cannot_work_the_reason_is_said(tmp_path, monkeypatch, settings, device, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        four_bit(config(tmp_path, dtype="nf4", **settings), device)
    assert four_bit(config(tmp_path, **settings), device) == {}, "and only where it was asked for"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_run_without_a_gpu_stops_before_it_loads_a_model(tiny_models, tmp_path):
    with pytest.raises(UserError, match="dtype=nf4 needs a GPU"):
        trainer(tiny_models, tmp_path, kind="adapter", dtype="nf4")
    assert not (tmp_path / "run").exists()


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
