"""wandb and trackio get every metric once, under a name that a resumed run has too; a module stands in for them."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest
from tiny_runs import QUIET, ROWS, config, examples, trainer
from torch.utils.tensorboard import SummaryWriter

from srppo import UserError, run_sft
from srppo.metrics import MetricsWriter


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    """A module by that name, with the functions that both have; it keeps the calls."""
    module = types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    module.calls = []
    module.init = lambda **options: module.calls.append(("init", options))
    module.log = lambda metrics, step: module.calls.append(("log", step, metrics))
    module.finish = lambda: module.calls.append(("finish",))
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_run_logs_its_settings_and_every_metric_and_ends(tiny_models, tmp_path, service):
    run = trainer(tiny_models, tmp_path, report_to=[service.__name__], save_steps=1)
    run.train()
    (kind, options), *logged, last = service.calls
    assert kind == "init" and options["project"] == "srppo" and options["config"]["kl_coef"] == 1.0
    assert {name: options.get(name) for name in ("id", "dir")} == (
        {"id": options["name"], "dir": str(tmp_path / "run")}
        if service.__name__ == "wandb"
        else {"id": None, "dir": None}
    )
    assert [{"step": step, **metrics} for _, step, metrics in logged] == run.history
    assert last == ("finish",)

    service.calls.clear()
    again = trainer(
        tiny_models, tmp_path, report_to=[service.__name__], max_steps=3, resume_from_checkpoint="latest", save_steps=1
    )
    again.train()
    assert service.calls[0][1]["name"] == options["name"] and service.calls[0][1]["resume"] == "allow"
    assert [call[1] for call in service.calls if call[0] == "log"] == [3]


def test_an_sft_run_is_known_by_the_folder_that_its_model_gets(tiny_models, tmp_path, service):
    """And not by the one that it is written to until then, whose name is drawn anew each time."""
    args = config(tmp_path, base_model_name_or_path=tiny_models.base, report_to=[service.__name__])
    run_sft(args, train_dataset=examples(ROWS), output_dir=tmp_path / "sft", console=QUIET)
    with MetricsWriter(tmp_path / "sft", args) as writer:
        writer.write(1, {"x": 1.0})
    first, second = (call[1]["name"] for call in service.calls if call[0] == "init")
    assert first == second and first.startswith("sft-")


def test_a_folder_is_one_run_however_it_is_written(tmp_path, service, monkeypatch):
    (tmp_path / "run").mkdir()
    for here, folder in ((tmp_path, "run"), (tmp_path / "run", "."), (tmp_path, tmp_path / "run")):
        monkeypatch.chdir(here)
        with MetricsWriter(Path(folder), config(tmp_path, report_to=[service.__name__])) as writer:
            writer.write(1, {"x": 1.0})
    first, *others = (call[1]["name"] for call in service.calls if call[0] == "init")
    assert others == [first, first] and first.startswith("run-")


def test_the_board_is_closed_with_the_run(tmp_path, monkeypatch):
    """What it has not written yet would be lost with the process."""
    closed = []
    close = SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda self: closed.append(self.log_dir) or close(self))
    with MetricsWriter(tmp_path, config(tmp_path, report_to=["tensorboard"])) as writer:
        writer.write(1, {"x": 1.0})
        assert closed == []
    assert closed == [str(tmp_path / "tensorboard")]


@pytest.mark.parametrize("service", ["wandb"], indirect=True)
def test_a_folder_of_any_name_gives_an_id_that_wandb_takes(tmp_path, service):
    """Which raised after the first iteration was computed."""
    with MetricsWriter(tmp_path / " lr:3e-6,b#1? ", config(tmp_path, report_to=["wandb"])) as writer:
        writer.write(1, {"x": 1.0})
    options = service.calls[0][1]
    assert options["name"].startswith(" lr:3e-6,b#1? -") and options["id"].startswith("-lr-3e-6-b-1---")


def test_another_folder_is_another_run(tmp_path, service):
    for name in ("a", "b"):
        with MetricsWriter(tmp_path / name / "run", config(tmp_path, report_to=[service.__name__])) as writer:
            writer.write(1, {"x": 1.0})
    first, second = (call[1]["name"] for call in service.calls if call[0] == "init")
    assert first != second


def test_a_package_that_is_missing_is_named_when_the_run_is_configured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to=wandb needs a package that is not installed: pip install wandb"):
        config(tmp_path, report_to=["wandb"])
