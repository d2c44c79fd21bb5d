"""Writing to disk so that nothing is ever half there, and reading it back.

A folder is written under a temporary name beside its place, synced, and renamed; a file likewise. Models are stored as
transformers and peft store them, in safetensors; optimizer state is read with ``weights_only=True``, so that nothing
that is loaded can run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickletools
import re
import secrets
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
CHECKSUMS = "checksums.json"
STATE_KEYS = {"policy", "critic", "optimizers", "schedulers", "sampler", "moments", "guard", "controller", "generator",
              "rng", "cuda_rng", "step", "episode", "num_tokens", "log_history"}  # fmt: skip

CLAIMED: set[Path] = set()  # by this process
WINDOWS = sys.platform == "win32"


def sync(path: Path) -> None:
    """Asks the disk to hold a file or a folder's entries before we go on. Windows opens no folder, and holds no file
    that was opened for reading alone."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(old: Path, new: Path) -> None:
    """Renames, over a file that is there. On Windows no file may be open in what moves, and what was just written is
    read by virus scanners and indexers: it is asked again for some seconds."""
    for seconds in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2) if WINDOWS else ():
        try:
            return os.replace(old, new)
        except PermissionError:
            time.sleep(seconds)
    os.replace(old, new)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder beside what will be written; gone at the end, whatever happened."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".writing-{secrets.token_hex(8)}"  # named first: Ctrl-C may come while it is made
    try:
        # 0o700 shuts others out on Windows for good: what is moved out of the folder keeps whom it lets in
        folder.mkdir(mode=0o777 if WINDOWS else 0o700)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # or while it is removed
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` all at once if the block ends well; ``target`` must be new or empty,
    or with ``replace`` what was there goes. An empty one that no folder can be renamed to gets the files one by one."""
    if target.is_dir() and not replace and is_fixed(target):
        with temporary_folder(target) as folder:
            yield folder
            publish(folder, target)
        return
    with temporary_folder(target.parent) as folder, temporary_folder(target.parent) as old:
        yield folder
        os.chmod(folder, 0o755)
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        aside = old / target.name
        try:
            if replace and target.is_dir():
                move(target, aside)
            elif target.is_dir():
                target.rmdir()  # Windows renames no folder to one that is there, empty or not
            move(folder, target)
        except BaseException:  # between the two: ``old`` goes at the end, and all that there is would go with it
            if aside.exists() and not target.exists():
                move(aside, target)
            if not replace and target.is_dir() and any(target.iterdir()):
                raise UserError(f"{target} was new or empty and is not any more: another run wrote to it") from None
            raise
        sync(target.parent)


def is_fixed(folder: Path) -> bool:
    """Whether a folder must stay where it is: a link, a mounted disk, the working directory, or in one that may not
    be written to."""
    stays = folder.is_symlink() or os.path.ismount(folder) or folder.samefile(Path.cwd())
    return stays or not os.access(folder.resolve().parent, os.W_OK)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps runs of other processes out of a folder, where the file system has locks of folders, as Windows has not; a
    block inside of another is fine. The system lets go of it when a process ends, however that comes about."""
    place, descriptor = folder.resolve(), None
    new = [path for path in (place, *place.parents) if not path.exists()]
    if place in CLAIMED:
        yield
        return
    with suppress(OSError):  # what cannot be a folder is refused with the reason by the checks that follow
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            import fcntl

            if descriptor is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output_dir {folder} is in use by another run: end that one, or choose another folder"
            ) from None
        except (ImportError, OSError):  # a system or a file system without such locks
            pass
        CLAIMED.add(place)
        yield
    finally:
        CLAIMED.discard(place)
        if descriptor is not None:
            os.close(descriptor)
        with suppress(OSError):  # a run that was refused leaves nothing
            for path in new:
                path.rmdir()


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
        if WINDOWS and number in (39, 112):  # its own numbers of a full disk
            number = errno.ENOSPC
        raise OSError(number, os.strerror(number), str(folder)) from error


def write_text(path: Path, text: str) -> None:
    """Replaces a text file all at once."""
    with temporary_folder(path.parent) as folder:
        new = folder / path.name
        new.write_text(text, encoding="utf-8")
        sync(new)
        move(new, path)


def to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def publish(folder: Path, target: Path) -> None:
    """Moves a model's files into ``target``, configuration last: what is not complete does not load."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda p: p.name in ("config.json", "adapter_config.json")):
        for inner in (*path.rglob("*"), path):
            sync(inner)
        if path.is_dir():  # a tokenizer's further chat templates: no folder is renamed to one with files in it
            shutil.rmtree(target / path.name, ignore_errors=True)
        move(path, target / path.name)
    sync(target)


def require_new_folder(path: Path, option: str = "output_dir", *, hint: str = "") -> None:
    """Stops before anything is computed if a run would write over another; ``hint`` ends the message."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file: choose a folder")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{option} {path} is a link to a folder that is not there: make it, or choose another")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"{option} {path} exists and is not empty: choose a new folder, or move the old run away (nothing was "
            f"touched){hint}"
        )
    require_writable(path, option)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest folder above it that is there; the path where a drive is not."""
    return next((p for p in (path, *path.resolve().parents) if p.exists()), path)


def require_writable(path: Path, option: str) -> None:
    """Stops before anything is computed if nothing could be written to ``path`` in the end."""
    place = nearest_existing(path)
    try:
        tempfile.TemporaryDirectory(prefix=".writing-", dir=place).cleanup()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written, {place}: {error.strerror}") from None


def require_file(path: str | None) -> None:
    """The same of a file that results go to; absent, they go to standard output."""
    if path is not None:
        if Path(path).is_dir():
            raise UserError(f"output_file {path} is a folder: name a file in it")
        require_writable(Path(path).resolve().parent, "output_file")


def require_fresh_output(path: Path, *, again: bool = False, rollouts: str | Path | None = None) -> None:
    """Stops unless ``path`` is new or empty; what this run's own SFT stage wrote there may be there.

    Args:
        again: what a run that was killed before its first checkpoint leaves behind may be there too.
        rollouts: the folder that such a run saves its rollouts to, which may lie in ``path``.
    """
    allowed = {"sft"}
    if again:
        if rollouts is not None and Path(rollouts).resolve().is_relative_to(path.resolve()):
            allowed |= {*Path(rollouts).resolve().relative_to(path.resolve()).parts[:1]}
        allowed |= {
            "srppo_config.yaml",
            "metrics.jsonl",
            "tensorboard",
            "wandb",
            "completions",
            "best",
            "rollout-adapters",
        }
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if not names or names - allowed:
        require_new_folder(path)


def require_space(path: Path, needed: int) -> None:
    """Stops before training if the result would not fit on the disk, or must not be written there."""
    require_writable(path, "output_dir")
    free = shutil.disk_usage(nearest_existing(path)).free
    if free < needed:
        raise UserError(
            f"output_dir {path}: the run writes about {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free: "
            f"make room, "
            "or choose another output_dir"
        )


def save_model(
    role: Role, tokenizer: PreTrainedTokenizerBase, folder: Path, state: Mapping[str, Any] | None = None
) -> None:
    """Writes a role as ``PeftModel`` or ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it.

    Args:
        state: the whole weights of a sharded model, see :func:`srppo.sharding.whole_state`.
    """
    save_weights(role, folder, state)
    tokenizer.save_pretrained(str(folder))


def save_weights(role: Role, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Writes a role's adapter or model without a tokenizer."""
    if is_peft(role.model):
        assert role.adapter is not None, "a role with its adapter off has nothing to save"
        with temporary_folder(folder.parent) as scratch, failed_writes(folder):
            role.model.save_pretrained(  # type: ignore[operator]
                str(scratch), selected_adapters=[role.adapter], save_embedding_layers=False
            )
            inner = scratch / role.adapter if (scratch / role.adapter).is_dir() else scratch
            for path in inner.iterdir():
                if path.name != "README.md":  # peft's empty model card; ours says what was trained
                    move(path, folder / path.name)
    else:
        with failed_writes(folder):
            role.causal_lm.save_pretrained(str(folder), state_dict=state)


def model_bytes(role: Role) -> int:
    """About what :func:`save_model` writes, in bytes."""
    parameters = [p for _, p in role.parameters()] if is_peft(role.model) else list(role.model.parameters())
    return sum(p.numel() * p.element_size() for p in parameters)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    policy: Role,
    tokenizer: PreTrainedTokenizerBase,
    tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
) -> None:
    """``checkpoint-N``: the policy as a model of its own, and everything that resuming needs.

    Args:
        weights: the whole weights of a sharded policy.
    """
    with atomic_folder(folder, replace=True) as writing:  # a resumed run comes by its later checkpoints again
        save_model(policy, tokenizer, writing, weights)
        with failed_writes(folder):
            torch.save(dict(tensors), writing / STATE_FILE)
        (writing / "trainer_state.json").write_text(to_json(state), encoding="utf-8")
        digests = {name: file_digest(writing / name) for name in (STATE_FILE, "trainer_state.json")}
        (writing / CHECKSUMS).write_text(to_json(digests), encoding="utf-8")


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Damaged(Exception):
    """A checkpoint that cannot be read, with the reason."""


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and state of a checkpoint.

    Raises:
        Damaged: a file is missing, cut, or not what was written.
        UserError: a file would run code.
    """
    try:
        for name, digest in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items():
            if file_digest(folder / name) != digest:  # torch reads a file with flipped bits without a word
                raise ValueError(f"{name} is not what was written: its checksum differs")
        tensors = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        missing = STATE_KEYS - {*tensors, *state}
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:  # torch.load raises whatever its readers raise
        if names := pickled_code(folder / STATE_FILE):
            raise UserError(
                f"checkpoint {folder} is refused: loading its {STATE_FILE} would run code ({', '.join(names)}); a "
                "checkpoint holds tensors and plain values only, so somebody else made this one"
            ) from None
        raise Damaged(str(error).strip().split("\n", 1)[0] or type(error).__name__) from None
    return tensors, state


def pickled_code(path: Path) -> list[str]:
    """The functions and classes that unpickling a file would call; none where it is no whole pickle. Runs nothing."""
    names: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                data = archive.read(member)
        else:
            data = path.read_bytes()
        texts: list[str] = []
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif operation.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif isinstance(argument, str):
                texts.append(argument)
    except Exception:  # pickletools raises whatever it trips over
        return []
    return [name for name in names if not name.startswith(("torch.", "torch._utils.", "collections.OrderedDict"))]


def find_checkpoint(
    wanted: str, output_dir: Path, warn: Callable[[str], None]
) -> tuple[Path, dict[str, Any], dict[str, Any]] | None:
    """The checkpoint to go on from, with its tensors and state: the one wanted, or if it is damaged the newest whole
    one before it.

    Args:
        wanted: a ``checkpoint-N`` folder, or ``latest`` for the newest in ``output_dir``.
        warn: told of each damaged checkpoint.

    Returns:
        None where ``latest`` is wanted and there is no checkpoint yet.

    Raises:
        UserError: the folder does not exist, nothing whole is left, or a checkpoint would run code.
    """
    if wanted == "latest":
        candidates = current_checkpoints(output_dir)
        if not candidates:
            return None
    else:
        folder = Path(wanted)
        require_checkpoint(folder)
        candidates = [path for path in checkpoints(folder.parent) if step_of(path) < step_of(folder)] + [folder]
    while candidates:
        folder = candidates.pop()
        try:
            return folder, *load_checkpoint(folder)
        except Damaged as error:
            instead = f"trying {candidates[-1].name}" if candidates else "and there is none before it"
            warn(f"checkpoint {folder} cannot be read ({error}); {instead}")
    raise UserError(f"no whole checkpoint was found from {wanted} back: start again in a new output_dir")


def require_checkpoint(folder: Path) -> None:
    """Stops if a checkpoint that was named is not there, or is another folder, such as that of the run."""
    if not folder.is_dir() or (step_of(folder) < 0 and not (folder / STATE_FILE).is_file()):
        place = folder if checkpoints(folder) else folder.parent
        names = ", ".join(path.name for path in checkpoints(place))
        raise UserError(
            f"resume_from_checkpoint: there is no checkpoint {folder}; in {place.absolute()} are: "
            f"{names or 'none'}; 'latest' is the newest in output_dir"
        )


def step_of(path: Path) -> int:
    """N of ``checkpoint-N``; -1 for another name."""
    name, _, number = path.name.rpartition("-")
    return int(number) if name == "checkpoint" and number.isdigit() else -1


def adopt_best(source: Path, output_dir: Path) -> bool:
    """Whether ``best/`` of the run in ``source`` is in ``output_dir``, where it is copied if that is another folder."""
    best = output_dir / "best"
    if not best.is_dir() and (source / "best").is_dir():
        with atomic_folder(best) as folder:
            shutil.copytree(source / "best", folder, dirs_exist_ok=True)
    return best.is_dir()


def sweep(output_dir: Path, rollouts: str | Path | None = None) -> None:
    """Clears up after a process that was killed while writing: what it had set aside goes back to its place, what was
    half written goes, also in the folder that it saved its rollouts to."""
    places = [output_dir, *(output_dir / name for name in ("completions", "rollout-adapters"))]
    places += [] if rollouts is None else [Path(rollouts)]
    for folder in [folder for place in places for folder in place.glob(".writing-*")]:
        for aside in folder.iterdir():
            if (
                aside.is_dir()
                and (aside.name == "best" or step_of(aside) >= 0)
                and not (output_dir / aside.name).exists()
            ):
                move(aside, output_dir / aside.name)
        shutil.rmtree(folder, ignore_errors=True)


def require_latest(output_dir: Path, rollouts: str | Path | None) -> None:
    """Clears up in the folder of a run that goes on from its latest checkpoint; where it has none yet, stops unless the
    run may begin there.

    Args:
        rollouts: see :func:`require_fresh_output`.
    """
    with claimed(output_dir):
        sweep(output_dir, rollouts)
    if not checkpoints(output_dir):
        require_fresh_output(output_dir, again=True, rollouts=rollouts)


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((p for p in output_dir.glob("checkpoint-*") if p.is_dir() and step_of(p) >= 0), key=step_of)


def current_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of the run that ``metrics.jsonl`` tells of, oldest first.

    Later ones may be left over from before the run was resumed at an earlier one: the metrics then lack the last
    iteration of such a checkpoint, or have it with other numbers (times, if nothing else). All of them where that
    cannot be told.
    """
    found = checkpoints(output_dir)
    try:
        text = (output_dir / "metrics.jsonl").read_text(encoding="utf-8")
        lines = text.splitlines()[: text.count("\n")]  # a process that was killed may have left a part of the last one
        metrics = {entry["step"]: entry for entry in map(json.loads, lines)}
    except (OSError, ValueError, KeyError, TypeError):
        return found

    def passed(path: Path) -> bool:
        try:
            last = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"][-1]
            return bool(last.items() <= metrics.get(last["step"], {}).items())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return True  # loading it says what is wrong with it

    return [path for path in found if not metrics or passed(path)] or found


def keep_newest(output_dir: Path, limit: int | None, step: int) -> None:
    """Removes the oldest checkpoints beyond ``limit``, just after that of ``step`` was written. Those of later steps
    are left over from before the run was resumed: they count as the oldest."""
    if limit is not None:
        found = checkpoints(output_dir)
        stale = [path for path in found if step_of(path) > step]
        for path in [*stale, *(path for path in found if path not in stale)][:-limit]:
            shutil.rmtree(path, ignore_errors=WINDOWS)  # where a file in it may be open: it goes the next time
