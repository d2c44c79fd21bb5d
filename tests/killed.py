"""Runs that kill themselves at a chosen moment: what :mod:`trainer.test_killed` starts in processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_runs import TinyModels, examples, trainer, without_plots

from srppo import checkpoint
from srppo.metrics import MetricsWriter
from srppo.trainer import SRPPOTrainer

SETTINGS: dict[str, Any] = {
    "max_steps": 3, "save_steps": 1, "save_total_limit": 1, "num_ppo_epochs": 1, "learning_rate": 3e-3,
}  # fmt: skip
ROWS = [{"prompt": f"{text}:", "completion": text} for text in ("ab", "cde", "fghi", "j")]


def run(models: TinyModels, folder: Path, **settings: Any) -> SRPPOTrainer:
    """The run that is killed, and resumed: three iterations, each with its checkpoint, of which one is kept."""
    return trainer(models, folder, eval_dataset=examples(ROWS), resume_from_checkpoint="latest", **SETTINGS, **settings)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(content: Any, path: Path) -> None:
    torch_save(content, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    die()


torch_save = torch.save


def nth(number: int, function: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, but ``instead`` of it the n-th time."""
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return (instead if calls == number else function)(*arguments, **options)

    return call


def before_renaming(name: str) -> Callable[..., None]:
    """``os.replace`` that dies just before the folder ``name`` comes to its place."""
    replace = os.replace

    def call(source: Any, target: Any) -> None:
        if Path(target).name == name and Path(source).name.startswith(".writing-"):
            die()
        replace(source, target)

    return call


# Name of the moment -> (what to patch, with what).
MOMENTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "writing metrics": (MetricsWriter, "write", nth(2, MetricsWriter.write, die)),
    "half of the state written": (torch, "save", nth(2, torch.save, half_a_file)),
    "before the second checkpoint is renamed": (os, "replace", before_renaming("checkpoint-2")),
    "removing the old checkpoint": (shutil, "rmtree", None),  # type: ignore[dict-item]  # made in the process
    "best has been set aside": (os, "replace", before_renaming("best")),
    "the final model": (checkpoint, "publish", die),
}


def removing(path: Any, *arguments: Any, **options: Any) -> None:
    """``shutil.rmtree`` that dies half-way through the first checkpoint."""
    if Path(path).name == "checkpoint-1":
        (Path(path) / checkpoint.STATE_FILE).unlink()
        die()
    rmtree(path, *arguments, **options)


rmtree = shutil.rmtree


def run_and_die(models: TinyModels, folder: Path, moment: str) -> None:
    """Ends by SIGKILL; returns only where the moment never came."""
    torch.set_num_threads(1)
    owner, name, patched = MOMENTS[moment]
    setattr(owner, name, patched or removing)
    with without_plots():
        run(models, folder).train()
