"""Checkpoints: resuming is as if nothing had happened, damage is named, and nothing that is loaded can run code."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import examples, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from srppo import UserError, checkpoint, distributed, ppo
from srppo.console import Console
from srppo.training_state import restore

TIMES = ("time", "per_second", "perf/")


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMES)} for entry in history]


def weights(run) -> dict[str, torch.Tensor]:
    return {
        f"{role.name}.{name}": p.detach().clone()
        for role in (run.roles.policy, run.roles.critic)
        for name, p in role.parameters()
    }


SETTINGS = {
    "max_steps": 4,
    "save_steps": 2,
    "reward_normalization": "running",
    "num_mini_batches": 2,
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.25,
    "lr_scheduler_type": "cosine",
}


@pytest.fixture(scope="module", params=["sft", "adapter"])
def straight(request, tiny_models, tmp_path_factory):
    """A run of four iterations with checkpoints after two and four, and its final weights."""
    folder = tmp_path_factory.mktemp("straight")
    run = trainer(tiny_models, folder, kind=request.param, **SETTINGS)
    run.train()
    return request.param, folder, run.history, weights(run)


def resume(tiny_models, folder: Path, source: Path, kind: str, **settings):
    return trainer(tiny_models, folder, kind=kind, resume_from_checkpoint=str(source), **{**SETTINGS, **settings})


def test_two_iterations_and_two_resumed_ones_equal_four_bit_for_bit(tiny_models, tmp_path, straight):
    kind, folder, history, final = straight
    torch.manual_seed(999)  # what the resuming process did before must not matter
    run, steps = resume(tiny_models, tmp_path, folder / "run" / "checkpoint-2", kind), []
    run.callbacks = [lambda _, step, metrics: steps.append(step)]
    run.train()
    assert steps == [3, 4], "it goes on from the checkpoint that was named, and not from the newest"
    assert without_times(run.history) == without_times(history)
    assert len(run.history) == 4
    got = weights(run)
    assert got.keys() == final.keys()
    for name, value in got.items():
        assert torch.equal(value, final[name]), name
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_resumed_iterations_are_not_the_first_ones_again(straight):
    """The comparison above could not tell if all iterations were alike."""
    _, _, history, _ = straight
    rewards = [entry["objective/scores"] for entry in history]
    assert len(set(rewards)) == 4


def test_a_checkpoint_is_a_model_that_loads_alone(straight):
    kind, folder, _, _ = straight
    saved = folder / "run" / "checkpoint-4"
    name = {"sft": "model.safetensors", "adapter": "adapter_model.safetensors"}[kind]
    final, last = load_file(folder / "run" / name), load_file(saved / name)
    assert final.keys() == last.keys()
    assert all(torch.equal(value, last[key]) for key, value in final.items())
    AutoTokenizer.from_pretrained(saved)
    if kind == "sft":
        AutoModelForCausalLM.from_pretrained(saved)


def test_resuming_in_place_writes_over_the_later_checkpoints_and_over_nothing_else(tiny_models, tmp_path):
    first = trainer(tiny_models, tmp_path, **SETTINGS)
    first.train()
    final, run_folder = weights(first), tmp_path / "run"
    (run_folder / "checkpoint-4" / "left-over").write_text("from the first time")
    (run_folder / "notes.txt").write_text("the user's")
    again = resume(tiny_models, tmp_path, run_folder / "checkpoint-2", "sft")
    again.train()
    assert all(torch.equal(value, final[name]) for name, value in weights(again).items())
    assert not (run_folder / "checkpoint-4" / "left-over").exists()
    assert (run_folder / "notes.txt").exists()
    assert not list(run_folder.glob(".writing-*"))
    third = resume(tiny_models, tmp_path, run_folder / "checkpoint-4", "sft")
    assert third.train()["step"] == 4  # nothing left to do


def test_resuming_into_another_runs_folder_is_refused_and_leaves_it_alone(tiny_models, tmp_path, straight):
    kind, folder, _, _ = straight
    other = tmp_path / "run"
    other.mkdir()
    (other / "metrics.jsonl").write_text("precious\n")
    run = resume(tiny_models, tmp_path, folder / "run" / "checkpoint-2", kind)
    with pytest.raises(UserError, match="exists and is not empty"):
        run.train()
    assert [p.name for p in other.iterdir()] == ["metrics.jsonl"]
    assert (other / "metrics.jsonl").read_text() == "precious\n"


def test_tensorboard_of_a_resumed_run_has_every_step_once(tiny_models, tmp_path):
    settings = {**SETTINGS, "save_steps": 1, "max_steps": 3, "report_to": ["tensorboard"]}
    trainer(tiny_models, tmp_path, **settings).train()
    resume(tiny_models, tmp_path, tmp_path / "run" / "checkpoint-2", "sft", **settings).train()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("objective/scores")] == [1, 2, 3]


def copied(straight, run_folder: Path) -> Path:
    """The run's checkpoints in a folder of their own; returns the later one."""
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(straight[1] / "run" / name, run_folder / name)
    return run_folder / "checkpoint-4"


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-4"])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "no state", "no tensors", "bad json", "another dict"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny_models, tmp_path, straight, damage, wanted):
    kind, _, history, final = straight
    broken = copied(straight, tmp_path / "run")
    state, metrics = broken / checkpoint.STATE_FILE, broken / "trainer_state.json"
    content = state.read_bytes()
    if damage == "cut":
        state.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        state.write_bytes(b"")
    elif damage == "flipped":
        middle = len(content) // 2  # in the numbers of some tensor: torch alone would load it
        state.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "no state":
        metrics.unlink()
    elif damage == "no tensors":
        state.unlink()
    elif damage == "bad json":
        metrics.write_text(metrics.read_text()[:-20])
    else:
        torch.save({"policy": {}}, state)
        digests = {path.name: checkpoint.file_digest(path) for path in (state, metrics)}  # as another version writes it
        (broken / checkpoint.CHECKSUMS).write_text(json.dumps(digests))
    run = resume(tiny_models, tmp_path, Path("latest") if wanted == "latest" else broken, kind)
    said, run.console = [], Console(quiet=True)
    run.console.warn = said.append
    run.train()
    assert len(said) == 2 and "best is gone" not in said[0]  # the second: best/ was not copied
    assert run.guard.best is not None and (tmp_path / "run" / "best").is_dir(), "judged anew"
    assert re.fullmatch(r"checkpoint \S+checkpoint-4 cannot be read \(.+\); trying checkpoint-2", said[0])
    assert damage != "another dict" or "it has no controller, critic, cuda_rng, " in said[0]
    assert without_times(run.history) == without_times(history)
    assert all(torch.equal(value, final[name]) for name, value in weights(run).items())


def test_with_nothing_whole_left_the_run_stops_and_names_them_all(tiny_models, tmp_path, straight):
    copied(straight, tmp_path / "run")
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / "run" / name / checkpoint.STATE_FILE).unlink()
    run, said = resume(tiny_models, tmp_path, Path("latest"), straight[0]), []
    run.console = Console(quiet=True)
    run.console.warn = said.append
    with pytest.raises(UserError, match="no whole checkpoint was found from latest back"):
        run.train()
    assert [re.search(r"checkpoint-\d", text).group() for text in said] == ["checkpoint-4", "checkpoint-2"]


def test_a_checkpoint_that_is_not_there_is_an_error_and_not_another_one(tiny_models, tmp_path, straight):
    copied(straight, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"there is no checkpoint .*checkpoint-3; in .* are: checkpoint-2, checkpoint-4"
    ):
        resume(tiny_models, tmp_path, tmp_path / "run" / "checkpoint-3", straight[0]).train()


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-2"])
def test_what_a_killed_run_half_wrote_goes_from_its_rollouts_too(tiny_models, tmp_path, wanted):
    settings = {"max_steps": 2, "save_steps": 1, "num_ppo_epochs": 1, "save_rollouts": tmp_path / "rollouts"}
    trainer(tiny_models, tmp_path, **settings).train()
    left = tmp_path / "rollouts" / ".writing-0123"
    left.mkdir()
    (left / "rollout_00003.safetensors").write_bytes(b"half")
    place = wanted if wanted == "latest" else str(tmp_path / "run" / wanted)
    trainer(tiny_models, tmp_path, **settings, resume_from_checkpoint=place).train()
    names = [f"rollout_0000{step}.safetensors" for step in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == names


@pytest.mark.parametrize("wanted", ["latest", True, "true"])
def test_latest_resumes_the_newest_or_starts_where_there_is_none(tiny_models, tmp_path, straight, wanted):
    kind, _, history, _ = straight
    settings = {**SETTINGS, "resume_from_checkpoint": wanted}
    first = trainer(tiny_models, tmp_path, kind=kind, **settings)
    first.train()
    assert without_times(first.history) == without_times(history)
    again = trainer(tiny_models, tmp_path, kind=kind, **settings)
    again.train()
    assert again.step == 4 and without_times(again.history) == without_times(history)


def test_latest_is_of_the_run_that_was_resumed_and_not_of_what_it_left_behind(
    tiny_models, tmp_path, straight, monkeypatch
):
    """The same trainer can go on from it, too, though Ctrl-C left the policy with a gradient; but not start again."""
    kind, folder, _, final = straight
    shutil.copytree(folder / "run", tmp_path / "run")
    run = resume(tiny_models, tmp_path, tmp_path / "run" / "checkpoint-2", kind)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "value_backward", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train()
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]
    assert checkpoint.find_checkpoint("latest", tmp_path / "run", print)[0].name == "checkpoint-2"
    run.args.resume_from_checkpoint = "latest"
    monkeypatch.setattr(checkpoint, "load_checkpoint", read := Mock(wraps=checkpoint.load_checkpoint))
    run.train()
    assert read.call_count == 1  # of full fine-tuning it is as large as both models and their moments
    assert all(torch.equal(value, final[name]) for name, value in weights(run).items())
    for run.output_dir, run.args.resume_from_checkpoint in ((tmp_path / "run", None), (tmp_path / "new", "latest")):
        with pytest.raises(UserError, match="this trainer has begun its run already"):
            run.train()


def test_a_checkpoint_is_of_the_run_whose_metrics_say_what_it_says(tmp_path):
    """With a time in it, which no other run has; and the last entry may have got an evaluation since."""
    entries = [{"step": step, "step_time": step / 7} for step in (1, 2, 3, 4)]
    for step in (1, 2, 3, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": entries[:step]} if step < 6 else {}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))

    def current(*lines, torn="") -> list[int]:
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + torn)
        return [checkpoint.step_of(path) for path in checkpoint.current_checkpoints(tmp_path)]

    damaged = 6  # which loading will say
    assert current(*entries) == [1, 2, 3, 4, damaged]
    assert current(*entries[:2], {"step": 3, "step_time": 0.1}) == [1, 2, damaged]
    assert current(entries[0], {**entries[1], "eval/objective/kl": 0.5}) == [1, 2, damaged]
    assert current(*entries[:2], torn='{"step": 3, "step_t') == [1, 2, damaged]
    assert current() == current("no entry") == [1, 2, 3, 4, damaged]


def test_a_folder_that_another_run_writes_to_is_left_alone(tiny_models, tmp_path):
    """What that one is just writing, too. A second descriptor is to the lock what a second process is."""
    (tmp_path / "run" / ".writing-1").mkdir(parents=True)
    other = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"run is in use by another run: end that one, or choose another folder"):
        trainer(tiny_models, tmp_path, resume_from_checkpoint="latest").train()
    with pytest.raises(UserError, match="in use by another run"):
        checkpoint.require_latest(tmp_path / "run", None)
    assert os.listdir(tmp_path / "run") == [".writing-1"]
    fcntl.flock(other, fcntl.LOCK_UN)
    with checkpoint.claimed(tmp_path / "run"), checkpoint.claimed(tmp_path / "run"):
        checkpoint.require_latest(tmp_path / "run", None)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UserError, match="in use by another run"):  # nor has it still, after it let go
        checkpoint.require_latest(tmp_path / "run", None)
    os.close(other)
    with checkpoint.claimed(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run").is_dir()
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("file", ["notes.txt", "model.safetensors"])
def test_latest_does_not_start_in_a_folder_with_other_things(tiny_models, tmp_path, file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("precious")
    with pytest.raises(UserError, match="exists and is not empty"):
        trainer(tiny_models, tmp_path, resume_from_checkpoint="latest").train()


@pytest.mark.parametrize("place", ["rollouts", "kept/rollouts"])
def test_latest_starts_again_beside_the_rollouts_of_the_run_that_was_interrupted(tiny_models, tmp_path, place):
    def interrupt(*_):
        raise KeyboardInterrupt

    options = {"resume_from_checkpoint": "latest", "save_rollouts": tmp_path / "run" / place}
    options["report_to"] = ["tensorboard"]
    with pytest.raises(KeyboardInterrupt):
        trainer(tiny_models, tmp_path, callbacks=[interrupt], **options).train()
    assert trainer(tiny_models, tmp_path, **options).train()["step"] == 2
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("objective/scores")] == [1, 2]


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("with_its_checksum", [True, False])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_by_name_and_runs_none(
    tiny_models, tmp_path, straight, writer, with_its_checksum
):
    """Checksums are for accidents: who puts code in writes a checksum that fits."""
    bad = copied(straight, tmp_path / "run")
    with (bad / checkpoint.STATE_FILE).open("wb") as file:
        (torch.save if writer == "torch" else pickle.dump)({"policy": Payload(tmp_path / "pwned")}, file)
    if with_its_checksum:
        digests = json.loads((bad / checkpoint.CHECKSUMS).read_text())
        digests[checkpoint.STATE_FILE] = checkpoint.file_digest(bad / checkpoint.STATE_FILE)
        (bad / checkpoint.CHECKSUMS).write_text(json.dumps(digests))
    with pytest.raises(UserError, match=r"checkpoint .*checkpoint-4 is refused: .* would run code \(posix\.mkdir\)"):
        resume(tiny_models, tmp_path, Path("latest"), straight[0]).train()
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_before_the_first_iteration(tiny_models, tmp_path):
    run = trainer(tiny_models, tmp_path)
    run.save_checkpoint()
    again = trainer(tiny_models, tmp_path, resume_from_checkpoint=str(run.output_dir / "checkpoint-0"))
    again.resume()
    assert again.step == 0


def test_a_checkpoint_that_the_first_process_alone_sees_is_refused(tiny_models, tmp_path, monkeypatch):
    run = trainer(tiny_models, tmp_path, resume_from_checkpoint="latest")
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    run.find = lambda wanted, held: tmp_path / "checkpoint-1"  # as the first process, which is another, says
    with pytest.raises(UserError, match=r"checkpoint .*checkpoint-1 cannot be read by every process"):
        run.resume()


def test_a_checkpoint_of_another_model_is_refused(tiny_models, tmp_path, straight):
    kind, folder, _, _ = straight
    other = {"sft": "adapter", "adapter": "sft"}[kind]
    with pytest.raises(UserError, match="is of another model"):
        resume(tiny_models, tmp_path, folder / "run" / "checkpoint-2", other).train()


@pytest.mark.parametrize("changed", [False, True])
def test_a_base_of_the_same_shapes_with_other_weights_is_warned_of(tiny_models, tmp_path, straight, changed):
    kind, folder, _, _ = straight
    run = resume(tiny_models, tmp_path, folder / "run" / "checkpoint-2", kind)
    run.console = Mock()
    with torch.no_grad():
        next(run.roles.base.model.parameters()).view(-1)[7] += 1e-6 * changed
    run.resume()
    told = [call.args[0] for call in run.console.warn.call_args_list]
    assert ["other weights of base or SFT" in text for text in told] == [True] * changed, told


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        ({"kl_coef": 0.5, "stop_token_ids": [0]}, ["stop_token_ids [", "] -> [0], kl_coef 1.0 -> 0.5"]),
    ],
)
def test_settings_that_a_resumed_run_changes_are_told(tiny_models, tmp_path, straight, settings, said):
    run = resume(tiny_models, tmp_path, straight[1] / "run" / "checkpoint-2", straight[0], **settings)
    run.console = Mock()
    run.resume()
    told = [call.args[0] for call in run.console.note.call_args_list if "settings" in call.args[0]]
    assert len(told) == bool(said) and all(part in told[0] for part in said), told


def test_a_checkpoint_with_parameters_of_another_shape_is_refused(tiny_models, tmp_path):
    """Copying a smaller tensor could broadcast, in silence."""
    first = trainer(tiny_models, tmp_path / "a", kind="sft", use_peft=True, lora_r=2, max_steps=1, save_steps=1)
    first.train()
    second = trainer(
        tiny_models, tmp_path / "b", kind="sft", use_peft=True, lora_r=1,
        resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-1"),
    )  # fmt: skip
    with pytest.raises(UserError, match="is of another model"):
        second.train()


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_resumed_run_learns_at_the_rates_that_it_is_given(tiny_models, tmp_path, schedule):
    """AdamW's state holds the rates and decays of the run that wrote it, and loading it would bring them back."""
    settings = {"max_steps": 4, "save_steps": 1, "lr_scheduler_type": schedule, "num_ppo_epochs": 1}
    trainer(tiny_models, tmp_path / "a", **{**settings, "max_steps": 1}).train()
    settings |= {"learning_rate": 5e-4, "value_learning_rate": 2e-4, "adam_betas": [0.8, 0.9]}
    source = str(tmp_path / "a" / "run" / "checkpoint-1")
    run = trainer(tiny_models, tmp_path / "b", resume_from_checkpoint=source, **settings)
    used = []
    for learner in (run.policy, run.critic):
        learner.optimizer.register_step_pre_hook(
            lambda optimizer, *_: used.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
        )
    run.train()
    factors = {"constant": [1, 1, 1], "linear": [3 / 4, 2 / 4, 1 / 4]}[schedule]
    expected = [rate * factor for factor in factors for rate in (5e-4, 2e-4)]
    assert [group[0][0] for group in used] == pytest.approx(expected, rel=1e-12)
    assert all(group == (groups[0][0], (0.8, 0.9)) for groups in used for group in groups)
    assert [entry["lr"] for entry in run.history[1:]] == pytest.approx([5e-4 * factor for factor in factors])


@pytest.mark.parametrize("rows", [4, 8])
def test_resuming_on_other_data_is_refused(tiny_models, tmp_path, straight, rows):
    """The place in the data is a list of row numbers, which mean nothing in another file."""
    source = straight[1] / "run" / "checkpoint-2"
    data = [{"prompt": f"{i}:"} for i in range(rows)]
    run = resume(tiny_models, tmp_path, source, straight[0], rows=examples(data))
    with pytest.raises(UserError, match=rf"has {rows} prompts and had 6 when the checkpoint was written"):
        run.train()


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(folder)]


def test_save_total_limit_keeps_the_newest(tiny_models, tmp_path):
    run = trainer(tiny_models, tmp_path, max_steps=4, save_steps=1, save_total_limit=2, num_ppo_epochs=1)
    run.train()
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(("limit", "kept"), [(None, [2, 4, 6, 9, 10]), (1, [4]), (2, [2, 4]), (3, [2, 4, 10])])
def test_checkpoints_left_from_before_a_resume_count_as_the_oldest(tmp_path, limit, kept):
    for step in (2, 4, 6, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.keep_newest(tmp_path, limit, step=4)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_checkpoints_are_ordered_by_number_and_others_folders_are_none(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10"]


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    target = tmp_path / "model"

    def interrupted() -> None:
        with checkpoint.atomic_folder(target) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with checkpoint.atomic_folder(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["whole"]
    with (
        pytest.raises(UserError, match=r"model was new or empty .* another run wrote to it"),
        checkpoint.atomic_folder(target) as folder,
    ):
        (folder / "other").write_text("y")
    assert [p.name for p in target.iterdir()] == ["whole"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with checkpoint.atomic_folder(target, replace=True) as folder:
        (folder / "other").write_text("y")
    assert [p.name for p in target.iterdir()] == ["other"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("place", ["link", "."])
def test_a_folder_that_none_can_be_renamed_to_is_filled(tmp_path, monkeypatch, place):
    """As a mounted disk: the SFT model was lost there after its training."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    target = tmp_path / "link" if place == "link" else Path()
    checkpoint.require_new_folder(target)
    with contextlib.suppress(ZeroDivisionError), checkpoint.atomic_folder(target) as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    assert list(target.iterdir()) == []
    with checkpoint.atomic_folder(target) as folder:
        (folder / "plots").mkdir()
        (folder / "config.json").write_text("{}")
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["config.json", "plots"]


def test_a_link_to_nothing_is_refused_as_an_output_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a link to a folder that is not there"):
        checkpoint.require_new_folder(tmp_path / "link")


@pytest.mark.parametrize("before", [1, 2])
def test_ctrl_c_while_a_folder_is_replaced_leaves_the_old_one(tmp_path, monkeypatch, before):
    """Before it is set aside, and before the new one comes to its place."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("x")
    replace, calls = os.replace, []

    def interrupted(*paths) -> None:
        calls.append(paths)
        if len(calls) == before:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), checkpoint.atomic_folder(tmp_path / "model", replace=True) as folder:
        (folder / "new").write_text("y")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["model", "model/old"]


@pytest.mark.parametrize("function", ["mkdir", "rmtree"])
def test_ctrl_c_while_a_temporary_folder_is_made_or_removed_leaves_none(tmp_path, monkeypatch, function):
    where = {"mkdir": Path, "rmtree": shutil}[function]
    own, calls = getattr(where, function), []

    def interrupted(path, *args, **options) -> None:
        if not path.name.startswith(".writing-") or calls:
            return own(path, *args, **options)
        calls.append(path)
        if function == "mkdir":
            own(path, *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, function, interrupted)
    with pytest.raises(KeyboardInterrupt), checkpoint.temporary_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("y")
    assert calls and not list((tmp_path / "run").iterdir())


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """What is synced and what is renamed, in order, by name."""
    seen: list[tuple[str, str]] = []
    sync, replace = checkpoint.sync, os.replace
    monkeypatch.setattr(checkpoint, "sync", lambda path: seen.append(("sync", Path(path).name)) or sync(path))
    monkeypatch.setattr(os, "replace", lambda old, new: seen.append(("rename", Path(new).name)) or replace(old, new))
    return seen


def test_a_folder_is_on_the_disk_before_it_gets_its_name_and_the_name_is_after(tmp_path, events):
    """What a power cut could otherwise leave: a checkpoint of the right name with empty files in it."""
    with checkpoint.atomic_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        for name in ("weights", "inner/state"):
            (folder / name).write_text("x")
    assert set(events[:3]) == {("sync", "weights"), ("sync", "inner"), ("sync", "state")}
    assert events[3:] == [("sync", folder.name), ("rename", "model"), ("sync", tmp_path.name)]


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_a_models_configuration_comes_last(tmp_path, events):
    checkpoint.write_text(tmp_path / "state.json", "x")
    assert events == [("sync", "state.json"), ("rename", "state.json")]
    events.clear()
    made = tmp_path / "made"
    made.mkdir()
    for name in ("config.json", "a.safetensors", "z.json"):
        (made / name).write_text("x")
    checkpoint.publish(made, tmp_path / "model")
    order = ("a.safetensors", "z.json", "config.json")
    assert events == [*((how, name) for name in order for how in ("sync", "rename")), ("sync", "model")]


def test_a_tokenizer_with_several_chat_templates_is_written_again(tiny_models, tmp_path):
    """They lie in a folder of their own, and a resumed run could not put its model where the last one's was."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.base)
    run = trainer(tiny_models, tmp_path)
    run.tokenizer = tokenizer
    for template in ("first", "second"):
        tokenizer.chat_template = {"default": template, "tool_use": template}
        assert AutoTokenizer.from_pretrained(run.save_model()).chat_template == tokenizer.chat_template


def test_a_text_file_is_replaced_all_at_once(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    checkpoint.write_text(path, "old")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", fails)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_too_little_disk_space_is_found_before_training(tiny_models, tmp_path, monkeypatch):
    run = trainer(tiny_models, tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"writes about \d+ MiB and 0 MiB are free"):
        run.train()
    assert run.step == 0
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_from_when_the_critics_adapter_was_called_value_is_read(tiny_models, tmp_path):
    run = trainer(tiny_models, tmp_path, kind="adapter", max_steps=1, save_steps=1)
    run.train()
    folder = tmp_path / "run" / "checkpoint-1"
    tensors, state = checkpoint.load_checkpoint(folder)
    older = {n.replace(".critic.", ".value."): p for n, p in tensors["critic"].items()}
    assert older.keys() != tensors["critic"].keys()
    fresh = trainer(tiny_models, tmp_path / "fresh", kind="adapter", max_steps=1)
    restore(fresh, folder, {**tensors, "critic": older}, state)
    for (name, got), (_, expected) in zip(fresh.roles.critic.parameters(), run.roles.critic.parameters(), strict=True):
        assert torch.equal(got, expected), name
