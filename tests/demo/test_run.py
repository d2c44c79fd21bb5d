"""The quick demo, end to end: every stage runs, every file is there, every row is printed."""

import io
import json

import pytest
import torch
from rich.console import Console as RichConsole
from transformers import AutoModelForCausalLM, AutoTokenizer

from srppo.console import Console
from srppo.demo.run import QUICK, run_demo
from srppo.errors import UserError

ROWS = [
    "base",
    "SFT",
    "SFT, 4x as long",
    "SFT, 8x as long",
    "extrapolated β=1",
    "extrapolated β=0.33",
    "SRPPO",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console()
    console.rich = RichConsole(file=io.StringIO(), width=80)
    threads = torch.get_num_threads()
    results = run_demo(folder, seed=3, quick=True, console=console)
    assert torch.get_num_threads() == threads
    return folder, results, console.rich.file.getvalue()


def test_the_table_has_every_row_within_80_columns(demo):
    _, results, printed = demo
    assert [row["model"] for row in results["table"]] == ROWS
    table = printed[printed.index("Held-out prompts") :]
    for row in ROWS:
        assert any(line.startswith(f"│ {row} ") for line in table.splitlines()), row
    assert "reward" in table
    assert "KL to SFT" in table


def test_numbers_are_consistent(demo):
    _, results, _ = demo
    by_name = {row["model"]: row for row in results["table"]}
    assert by_name["SFT"]["kl_to_sft_in"] == by_name["SFT"]["kl_to_sft_out"] == 0
    for name in set(ROWS) - {"SFT"}:
        assert by_name[name]["kl_to_sft_out"] > 0
    for model in results["models"].values():
        for domain in ("in_domain", "out_of_domain"):
            assert sum(model[domain]["ways"].values()) == pytest.approx(1)
    assert set(results["seconds"]) == {"data and pretraining", "SFT, all lengths", "SRPPO", "evaluation"}
    assert [entry["step"] for entry in results["srppo_scores"]] == [0, 2]


def test_every_file_is_written(demo):
    folder, results, _ = demo
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in (
        "scores.png",
        "iterations.png",
        "srppo/plots/reward.png",
        "srppo/plots/kl.png",
        "srppo/plots/length.png",
    ):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name
    lines = {path.stem: path.read_text().splitlines() for path in (folder / "data").iterdir()}
    assert {name: len(rows) for name, rows in lines.items()} == {
        "corpus": QUICK.corpus_size,
        "demonstrations": QUICK.demonstrations,
        "prompts": QUICK.prompts,
        "held_out": 6 * QUICK.held_out_per_task,
        "held_out_demonstrations": QUICK.held_out_demonstrations,
    }
    assert all(set(json.loads(line)) == {"prompt", "completion"} for line in lines["demonstrations"])
    assert all(set(json.loads(line)) == {"prompt"} for line in lines["prompts"])


def test_every_model_loads_with_plain_transformers(demo):
    folder, _, _ = demo
    weights = {}
    for name in ("base", "sft", "sft-longer-4x", "sft-longer-8x", "srppo"):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.eos_token_id == model.config.eos_token_id != tokenizer.pad_token_id
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    names = list(weights)
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            assert not torch.equal(weights[left], weights[right]), (left, right)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_srppo_would_refuse_is_refused_before_anything_is_written(tmp_path, seed):
    with pytest.raises(UserError, match=f"seed must be at least 0 and at most 4294967295; got {seed}"):
        run_demo(tmp_path / "new", seed, quick=True, console=Console(quiet=True))
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty: choose a new folder"):
        run_demo(tmp_path, quick=True, console=Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
