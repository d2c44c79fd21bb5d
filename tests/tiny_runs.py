"""Tiny SRPPO runs that several test files share: models on disk made once, configurations, rollouts written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from srppo import PipelineConfig, SRPPOConfig
from srppo import sft as sft_module
from srppo import trainer as trainer_module
from srppo.commands import quiet_libraries
from srppo.console import Console
from srppo.data import Example, prepare
from srppo.plots import plot_history
from srppo.ppo import Learner
from srppo.roles import Role, Roles, build_roles
from srppo.rollout import Rollout, collate
from srppo.sft import run_sft
from srppo.trainer import SRPPOTrainer

STOPS = list(range(0, 260, 3))  # a third of all tokens ends a completion, so that random models stop now and then
ROWS = [{"prompt": f"{text}:", "completion": text[::-1]} for text in ("ab", "cde", "fghi", "j", "klm", "nopqr")]
QUIET = Console(quiet=True)

quiet_libraries()


@dataclass(frozen=True)
class TinyModels:
    """Folders of a base model and of the two kinds of SFT model, made by ``run_sft`` on ``ROWS``."""

    base: str
    sft: str
    adapter: str


_made: dict[str, TinyModels] = {}


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    if "llama" not in _made:  # both conftest files import this fixture; the models are made once all the same
        folder = tmp_path_factory.mktemp("models")
        base = save(tiny_model("llama"), folder / "base")
        tokenizer = tiny_tokenizer()
        rows = examples(ROWS)
        made = {}
        for name, use_peft in (("sft", False), ("adapter", True)):
            args = config(folder, base_model_name_or_path=base, use_peft=use_peft, sft_learning_rate=1e-2, lora_r=4)
            with without_plots():
                run_sft(args, train_dataset=rows, output_dir=folder / name, tokenizer=tokenizer, console=QUIET)
            made[name] = str(folder / name)
        _made["llama"] = TinyModels(base, **made)
    return _made["llama"]


@contextmanager
def plotting(function: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer_module, sft_module):
            patch.setattr(module, "plot_history", function)
        yield


def with_plots() -> AbstractContextManager[None]:
    return plotting(plot_history)


def without_plots() -> AbstractContextManager[None]:
    return plotting(lambda *_: [])


@pytest.fixture(scope="module", autouse=True)
def lean_runs() -> Iterator[None]:
    """One thread, as models this small gain nothing from a second one, and no plots, which take most of a tiny run's
    time; the tests that look at plots use :func:`with_plots`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with without_plots():
        yield
    torch.set_num_threads(threads)


def config(folder: Path, **settings: Any) -> PipelineConfig:
    """Two iterations of four prompts and up to five tokens, with a learning rate that moves a tiny model."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "max_completion_length": 5,
        "max_prompt_length": 24,
        "learning_rate": 1e-3,
        "stop_token_ids": STOPS,
        "report_to": ["none"],
        "log_completions": 0,
        "sft_num_train_epochs": 2,
    }
    return PipelineConfig(**{**defaults, **settings})


def examples(rows: Iterable[Mapping[str, Any]], stops: Sequence[int] = (0,)) -> list[Example]:
    return prepare(list(rows), tiny_tokenizer(), stop_token_ids=stops, max_prompt_length=64, max_completion_length=64)


def trainer(models: TinyModels, folder: Path, *, kind: str = "sft", rows: Any = None, **settings: Any) -> SRPPOTrainer:
    """A trainer on one of the models on disk; ``trainer`` keywords that are no settings go to the constructor."""
    names = ("callbacks", "reward_fn", "eval_dataset", "peft_config", "engine", "importance_cap", "save_rollouts",
             "from_rollouts", "fsdp")  # fmt: skip
    own = {name: settings.pop(name) for name in names if name in settings}
    settings.setdefault("use_peft", kind == "adapter")
    rows = examples(ROWS) if rows is None else rows
    path = {"sft": models.sft, "adapter": models.adapter}[kind]
    return SRPPOTrainer(path, models.base, config(folder, **settings), rows, console=QUIET, **own)


def role(model: PreTrainedModel, name: str = "policy", **options: Any) -> Role:
    return Role(name, model, **options)


def rollout(
    prompts: Sequence[Sequence[int]] = ((10, 11, 12), (13,), (14, 15, 16, 17, 18), (19, 20)),
    completions: Sequence[Sequence[int]] = ((30, 31, 0), (0,), (32, 33, 34, 35), (36, 0)),
) -> Rollout:
    """Prompts and completions of different lengths: one of a single token, and the third one cut."""
    return collate(prompts, completions, pad_token_id=1, stop_token_ids=[0])


def widened(given: Rollout, left: int, right: int, *, filler: int = 7) -> Rollout:
    """The same rollout with further padding, filled with a token that means something."""
    pad = lambda x, value: torch.nn.functional.pad(x, (left, right), value=value)  # noqa: E731
    return Rollout(
        pad(given.input_ids, filler),
        pad(given.attention_mask, 0),
        torch.nn.functional.pad(given.completion_mask, (0, right), value=False),
        given.truncated,
        given.prompt_length + left,
    )


def full_roles(args: SRPPOConfig, kind: str = "llama", *, sft_seed: int = 1, **options: Any) -> Roles:
    """Roles over two random models in memory, with everything separate (full fine-tuning)."""
    return build_roles(args, tiny_model(kind, **options), tiny_model(kind, seed=sft_seed, **options))


def learners(roles: Roles, args: SRPPOConfig) -> tuple[Learner, Learner]:
    return (
        Learner.create(roles.policy, args, args.learning_rate, args.max_steps),
        Learner.create(roles.critic, args, args.learning_rate, args.max_steps),
    )


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
