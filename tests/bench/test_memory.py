"""bench/memory.py: its rows come out right, and what it compares does the same work in less memory."""

import csv
import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch

from bench import memory, memory_run
from bench.core import SelectionError
from bench.memory_run import Setting, prepare, run
from bench.method import reset_resident_peak
from srppo.commands import quiet_libraries

needs_peaks = pytest.mark.skipif(
    torch.cuda.is_available() or not reset_resident_peak(), reason="the resident set's peak cannot be read or reset"
)
SMALL = Setting("small", "float32", batch=2, micro_batch=2, prompt=4, completion=4)
WIDE = Setting("wide", "float32", batch=4, micro_batch=4, prompt=4, completion=24)

quiet_libraries()


@needs_peaks
def test_roles_over_one_model_do_the_same_in_less_memory_than_a_model_each(tmp_path):
    prepare(SMALL, tmp_path)
    # In processes of their own: this one's heap has room that earlier tests left.
    settings = [dataclasses.replace(SMALL, roles=roles) for roles in ("shared", "separate")]
    rows = [memory.measure(setting, tmp_path, threads=1) for setting in settings]
    memory.set_against_shipped(rows)
    shared, separate = rows
    weights = 4 * SMALL.parameters / memory.MIB
    assert shared.metrics == separate.metrics
    assert set(shared.phases) == set(memory.PHASES)
    assert weights < shared.models - shared.before < 1.5 * weights
    # Four, 4.2 times the weights as a rule; the pages of a file that is being read may be there beside them: 5.02 once.
    assert 3.5 * weights < separate.models - separate.before < 5.5 * weights
    assert separate.ratio == shared.beyond / separate.beyond < 0.6
    assert shared.ratio == shared.whole_ratio == 1
    assert separate.ratio < separate.whole_ratio < 1


@needs_peaks
def test_fused_ops_do_the_same_in_less_memory_than_logits(tmp_path):
    prepare(WIDE, tmp_path)
    run(dataclasses.replace(WIDE, completion=2), tmp_path)
    rows = []
    for head in memory_run.HEADS:
        setting = dataclasses.replace(WIDE, head=head)
        rows.append(memory.row_of(setting, run(setting, tmp_path)))
    memory.set_against_shipped(rows)
    fused, logits = rows
    one = 4 * WIDE.batch * WIDE.completion * 131072 / memory.MIB
    assert logits.phases["updating"] - logits.before > 2 * one
    assert logits.ratio == fused.beyond / logits.beyond < 0.6
    assert fused.metrics == pytest.approx(logits.metrics, rel=1e-3, abs=1e-4)


def test_a_process_that_fails_or_a_setting_that_does_not_fit_is_a_row_that_says_why(tmp_path, monkeypatch):
    broken = dataclasses.replace(SMALL, model="no-such-model")
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(Setting, "needs", 0)
    row = memory.measure(broken, tmp_path)
    assert row.status == "failed" and "unknown model 'no-such-model'" in row.reason
    monkeypatch.setattr(Setting, "needs", 2**60)
    row = memory.measure(SMALL, tmp_path)
    assert row.status == "skipped" and "needs 1073741824.0 GiB" in row.reason
    memory.set_against_shipped([row])
    assert math.isnan(row.ratio)


def test_a_process_gets_its_threads_and_its_heap(monkeypatch):
    seen = []
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr(memory.subprocess, "run", lambda command, env, **_: seen.append((command[2], env)))
    for heap in memory_run.HEAPS:
        memory.process("run", dataclasses.replace(SMALL, heap=heap), Path("models"), 3)
    assert [(what, env["OMP_NUM_THREADS"]) for what, env in seen] == [("run", "3")] * 2
    assert [env.get("MALLOC_MMAP_THRESHOLD_") for _, env in seen] == [None, "131072"]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="what is free is read from /proc")
def test_what_is_free_is_in_bytes():
    page = os.sysconf("SC_PAGE_SIZE")
    assert 0.2 * page * os.sysconf("SC_AVPHYS_PAGES") < memory.available() <= page * os.sysconf("SC_PHYS_PAGES")


def test_what_weights_and_logits_need_is_counted():
    qwen = Setting("qwen2.5-0.5b")
    assert qwen.parameters == pytest.approx(494e6, rel=0.001)
    assert Setting("smollm2-135m").parameters == pytest.approx(134.5e6, rel=0.001)
    separate = dataclasses.replace(qwen, roles="separate")
    assert separate.needs == 4 * qwen.needs == 8 * qwen.parameters
    logits = dataclasses.replace(qwen, head="logits")
    assert logits.needs - qwen.needs == 8 * 256 * 151936 * 14


def test_settings_of_the_command_line():
    def chosen(*words: str) -> list[Setting]:
        return memory.settings(memory.parser().parse_args(words))

    everything = chosen()
    assert {s.roles for s in everything} == set(memory_run.ROLES)
    assert {s.head for s in everything} == set(memory_run.HEADS)
    one = chosen("--set", "heads", "--model", "wide", "--heap", "default", "--completion", "8", "--no-checkpointing")
    assert [s.head for s in one] == ["srppo", "logits"]
    assert {(s.model, s.completion, s.checkpointing) for s in one} == {("wide", 8, False)}
    with pytest.raises(SelectionError, match="no multiple"):
        chosen("--batch", "3", "--micro-batch", "2")


def test_the_command_writes_its_rows_and_shows_a_table(tmp_path, monkeypatch, capsys):
    def measured(setting: Setting, folder: Path, threads: int | None) -> memory.Row:
        if setting.roles == "full":
            return memory.Row(setting, "skipped", "too large")
        peak = (1000 if setting.roles == "shared" else 3000) * 2**20
        told = {"before": 500 << 20, "models": 700 << 20, "estimate": 600 << 20, "metrics": {"loss/policy_avg": 0.5},
                "peaks": {"loading": 2 << 20, "sampling": 3 << 20, "scoring": peak, "updating": 5 << 20}}  # fmt: skip
        return memory.row_of(setting, json.loads(json.dumps(told)))

    monkeypatch.setattr(memory, "measure", measured)
    out = tmp_path / "memory.csv"
    assert memory.main(["--set", "roles", "--model", "small", "--dtype", "float32", "--out", str(out)]) == 0
    lines = {line["roles"]: line for line in csv.DictReader(out.open())}
    assert [lines[name]["ratio"] for name in ("shared", "separate", "full")] == ["1", "0.2", "n/a"]
    assert lines["separate"]["whole_ratio"] == "0.333333"
    assert lines["full"]["reason"] == "too large"
    names = ("peak", "beyond", "before", "models", "estimate", *memory.PHASES)
    figures = [lines["separate"][f"{name}_mib"] for name in names]
    assert figures == ["3000", "2500", "500", "700", "600", "2", "3", "3000", "5"]
    assert all(line["commit"] and line["versions"] and line["status"] for line in lines.values())
    text = " ".join(capsys.readouterr().out.split())
    assert "small full srppo: skipped: too large" in text
    assert "separate srppo default 3000 2500 700 2 3 3000 5 0.200 0.333" in " ".join(text.replace("│", " ").split())
    assert memory.main(["--batch", "3"]) == 2
    assert memory.main(["--out", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}: " in capsys.readouterr().err


def test_an_interrupted_command_writes_the_rows_that_it_has(tmp_path, monkeypatch, capsys):
    out = tmp_path / "memory.csv"

    def measured(setting: Setting, folder: Path, threads: int | None) -> memory.Row:
        if setting.head == "logits":
            raise KeyboardInterrupt
        return memory.Row(setting, "skipped", "too large")

    monkeypatch.setattr(memory, "measure", measured)
    words = ["--set", "heads", "--model", "small", "--heap", "default", "--threads", "1", "--out", str(out)]
    assert memory.main(words) == 130
    (line,) = csv.DictReader(out.open())
    assert line["head"] == "srppo" and line["threads"] == "1" and line["machine"].endswith(" 1 threads")
    assert "interrupted after 1 of 2 settings" in capsys.readouterr().err
