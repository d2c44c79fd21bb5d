"""``kill -9`` at any moment: the next run goes on from the last checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed
import pytest
import torch
from tiny_runs import read_jsonl, write_jsonl

from srppo import checkpoint

TIMES = ("time", "per_second", "perf/")


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMES)} for entry in history]


@pytest.fixture(scope="module")
def straight(tiny_models, tmp_path_factory):
    """The run that nobody kills: its history and final weights."""
    run = killed.run(tiny_models, tmp_path_factory.mktemp("straight"))
    run.train()
    return without_times(run.history), [p.detach().clone() for _, p in run.roles.policy.parameters()]


@pytest.fixture(scope="module")
def start():
    """Starts processes that have imported everything already. Forks of this one could not: it has run a backward."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    return context.Process


# After which iteration the next run starts, if not after the first. Where best/ is replaced depends on the run.
RESUMED = {"removing the old checkpoint": 2, "the final model": 3, "best has been set aside": None}


@pytest.mark.parametrize("moment", killed.MOMENTS)
def test_a_killed_run_goes_on_and_ends_alike(tiny_models, tmp_path, straight, start, moment):
    process = start(target=killed.run_and_die, args=(tiny_models, tmp_path, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"{moment}: the moment never came"
    folder = tmp_path / "run"
    saved = [path.name for path in checkpoint.checkpoints(folder)]

    run = killed.run(tiny_models, tmp_path)
    first: list[int] = []
    run.callbacks = [lambda _, step, __: first.append(step)]
    run.train()
    assert without_times(run.history) == straight[0], moment
    assert all(torch.equal(p, q) for (_, p), q in zip(run.roles.policy.parameters(), straight[1], strict=True))
    assert read_jsonl(folder / "metrics.jsonl") == run.history
    assert not list(folder.rglob(".writing-*"))
    assert (folder / "best" / "model.safetensors").is_file()
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["checkpoint-3"]
    if (done := RESUMED.get(moment, 1)) is not None:
        assert first == list(range(done + 1, 4)), f"checkpoints {saved}"


def test_the_same_command_again_finishes_what_was_killed(tiny_models, tmp_path):
    """A whole process, killed from outside, after its first checkpoint."""
    data = write_jsonl(tmp_path / "data" / "train.jsonl", killed.ROWS)
    command = [
        sys.executable, "-m", "srppo.cli", "train", "--base_model_name_or_path", tiny_models.base,
        "--sft_model_name_or_path", tiny_models.sft, "--dataset_name", data, "--output_dir", str(tmp_path / "run"),
        "--max_steps", "20", "--save_steps", "1", "--save_total_limit", "2", "--per_device_train_batch_size", "2",
        "--max_completion_length", "6", "--report_to", "none", "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    waited = time.monotonic() + 120
    while not checkpoint.checkpoints(tmp_path / "run") and process.poll() is None and time.monotonic() < waited:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended by itself"
    last = checkpoint.step_of(checkpoint.checkpoints(tmp_path / "run")[-1])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(f"checkpoint-{step} after iteration {step}" in done.stderr for step in (last, last + 1)), done.stderr
    assert [entry["step"] for entry in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 21))
