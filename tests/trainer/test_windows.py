"""Windows, pretended: what the trainer imports, writes and renames is without what that system refuses. It was not run
there."""

from __future__ import annotations

import builtins
import errno
import fcntl
import importlib
import importlib.util
import os
import pkgutil
import shutil
import sys
import types
from pathlib import Path

import psutil
import pytest
from safetensors import SafetensorError
from tiny_runs import QUIET, ROWS, config, examples, read_jsonl, trainer

import srppo
from srppo import UserError, checkpoint, metrics, run_sft

ABSENT = ("fcntl", "grp", "pwd", "resource", "termios")


@pytest.fixture
def windows(monkeypatch):
    """Refuses to open a folder, to sync what was opened for reading alone, to rename a folder to one that is there or
    while a file in it is open, and to lock."""
    opens, syncs, replaces = os.open, os.fsync, os.replace

    def refused(path, why: str):
        return PermissionError(errno.EACCES, why, str(path))

    def open_file(path, *arguments, **options):
        if Path(path).is_dir():
            raise refused(path, "a folder was opened")
        return opens(path, *arguments, **options)

    def sync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "a file was synced that was opened for reading alone")
        syncs(descriptor)

    def replace(old, new):
        if Path(new).is_dir() or (Path(old).is_dir() and Path(new).exists()):
            raise refused(new, "a folder was renamed to what is there")
        if any(Path(file.path).is_relative_to(Path(old).resolve()) for file in psutil.Process().open_files()):
            raise refused(old, "what was renamed is in use")
        replaces(old, new)

    monkeypatch.setattr(checkpoint, "WINDOWS", True)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # rmtree opens folders with them
    monkeypatch.setattr(shutil, "_rmtree_impl", shutil._rmtree_unsafe, raising=False)  # chosen at import from 3.14 on
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setitem(sys.modules, "fcntl", None)


def test_every_module_is_imported_without_what_windows_has_not(monkeypatch):
    names = [
        found.name for found in pkgutil.walk_packages(srppo.__path__, "srppo.") if "integrations" not in found.name
    ]
    specs = [importlib.util.find_spec(importlib.import_module(name).__name__) for name in names]
    imports = builtins.__import__

    def without(name, given=None, *rest, **options):
        if name in ABSENT and (given or {}).get("__name__", "").startswith("srppo"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imports(name, given, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for spec in specs:
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))  # once more, and apart from the one in use
    assert {"srppo.metrics", "srppo.checkpoint", "srppo.commands", "srppo.demo.run"} <= set(names)


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_memory_is_measured_without_proc(monkeypatch, system):
    process = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=3 * 2**29))
    usage = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: types.SimpleNamespace(ru_maxrss=3 * 2**29))
    monkeypatch.setattr(metrics.Path, "exists", lambda *_, **__: False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setitem(sys.modules, "resource", usage if system == "darwin" else None)
    monkeypatch.setitem(sys.modules, "psutil", types.SimpleNamespace(Process=lambda: process))
    assert metrics.peak_memory_gib() == 1.5


def test_a_run_is_written_and_resumed(windows, tiny_models, tmp_path):
    options = {"save_steps": 1, "log_completions": 1, "save_rollouts": tmp_path / "rollouts"}
    options |= {"report_to": ["tensorboard"], "eval_dataset": examples(ROWS)}
    first = str(tmp_path / "run" / "checkpoint-1")
    trainer(tiny_models, tmp_path, max_steps=1, **options).train()
    for _ in range(2):  # the second time over what the first has written
        resumed = trainer(tiny_models, tmp_path, resume_from_checkpoint=first, **options)
        assert resumed.train()["step"] == 2
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"best", "checkpoint-1", "checkpoint-2", "completions", "model.safetensors", "tensorboard"}
    assert [entry["step"] for entry in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert not list(tmp_path.rglob(".writing-*"))


def test_sft_is_written_to_an_empty_folder(windows, tiny_models, tmp_path):
    (tmp_path / "sft").mkdir()
    args = config(tmp_path, base_model_name_or_path=tiny_models.base, report_to=["tensorboard"])
    run_sft(args, train_dataset=examples(ROWS), output_dir=tmp_path / "sft", console=QUIET)
    assert (tmp_path / "sft" / "model.safetensors").is_file() and (tmp_path / "sft" / "tensorboard").is_dir()


def test_a_run_that_is_refused_leaves_nothing(windows, tmp_path):
    folder = tmp_path / "new" / "run"
    with checkpoint.claimed(folder):
        with checkpoint.claimed(folder):
            pass
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())


def test_what_a_virus_scanner_reads_is_moved_when_it_is_done(windows, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    reads = (tmp_path / "old" / "weights").open("w")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            reads.close()

    monkeypatch.setattr(checkpoint.time, "sleep", sleep)
    checkpoint.move(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new" / "weights").is_file() and len(waited) == 2
    with (tmp_path / "new" / "weights").open(), pytest.raises(PermissionError):
        checkpoint.move(tmp_path / "new", tmp_path / "never")


def test_an_old_checkpoint_in_which_a_file_is_open_stays_and_the_run_goes_on(windows, tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state").touch()
    unlink = os.unlink

    def refused(path, **options):
        raise PermissionError(errno.EACCES, "a file is in use", str(path))

    monkeypatch.setattr(os, "unlink", refused)
    checkpoint.keep_newest(tmp_path, 1, 2)
    monkeypatch.setattr(os, "unlink", unlink)
    checkpoint.keep_newest(tmp_path, 1, 2)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_a_folder_lets_in_who_may_be_in_the_one_around_it(windows, tmp_path, monkeypatch):
    modes, mkdir = [], os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, mode=0o777, **options: modes.append(mode) or mkdir(path, mode))
    with checkpoint.temporary_folder(tmp_path):
        pass
    assert modes[-1] == 0o777


@pytest.mark.parametrize("number", [39, 112])
def test_a_full_disk_is_told_by_windows_own_numbers(windows, tmp_path, number):
    with pytest.raises(OSError, match="No space left") as caught, checkpoint.failed_writes(tmp_path):
        raise SafetensorError(f"Error while serializing: I/O error: There is no room (os error {number})")
    assert caught.value.errno == errno.ENOSPC


def test_a_drive_that_is_not_there_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"output_dir .*drive.*run cannot be written"):
        checkpoint.require_writable(tmp_path / "drive" / "run", "output_dir")
