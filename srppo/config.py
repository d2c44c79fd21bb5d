"""The configuration of a run: one flat dataclass, whose field documentation is the command line's help.

:class:`SRPPOConfig` is what the trainer reads. :class:`PipelineConfig` adds what ``srppo train`` needs around it: the
SFT stage before PPO, a second source of prompts, and where rollouts come from and go.

Names are TRL's where TRL has one, so that scripts and dashboards carry over. Batch arithmetic, per PPO iteration::

    micro-batch = per_device_train_batch_size                     sequences in one forward and backward
    mini-batch  = micro-batch * gradient_accumulation_steps       sequences in one optimizer step
    batch       = mini-batch * num_mini_batches                   prompts in one rollout
    optimizer steps = num_ppo_epochs * num_mini_batches

Of each process; under N processes a mini-batch and a batch are N times as large. max_tokens_per_micro_batch cuts the
same mini-batches into micro-batches by tokens instead; results do not depend on that cut.

There is no ``vf_coef``: the critic has an optimizer and a gradient clip of its own, under which Adam would cancel it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from srppo.errors import UserError, wrong_byte
from srppo.trackers import check_trackers

HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def option(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its documentation and, for numbers, the bounds of its range; every number is finite."""
    bounds = {"at least": minimum, "above": above, "at most": maximum, "below": below}
    limits = {word: bound for word, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": doc, "limits": limits})


@dataclass(kw_only=True)
class SRPPOConfig:
    """Every setting of :class:`srppo.SRPPOTrainer`."""

    # Models
    base_model_name_or_path: str | None = option(None, "pretrained base model pi_pt: a folder or a hub name")
    sft_model_name_or_path: str | None = option(
        None,
        "SFT model pi_sft: an adapter folder or a full model; srppo train alone makes one where none is given",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "nf4"] = option(
        "auto",
        "dtype of the frozen weights; auto: on a GPU bfloat16 with LoRA and where nothing is trained, float32 "
        "otherwise; nf4: 4 bit, with bitsandbytes",
    )
    attn_implementation: str | None = option(None, "attention of transformers: eager, sdpa, flash_attention_2")
    use_peft: bool = option(
        False, "LoRA: base, SFT, policy and value share one frozen base; otherwise full fine-tuning"
    )
    lora_r: int = option(16, "rank of new adapters", minimum=1)
    lora_alpha: float = option(32, "scale of new adapters: alpha / r", above=0)
    lora_dropout: float = option(
        0.0, "dropout on adapters during SFT; PPO always runs without dropout", minimum=0, below=1
    )
    lora_target_modules: list[str] | None = option(
        None, "modules that get adapters; absent: every linear layer but the head"
    )
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    # Data
    dataset_name: str | None = option(
        None,
        "demonstrations and prompts: a JSONL, Parquet or CSV file, a folder with train.* and test.*, or a hub name",
    )
    dataset_train_split: str = option("train", "split to train on")
    dataset_test_split: str = option("test", "split to evaluate on, where the source has it")
    max_prompt_length: int = option(512, "longest prompt, in tokens; a longer one is an error", minimum=1)
    max_completion_length: int = option(128, "longest completion, in tokens; rollouts are cut there", minimum=1)
    # Rollout
    temperature: float = option(
        1.0, "sampling temperature of rollouts, and of the policy whose ratio PPO clips", minimum=1e-3
    )
    top_p: float = option(
        1.0,
        "nucleus of rollouts; below 1 the sampler is not the policy, and PPO's ratio is biased",
        minimum=1e-3,
        maximum=1,
    )
    rollout_engine: Literal["hf", "vllm"] = option(
        "hf", "what samples: transformers' generate, or a vLLM server (see vllm_url)"
    )
    stop_token_ids: list[int] | None = option(None, "tokens that end a completion; absent: the tokenizer's EOS")
    missing_eos_penalty: float | None = option(None, "subtracted, in nats, from the score of a completion that was cut")
    # PPO
    num_ppo_epochs: int = option(4, "passes over a rollout", minimum=1)
    num_mini_batches: int = option(1, "optimizer steps in one pass", minimum=1)
    cliprange: float = option(0.2, "the ratio is clipped to [1 - cliprange, 1 + cliprange]", minimum=0, maximum=1)
    cliprange_value: float | None = option(
        None,
        "clip of the value's change, in nats; absent: off, as returns here are sums of log-ratios, not of unit scale",
        above=0,
    )
    gamma: float = option(1.0, "discount", minimum=0, maximum=1)
    lam: float = option(0.95, "lambda of generalized advantage estimation", minimum=0, maximum=1)
    whiten_advantages: bool = option(True, "advantages to zero mean and unit variance over the whole batch")
    target_kl: float | None = option(
        None, "ends the epochs of an iteration once the mean k3 estimate of KL(old || new) passes it", minimum=0
    )
    entropy_coef: float = option(0.0, "weight of an entropy bonus", minimum=0)
    # Reward
    reward_placement: Literal["eos", "token"] = option(
        "eos", "the sum at the last token, or each token's own log-ratio"
    )
    reward_normalization: Literal["none", "length", "running"] = option(
        "none", "score as is, divided by its length, or by the running standard deviation of scores"
    )
    reward_scale: float = option(1.0, "factor on the score, after normalisation")
    reward_clip: float | None = option(
        None,
        "score, or with reward_placement=token each token's, clipped to [-c, c]; a summed log-ratio often passes the "
        "usual 10",
        above=0,
    )
    whiten_rewards: bool = option(False, "per-token rewards to unit variance over the batch, mean kept")
    kl_coef: float = option(
        1.0, "beta: weight of the KL penalty; see kl_reference, and the README on how to choose", minimum=0
    )
    kl_target: float | None = option(
        None, "adapts beta, from kl_coef on, to hold this KL to the reference, in nats a sequence", above=0
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option(
        "k1", "per-token KL estimate in the reward; only k1 is unbiased in gradient"
    )
    kl_reference: Literal["sft", "base"] = option("sft", "the model that the KL penalty pulls towards")
    score_temperature: float = option(
        1.0, "temperature at which SFT and base are compared for the reward", minimum=1e-3
    )
    # Value
    value_model: Literal["auto", "adapter", "separate"] = option(
        "auto", "critic's trunk: an adapter on the shared base, or a copy of the SFT model; auto: adapter with LoRA"
    )
    value_learning_rate: float | None = option(None, "learning rate of the critic; absent: learning_rate", minimum=0)
    value_warmup_steps: int = option(0, "first iterations, in which only the critic learns", minimum=0)
    # Optimisation
    learning_rate: float = option(3e-6, "peak learning rate of the policy; LoRA wants about ten times more", minimum=0)
    per_device_train_batch_size: int = option(8, "sequences in one forward and backward", minimum=1)
    gradient_accumulation_steps: int = option(1, "forwards and backwards in one optimizer step", minimum=1)
    max_tokens_per_micro_batch: int | None = option(
        None,
        "most tokens in one forward and backward, for even memory and few of them; a longer sequence goes alone; "
        "absent: per_device_train_batch_size sequences",
        minimum=1,
    )
    max_grad_norm: float | None = option(1.0, "gradient norm is clipped to this; absent or 0: not clipped", minimum=0)
    adam_betas: list[float] = option((0.9, 0.999), "AdamW's two decay rates", minimum=0, below=1)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = option("linear", "decay after warm-up")
    warmup_ratio: float = option(0.0, "part of the run in which the learning rate rises", minimum=0, maximum=1)
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, a third more time")
    seed: int = option(0, "seed of data order, sampling and new weights", minimum=0, maximum=2**32 - 1)
    # Run
    output_dir: str = option("srppo-output", "new or empty folder for everything the run writes")
    max_steps: int = option(100, "PPO iterations", minimum=0)
    eval_steps: int = option(0, "evaluate every so many iterations; 0: only at the end", minimum=0)
    save_steps: int = option(0, "checkpoint every so many iterations; 0: only the final model", minimum=0)
    save_total_limit: int | None = option(None, "checkpoints kept; absent: all", minimum=1)
    resume_from_checkpoint: str | None = option(
        None, "a checkpoint-N folder to go on from; latest (or true): the newest in output_dir, if there is one yet"
    )
    report_to: list[str] = option(
        ("tensorboard",), "where metrics go besides metrics.jsonl: tensorboard, wandb, trackio; or none"
    )
    log_completions: int = option(
        10, "print and save sample completions, of the first iteration and every so many; 0: never", minimum=0
    )

    def __post_init__(self) -> None:
        as_text = str(self.resume_from_checkpoint).lower()  # yes or no instead of a folder, as TRL takes it
        self.resume_from_checkpoint = {"true": "latest", "false": None}.get(as_text, self.resume_from_checkpoint)
        for field, hint in fields_and_types(type(self)):
            value = coerce(field.name, getattr(self, field.name), hint)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    check_range(field, number)
            setattr(self, field.name, value)
        if len(self.adam_betas) != 2:
            raise UserError(f"adam_betas takes two numbers, got {self.adam_betas}")
        check_trackers(self.report_to)
        if 0 < self.max_steps <= self.value_warmup_steps:
            raise UserError(
                f"value_warmup_steps={self.value_warmup_steps} leaves none of max_steps={self.max_steps} iterations "
                "for the policy to learn in"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError("kl_target adapts beta from kl_coef on, so kl_coef must be above 0")
        if self.value_model == "adapter" and not self.use_peft:
            raise UserError("value_model=adapter needs use_peft=true; with full fine-tuning the critic is separate")
        if self.reward_normalization == "running" and self.reward_placement == "token":
            raise UserError(
                "reward_normalization=running is for reward_placement=eos: it tracks the scores of sequences"
            )

    @property
    def mini_batch_size(self) -> int:
        """Sequences in one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def batch_size(self) -> int:
        """Prompts in one rollout."""
        return self.mini_batch_size * self.num_mini_batches

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "the configuration") -> Self:
        """Builds a configuration; an unknown key is an error that names its nearest relative."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"; did you mean {near[0]}?" if near else "; 'srppo train --help' lists them"
                if key in (field.name for field in dataclasses.fields(PipelineConfig)):
                    hint = "; it is one of the command line's, which srppo.config.PipelineConfig reads"
                raise UserError(f"unknown option {key!r} in {source}{hint}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """Reads a YAML file of ``name: value`` lines; ``overrides`` win."""
        return cls.from_dict({**read_yaml(path), **overrides}, source=str(path))

    def of_all_processes(self) -> dict[str, Any]:
        """The settings that must be alike in all processes; of a path or a name, which may be another on another
        machine, only whether it is set."""
        values = {}
        for field, hint in fields_and_types(type(self)):
            value = getattr(self, field.name)
            values[field.name] = value is None if str in (hint, *typing.get_args(hint)) else value
        return values

    def to_yaml(self) -> str:
        """All settings, defaults included, in the order of their definition."""
        import yaml

        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


@dataclass(kw_only=True)
class PipelineConfig(SRPPOConfig):
    """The trainer's settings and those of what ``srppo train`` does before it; every command reads its part."""

    prompt_dataset_name: str | None = option(
        None, "further prompts for PPO, whose completions are not used; same kinds of source"
    )
    sft_learning_rate: float = option(2e-5, "peak learning rate of SFT; LoRA wants about ten times more", minimum=0)
    sft_num_train_epochs: int = option(3, "passes over the demonstrations", minimum=1)
    vllm_url: str = option("http://127.0.0.1:8000", "the vLLM server of rollout_engine=vllm")
    importance_cap: float | None = option(
        None, "C of importance weights min(pi_old / mu, C), mu being what sampled; absent: none", above=0
    )
    save_rollouts: str | None = option(None, "a folder to write every rollout to")
    from_rollouts: str | None = option(None, "a folder of saved rollouts to train on in place of sampling")
    fsdp: bool = option(False, "weights cut over the processes, of all roles and in SFT; for full fine-tuning")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a configuration file; errors name the file and, for bad syntax, the line."""
    import yaml

    try:
        text = Path(path).read_bytes().decode()
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML, nor UTF-8 text {wrong_byte(error)}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise UserError(f"{path} is not valid YAML{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # of a character that YAML does not allow
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold 'name: value' lines, got a {type(content).__name__}")
    mapping: Any = yaml.compose(text, yaml.SafeLoader)
    names = [name.value for name, _ in mapping.value]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:  # YAML forbids it, and PyYAML takes the last
        raise UserError(f"{path} has {twice!r} more than once: keep one")
    return content


def fields_and_types(config: type[SRPPOConfig]) -> list[tuple[dataclasses.Field, Any]]:
    """Fields of a configuration with their resolved types, in order."""
    hints = typing.get_type_hints(config)
    return [(field, hints[field.name]) for field in dataclasses.fields(config)]


def coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the field's type, or an error that names the field. YAML reads 3e-6 as text, so text may be a
    number."""
    if isinstance(hint, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        return value
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return [coerce(name, item, typing.get_args(hint)[0]) for item in items]
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise UserError(f"{name} must be true or false; got {value!r}")
    if hint is str:
        if not isinstance(value, str):
            raise UserError(f"{name} must be text; got {value!r}")
        return os.path.expanduser(value)  # no shell does it in a YAML file, nor behind a flag's "="
    if isinstance(value, bool):
        raise UserError(f"{name} must be a number; got {value!r}")
    try:
        number = hint(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be {'a whole number' if hint is int else 'a number'}; got {value!r}") from None
    if hint is int and float(value) != number:
        raise UserError(f"{name} must be a whole number; got {value!r}")
    return number


def check_range(field: dataclasses.Field, number: float) -> None:
    if not math.isfinite(number):
        raise UserError(f"{field.name} must be a finite number; got {number}")
    limits: dict[str, float] = field.metadata["limits"]
    if not all(HOLDS[word](number, bound) for word, bound in limits.items()):
        raise UserError(f"{field.name} must be {' and '.join(f'{w} {b}' for w, b in limits.items())}; got {number}")
