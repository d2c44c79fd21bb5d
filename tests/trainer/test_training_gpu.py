"""The trainer on a GPU against itself on a CPU, in each way of training; runs there, resumed, judged and scored."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from ppo_steps import assert_same_gradients, one_update, trained_head
from tiny_runs import ROWS, TinyModels, config, flags, read_jsonl, rollout, trainer, write_jsonl
from torch import Tensor

from srppo import SelfReward, memory, models
from srppo.cli import main
from srppo.models import choose_device, load_model
from srppo.packing import Layout
from srppo.roles import Roles, build_roles
from srppo.rollout import Rollout
from srppo_kernels import explain

pytestmark = pytest.mark.gpu

WAYS = [
    ("sft", False, "separate"),
    ("sft", True, "adapter"),
    ("adapter", True, "adapter"),
    ("adapter", True, "separate"),
]
TURN = (40, 41, 42, 43, 44, 45, 46)  # what prompts begin with alike
PAIRS = [[10, 11, 12], [13], [14, 15, 16, 17, 18]], [[30, 31, 0], [0], [32, 33, 34, 35]]


def on_cpu(patch: pytest.MonkeyPatch) -> None:
    for module in (models, memory):
        patch.setattr(module, "choose_device", lambda: torch.device("cpu"))


def given_on(device: torch.device) -> Rollout:
    prompts = [(*TURN, 10, 11, 12), (*TURN, 13), (*TURN, 10, 11), (19, 20)]
    return rollout(prompts, [(30, 31, 0), (0,), (32, 33, 34, 35), (36, 0)]).to(device)


def roles_of(
    models: TinyModels,
    folder: Path,
    way: tuple[str, bool, str],
    dtype: str,
    like: Roles | None = None,
    attention: str = "sdpa",
):
    """Roles with their configuration; ``like``: with the weights of these, as a device draws numbers of its own."""
    kind, use_peft, value_model = way
    args = config(
        folder, use_peft=use_peft, value_model=value_model, dtype=dtype, temperature=0.8, attn_implementation=attention
    )
    sft = {"sft": models.sft, "adapter": models.adapter}[kind]
    roles = trained_head(build_roles(args, models.base, sft))
    if like is not None:
        with torch.no_grad():
            for own, other in zip(trained(roles), trained(like), strict=True):
                own.copy_(other)
    return roles, args


def trained(roles: Roles) -> list[Tensor]:
    return [p for role in (roles.policy, roles.critic) for _, p in role.parameters()]


def test_what_is_on_the_cpu_is_refused_beside_what_is_not():
    """Which the other tests rely on."""
    here, there = torch.ones(4), torch.ones(4, device=choose_device())
    for mixed in (
        lambda: there + here, lambda: torch.cat([there, here]), lambda: here.masked_fill_(there > 0, 2),
        lambda: torch.where(there > 0, here, 0), lambda: torch.nn.functional.embedding(here.long(), there[:, None]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


@pytest.mark.parametrize(("way", "attention"), [*((way, "sdpa") for way in WAYS), (WAYS[2], "eager")])
def test_scores_and_gradients_are_those_of_a_cpu(tiny_models, tmp_path, gradients, way, attention):
    told, roles = [], None
    for here in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if here:
                on_cpu(patch)
            roles, args = roles_of(tiny_models, tmp_path, way, "float32", roles, attention)
            scores, targets, result = one_update(roles, args, given_on(roles.policy.device))
        assert roles.policy.layout == Layout.SHARED
        assert roles.policy.device.type == ("cpu" if here else choose_device().type)
        assert float(result.first.ratio_max) == pytest.approx(1, abs=1e-4), "scored and trained alike"
        told.append((scores, targets, result, [[g.cpu() for g in step] for step in gradients]))
        gradients.clear()
    (scores, targets, result, steps), (other_scores, other_targets, other_result, other_steps) = told
    for name in ("policy", "sft", "base", "values"):
        torch.testing.assert_close(getattr(other_scores, name).cpu(), getattr(scores, name), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other_targets.advantages.cpu(), targets.advantages, atol=1e-3, rtol=1e-3)
    assert float(other_result.policy_loss) == pytest.approx(float(result.policy_loss), abs=1e-4)
    assert_same_gradients(steps, other_steps)


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_lora_run_is_in_16_bit_and_near_the_one_in_32(tiny_models, tmp_path, gradients, way):
    told, roles = [], None
    for dtype in ("float32", "auto"):
        roles, args = roles_of(tiny_models, tmp_path, way, dtype, roles)
        scores, _, result = one_update(roles, args, given_on(roles.policy.device))
        assert roles.base.head.weight.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
        assert float(result.first.ratio_mean) == pytest.approx(1, abs=0.02)
        told.append((scores.policy, [torch.cat([g.flatten() for g in step]) for step in gradients]))
        gradients.clear()
    (exact, wanted), (scored, got) = told
    assert 0 < (scored - exact).abs().max() < 0.1
    for one, other in zip(wanted, got, strict=True):
        assert torch.nn.functional.cosine_similarity(one, other, 0) > 0.95


def final(run) -> dict[str, Tensor]:
    return {
        f"{r.name}.{n}": p.detach().clone() for r in (run.roles.policy, run.roles.critic) for n, p in r.parameters()
    }


@pytest.mark.parametrize(("kind", "dtype"), [("sft", "auto"), ("adapter", "auto"), ("adapter", "float32")])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tiny_models, tmp_path, kind, dtype):
    settings = {
        "kind": kind, "dtype": dtype, "max_steps": 4, "save_steps": 2, "num_mini_batches": 2,
        "gradient_accumulation_steps": 1, "missing_eos_penalty": 1.0, "eval_dataset": ROWS[:2],
    }  # fmt: skip
    whole = trainer(tiny_models, tmp_path / "whole", **settings)
    whole.train()
    assert len({entry["objective/scores"] for entry in whole.history}) == 4, "every iteration is another"
    assert all(math.isfinite(entry["loss/policy_avg"]) for entry in whole.history)
    torch.manual_seed(999)
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-2"
    again = trainer(tiny_models, tmp_path / "again", **settings, resume_from_checkpoint=str(checkpoint))
    again.train()
    for one, other in zip(whole.history, again.history, strict=True):
        for name in ("objective/scores", "objective/kl", "completions/mean_length"):
            assert other[name] == pytest.approx(one[name], abs=1e-3), name
    for one, other in zip(trained(whole.roles), trained(again.roles), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
    saved = load_model(tmp_path / "whole" / "run", config(tmp_path, dtype="float32"))
    assert next(saved.parameters()).device.type == choose_device().type


def test_the_self_reward_is_that_of_a_cpu(tiny_models, monkeypatch):
    there = SelfReward(tiny_models.base, tiny_models.adapter, dtype="float32").reward(*PAIRS)
    assert there.device.type == choose_device().type
    rough = SelfReward(tiny_models.base, tiny_models.adapter).reward(*PAIRS)
    on_cpu(monkeypatch)
    here = SelfReward(tiny_models.base, tiny_models.adapter, dtype="float32").reward(*PAIRS)
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rough.cpu(), here, atol=0.3, rtol=0)
    assert not torch.equal(rough, there), "16 bit is the default here"


def test_the_command_line_trains_scores_and_judges(tiny_models, tmp_path, capfd):
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", ROWS)
    write_jsonl(data / "test.jsonl", [{"prompt": "2+2=", "completion": "4", "answer": "4"}])
    out, common = tmp_path / "tuned", {"base_model_name_or_path": tiny_models.base, "dataset_name": data}
    train = {
        **common, "output_dir": out, "max_steps": 2, "per_device_train_batch_size": 4, "max_completion_length": 8,
        "use_peft": "true", "sft_num_train_epochs": 1, "report_to": "none", "eval_steps": 1,
    }  # fmt: skip
    assert main(["train", *flags(train)]) == 0
    said = capfd.readouterr().err
    assert "start: KL(policy || SFT) = 0 on" in said and "PPO ratio on the first mini-batch" in said, said
    told = read_jsonl(out / "metrics.jsonl")[-1]
    judged = {
        **common, "sft_model_name_or_path": out / "sft", "model_name_or_path": out, "max_completion_length": 8,
        "output_file": tmp_path / "eval.jsonl",
    }  # fmt: skip
    assert main(["eval", *flags(judged)]) == 0
    metrics = read_jsonl(tmp_path / "eval.jsonl")[0]["metrics"]
    assert metrics == pytest.approx({name: value for name, value in told.items() if name in metrics}, abs=0.05)
    assert main(["score", *flags({**common, "sft_model_name_or_path": out / "sft"})]) == 0
    assert len([json.loads(line) for line in capfd.readouterr().out.splitlines()]) == len(ROWS)


def test_a_models_head_reaches_the_kernels_of_the_device(tiny_models, tmp_path):
    roles, _ = roles_of(tiny_models, tmp_path, WAYS[2], "auto")
    role, given = roles.policy, given_on(roles.policy.device)
    with role.active():
        hidden = role.hidden(given)
    plan = explain(hidden, role.head.weight, given.tokens, **role.head.options)
    assert plan.backend in ("sm90", "triton"), plan
