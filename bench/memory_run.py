#!/usr/bin/env python3
"""A process of its own: one iteration of the trainer in one setting, and the memory that it took, as JSON.

``bench/memory.py`` starts it, first to write the models of a setting to a folder, then once for each setting::

    python bench/memory_run.py prepare '{"model": "qwen2.5-0.5b", ...}' FOLDER
    python bench/memory_run.py run     '{"model": "qwen2.5-0.5b", ...}' FOLDER

The iteration is :meth:`srppo.SRPPOTrainer.iterate`, rollout included, with two PPO epochs: the second one is the first
with the optimizers' state in memory. Weights are random, in the shapes of published models.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench.method import reset_resident_peak, resident, trim_heap

# Published shapes: SmolLM2-135M, SmolLM2-360M and Qwen2.5-0.5B, heads tied to the embeddings. The small ones are for
# tests: weights that outweigh a short batch, and a vocabulary that outweighs both.
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "smollm2-360m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 960, "intermediate_size": 2560,
                     "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5},
    "qwen2.5-0.5b": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                     "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
    "small": {"model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048,
              "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    "wide": {"model_type": "llama", "vocab_size": 131072, "hidden_size": 16, "intermediate_size": 32,
             "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip
ROLES = {
    "shared": "LoRA: one model, with SFT, policy and value adapters",
    "two": "LoRA: base, and a full SFT model with policy and value adapters",
    "separate": "LoRA: a model for each of the four roles, with an adapter on three",
    "full": "full fine-tuning: a model for each of the four roles, policy and critic trained",
}
HEADS = {"srppo": "fused ops, as shipped", "logits": "plain torch on materialised logits"}
HEAPS = {"default": "glibc as it is", "mapped": "MALLOC_MMAP_THRESHOLD_=131072: freed buffers go back at once"}
EPOCHS = 2


def shape_of(name: str) -> dict[str, Any]:
    """Everything that a configuration of transformers needs to know of one of MODELS."""
    return {
        **MODELS[name], "tie_word_embeddings": True, "max_position_embeddings": 8192, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """One configuration of a run. A micro-batch is the whole batch unless ``micro_batch`` says otherwise."""

    model: str
    dtype: str = "bfloat16"
    roles: str = "shared"
    head: str = "srppo"
    batch: int = 8  # sequences of a rollout, and of an optimizer step
    micro_batch: int = 8  # sequences in one forward and backward
    prompt: int = 64
    completion: int = 256
    checkpointing: bool = True
    heap: str = "default"  # of a CPU

    @property
    def parameters(self) -> int:
        """Weights of the model, without norms and biases."""
        shape = MODELS[self.model]
        hidden, heads, pairs = (shape[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        attention = 2 * hidden * hidden * (1 + pairs / heads)
        layer = int(attention) + 3 * hidden * shape["intermediate_size"]
        return shape["vocab_size"] * hidden + shape["num_hidden_layers"] * layer

    @property
    def needs(self) -> int:
        """Bytes without which it is not worth a try: weights, what trains them, and logits; no activations."""
        weight = 4 if self.dtype == "float32" else 2
        copies = {"shared": 1, "two": 2}.get(self.roles, 4)
        trained = 2 * 12 * self.parameters if self.roles == "full" else 0
        rows = self.micro_batch * self.completion if self.head == "logits" else 0
        return copies * weight * self.parameters + trained + rows * MODELS[self.model]["vocab_size"] * (weight + 12)

    @property
    def source(self) -> str:
        """The SFT model that the trainer is given: an adapter where roles share or copy a base, else a full model."""
        return "sft-full" if self.roles in ("two", "full") else "sft-adapter"


def prepare(setting: Setting, folder: Path) -> None:
    """Writes the base model, an SFT adapter, and the two merged; in bf16, as such models are published."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from srppo.models import lora_config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape_of(setting.model)), dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tuned = get_peft_model(model, lora_config(configuration(setting, folder), model))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)  # at 0, as B starts, SFT would be the base model
    tuned.save_pretrained(folder / "sft-adapter")
    tuned.merge_and_unload().save_pretrained(folder / "sft-full")


def configuration(setting: Setting, folder: Path) -> Any:
    from srppo import SRPPOConfig

    return SRPPOConfig(
        base_model_name_or_path=str(folder / "base"), dtype=setting.dtype, use_peft=setting.roles != "full",
        output_dir=str(folder / "run"), max_steps=1, num_ppo_epochs=EPOCHS, learning_rate=1e-5,
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=setting.batch // setting.micro_batch,
        gradient_checkpointing=setting.checkpointing, max_prompt_length=setting.prompt,
        max_completion_length=setting.completion, report_to=["none"], log_completions=0, stop_token_ids=[0],
    )  # fmt: skip


def separate_roles(args: Any, base: str, sft: str, peft_config: Any = None) -> Any:
    """What :func:`srppo.roles.build_roles` gives, with a copy of the base model under each adapter.

    Models of one folder and its dtype would share the pages of its file; models of four folders would not, and a GPU
    has no such pages. So each copy's weights are its own.
    """
    from srppo.models import attach_adapter, disable_dropout, freeze, load_model
    from srppo.roles import Role, Roles, laid_out_alike, new_value_head, settle

    def copy() -> Any:
        model = load_model(base, args)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        freeze(model)
        disable_dropout(model)
        return model

    def model(adapter: str) -> Any:
        return attach_adapter(copy(), sft, adapter)

    pair = laid_out_alike(Role("base", copy()), Role("sft", model("sft"), "sft"))
    layout = pair[0].layout
    policy = Role("policy", model("policy"), "policy", trainable=True, layout=layout)
    critic = Role("critic", model("critic"), "critic", trainable=True, layout=layout,
                  value_head=new_value_head(policy.causal_lm))  # fmt: skip
    roles = Roles(*pair, policy, critic)
    settle(args, roles)
    return roles


@contextmanager
def as_set(setting: Setting) -> Iterator[None]:
    """The trainer with the roles and the head of a setting in place of its own."""
    from bench.training_step import logits_logprob, logits_loss, vocabulary
    from srppo import trainer

    with ExitStack() as stack:
        if setting.head == "logits":
            stack.enter_context(vocabulary(logits_logprob, logits_loss))
        if setting.roles == "separate":
            stack.enter_context(mock.patch.object(trainer, "build_roles", separate_roles))
        yield


class Phases:
    """Takes the place of a progress bar: what a phase of the run holds at most, in bytes, by its name."""

    def __init__(self) -> None:
        self.now, self.peaks = "loading", dict[str, int]()
        self.begin("loading")

    def begin(self, name: str) -> None:
        self.now = name
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            reset_resident_peak()  # where that is refused, each phase counts those before it

    def end(self) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
        self.peaks[self.now] = max(peak, self.peaks.get(self.now, 0))

    def status(self, text: str) -> None:
        self.end()
        self.begin(text)

    def advance(self, *_: Any, **__: Any) -> None:
        """Nothing to draw."""


def held() -> int:
    """Bytes that are in use now: on the GPU if there is one, else resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    trim_heap()
    return resident("VmRSS")


def run(setting: Setting, folder: Path) -> dict[str, Any]:
    """Loads the models and trains one iteration. Sizes are in bytes; ``before`` is what the process held before it."""
    from srppo import SRPPOTrainer
    from srppo.console import Console
    from srppo.data import Example
    from srppo.demo.model import build_tokenizer
    from srppo.memory import estimate

    args, tokens = configuration(setting, folder), range(1, 1 + setting.prompt)
    prompts = [Example([token + row for token in tokens], None, None, "") for row in range(setting.batch)]
    base, sft = str(folder / "base"), str(folder / setting.source)
    told = estimate(args, base, sft, longest_prompt=setting.prompt)
    before, phases = held(), Phases()
    with as_set(setting):
        trainer = SRPPOTrainer(
            sft, base, args, prompts, processing_class=build_tokenizer(), console=Console(quiet=True)
        )
        models = held()
        metrics = trainer.iterate(phases)  # type: ignore[arg-type]
        phases.end()
    return {
        "before": before,
        "models": models,
        "peaks": phases.peaks,
        "estimate": told.peak if told is not None else 0,
        "metrics": {name: metrics[name] for name in ("objective/scores", "loss/policy_avg", "loss/value_avg")},
        "tokens": metrics["num_tokens"],
    }


def warm_up(folder: Path) -> None:
    """One iteration of a tiny model: what libraries load and keep at first use is no part of the setting."""
    small = Setting("wide", batch=1, micro_batch=1, prompt=2, completion=2)
    prepare(small, folder)
    run(small, folder)


def main(arguments: list[str]) -> int:
    """``prepare`` or ``run`` with a setting as JSON and a folder. Returns 0; 1 where memory did not suffice; 2 for a
    model that it does not know."""
    import tempfile

    what, text, folder = arguments
    setting = Setting(**json.loads(text))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # a setting that is too large shall end alone
    if what == "prepare":
        prepare(setting, Path(folder))
        return 0
    if setting.model not in MODELS:
        print(f"unknown model {setting.model!r}; known: {', '.join(MODELS)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as tiny:
        warm_up(Path(tiny))
    try:
        print(json.dumps({**dataclasses.asdict(setting), **run(setting, Path(folder))}))
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"out of memory: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
