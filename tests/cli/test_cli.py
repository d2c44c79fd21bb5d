"""The command line end to end on tiny models: results, exit codes, messages, and what is left after a failure."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from safetensors import SafetensorError
from tiny import save, tiny_model
from tiny_runs import ROWS, TinyModels, flags, read_jsonl, with_plots, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import srppo
from srppo import checkpoint, commands, ppo
from srppo import sft as sft_module
from srppo.cli import COMMANDS, lines_to, main
from srppo.models import choose_device, choose_dtype
from srppo.roles import frozen_roles
from srppo_kernels import _extension

ROOT = Path(srppo.__file__).parents[1]


@pytest.fixture
def data(tmp_path) -> str:
    rows = [{**row, "id": number} for number, row in enumerate([*ROWS, {"prompt": "only a prompt"}])]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    held_out = {"prompt": "2+2=", "completion": "4", "answer": "4", "id": "sum"}
    write_jsonl(tmp_path / "data" / "test.jsonl", [held_out])
    return str(tmp_path / "data")


def train_flags(models: TinyModels, data: str, folder: Path, **settings) -> list[str]:
    chosen = {
        "base_model_name_or_path": models.base, "dataset_name": data, "output_dir": folder, "max_steps": 2,
        "per_device_train_batch_size": 4, "max_completion_length": 8, "learning_rate": 1e-3, "sft_learning_rate": 1e-2,
        "sft_num_train_epochs": 1, "num_ppo_epochs": 1, "report_to": "none", "log_completions": 1, **settings,
    }  # fmt: skip
    return flags(chosen)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".writing-*")]


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "srppo.cli", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False, **options,
    )  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# -- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_peft", ["true", "false"])
def test_train_goes_from_a_base_model_and_demonstrations_to_a_tuned_model(tiny_models, data, tmp_path, capfd, use_peft):
    out = tmp_path / "run"
    with with_plots():
        assert main(["train", *train_flags(tiny_models, data, out, use_peft=use_peft, report_to="tensorboard")]) == 0
    if use_peft == "true":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models.base), out)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models.base), out / "sft")
    else:
        model = AutoModelForCausalLM.from_pretrained(out)
        AutoModelForCausalLM.from_pretrained(out / "sft")
    ids = AutoTokenizer.from_pretrained(out)("ab:", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    names = {path.name for path in out.iterdir()}
    assert names >= {"sft", "srppo_config.yaml", "trainer_state.json", "README.md", "metrics.jsonl", "plots",
                     "completions", "tensorboard", "tokenizer.json"}  # fmt: skip
    assert (out / "plots" / "kl.png").exists() and (out / "sft" / "plots" / "sft_loss.png").exists()
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [entry["step"] for entry in metrics] == [1, 2] and "eval/demonstrations/logp" in metrics[-1]
    assert "eval/loss" in read_jsonl(out / "sft" / "metrics.jsonl")[-1]
    assert leftovers(tmp_path) == []
    assert (
        f"srppo train --config {out}/srppo_config.yaml --output_dir another-folder" in (out / "README.md").read_text()
    )
    printed = capfd.readouterr()
    assert printed.out == ""
    for said in ("KL(policy || SFT) = 0 on", "PPO ratio on the first mini-batch exactly 1", "beta 1.0 towards sft",
                 "batch: 4 prompts = 4 a micro-batch x 1 accumulation x 1 mini-batches", "policy:", "frozen",
                 "missing_eos_penalty is off", "model written to"):  # fmt: skip
        assert said in printed.err, said


def test_train_from_an_sft_model_runs_no_sft(tiny_models, data, tmp_path):
    out = tmp_path / "run"
    assert main(["train", *train_flags(tiny_models, data, out, sft_model_name_or_path=tiny_models.sft)]) == 0
    assert not (out / "sft").exists() and (out / "model.safetensors").exists()


def test_sft_writes_a_model_that_fits_the_demonstrations_better(tiny_models, data, tmp_path):
    out = tmp_path / "sft"
    options = {
        "base_model_name_or_path": tiny_models.base, "dataset_name": data, "output_dir": out, "report_to": "none",
        "sft_learning_rate": 1e-2, "sft_num_train_epochs": 4, "max_completion_length": 16,
    }  # fmt: skip
    file = tmp_path / "run.yaml"  # of train, too, whose further prompts SFT does not read
    file.write_text(f"prompt_dataset_name: {tmp_path / 'nowhere.jsonl'}\n")
    assert main(["sft", "--config", str(file), *flags(options)]) == 0
    AutoModelForCausalLM.from_pretrained(out)
    losses = [entry["sft/loss"] for entry in read_jsonl(out / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]


def test_resuming_on_the_command_line_finds_the_sft_model_of_the_run(tiny_models, data, tmp_path):
    out = tmp_path / "run"
    assert main(["train", *train_flags(tiny_models, data, out, save_steps=1)]) == 0
    final = tree(out)["model.safetensors"]
    settings = {"save_steps": 1, "resume_from_checkpoint": out / "checkpoint-1"}
    assert main(["train", *train_flags(tiny_models, data, tmp_path / "other", **settings)]) == 0
    assert tree(tmp_path / "other")["model.safetensors"] == final
    assert main(["train", *train_flags(tiny_models, data, out, **settings)]) == 0
    assert tree(out)["model.safetensors"] == final


# -- score and eval ---------------------------------------------------------------------------------------------------


def independent(models: TinyModels, prompt: list[int], completion: list[int], temperature: float) -> dict[str, list]:
    """Log-probs of each token from the models' logits in float64."""
    ids, found = torch.tensor([prompt + completion]), {}
    base = AutoModelForCausalLM.from_pretrained(models.base).double()
    adapted = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models.base), models.adapter).eval().double()
    )
    for name, model in (("base", base), ("sft", adapted)):
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].double() / temperature
        found[name] = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1).tolist()
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_score_gives_what_the_models_logits_give_in_float64(tiny_models, tmp_path, capfd, temperature):
    source = write_jsonl(tmp_path / "data.jsonl", ROWS)
    options = {
        "base_model_name_or_path": tiny_models.base, "sft_model_name_or_path": tiny_models.adapter,
        "dataset_name": source, "score_temperature": temperature, "per_device_train_batch_size": 4,
    }  # fmt: skip
    assert main(["score", *flags(options)]) == 0
    printed = capfd.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert f"{len(ROWS)} completions, mean score {sum(row['score'] for row in rows) / len(ROWS):.4f}" in printed.err
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS]
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.base)
    for row, source_row in zip(rows, ROWS, strict=True):
        ids = [*tokenizer(source_row["completion"])["input_ids"], 0]
        assert row["token_ids"] == ids
        assert "".join(row["tokens"]) == row["completion"] == source_row["completion"] + "<|end|>"
        logp = independent(tiny_models, tokenizer(source_row["prompt"])["input_ids"], ids, temperature)
        assert row["logps_sft"] == pytest.approx(logp["sft"], abs=2e-5)
        assert row["logps_base"] == pytest.approx(logp["base"], abs=2e-5)
        rewards = [s - b for s, b in zip(logp["sft"], logp["base"], strict=True)]
        assert row["rewards"] == pytest.approx(rewards, abs=4e-5)
        assert row["score"] == pytest.approx(sum(rewards), abs=1e-4)
        assert row["score_per_token"] == pytest.approx(sum(rewards) / len(ids), abs=1e-4)
        assert row["logp_sft"] == pytest.approx(sum(logp["sft"]), abs=1e-4)
        assert row["logp_base"] == pytest.approx(sum(logp["base"]), abs=1e-4)
    assert max(abs(row["score"]) for row in rows) > 0.5


def test_score_writes_to_a_file_and_works_in_bfloat16(tiny_models, tmp_path, capfd):
    source, out = write_jsonl(tmp_path / "data.jsonl", ROWS), tmp_path / "scores" / "out.jsonl"
    options = {
        "base_model_name_or_path": tiny_models.base, "sft_model_name_or_path": tiny_models.sft,
        "dataset_name": source, "output_file": out,
    }  # fmt: skip
    scores = {}
    for dtype in ("float32", "bfloat16"):
        assert main(["score", *flags({**options, "dtype": dtype})]) == 0
        scores[dtype] = [row["score"] for row in read_jsonl(out)]
    assert scores["float32"] != scores["bfloat16"]
    assert scores["bfloat16"] == pytest.approx(scores["float32"], abs=1.0)
    assert capfd.readouterr().out == ""


def test_nothing_is_printed_of_rows_that_a_mistake_follows(capfd):
    def rows():
        yield {"text": "ü"}
        raise srppo.UserError("the next one is wrong")

    def written():
        with lines_to(None) as write:
            for row in rows():
                write(row)

    with pytest.raises(srppo.UserError, match="the next"):
        written()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("command", "options"), [("score", {}), ("eval", {"max_completion_length": 2})])
def test_what_trains_nothing_loads_16_bit_on_a_gpu_and_takes_4_bit(
    tiny_models, data, monkeypatch, capfd, command, options
):
    paths = {"base_model_name_or_path": tiny_models.base, "sft_model_name_or_path": tiny_models.sft, **options}
    told = []
    monkeypatch.setattr(commands, "frozen_roles", lambda args, *paths: told.append(args) or frozen_roles(args, *paths))
    data += "/test.jsonl"
    assert main([command, *flags({**paths, "dataset_name": data})]) == 0
    assert choose_dtype(told[0], torch.device("cuda")) == torch.bfloat16
    assert choose_dtype(told[0], torch.device("cpu")) == torch.float32
    capfd.readouterr()
    pytest.importorskip("bitsandbytes")
    assert main([command, *flags({**paths, "dataset_name": data, "dtype": "nf4"})]) == 0
    line = json.loads(capfd.readouterr().out.splitlines()[0])
    wanted = line["logp_sft"] if command == "score" else line["metrics"]["eval/demonstrations/logp_sft"]
    assert told[1].dtype == "nf4" and math.isfinite(wanted)


def test_score_prints_utf8_whatever_the_locale_can_write(tiny_models, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "über", "completion": "Öl"}])
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    paths = {"base_model_name_or_path": tiny_models.base, "sft_model_name_or_path": tiny_models.sft}
    assert main(["score", *flags({**paths, "dataset_name": tmp_path / "data.jsonl"})]) == 0
    sys.stdout.flush()
    assert "über" in json.loads(raw.getvalue().decode())["prompt"]


def test_score_skips_rows_without_completion_and_says_how_many(tiny_models, data, tmp_path, capfd):
    options = {"base_model_name_or_path": tiny_models.base, "sft_model_name_or_path": tiny_models.sft}
    assert main(["score", *flags({**options, "dataset_name": data})]) == 0
    printed = capfd.readouterr()
    scored = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["id"], row["prompt"]) for row in scored] == [(i, row["prompt"]) for i, row in enumerate(ROWS)]
    assert f"1 of {len(ROWS) + 1} rows have no completion and are skipped" in printed.err
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    assert main(["score", *flags({**options, "dataset_name": prompts})]) == 2
    assert "prompts.jsonl has no row with a completion: there is nothing to score" in capfd.readouterr().err


def evaluate(models: TinyModels, data: str, out: Path, **options) -> list[dict]:
    chosen = {
        "base_model_name_or_path": models.base, "sft_model_name_or_path": models.adapter, "dataset_name": data,
        "output_file": out, "max_completion_length": 8, **options,
    }  # fmt: skip
    assert main(["eval", *flags(chosen)]) == 0
    return read_jsonl(out)


def test_eval_judges_sft_a_tuned_model_and_extrapolated_decoding(tiny_models, data, tmp_path):
    out = tmp_path / "eval.jsonl"
    sft = evaluate(tiny_models, data, out)
    assert sft[0]["metrics"]["eval/objective/kl"] == 0
    assert len(sft) == 2 and sft[1]["prompt"] == "2+2=" and sft[1]["id"] == "sum" and "exact_match" in sft[1]
    full = evaluate(tiny_models, data, out, model_name_or_path=tiny_models.sft)
    assert full[0]["metrics"]["eval/objective/kl"] != 0
    same = evaluate(tiny_models, data, out, model_name_or_path=tiny_models.adapter)
    assert same[0]["metrics"] == pytest.approx(sft[0]["metrics"], abs=1e-5)
    extrapolated = evaluate(tiny_models, data, out, extrapolate=0.2)
    assert extrapolated[0]["metrics"]["eval/objective/kl"] != 0
    assert evaluate(tiny_models, data, out, extrapolate=0.4)[0]["metrics"] != extrapolated[0]["metrics"]
    adapter_on_full = {"sft_model_name_or_path": tiny_models.sft, "model_name_or_path": tiny_models.adapter}
    judged = evaluate(tiny_models, data, out, **adapter_on_full)[0]["metrics"]
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models.base), tiny_models.adapter)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    apart = {**adapter_on_full, "model_name_or_path": tmp_path / "merged"}
    assert judged == pytest.approx(evaluate(tiny_models, data, out, **apart)[0]["metrics"], abs=1e-5)
    assert judged["eval/objective/kl"] != 0


def test_eval_puts_an_adapter_of_ppo_on_the_full_sft_model_that_it_was_made_on(tiny_models, data, tmp_path, capfd):
    out = tmp_path / "tuned"
    options = {"sft_model_name_or_path": tiny_models.sft, "max_completion_length": 8}
    assert main(["train", *train_flags(tiny_models, data, out, use_peft="true", **options)]) == 0
    told = read_jsonl(out / "metrics.jsonl")[-1]
    judged = evaluate(tiny_models, data, tmp_path / "eval.jsonl", model_name_or_path=out, **options)[0]["metrics"]
    assert judged == pytest.approx({name: value for name, value in told.items() if name in judged}, abs=1e-5)
    named = out / "adapter_config.json"
    named.write_text(named.read_text().replace(tiny_models.sft, "somewhere/else"))
    arguments = {"base_model_name_or_path": tiny_models.base, "dataset_name": data, "model_name_or_path": out}
    assert main(["eval", *flags({**arguments, **options})]) == 2
    assert "was made on somewhere/else, which is neither the base nor the SFT model given" in capfd.readouterr().err


def test_eval_takes_the_train_split_of_a_single_file_and_says_so(tiny_models, tmp_path, capfd):
    source = write_jsonl(tmp_path / "data.jsonl", [{**row, "id": number} for number, row in enumerate(ROWS)])
    rows = evaluate(tiny_models, source, tmp_path / "out.jsonl")[1:]
    assert [(row["id"], row["prompt"]) for row in rows] == [(i, row["prompt"]) for i, row in enumerate(ROWS)]
    assert "has no rows in a split 'test': judging on 'train'" in capfd.readouterr().err


def test_env_names_versions_and_says_why_each_backend_is_on_or_off(capfd, monkeypatch):
    monkeypatch.setattr(torch, "__version__", f"{torch.__version__.split('+')[0]}+build")
    assert main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capfd.readouterr().out.splitlines() if ": " in line)
    assert lines["torch"] == torch.__version__
    for name in ("python", "transformers", "peft", "native kernels", "cuda", "triton kernels", "flash attention"):
        assert lines[name]
    assert lines["native kernels"].split(":")[0] == ("on" if _extension.available() else "off")
    assert lines["threads"] == str(torch.get_num_threads())
    assert lines["cpu"] == f"{torch.backends.cpu.get_cpu_capability()} as torch sees it"
    assert {name: lines[f"  {name}"] for name in _extension.build_info()} == {
        name: str(value) for name, value in _extension.build_info().items()
    }


def test_env_of_packages_and_a_device_that_are_there_and_are_not(capfd, monkeypatch):
    def told():
        assert main(["env"]) == 0
        return dict(line.split(": ", 1) for line in capfd.readouterr().out.splitlines())

    def of(package):
        if package in ("flash-attn", "tensorboard") and absent:
            raise importlib.metadata.PackageNotFoundError
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    absent = True
    lines = told()
    assert lines["mps"] == "there, and not used: models go to the CPU" and choose_device() == torch.device("cpu")
    assert (lines["bitsandbytes"], lines["flash-attn"], lines["tensorboard"]) == ("1.2.3", *2 * ["not installed"])
    assert lines["cuda"] == "off: torch is a CPU build"
    assert "is not installed; attention is torch's own" in lines["flash attention"]
    absent = False
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    lines = told()
    assert "mps" not in lines
    assert lines["flash-attn"] == "1.2.3"
    assert lines["cuda"] == "off: torch is built for CUDA 13.0 and sees no device"
    assert lines["flash attention"] == "off: no CUDA device"
    card = types.SimpleNamespace(name="Card", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr("srppo.environment._triton.why", lambda: "")  # which would ask the device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lines = told()
    assert lines["cuda"] == "on: Card, compute capability 9.0, CUDA 13.0"
    assert lines["flash attention"] == "available: choose it with --attn_implementation flash_attention_2"


# -- mistakes ---------------------------------------------------------------------------------------------------------

JUDGED = ["--base_model_name_or_path", "x", "--sft_model_name_or_path", "x", "--dataset_name", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--learning_rte", "1"], "unrecognized arguments: --learning_rte"),
        (["train", "--learning", "1"], "unrecognized arguments: --learning"),
        (["train", "--learning-rate", "1"], "; 'srppo train --help' lists the options"),
        (["score", "--learning_rate", "1"], "unrecognized arguments"),
        (["score", "--dataset_test_split", "x"], "unrecognized arguments"),
        (["sft", "--sft_model_name_or_path", "x"], "unrecognized arguments"),
        (["tune"], "invalid choice: 'tune'"),
        ([], "the following arguments are required: command"),
        (["train"], "--base_model_name_or_path is needed: pretrained base model"),
        (["train", "--base_model_name_or_path", "x"], "--dataset_name is needed"),
        (["score", "--base_model_name_or_path", "x"], "--sft_model_name_or_path is needed"),
        (["eval", *JUDGED, "--extrapolate", "0"], "--extrapolate must be above 0; got 0.0"),
        (["train", "--lora_r", "0"], "lora_r must be at least 1; got 0"),
        (["train", "--lora_r", "two"], "lora_r must be a whole number; got 'two'"),
        (["train", "--lora_r", "64"], "lora_r is for adapters: add --use_peft, or leave it out to train all weights"),
        (["sft", "--lora_target_modules", "q_proj"], "lora_target_modules is for adapters: add --use_peft"),
        (["train", "--config", "no-such.yaml"], "cannot read the configuration file no-such.yaml"),
        (
            ["sft", "--base_model_name_or_path", "x", "--dataset_name", "no.jsonl"],
            "no tokenizer could be loaded from x: it is no folder here (base_model_name_or_path), and from the hub: ",
        ),
        (["train", "--learning_rate"], "expected one argument"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_two(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.startswith("srppo: ") and printed.err.count("\n") == 1
    assert message in printed.err
    assert list(tmp_path.iterdir()) == []


def test_train_takes_the_tokenizer_of_the_sft_model(tiny_models, data, tmp_path, monkeypatch):
    """Where that of the base is another: SFT may have brought a chat template."""
    sft = tmp_path / "own"
    shutil.copytree(tiny_models.sft, sft)
    tokenizer = AutoTokenizer.from_pretrained(sft)
    tokenizer.chat_template = "{{ messages[0]['content'] }}:"
    tokenizer.save_pretrained(sft)
    given = {}

    def trainer(*models, processing_class, **options):
        given.update(template=processing_class.chat_template)
        raise srppo.UserError("seen")

    monkeypatch.setattr("srppo.trainer.SRPPOTrainer", trainer)
    assert main(["train", *train_flags(tiny_models, data, tmp_path / "run", sft_model_name_or_path=sft)]) == 2
    assert given == {"template": tokenizer.chat_template}


@pytest.mark.parametrize(
    ("setting", "message"),
    [("save_rollouts", "exists and is not empty"), ("from_rollouts", "the rollout of iteration 1, is not there")],
)
def test_rollouts_that_cannot_be_kept_or_had_are_told_before_sft(tiny_models, tmp_path, capfd, setting, message):
    data = write_jsonl(tmp_path / "old" / "train.jsonl", ROWS)
    settings = {setting: str(tmp_path / "old")}
    assert main(["train", *train_flags(tiny_models, data, tmp_path / "run", **settings)]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_completion_length": 126}, "may reach 132 tokens, and the model has 128 positions"),
        (
            {"rollout_engine": "vllm", "vllm_url": "http://127.0.0.1:9", "use_peft": "true"},
            "no vLLM server answers at http://127.0.0.1:9",
        ),
        ({"rollout_engine": "vllm"}, "needs use_peft=true"),
    ],
)
def test_what_would_stop_ppo_is_told_before_sft(tiny_models, tmp_path, capfd, settings, message):
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)
    for more in ({}, {"resume_from_checkpoint": "latest"}):
        assert main(["train", *train_flags(tiny_models, data, tmp_path / "run", **settings, **more)]) == 2
        assert message in capfd.readouterr().err
        assert not (tmp_path / "run").exists()


def test_what_a_killed_run_was_writing_goes_wherever_it_wrote(tmp_path):
    places = [tmp_path / "run", tmp_path / "run" / "completions", tmp_path / "rollouts"]
    for place in places:
        (place / ".writing-1").mkdir(parents=True)
        (place / ".writing-1" / "rollout_00002.safetensors").touch()
        (place / "kept").touch()
    checkpoint.sweep(places[0], str(places[2]))
    assert [sorted(path.name for path in place.iterdir()) for place in places[1:]] == [["kept"]] * 2
    assert not (places[0] / ".writing-1").exists()


def test_a_folder_that_holds_only_the_sft_model_of_a_run_is_refused_with_how_to_go_on(
    tiny_models, data, tmp_path, capfd
):
    out, hint = tmp_path / "run", "--resume_from_checkpoint latest goes on from the SFT model in it"
    shutil.copytree(tiny_models.sft, out / "sft")
    arguments = ["train", *train_flags(tiny_models, data, out)]
    before = tree(out)
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "run exists and is not empty" in error and hint in error and error.count("\n") == 1
    assert main([*arguments, "--sft_model_name_or_path", tiny_models.sft]) == 2
    assert hint not in capfd.readouterr().err  # it would go on from the model named
    assert tree(out) == before
    (out / "thesis.txt").write_text("precious")
    assert main(arguments) == 2
    assert hint not in capfd.readouterr().err
    shutil.move(out, tmp_path / "kept")
    (out / ".writing-1").mkdir(parents=True)
    assert main(arguments) == 2
    assert "killed run was writing: --resume_from_checkpoint latest begins again" in capfd.readouterr().err
    shutil.move(tmp_path / "kept" / "sft", out)
    assert main([*arguments, "--resume_from_checkpoint", "latest"]) == 0
    assert not (out / ".writing-1").exists()


def test_a_checkpoint_or_its_sft_model_that_is_not_there_is_no_name_for_a_hub(
    tiny_models, data, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *train_flags(tiny_models, data, tmp_path / "run")]
    assert main([*arguments, "--resume_from_checkpoint", "nothere"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("srppo: resume_from_checkpoint: there is no checkpoint nothere; in ")
    assert error.count("\n") == 1
    (tmp_path / "checkpoint-1").mkdir()
    assert main([*arguments, "--resume_from_checkpoint", str(tmp_path)]) == 2  # the run's folder instead of one in it
    assert f"there is no checkpoint {tmp_path}; in {tmp_path} are: checkpoint-1; " in capfd.readouterr().err
    assert main([*arguments, "--resume_from_checkpoint", "checkpoint-1"]) == 2
    told = "there is no SFT model in {}: give the run's own with --sft_model_name_or_path"
    assert told.format("sft") in capfd.readouterr().err
    made = tmp_path / "run" / "sft"
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    assert main([*arguments, "--resume_from_checkpoint", "latest"]) == 2
    assert told.format(made) in capfd.readouterr().err and not made.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "bad.jsonl, line 2 is not valid JSON"),
        ('{"prompt": "a", "extra": 1}\n', "bad.jsonl, line 1: unknown column 'extra'"),
        ('{"text": "a"}\n', "bad.jsonl, line 1: a 'text' column"),
        (
            '{"prompt": "' + "a" * 600 + '"}\n',
            "bad.jsonl, line 1: the prompt has 600 tokens and max_prompt_length is 512",
        ),
        ("", "bad.jsonl has no rows: there is nothing to train on"),
        ('{"prompt": "a"}\n', "SFT needs demonstrations, and no row has a completion"),
    ],
)
def test_bad_data_is_refused_with_its_place_before_anything_is_written(tiny_models, tmp_path, capfd, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    arguments = train_flags(tiny_models, str(tmp_path / "bad.jsonl"), tmp_path / "run", max_completion_length=None)
    assert main(["train", *arguments]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "settings"), [("train", {}), ("train", {"resume_from_checkpoint": "latest"}), ("sft", {})]
)
def test_an_output_folder_that_is_not_empty_is_refused_and_untouched(
    tiny_models, data, tmp_path, capfd, command, settings
):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    arguments = train_flags(tiny_models, data, out, **settings)
    if command == "sft":
        arguments = flags({"base_model_name_or_path": tiny_models.base, "dataset_name": data, "output_dir": out})
    assert main([command, *arguments]) == 2
    assert "exists and is not empty: choose a new folder" in capfd.readouterr().err
    assert tree(out) == {"thesis.txt": b"precious"}


def test_an_output_folder_that_cannot_be_made_is_told_before_anything_is_loaded(tiny_models, data, tmp_path, capfd):
    (tmp_path / "file").write_text("x")
    assert main(["train", *train_flags(tiny_models, data, tmp_path / "file")]) == 2
    assert "file is a file: choose a folder" in capfd.readouterr().err
    for out in (tmp_path / "file" / "run", Path("/proc/nowhere/run")):  # not even root makes a folder in /proc
        for model in (None, tiny_models.sft):
            assert main(["train", *train_flags(tiny_models, data, out, sft_model_name_or_path=model)]) == 2
            error = capfd.readouterr().err
            assert f"output_dir {out} cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", ["score", "eval"])
def test_an_output_file_or_data_that_cannot_be_used_is_told_before_anything_is_computed(
    tiny_models, tmp_path, capfd, command
):
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    options = {
        "base_model_name_or_path": tiny_models.base, "sft_model_name_or_path": tiny_models.sft, "dataset_name": data,
    }  # fmt: skip
    for file, message in ((tmp_path, "is a folder: name a file in it"), (f"{data}/out.jsonl", "cannot be written")):
        assert main([command, *flags({**options, "output_file": file})]) == 2
        error = capfd.readouterr().err
        assert f"output_file {file}" in error.replace(data + " ", f"{file} ") and message in error
        assert error.count("\n") == 1
    write_jsonl(tmp_path / "empty.jsonl", [])
    assert main([command, *flags({**options, "dataset_name": tmp_path / "empty.jsonl"})]) == 2
    assert "has no rows: there is nothing to" in capfd.readouterr().err
    long = {"prompt": "ab:", "completion": "x" * 126}
    options["dataset_name"] = write_jsonl(tmp_path / "long.jsonl", [long])
    assert main([command, *flags({**options, "max_completion_length": 130})]) == 2
    assert "the model has 128 positions" in capfd.readouterr().err
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.sft)
    tokenizer.add_tokens(["<a>", "<b>", "<c>", "<d>", "<e>"])  # the last is beyond the models' embeddings
    for name in ("base", "sft"):
        options[f"{name}_model_name_or_path"] = shutil.copytree(getattr(tiny_models, name), tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options["dataset_name"] = write_jsonl(tmp_path / "new.jsonl", [{"prompt": "<e>", "completion": "x"}])
    assert main([command, *flags({**options, "max_completion_length": 8})]) == 2
    assert "token 264 is outside of the model's vocabulary of 264 tokens" in capfd.readouterr().err


def test_demonstrations_that_only_sft_would_read_may_be_longer_than_rollouts(tiny_models, data, tmp_path, capfd):
    settings = {"max_completion_length": 3, "max_steps": 0}
    assert main(["train", *train_flags(tiny_models, data, tmp_path / "a", **settings)]) == 2
    assert "the completion has 4 tokens with its stop token and max_completion_length is 3" in capfd.readouterr().err
    settings["sft_model_name_or_path"] = tiny_models.sft
    assert main(["train", *train_flags(tiny_models, data, tmp_path / "b", **settings)]) == 0


def test_models_that_do_not_fit_are_refused_with_exit_code_two(tiny_models, data, tmp_path, capfd):
    other = save(tiny_model(vocab_size=270), tmp_path / "other")
    assert main(["train", *train_flags(tiny_models, data, tmp_path / "run", sft_model_name_or_path=other)]) == 2
    assert "base and SFT model have different vocabularies (264 and 270 tokens)" in capfd.readouterr().err
    models = {"base_model_name_or_path": tiny_models.base, "sft_model_name_or_path": tiny_models.sft}
    assert main(["eval", *flags({**models, "dataset_name": data, "model_name_or_path": other})]) == 2
    assert f"base and the model in {other} have different vocabularies" in capfd.readouterr().err
    settings = {"use_peft": "true", "lora_target_modules": "lm_head"}
    assert main(["train", *train_flags(tiny_models, data, tmp_path / "run", **settings)]) == 2
    assert "the LM head" in capfd.readouterr().err
    same = train_flags(tiny_models, data, tmp_path / "run", sft_model_name_or_path=tiny_models.base)
    assert main(["train", *same]) == 2
    assert "the reward is 0 everywhere" in capfd.readouterr().err


def test_flags_win_over_the_configuration_file(tiny_models, data, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "run.yaml").write_text("max_steps: 5\nkl_coef: 0.25\nlearning_rate: 1e-4\nuse_peft: false\n")
    arguments = train_flags(tiny_models, data, out, max_steps=1, sft_model_name_or_path=tiny_models.sft)
    assert main(["train", "--config", str(tmp_path / "run.yaml"), *arguments]) == 0
    written = srppo.PipelineConfig.from_yaml(out / "srppo_config.yaml")
    assert (written.max_steps, written.kl_coef, written.learning_rate) == (1, 0.25, 1e-3)


def test_a_tilde_is_the_home_folder_where_no_shell_expands_it(tmp_path, monkeypatch):
    """A run's output would go to a folder of the name ~ in the working directory, and models not be found."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = {}
    monkeypatch.setattr(commands, "eval", lambda args, options: seen.update(args=args, options=options))
    monkeypatch.setattr(commands, "demo", lambda options: seen.update(demo=options.output_dir))
    (tmp_path / "run.yaml").write_text("base_model_name_or_path: ~/base\noutput_dir: ~/run\nsave_rollouts: ~/kept\n")
    assert main(["eval", "--config=~/run.yaml", "--output_file=~/out.jsonl", "--model_name_or_path=~/run"]) == 0
    assert main(["demo", "--output_dir=~/demo"]) == 0
    args, options = seen["args"], seen["options"]
    found = (args.base_model_name_or_path, args.output_dir, args.save_rollouts, options.output_file,
             options.model_name_or_path, seen["demo"])  # fmt: skip
    assert found == tuple(str(tmp_path / name) for name in ("base", "run", "kept", "out.jsonl", "run", "demo"))


def test_the_demo_gets_its_seed_and_its_length(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("srppo.demo.run.run_demo", lambda folder, **options: asked.append((folder, options)))
    assert main(["demo", f"--output_dir={tmp_path}"]) == main(["demo", "--seed", "7", "--quick"]) == 0
    assert asked == [(tmp_path, {"seed": 0, "quick": False}), (Path("srppo-demo"), {"seed": 7, "quick": True})]


def test_lists_and_switches_as_flags(monkeypatch):
    seen = {}
    monkeypatch.setattr(commands, "train", lambda args, options: seen.update(args=args))
    arguments = [
        "train",
        "--stop_token_ids",
        "1",
        "2",
        "--adam_betas",
        "0.8",
        "0.9",
        "--use_peft",
        "--max_grad_norm",
        "none",
    ]
    assert main([*arguments, "--lora_target_modules", "q_proj", "v_proj", "--whiten_advantages", "false"]) == 0
    args = seen["args"]
    assert (args.stop_token_ids, args.adam_betas, args.use_peft) == ([1, 2], [0.8, 0.9], True)
    assert (args.max_grad_norm, args.lora_target_modules) == (None, ["q_proj", "v_proj"])
    assert args.whiten_advantages is False


@pytest.mark.parametrize(("command", "settings"), [
    ("sft", {"max_tokens_per_micro_batch": 40, "fsdp": True}), ("eval", {"max_tokens_per_micro_batch": 40}),
])  # fmt: skip
def test_what_a_command_reads_from_a_file_is_one_of_its_flags_too(monkeypatch, command, settings):
    seen = []
    monkeypatch.setattr(commands, command, lambda args, options: seen.append(args))
    assert main([command, *flags(settings)]) == 0
    assert {name: getattr(seen[0], name) for name in settings} == settings


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"srppo {importlib.metadata.version('srppo')}\n"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_lists_the_options_with_their_defaults(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    if command == "train":
        for field in srppo.PipelineConfig.__dataclass_fields__.values():
            assert f"--{field.name}" in text
        assert (
            "beta: weight of the KL penalty; see kl_reference, and the README on how to choose (default: 1.0)" in text
        )


# -- interruption -----------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, module, name: str, call: int) -> None:
    """The ``call``-th call of a function ends as Ctrl-C would end it."""
    real, calls = getattr(module, name), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)


@pytest.mark.parametrize("place", ["step", "saving"])
def test_ctrl_c_in_sft_leaves_nothing_and_the_same_command_runs_again(
    tiny_models, data, tmp_path, monkeypatch, capfd, place
):
    neighbour = tmp_path / "earlier"
    neighbour.mkdir()
    (neighbour / "model.safetensors").write_text("precious")
    arguments = ["train", *train_flags(tiny_models, data, tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, sft_module, *(("sft_step", 2) if place == "step" else ("save_model", 1)))
        assert main(arguments) == 130
    assert "interrupted" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert leftovers(tmp_path) == [] and tree(neighbour) == {"model.safetensors": b"precious"}
    assert main(arguments) == 0


@pytest.mark.parametrize("save_steps", [0, 1])
def test_ctrl_c_in_ppo_keeps_what_was_complete_and_says_how_to_go_on(
    tiny_models, data, tmp_path, monkeypatch, capfd, save_steps
):
    out = tmp_path / "run"
    arguments = train_flags(tiny_models, data, out, max_steps=3, save_steps=save_steps)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, ppo, "update", 3)
        assert main(["train", *arguments]) == 130
    said = capfd.readouterr().err
    assert "stopped after iteration 2" in said and "interrupted" in said
    assert not (out / "model.safetensors").exists() and leftovers(tmp_path) == []
    AutoModelForCausalLM.from_pretrained(out / "sft")
    assert [entry["step"] for entry in read_jsonl(out / "metrics.jsonl")] == [1, 2]
    if save_steps:
        newest = out / "checkpoint-2"
        assert f"--resume_from_checkpoint {newest}" in said
        assert main(["train", *arguments, "--resume_from_checkpoint", str(newest)]) == 0
        assert (out / "model.safetensors").exists()
    else:
        assert "no checkpoint was due yet (save_steps)" in said
        assert "from its SFT model with --resume_from_checkpoint latest" in said
        assert main(["train", *arguments, "--resume_from_checkpoint", "latest"]) == 0


@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_in_a_run_with_a_given_sft_model_says_how_to_start_again(
    tiny_models, data, tmp_path, monkeypatch, capfd, call
):
    """The same command would find its folder in use; after no iteration there are no metrics to be named."""
    arguments = train_flags(tiny_models, data, tmp_path / "run", sft_model_name_or_path=tiny_models.sft)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, ppo, "update", call)
        assert main(["train", *arguments]) == 130
    said = " ".join(capfd.readouterr().err.split())
    assert ("stopped before the first iteration was done; no" in said) == (call == 1)
    assert "was due yet (save_steps); start again with --resume_from_checkpoint latest" in said
    assert main(["train", *arguments, "--resume_from_checkpoint", "latest"]) == 0


def test_ctrl_c_while_the_final_model_is_written_leaves_no_half_model(tiny_models, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    arguments = train_flags(tiny_models, data, out, sft_model_name_or_path=tiny_models.sft)
    real = checkpoint.save_model

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_model", interrupted)
    assert main(["train", *arguments]) == 130
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()
    assert leftovers(tmp_path) == []


def test_ctrl_c_as_a_signal_to_the_process(tiny_models, data, tmp_path):
    out = tmp_path / "run"
    arguments = train_flags(tiny_models, data, out, max_steps=100_000, num_ppo_epochs=1, log_completions=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "srppo.cli", "train", *arguments],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background may ignore it
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no iteration was done"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "stopped after iteration" in said and "Traceback" not in said
    assert not (out / "model.safetensors").exists() and leftovers(tmp_path) == []
    AutoModelForCausalLM.from_pretrained(out / "sft")


# -- full disk --------------------------------------------------------------------------------------------------------


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk(*_, **__):
    raise FULL


@pytest.mark.parametrize("use_peft", ["true", "false"])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_full_disk_is_exit_code_one_a_clear_message_and_no_half_model(
    tiny_models, data, tmp_path, monkeypatch, capfd, use_peft, stage
):
    out = tmp_path / "run"
    source = {"true": tiny_models.adapter, "false": tiny_models.sft}[use_peft] if stage == "ppo" else None
    arguments = train_flags(tiny_models, data, out, use_peft=use_peft, sft_model_name_or_path=source)
    for module in ("transformers.modeling_utils.safe_save_file", "peft.peft_model.safe_save_file"):
        monkeypatch.setattr(module, full_disk)
    assert main(["train", *arguments]) == 1
    said = capfd.readouterr().err
    assert "srppo: the disk is full (No space left on device): make room" in said and "Traceback" not in said
    assert not list(out.rglob("*.safetensors")) and not list(out.rglob("*config.json"))
    assert leftovers(tmp_path) == []


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_ones(tiny_models, data, tmp_path, monkeypatch, capfd):
    out, real, calls = tmp_path / "run", torch.save, []

    def second_fails(value, path):
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        real(value, path)

    monkeypatch.setattr(checkpoint.torch, "save", second_fails)
    arguments = train_flags(tiny_models, data, out, save_steps=1, sft_model_name_or_path=tiny_models.sft)
    assert main(["train", *arguments]) == 1
    assert "the disk is full" in capfd.readouterr().err
    assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-1"]
    checkpoint.load_checkpoint(out / "checkpoint-1")
    assert leftovers(tmp_path) == []


def test_an_error_of_another_kind_while_saving_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shared memory"), checkpoint.failed_writes(tmp_path):
        raise RuntimeError("Some tensors share memory, see shared memory")


def test_a_real_write_failure_in_a_process_with_a_limit_on_file_size(tiny_models, data, tmp_path):
    """The kernel refuses to let model.safetensors grow past the limit, as a full disk or a quota would."""
    limit = 100_000
    assert (Path(tiny_models.base) / "model.safetensors").stat().st_size > limit
    done = run(
        "sft", *flags({"base_model_name_or_path": tiny_models.base, "dataset_name": data, "report_to": "none",
                       "sft_num_train_epochs": 1, "output_dir": tmp_path / "out"}),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert f"srppo: the disk is full ({os.strerror(errno.EFBIG)}): make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


# -- the end of the process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("ends", ["returns 3", "fails"])
def test_one_of_several_processes_ends_in_order_and_without_a_shutdown_of_its_interpreter(processes, ends):
    """During which a worker thread of gloo may still ask for the GIL; see ``srppo.distributed.leave``."""
    code = (
        "import atexit, srppo.cli as cli\n"
        "class Global:\n"
        "    def __del__(self): print('shut down')\n"
        "kept = Global()\n"
        "atexit.register(print, 'exit handler')\n"
        f"cli.main = (lambda: 3) if {ends == 'returns 3'} else (lambda: 1 / 0)\n"
        "cli.entry()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**environment(), "WORLD_SIZE": processes}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split("\n") == ["exit handler", *(["shut down"] if processes == "1" else []), ""]
    assert done.returncode == (3 if ends == "returns 3" else 1)
    assert ("ZeroDivisionError: division by zero" in done.stderr) == (ends == "fails")


# -- the package ------------------------------------------------------------------------------------------------------


def test_importing_srppo_imports_neither_transformers_nor_triton():
    code = (
        "import sys, srppo, srppo_kernels\n"
        "srppo.linear_logprob, srppo.gae, srppo.SRPPOConfig()\n"
        "heavy = {'transformers', 'triton', 'peft', 'datasets', 'matplotlib', 'rich', 'pyarrow', 'tensorboard',"
        " 'torch._dynamo', 'torch._inductor'}\n"  # a second of import time, for what only torch.compile needs
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    for name in srppo.__all__:
        assert getattr(srppo, name) is not None
    assert set(srppo.__all__) <= set(dir(srppo))
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = srppo.missing


def test_submodules_that_the_readme_names_need_no_import_of_their_own():
    named = re.findall(r"`srppo\.([a-z]+)\.\w+", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"distributed", "evaluation", "metrics"} <= set(named)
    for name in [*named, "data"]:  # an error names the last one
        assert srppo.__getattr__(name) is importlib.import_module(f"srppo.{name}")


def test_models_are_stored_as_safetensors_and_nothing_is_pickled(tiny_models):
    for folder, name in ((tiny_models.sft, "model"), (tiny_models.adapter, "adapter_model")):
        assert len(safetensors.torch.load_file(Path(folder) / f"{name}.safetensors")) > 10
        assert not [path for kind in ("*.bin", "*.pt", "*.pkl") for path in Path(folder).rglob(kind)]
