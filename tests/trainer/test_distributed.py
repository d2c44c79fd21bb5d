"""Two processes: what they learn is what one learns, they resume bit for bit, and none of them waits for a dead one."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import training_ranks as ranks
from on_ranks import on_ranks
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_runs import QUIET, ROWS, STOPS, config, examples, trainer, write_jsonl
from transformers import AutoModelForCausalLM

from srppo import UserError, checkpoint, distributed, run_sft, sharding, training_state
from srppo.console import Console
from srppo.evaluation import fixed_seed
from srppo.roles import build_roles

TESTS = Path(__file__).parents[1]


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_two(tiny_models, tmp_path_factory) -> Path:
    """What two processes left behind: steps, an SFT model, and runs of both kinds."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(functools.partial(ranks.check, models=tiny_models, folder=folder), folder)
    return folder


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_processes_step_as_one_does_on_the_same_completions(tiny_models, tmp_path, of_two, name):
    """Weights that move by 3e-4 to 3e-3 are alike to 2e-7 (measured 3e-8), metrics to 1e-4."""
    alone = ranks.steps(tiny_models, tmp_path, name)
    first, second = (torch.load(of_two / f"{name} {rank}.pt") for rank in (0, 1))
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(one, other)
    assert first["metrics"] == pytest.approx(second["metrics"], abs=0, nan_ok=True)
    assert all(torch.equal(a, b) for a, b in zip(alone["start"], first["start"], strict=True))
    moved = max((a - b).abs().max().item() for a, b in zip(alone["weights"], alone["start"], strict=True))
    assert moved > 2e-4
    apart = max((a - b).abs().max().item() for a, b in zip(alone["weights"], first["weights"], strict=True))
    assert apart <= 2e-7
    assert alone["metrics"].keys() == first["metrics"].keys()
    for metric, value in alone["metrics"].items():
        assert first["metrics"][metric] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), metric
    assert alone["first"] == pytest.approx(first["first"], rel=1e-5, abs=1e-6)
    if name == "target_kl":
        assert alone["metrics"]["ppo_epochs"] < 8


@pytest.mark.parametrize("how", ["sft-2", "sft-cut", "sft-cut-by-tokens"])
def test_sft_by_two_processes_is_that_of_one(tiny_models, tmp_path, of_two, how):
    """With whole weights on each, and with weights cut over both."""
    alone = ranks.sft(tiny_models, tmp_path / "sft-1")
    one, two, base = (load_file(Path(f) / "model.safetensors") for f in (alone, of_two / how, tiny_models.base))
    assert one.keys() == two.keys()
    moved = max((one[name] - base[name]).abs().max().item() for name in one)
    assert moved > 1e-4
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 0.02 * moved  # of Adam's sign-like steps
    history = [
        [json.loads(line) for line in (Path(f) / "metrics.jsonl").read_text().splitlines()]
        for f in (alone, of_two / how)
    ]
    for a, b in zip(*history, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert "eval/loss" in history[0][-1]


# -- runs -------------------------------------------------------------------------------------------------------------


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if not k.startswith(("time", "step_time", "perf/"))} for entry in history]


@pytest.mark.parametrize("kind", ["sft", "adapter", "fsdp"])
def test_two_ranks_resume_bit_for_bit_and_the_first_alone_writes(of_two, kind):
    """The checks between ranks are in ``check_runs``."""
    first, second = (torch.load(of_two / kind / f"{rank}.pt") for rank in (0, 1))
    assert without_times(first["straight"]) == without_times(first["resumed"])
    assert without_times(first["straight"]) == without_times(second["straight"])
    assert first["straight"][-1]["episode"] == 2 * 8  # 2 iterations, 2 ranks of 2 x 2 prompts
    assert first["drawn"] != second["drawn"]  # each rank samples with random numbers of its own
    run = of_two / kind / "straight" / "run"
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    table = pyarrow.parquet.read_table(run / "completions" / "completions_00001.parquet").to_pylist()
    assert len(table) == 8
    scores = [row["score"] for row in table]
    assert sum(scores) / 8 == pytest.approx(entries[0]["objective/scores"], rel=1e-5)
    assert not list((of_two / kind).rglob(".writing-*"))
    name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    saved = load_file(run / name)
    assert all(any(torch.equal(w, s) for w in first["weights"] if w.shape == s.shape) for s in saved.values())


def test_a_run_with_weights_cut_over_the_ranks_is_that_with_whole_ones(of_two):
    """The same samples, scores and steps, up to rounding; its model and checkpoints load as any other's."""
    whole, cut = (torch.load(of_two / kind / "0.pt") for kind in ("sft", "fsdp"))
    for a, b in zip(without_times(whole["straight"]), without_times(cut["straight"]), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    run = of_two / "fsdp" / "straight" / "run"
    for folder in (run, run / "checkpoint-2", run / "best"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert sum(p.numel() for p in model.parameters()) == sum(
            p.numel() for p in AutoModelForCausalLM.from_pretrained(of_two / "sft" / "straight" / "run").parameters()
        )
    tensors, _ = checkpoint.load_checkpoint(run / "checkpoint-2")
    other, _ = checkpoint.load_checkpoint(of_two / "sft" / "straight" / "run" / "checkpoint-2")
    for role in ("policy", "critic"):
        assert {n: p.shape for n, p in tensors[role].items()} == {n: p.shape for n, p in other[role].items()}


@pytest.mark.parametrize("kind", ["sft", "fsdp"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(tiny_models, tmp_path, of_two, kind):
    """Weights, optimizers and data position are whole; that the random numbers of two are not those of one is said."""
    source = of_two / kind / "straight" / "run" / "checkpoint-1"
    rows = [*examples(ROWS), *examples(ROWS)]
    looked_at, run = (
        trainer(tiny_models, tmp_path / name, rows=rows, resume_from_checkpoint=str(source), **ranks.RUN)
        for name in ("looked at", "run")
    )
    told: list[str] = []
    looked_at.console = Console(quiet=True)
    looked_at.console.warn = told.append
    looked_at.resume()
    (said,) = told  # and not that base and SFT are others, whole or cut as they were
    assert "was written by 2 processes and is resumed by 1" in said and "a batch is now 4 prompts" in said
    tensors, _ = checkpoint.load_checkpoint(source)
    assert training_state.frozen_bits(looked_at) == tensors["frozen_bits"]
    for role in (looked_at.roles.policy, looked_at.roles.critic):
        assert all(torch.equal(p, tensors[role.name][name]) for name, p in role.parameters())
    moments = [state["exp_avg_sq"].abs().sum() for state in looked_at.critic.optimizer.state.values()]
    assert len(moments) == len(looked_at.critic.parameters) and sum(moments) > 0
    run.train()
    assert [entry["step"] for entry in run.history] == [1, 2]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def test_a_dead_rank_ends_the_run_with_an_error_and_not_a_hang(tiny_models, tmp_path):
    """With no launcher to clean up: the rank that lives finds out by itself."""
    port = free_port()
    command = [sys.executable, str(TESTS / "training_ranks.py"), tiny_models.base, tiny_models.sft, str(tmp_path)]
    processes = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True,
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == -signal.SIGKILL, errors[1]
    assert processes[0].returncode > 0
    assert "Error" in errors[0].strip().splitlines()[-1]
    assert (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("fsdp", [False, True])
def test_torchrun_trains_from_the_command_line(tiny_models, tmp_path, fsdp):
    """SFT and PPO; each line is printed once."""
    data = write_jsonl(tmp_path / "data" / "train.jsonl", ROWS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port()]
    flags = {
        "base_model_name_or_path": tiny_models.base, "dataset_name": data, "output_dir": str(tmp_path / "run"),
        "max_steps": 1, "per_device_train_batch_size": 2, "max_completion_length": 4, "max_prompt_length": 24,
        "sft_num_train_epochs": 1, "sft_learning_rate": 1e-2, "log_completions": 1, "report_to": "none",
        "fsdp": fsdp,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [*launch, "-m", "srppo.cli", "train", *arguments, "--stop_token_ids", *map(str, STOPS)],
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("SFT model written to", "start: KL(policy || SFT) = 0", "exactly 1", "model written to"):
        assert done.stderr.count(f"{line}") == (2 if line == "model written to" else 1), (line, done.stderr)
    assert "batch: 4 prompts = 2 processes x 2 a micro-batch" in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()


# -- alone ------------------------------------------------------------------------------------------------------------


def test_without_a_launcher_nothing_is_joined_and_functions_are_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.start()
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
    values = torch.arange(3.0)
    assert torch.equal(distributed.summed(values), values)
    assert torch.equal(distributed.gathered_rows(values), values)
    assert distributed.even_share([1, 2, 3]) == [1, 2, 3]
    assert distributed.on_main(lambda: 5) == 5
    distributed.finish()


def test_tied_weights_that_were_put_together_are_one_tensor():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in ("embedding", "layer", "head")})
    model["head"].weight = model["embedding"].weight
    assert sharding.whole_state(model) is None
    model.set_reshard_after_forward = None  # as a sharded model has
    state = sharding.whole_state(model)
    assert state["head.weight"] is state["embedding.weight"]
    assert torch.equal(state["layer.weight"], model["layer"].weight)


def test_every_rank_has_random_numbers_of_its_own(monkeypatch):
    """In training and in evaluation: on a CPU torch's generator reads the low 32 bits of a seed."""
    drawn = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        torch.manual_seed(3)
        distributed.seed_apart(3)
        with fixed_seed(5):
            evaluation = torch.rand(())
        drawn += [evaluation.item(), torch.rand(()).item()]
    assert len(set(drawn)) == 8


def test_sft_with_nothing_to_cut_is_refused_before_anything_is_loaded(tmp_path):
    args = config(tmp_path, base_model_name_or_path="nowhere", fsdp=True)
    with pytest.raises(UserError, match="fsdp cuts weights over processes, and there is one"):
        run_sft(args, train_dataset=examples(ROWS), output_dir=tmp_path / "sft", console=QUIET)


def test_fsdp_is_refused_in_one_process(tiny_models, tmp_path):
    with pytest.raises(UserError, match="and there is one: launch with torchrun"):
        trainer(tiny_models, tmp_path, fsdp=True)


def test_fsdp_is_refused_for_adapters_and_for_a_model_whose_layers_are_not_known(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "start", lambda: None)
    adapters = config(tmp_path, use_peft=True)
    for sft in (tiny_models.adapter, tiny_models.sft):
        with pytest.raises(UserError, match=r"fsdp is for full fine-tuning \(use_peft=false\)"):
            sharding.shard_roles(build_roles(adapters, tiny_models.base, sft))
    args = config(tmp_path, base_model_name_or_path="nowhere", fsdp=True, use_peft=True)
    with pytest.raises(UserError, match="fsdp is for full fine-tuning"):
        run_sft(args, train_dataset=examples(ROWS), output_dir=tmp_path / "sft", console=QUIET)
    model = tiny_model()
    model._no_split_modules = None
    with pytest.raises(UserError, match="LlamaForCausalLM does not say which of its modules are layers"):
        sharding.shard(model)


def test_a_group_that_sends_nothing_from_a_cpu_is_refused(monkeypatch, tmp_path):
    """As one that a program made for its GPUs alone: a run would fail after its first rollout."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("cuda:gloo", init_method=store, rank=0, world_size=1)
    try:
        distributed.start()  # alone nothing is sent
        monkeypatch.setattr(distributed, "size", lambda: 2)
        with pytest.raises(UserError, match=r"the backends cuda:gloo and none for tensors on a CPU"):
            distributed.start()
    finally:
        torch.distributed.destroy_process_group()


def test_an_incomplete_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2 and the processes could not be joined"):
        distributed.start()
