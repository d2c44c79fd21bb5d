"""The configuration: every field does something, and every mistake in it is named."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save, tiny_model, tiny_tokenizer
from tiny_runs import QUIET, ROWS, TinyModels, config, examples, full_roles, rollout, trainer, write_jsonl
from transformers import dynamic_module_utils

from srppo import PipelineConfig, SRPPOConfig, UserError, commands, ppo, run_sft
from srppo.cli import main
from srppo.commands import load_data
from srppo.config import read_yaml
from srppo.engines import VLLMEngine
from srppo.models import load_model, lora_config
from srppo.packing import Layout
from srppo.roles import Role, build_roles, frozen_roles, is_peft
from srppo.rollout import Rollout
from srppo.trainer import TAKEN_IN

FIELDS = [field.name for field in dataclasses.fields(PipelineConfig)]  # the trainer's and those around it


@dataclass
class World:
    """What an observation may use."""

    models: TinyModels
    folder: Path
    runs: int = 0

    def fresh(self) -> Path:
        self.runs += 1
        return self.folder / str(self.runs)


@pytest.fixture
def world(tiny_models, tmp_path) -> World:
    return World(tiny_models, tmp_path)


# -- observations: each turns settings into something that can be compared ---------------------------------------------


def made_up() -> tuple[Rollout, ppo.Scores]:
    given, generator = rollout(), torch.Generator().manual_seed(0)
    draw = lambda: -3 * torch.rand(given.completion_mask.shape, generator=generator) * given.completion_mask  # noqa: E731
    return given, ppo.Scores(*(draw() for _ in ppo.Scores.__dataclass_fields__))


def rewards(world: World, **settings: Any) -> Any:
    """Advantages and returns of given scores."""
    given, scores = made_up()
    moments = ppo.RunningMoments()
    got = ppo.advantages(given, scores, config(world.fresh(), **settings), moments=moments)
    return got.advantages.tolist(), got.returns.tolist()


def scored(world: World, **settings: Any) -> Any:
    args = config(world.fresh(), **settings)
    got = ppo.score(full_roles(args), rollout(), args)
    return {name: getattr(got, name).tolist() for name in ppo.Scores.__dataclass_fields__}


def updated(world: World, **settings: Any) -> Any:
    """Weights after the epochs on one rollout."""
    args = config(world.fresh(), **{"num_ppo_epochs": 3, "learning_rate": 1e-2, **settings})
    roles, (given, scores) = full_roles(args), made_up()
    value = 1e-2 if args.value_learning_rate is None else args.value_learning_rate
    policy = ppo.Learner.create(roles.policy, args, args.learning_rate, 1)
    critic = ppo.Learner.create(roles.critic, args, value, 1)
    scores = dataclasses.replace(scores, policy=ppo.score(roles, given, args).policy)
    targets = ppo.advantages(given, scores, args)
    generator = torch.Generator().manual_seed(0)
    rows = ppo.split_rows(torch.arange(4), given, args, role=roles.policy, generator=generator)
    result = ppo.update(policy, critic, given, scores, targets, args, rows, generator=generator)
    return result.epochs, [p.sum().item() for p in (*policy.parameters, *critic.parameters)]


def sampled(world: World, **settings: Any) -> Any:
    """The first rollout of a run."""
    run = trainer(world.models, world.fresh(), **settings)
    drawn = run.rollout(run.sampler.next())
    return drawn.input_ids.tolist(), drawn.lengths.tolist()


def trained(world: World, **settings: Any) -> Any:
    """History and final policy of a short run, without times."""
    run = trainer(world.models, world.fresh(), **settings)
    run.train()
    keep = ("lr", "objective/scores", "objective/kl", "loss/value_avg")
    history = [[entry.get(name) for name in keep] for entry in run.history]
    return history, [p.sum().item() for _, p in run.roles.policy.parameters()]


def files(world: World, **settings: Any) -> Any:
    """What a run of three iterations leaves behind."""
    folder = world.fresh()
    rows = examples(ROWS[:1])
    trainer(world.models, folder, eval_dataset=rows, num_ppo_epochs=1, **{"max_steps": 3, **settings}).train()
    evaluated = sum("eval/objective/kl" in line for line in (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return evaluated, sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name)


def place(world: World, **settings: Any) -> Any:
    trainer(world.models, world.folder, max_steps=0, **settings).train()
    return sorted(path.parent.name for path in world.folder.rglob("model.safetensors"))


def fine_tuned(world: World, **settings: Any) -> Any:
    folder = world.fresh()
    args = config(folder, **{"base_model_name_or_path": world.models.base, **settings})
    run_sft(args, train_dataset=examples(ROWS), output_dir=folder / "sft", console=QUIET)
    return [json.loads(line)["sft/loss"] for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]


def loaded(world: World, **settings: Any) -> Any:
    model = load_model(world.models.base, config(world.fresh(), use_peft=True, **settings))
    return model.dtype, model.config._attn_implementation


def adapted(world: World, **settings: Any) -> Any:
    """The adapter that would be made: where, how large, and its scale."""
    args = config(world.fresh(), use_peft=True, **settings)
    made = build_roles(args, world.models.base, world.models.sft)
    scale = next(m.scaling["policy"] for m in made.policy.model.modules() if hasattr(m, "lora_A"))
    return scale, [(name, tuple(p.shape)) for name, p in made.policy.parameters()]


def roles(world: World, **settings: Any) -> Any:
    args = config(world.fresh(), **settings)
    made = build_roles(args, world.models.base, world.models.sft)
    return (
        is_peft(made.policy.model),
        made.critic.model is made.policy.model,
        any(getattr(part, "gradient_checkpointing", False) for part in made.policy.causal_lm.modules()),
    )


def data(world: World, **settings: Any) -> Any:
    """Training and evaluation rows, or the refusal."""
    folder = world.folder / "data"
    for name, rows in {"train": ROWS, "test": ROWS[:2], "more": ROWS[2:]}.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    write_jsonl(world.folder / "prompts" / "train.jsonl", [{"prompt": "another"}])
    write_jsonl(world.folder / "prompts" / "more.jsonl", [{"prompt": "yet another"}])
    for key in ("dataset_name", "prompt_dataset_name"):
        if settings.get(key):
            settings[key] = str(world.folder / settings[key])
    args = config(world.fresh(), **{"dataset_name": str(folder), **settings})
    try:
        return [[e.prompt_ids for e in part] for part in load_data(args, tiny_tokenizer(), QUIET)]
    except UserError as error:
        return str(error).rpartition("line")[2]


def score_command(world: World, **settings: Any) -> Any:
    source = write_jsonl(world.folder / "score.jsonl", ROWS)
    out = world.fresh()
    flags = {"base_model_name_or_path": "base", "sft_model_name_or_path": "sft", **settings}
    arguments = [part for k, v in flags.items() for part in (f"--{k}", getattr(world.models, v))]
    assert main(["score", "--dataset_name", source, "--output_file", str(out), *arguments]) == 0
    return [json.loads(line)["score"] for line in out.read_text().splitlines()]


def remote_code(world: World, **settings: Any) -> Any:
    """Whether a checkpoint's own model and tokenizer code are run."""
    folder = world.folder / "custom"
    save(tiny_model(), folder)
    (folder / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}}
    for file, own in {
        "config.json": {"model_type": "own_llama", "auto_map": names},
        "tokenizer_config.json": tokenizer,
    }.items():
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(world.folder / "modules"))
        try:
            base, _ = frozen_roles(config(world.fresh(), **settings), str(folder), str(folder))
            return type(base.model).__name__
        except UserError as error:
            return "refused" if "trust_remote_code" in str(error) or "custom code" in str(error) else str(error)


def resumed(world: World, **settings: Any) -> Any:
    """Iterations done by a run that may start from a checkpoint."""
    first = world.folder / "first"
    if not first.exists():
        trainer(world.models, first, save_steps=1, max_steps=1).train()
    if settings["resume_from_checkpoint"]:
        settings["resume_from_checkpoint"] = str(first / "run" / settings["resume_from_checkpoint"])
    done: list[int] = []
    trainer(world.models, world.fresh(), callbacks=[lambda run, step, metrics: done.append(step)], **settings).train()
    return done


def refusal(world: World, **settings: Any) -> Any:
    try:
        return config(world.fresh(), **settings) and "accepted"
    except UserError as error:
        return str(error)


def replay(world: World, **settings: Any) -> Any:
    """What a run of the command says of its rollouts, the server that it asks, and the rollouts that it leaves."""
    for name, value in settings.items():
        if name in ("save_rollouts", "from_rollouts") and value:
            settings[name] = str(world.folder / value)
    settings.setdefault("max_steps", 1)
    args = config(
        world.fresh(), base_model_name_or_path=world.models.base, sft_model_name_or_path=world.models.adapter,
        use_peft=True, dataset_name=write_jsonl(world.folder / "rows.jsonl", ROWS), **settings,
    )  # fmt: skip
    said, asked = io.StringIO(), []

    def ask(engine: VLLMEngine, path: str, body: Any) -> Any:
        asked.append(engine.url)
        raise UserError("nobody there")

    with contextlib.redirect_stderr(said), contextlib.suppress(UserError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLLMEngine, "call", ask)
        commands.train(args, argparse.Namespace())
    lines = [line for line in said.getvalue().splitlines() if "rollouts: " in line]
    return lines, asked, sorted(path.name for path in world.folder.glob("*/rollout_*"))


def capped(world: World, **settings: Any) -> Any:
    """The advantages' weights and the saved rollouts that a run of the command would use."""
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Any] = []
        patch.setattr("srppo.rollout_store.require_folders", lambda *_: None)  # before SFT; see the command's own tests
        patch.setattr("srppo.trainer.SRPPOTrainer.train", lambda r: seen.append((r.importance_cap, r.from_rollouts)))
        replay(world, **settings)
    return seen


def batches(world: World, **settings: Any) -> Any:
    args = config(world.fresh(), **settings)
    given = rollout([[10, 11, 12]] * args.batch_size, [[13, 0]] * args.batch_size)
    packing = Role("policy", tiny_model(), layout=Layout.PACKED)
    parts = ppo.split_rows(torch.arange(args.batch_size), given, args, role=packing)
    return [[len(rows) for rows in mini] for mini in parts]


# -- the table: field -> two values and what tells them apart ---------------------------------------------------------

Observation = Callable[..., Any]
EFFECTS: dict[str, tuple[Any, Any, Observation]] = {
    "base_model_name_or_path": ("base", "sft", score_command),
    "sft_model_name_or_path": ("sft", "adapter", score_command),
    "dtype": ("float32", "bfloat16", loaded),
    "attn_implementation": ("eager", "sdpa", loaded),
    "use_peft": (True, False, roles),
    "lora_r": (4, 8, adapted),
    "lora_alpha": (8, 16, adapted),
    "lora_dropout": (0.0, 0.5, lambda world, **s: fine_tuned(world, use_peft=True, sft_learning_rate=1e-2, **s)),
    "lora_target_modules": (None, ["q_proj"], adapted),
    "trust_remote_code": (True, False, remote_code),
    "dataset_name": ("data", "prompts", data),
    "prompt_dataset_name": (None, "prompts", data),
    "dataset_train_split": ("train", "more", data),
    "dataset_test_split": ("test", "more", data),
    "max_prompt_length": (24, 4, data),
    "max_completion_length": (5, 2, sampled),
    "temperature": (1.0, 0.3, sampled),
    "top_p": (1.0, 0.3, sampled),
    "stop_token_ids": ([0], list(range(260)), sampled),
    "missing_eos_penalty": (None, 1.0, rewards),
    "num_ppo_epochs": (1, 2, updated),
    "num_mini_batches": (1, 2, batches),
    "cliprange": (0.2, 1e-4, lambda world, **s: updated(world, learning_rate=1e-4, **s)),
    "cliprange_value": (None, 0.001, updated),
    "gamma": (1.0, 0.9, rewards),
    "lam": (0.95, 0.5, rewards),
    "whiten_advantages": (True, False, rewards),
    "target_kl": (None, 1e-6, updated),
    "entropy_coef": (0.0, 0.1, updated),
    "reward_placement": ("eos", "token", rewards),
    "reward_normalization": ("none", "length", rewards),
    "reward_scale": (1.0, 2.0, rewards),
    "reward_clip": (None, 0.1, rewards),
    "whiten_rewards": (False, True, rewards),
    "kl_coef": (1.0, 0.5, rewards),
    "kl_target": (None, 1e-3, lambda world, **s: trained(world, max_steps=3, **s)),
    "kl_estimator": ("k1", "k3", rewards),
    "kl_reference": ("sft", "base", scored),
    "score_temperature": (1.0, 2.0, scored),
    "value_model": ("adapter", "separate", lambda world, **s: roles(world, use_peft=True, **s)),
    "value_learning_rate": (None, 1e-4, trained),
    "value_warmup_steps": (0, 1, trained),
    "learning_rate": (1e-3, 1e-4, trained),
    "per_device_train_batch_size": (2, 4, batches),
    "gradient_accumulation_steps": (2, 4, batches),
    "rollout_engine": ("hf", "vllm", replay),
    "vllm_url": (
        "http://one",
        "http://other",
        lambda world, **s: replay(world, rollout_engine="vllm", max_steps=0, **s),
    ),
    "importance_cap": (None, 2.0, capped),
    "fsdp": (False, True, lambda world, **s: replay(world, max_steps=0, **s)),  # refused in one process
    "save_rollouts": (None, "kept", replay),
    "from_rollouts": (None, "missing", capped),
    "max_tokens_per_micro_batch": (10, 20, batches),
    "max_grad_norm": (None, 1e-6, updated),
    "adam_betas": ([0.9, 0.999], [0.5, 0.999], updated),
    "lr_scheduler_type": ("linear", "constant", trained),
    "warmup_ratio": (0.0, 0.5, trained),
    "gradient_checkpointing": (False, True, roles),
    "seed": (0, 1, sampled),
    "sft_learning_rate": (1e-3, 1e-2, fine_tuned),
    "sft_num_train_epochs": (1, 2, fine_tuned),
    "output_dir": ("here", "there", lambda world, output_dir: place(world, output_dir=str(world.folder / output_dir))),
    "max_steps": (1, 2, lambda world, **s: trained(world, lr_scheduler_type="constant", **s)[0]),
    "eval_steps": (0, 1, files),
    "save_steps": (0, 2, files),
    "save_total_limit": (None, 1, lambda world, **s: files(world, save_steps=1, **s)),
    "resume_from_checkpoint": (None, "checkpoint-1", resumed),
    "report_to": (["none"], ["tensorboard"], files),
    "log_completions": (0, 1, files),
}


def test_the_table_has_every_field_of_the_configuration():
    assert sorted(EFFECTS) == sorted(FIELDS), "a new field needs an entry: two values and what tells them apart"


@pytest.mark.parametrize("name", FIELDS)
def test_changing_a_field_changes_something(world, name):
    one, other, observe = EFFECTS[name]
    assert observe(world, **{name: one}) != observe(world, **{name: other})


def test_a_setting_that_was_taken_in_is_not_changed_afterwards(tiny_models, tmp_path):
    """Raised, max_steps trained at a rate of 0; a temperature was scored at and not sampled at. Others may change."""

    def changes(run, step, metrics):
        run.args.cliprange, run.args.temperature = 0.1, 1 - step / 4

    run = trainer(tiny_models, tmp_path, callbacks=[changes])
    for name in TAKEN_IN:
        before = getattr(run.args, name)
        setattr(run.args, name, [*before, 7] if isinstance(before, list) else "another")
        with pytest.raises(UserError, match=f"args.{name} was changed"):
            run.train()
        setattr(run.args, name, before)
    with pytest.raises(UserError, match=r"args.temperature was changed from 1.0 to 0.75"):
        run.train()
    assert run.step == 1


def test_the_seed_decides_the_order_of_prompts_and_the_mini_batches_too(world):
    drawn = []
    for seed in (0, 1):
        run = trainer(world.models, world.fresh(), seed=seed)
        drawn.append((run.sampler.next(), torch.randperm(99, generator=run.generator).tolist()))
    assert all(one != other for one, other in zip(*drawn, strict=True))


@pytest.mark.parametrize("observe", [rewards, scored, updated, sampled, trained, fine_tuned, loaded, adapted, batches])
def test_an_observation_without_a_change_is_always_the_same(world, observe):
    """Otherwise the table would prove nothing."""
    first = observe(world)
    random.seed(1)
    torch.manual_seed(12345)
    assert observe(world) == first


# -- values -----------------------------------------------------------------------------------------------------------


def test_there_are_at_most_sixty_fields_each_with_documentation():
    assert len(dataclasses.fields(SRPPOConfig)) <= 60
    for field in dataclasses.fields(PipelineConfig):
        assert len(field.metadata["help"]) >= 8, field.name


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("learning_rte", "did you mean learning_rate?"),
        ("kl_coeff", "did you mean kl_coef?"),
        ("use_lora", "'srppo train --help' lists them"),
        ("vf_coef", "did you mean kl_coef?"),
        (3, "'srppo train --help' lists them"),
        ("fsdp", "it is one of the command line's, which srppo.config.PipelineConfig reads"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_is_named(key, hint):
    with pytest.raises(UserError) as caught:
        SRPPOConfig.from_dict({"seed": 1, key: 1}, source="run.yaml")
    assert str(caught.value).startswith(f"unknown option {key!r} in run.yaml; ")
    assert hint in str(caught.value) or key == "vf_coef"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate must be a number; got 'fast'"),
        ({"learning_rate": True}, "learning_rate must be a number; got True"),
        ({"learning_rate": -1e-3}, "learning_rate must be at least 0; got -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number; got nan"),
        ({"learning_rate": "inf"}, "learning_rate must be a finite number; got inf"),
        ({"learning_rate": None}, "learning_rate must be a number; got None"),
        ({"reward_scale": float("nan")}, "reward_scale must be a finite number; got nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number; got inf"),
        ({"lora_r": 0}, "lora_r must be at least 1; got 0"),
        ({"lora_r": 2.5}, "lora_r must be a whole number; got 2.5"),
        ({"lora_r": "2.5"}, "lora_r must be a whole number; got '2.5'"),
        ({"seed": float("inf")}, "seed must be a whole number; got inf"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1; got 1.0"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0; got 0"),
        ({"gamma": 1.5}, "gamma must be at least 0 and at most 1; got 1.5"),
        ({"cliprange": 1.5}, "cliprange must be at least 0 and at most 1; got 1.5"),
        ({"cliprange_value": 0}, "cliprange_value must be above 0; got 0"),
        ({"reward_clip": 0}, "reward_clip must be above 0; got 0"),
        ({"target_kl": -1}, "target_kl must be at least 0; got -1"),
        ({"seed": 2**70}, "seed must be at least 0 and at most 4294967295; got"),
        ({"adam_betas": [0.9]}, "adam_betas takes two numbers"),
        ({"adam_betas": [0.9, 1.0]}, "adam_betas must be at least 0 and below 1; got 1.0"),
        ({"adam_betas": "0.9,x"}, "adam_betas must be a number; got 'x'"),
        ({"use_peft": "yes"}, "use_peft must be true or false; got 'yes'"),
        ({"use_peft": 1}, "use_peft must be true or false; got 1"),
        ({"dtype": "fp8"}, "dtype must be one of auto, float32, bfloat16, float16, nf4; got 'fp8'"),
        ({"output_dir": 3}, "output_dir must be text; got 3"),
        ({"report_to": ["mlflow"]}, r"report_to knows tensorboard, wandb, trackio, none; got \['mlflow'\]"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "kl_coef must be above 0"),
        ({"value_model": "adapter"}, "value_model=adapter needs use_peft=true"),
        ({"value_warmup_steps": 9, "max_steps": 9}, "leaves none of max_steps=9 iterations for the policy"),
        ({"reward_normalization": "running", "reward_placement": "token"}, "running is for reward_placement=eos"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_name(settings, message):
    with pytest.raises(UserError, match=message):
        SRPPOConfig(**settings)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "3e-6", 3e-6),
        ("use_peft", "TRUE", True),
        ("seed", "7", 7),
        ("lora_r", 8.0, 8),
        ("max_grad_norm", "none", None),
        ("target_kl", "null", None),
        ("stop_token_ids", "1,2", [1, 2]),
        ("stop_token_ids", 5, [5]),
        ("adam_betas", (0.8, 0.9), [0.8, 0.9]),
        ("lora_target_modules", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("report_to", "none", ["none"]),
        ("resume_from_checkpoint", True, "latest"),
        ("resume_from_checkpoint", "true", "latest"),
        ("resume_from_checkpoint", False, None),
        ("resume_from_checkpoint", "run/checkpoint-2", "run/checkpoint-2"),
    ],
)
def test_text_from_flags_and_yaml_becomes_the_fields_type(name, text, value):
    assert getattr(SRPPOConfig(**{name: text}), name) == value


def test_what_decides_a_run_is_by_default_what_the_documents_say():
    """The optimum is SFT, extrapolated; nothing saturates a summed log-ratio; the rest as in TRL's PPO."""
    told = {
        "kl_coef": 1.0, "kl_reference": "sft", "kl_estimator": "k1", "kl_target": None, "score_temperature": 1.0,
        "temperature": 1.0, "top_p": 1.0, "reward_placement": "eos", "reward_normalization": "none",
        "reward_scale": 1.0, "reward_clip": None, "missing_eos_penalty": None, "whiten_rewards": False,
        "whiten_advantages": True, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": None,
        "num_ppo_epochs": 4, "num_mini_batches": 1, "target_kl": None, "entropy_coef": 0.0, "learning_rate": 3e-6,
        "value_learning_rate": None, "sft_learning_rate": 2e-5, "sft_num_train_epochs": 3, "max_grad_norm": 1.0,
        "adam_betas": [0.9, 0.999], "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "lora_r": 16,
        "lora_alpha": 32, "importance_cap": None,
    }  # fmt: skip
    args = PipelineConfig()
    assert {name: getattr(args, name) for name in told} == told


def test_batch_arithmetic():
    args = SRPPOConfig(per_device_train_batch_size=3, gradient_accumulation_steps=4, num_mini_batches=5)
    assert (args.mini_batch_size, args.batch_size) == (12, 60)


# -- files ------------------------------------------------------------------------------------------------------------


def test_yaml_is_read_overridden_and_written_back_alike(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 3e-6\nuse_peft: true\nstop_token_ids: [1, 2]\nmax_grad_norm: null\nseed: 4\n")
    args = SRPPOConfig.from_yaml(path, seed=9)
    assert (args.learning_rate, args.use_peft, args.stop_token_ids) == (3e-6, True, [1, 2])
    assert args.max_grad_norm is None and args.seed == 9
    path.write_text(args.to_yaml())
    assert SRPPOConfig.from_yaml(path) == args
    path.write_text("")
    assert SRPPOConfig.from_yaml(path) == SRPPOConfig()


def test_what_only_the_command_takes_is_in_its_configuration_and_not_in_the_trainers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("sft_learning_rate: 1e-3\nseed: 4\n")
    args = PipelineConfig.from_yaml(path)
    assert (args.sft_learning_rate, args.seed) == (1e-3, 4)
    assert PipelineConfig.from_dict(dataclasses.asdict(args)) == args
    with pytest.raises(UserError, match="unknown option 'sft_learning_rate'"):
        SRPPOConfig.from_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", r"run\.yaml is not valid YAML"),
        (
            "lam: 1\nseed: 1: 2\n",
            r"run\.yaml is not valid YAML in line 2, column 8: mapping values are not allowed here$",
        ),
        ("lam: \x00", r"run\.yaml is not valid YAML: unacceptable character #x0000: .* position 5$"),
        ("- seed\n", r"run\.yaml must hold 'name: value' lines, got a list"),
        (b"seed: \xff\xfe", r"run\.yaml is not valid YAML, nor UTF-8 text \(byte 0xff at 6\): save it as UTF-8"),
        ("seed: 1\nlam: 1\nseed: 2\n", r"run\.yaml has 'seed' more than once: keep one"),
        ("sed: 1\n", r"unknown option 'sed' in .*run\.yaml; did you mean seed\?"),
        (None, r"cannot read the configuration file .*run\.yaml: No such file"),
    ],
)
def test_a_bad_configuration_file_is_named(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        SRPPOConfig.from_yaml(path)
    assert "\n" not in str(caught.value)
    with contextlib.suppress(UserError):
        assert read_yaml(path) == {"sed": 1}


def test_lora_config_takes_its_numbers_from_the_configuration():
    made = lora_config(SRPPOConfig(lora_r=5, lora_alpha=7, lora_dropout=0.25), tiny_model())
    assert (made.r, made.lora_alpha, made.lora_dropout) == (5, 7, 0.25)


def test_completions_of_prompt_dataset_name_are_no_demonstrations(tmp_path):
    """And may be longer than one that SFT learns."""
    prompts = [ROWS[0], {"prompt": "a", "completion": "long " * 9}]
    sources = {
        "dataset_name": write_jsonl(tmp_path / "demonstrations.jsonl", ROWS[:2]),
        "prompt_dataset_name": write_jsonl(tmp_path / "prompts.jsonl", prompts),
    }
    train, _ = load_data(config(tmp_path, **sources), tiny_tokenizer(), QUIET)
    assert [example.completion_ids is None for example in train] == [False, False, True, True]
