"""Writing to disk so that nothing is ever half there, and reading it back.

A folder is written under a temporary name beside its place, synced, and renamed; a file likewise. Models are stored as
transformers and peft store them, in safetensors; optimizer state is read with ``weights_only=True``, so that nothing
that is loaded can run code.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from srppo.errors import UserError
from srppo.models import is_peft
from srppo.roles import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_FILE = "training_state.pt"
STATE_KEYS = {"policy", "critic", "optimizers", "schedulers", "sampler", "moments", "guard", "controller", "generator",
              "rng", "cuda_rng", "step", "episode", "num_tokens", "log_history"}  # fmt: skip


def sync(path: Path) -> None:
    """Asks the disk to hold a file or a folder's entries before we go on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside what will be written; gone at the end, whatever happened."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".writing-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` all at once if the block ends well; ``target`` must be new or empty,
    or with ``replace`` what was there goes."""
    with temporary_folder(target.parent) as folder, temporary_folder(target.parent) as old:
        yield folder
        for path in folder.rglob("*"):
            sync(path)
        os.chmod(folder, 0o755)
        if replace and target.is_dir():
            os.replace(target, old / target.name)
        os.replace(folder, target)
        sync(target.parent)


@contextmanager
def failed_writes(folder: Path) -> Iterator[None]:
    """Turns what safetensors and torch raise when a write fails into the ``OSError`` that it was."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        told = re.search(r"os error (\d+)", str(error))
        if told is None and not (isinstance(error, RuntimeError) and "inline_container" in str(error)):
            raise
        # torch's zip writer notices a short write and keeps the reason to itself: nearly always the disk is full
        number = int(told.group(1)) if told else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(folder)) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a text file all at once."""
    with temporary_folder(path.parent) as folder:
        new = folder / path.name
        new.write_text(text, encoding="utf-8")
        sync(new)
        os.replace(new, path)


def to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def publish(folder: Path, target: Path) -> None:
    """Moves a model's files into ``target``, configuration last: what is not complete does not load."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda p: p.name in ("config.json", "adapter_config.json")):
        sync(path)
        os.replace(path, target / path.name)
    sync(target)


def require_new_folder(path: Path, option: str = "output_dir") -> None:
    """Stops before anything is computed if a run would write over another."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file: choose a folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"{option} {path} exists and is not empty: choose a new folder, or move the old run away (nothing was "
            f"touched)"
        )


def require_fresh_output(path: Path) -> None:
    """Stops unless ``path`` is new or empty; what this run's own SFT stage wrote there may be there."""
    if not path.is_dir() or {entry.name for entry in path.iterdir()} != {"sft"}:
        require_new_folder(path)


def require_space(path: Path, needed: int) -> None:
    """Stops before training if the result would not fit on the disk."""
    place = next(p for p in (path, *path.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"output_dir {path}: the run writes about {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free: "
            f"make room, "
            "or choose another output_dir"
        )


def save_model(role: Role, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a role as ``PeftModel`` or ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it."""
    if is_peft(role.model):
        assert role.adapter is not None, "a role with its adapter off has nothing to save"
        with temporary_folder(folder.parent) as scratch, failed_writes(folder):
            role.model.save_pretrained(  # type: ignore[operator]
                str(scratch), selected_adapters=[role.adapter], save_embedding_layers=False
            )
            inner = scratch / role.adapter if (scratch / role.adapter).is_dir() else scratch
            for path in inner.iterdir():
                if path.name != "README.md":  # peft's empty model card; ours says what was trained
                    os.replace(path, folder / path.name)
    else:
        with failed_writes(folder):
            role.causal_lm.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def model_bytes(role: Role) -> int:
    """About what :func:`save_model` writes, in bytes."""
    parameters = [p for _, p in role.parameters()] if is_peft(role.model) else list(role.model.parameters())
    return sum(p.numel() * p.element_size() for p in parameters)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, policy: Role, tokenizer: PreTrainedTokenizerBase, tensors: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """``checkpoint-N``: the policy as a model of its own, and everything that resuming needs."""
    with atomic_folder(folder, replace=True) as writing:  # a resumed run comes by its later checkpoints again
        save_model(policy, tokenizer, writing)
        with failed_writes(folder):
            torch.save(dict(tensors), writing / STATE_FILE)
        (writing / "trainer_state.json").write_text(to_json(state), encoding="utf-8")


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and state of a checkpoint; a damaged one is named, with those beside it."""
    try:
        tensors = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        missing = STATE_KEYS - {*tensors, *state}
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:  # torch.load raises whatever its readers raise
        others = ", ".join(path.name for path in checkpoints(folder.parent) if path != folder)
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise UserError(f"checkpoint {folder} cannot be read ({reason}); others: {others or 'none'}") from None
    return tensors, state


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def keep_newest(output_dir: Path, limit: int | None, step: int) -> None:
    """Removes the oldest checkpoints beyond ``limit``, just after that of ``step`` was written; those of later steps
    are left from before the run was resumed, and older still."""
    if limit is not None:
        found = checkpoints(output_dir)
        stale = [path for path in found if int(path.name.rpartition("-")[2]) > step]
        for path in [*stale, *(path for path in found if path not in stale)][:-limit]:
            shutil.rmtree(path)
