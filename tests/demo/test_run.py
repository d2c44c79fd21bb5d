"""The quick demo, end to end: every stage runs, every file is there, every row is printed."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console as RichConsole
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from srppo.console import Console
from srppo.demo import plots, run
from srppo.demo.run import QUICK, run_demo, sft_config, srppo_config
from srppo.demo.world import TASKS, World
from srppo.errors import UserError

ROWS = [
    "base",
    "SFT",
    "SFT, 8x as long",
    "SFT, 32x as long",
    "extrapolated β=1",
    "extrapolated β=0.33",
    "SRPPO",
    "SFT, T=0.5",
    "SRPPO, T=0.5",
]


CALLS = {}  # of the demo's run, by function: arguments and options of each
TABLES = []  # the rows of each that it printed
JUDGED = []  # what ``judge`` gave, with scores that tell whose they are: so short a run gets none right


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    console = Console()
    console.rich = RichConsole(file=io.StringIO(), width=80)
    threads, table = torch.get_num_threads(), console.table
    console.table = lambda title, rows, **options: TABLES.append(rows) or table(title, rows, **options)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build_model", "pretrain", "run_sft", "SRPPOTrainer", "plot_scores", "plot_iterations", "judge"):
            keep_calls(patch, name)
        counted = run.judge
        patch.setattr(run, "judge", lambda *a, **k: JUDGED.append(marked(counted(*a, **k))) or JUDGED[-1])
        results = run_demo(folder, seed=3, quick=True, console=console)
    assert torch.get_num_threads() == threads
    return folder, results, console.rich.file.getvalue()


def marked(judgement):
    ins, outs, score = judgement.in_domain, judgement.out_of_domain, (1 + len(JUDGED)) / 100
    ins, outs = dataclasses.replace(ins, score=score), dataclasses.replace(outs, score=score + 0.5)
    return dataclasses.replace(judgement, in_domain=ins, out_of_domain=outs)


def keep_calls(patch, name):
    real, CALLS[name] = getattr(run, name), []
    patch.setattr(run, name, lambda *a, **k: CALLS[name].append((a, k)) or real(*a, **k))


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


def test_each_stage_learns_from_its_own_data_and_models_with_the_seed_that_was_given(demo, tmp_path):
    folder, _, _ = demo
    world, settings = World(3), QUICK

    def pairs(rows):
        return [(row.prompt, row.completion) for row in rows]

    def texts(examples):
        decode = CALLS["SRPPOTrainer"][0][1]["processing_class"].decode
        return [
            (decode(e.prompt_ids), e.completion_ids and decode(e.completion_ids, skip_special_tokens=True))
            for e in examples
        ]

    assert CALLS["build_model"][0][1] == {"seed": 3}
    (_, _, corpus, *_), options = CALLS["pretrain"][0]
    assert options["seed"] == 3 and corpus == world.corpus(settings.corpus_size)
    for (args,), options in CALLS["run_sft"]:
        assert texts(options["train_dataset"]) == pairs(world.demonstrations(settings.demonstrations))
        assert args.base_model_name_or_path == str(folder / "base") and args.seed == 3
    ((sft, base, args, prompts, held_out),) = (call[0] for call in CALLS["SRPPOTrainer"])
    assert (sft, base, args.seed) == (str(folder / "sft"), str(folder / "base"), 3)
    assert texts(prompts) == pairs(world.prompts(settings.prompts))
    assert texts(held_out) == pairs(world.held_out_demonstrations(settings.held_out_demonstrations))
    judged = pairs(world.held_out(settings.held_out_per_task))
    watched, table = CALLS["judge"][:2], CALLS["judge"][2:]
    assert all(texts(arguments[3]) == judged[: settings.watch_per_task * len(TASKS)] for arguments, _ in watched)
    assert len(table) == len(ROWS) and all(texts(arguments[3]) == judged for arguments, _ in table)


def test_what_is_judged_is_what_was_written_and_each_figure_stands_at_its_place(demo):
    folder, results, _ = demo
    samples, table = TABLES[-2:]
    folders = ("base", "sft", "sft-longer-8x", "sft-longer-32x", "sft", "sft", "srppo", "sft", "srppo")
    betas = (None, None, None, None, *QUICK.extrapolation_betas, None, None, None)
    temperatures = (1.0,) * 7 + (QUICK.low_temperature,) * 2
    calls, found = CALLS["judge"][2:], JUDGED[2:]
    for name, of, beta, temperature, row, shown, (arguments, options), each in zip(
        ROWS, folders, betas, temperatures, results["table"], table, calls, found, strict=True
    ):
        candidate, sft, base, *_ = arguments
        assert (candidate.name, candidate.beta, options["seed"]) == (name, beta, 3)
        assert candidate.temperature == temperature
        for role, place in ((candidate.role, of), (sft, "sft"), (base, "base")):
            weights = load_file(folder / place / "model.safetensors")
            assert all(torch.equal(role.model.state_dict()[key], value) for key, value in weights.items())
        assert results["models"][name] == each.as_dict()
        ins, outs = each.in_domain, each.out_of_domain
        for metric in ("score", "reward", "kl_to_sft", "length"):
            assert (row[f"{metric}_in"], row[f"{metric}_out"]) == (getattr(ins, metric), getattr(outs, metric))
        assert shown == {
            "model": name, "score": f"{ins.score:.2f} / {outs.score:.2f}",
            "reward": f"{ins.reward:.1f} / {outs.reward:.1f}",
            "KL to SFT": f"{ins.kl_to_sft:.2f} / {outs.kl_to_sft:.2f}",
            "length": f"{ins.length:.1f} / {outs.length:.1f}",
        }  # fmt: skip
    for i, sample in enumerate(samples):
        prompt, base = found[0].samples[i]
        answers = {"base": base, "SFT": found[1].samples[i][1], "SRPPO": found[6].samples[i][1]}
        assert sample == {"prompt": prompt, **answers}
    (_, scores), _ = CALLS["plot_scores"][0]
    assert scores == {name: (j.in_domain.score, j.out_of_domain.score) for name, j in zip(ROWS, found, strict=True)}
    assert [(call[0][0].role.name, call[1]["seed"]) for call in CALLS["judge"][:2]] == [("sft", 3), ("policy", 3)]
    (_, _, watched), _ = CALLS["plot_iterations"][0]
    assert watched == results["srppo_scores"] == [
        {"step": step, "in_domain": j.in_domain.score, "out_of_domain": j.out_of_domain.score}
        for step, j in zip((0, 2), JUDGED, strict=False)
    ]  # fmt: skip


def test_each_panel_shows_its_own_figures(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: drawn.append(figure.axes))
    plots.plot_scores(tmp_path, {"one": (0.25, 0.5), "two": (0.75, 1.0)})
    names = ("objective/scores", "objective/kl", "completions/mean_length", "eval/demonstrations/logp")
    scores = [{"step": 6, "in_domain": 0.25, "out_of_domain": 0.5}]
    plots.plot_iterations(tmp_path, [{"step": 8, **dict(zip(names, range(4), strict=True))}], scores)
    ((bars,), panels) = drawn
    assert [label.get_text() for label in bars.get_yticklabels()] == ["one", "two"]
    widths = {part.get_label(): [bar.get_width() for bar in part] for part in bars.containers}
    assert widths == {"in domain": [0.25, 0.75], "out of domain": [0.5, 1.0]}
    lines = [{line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()} for axes in panels]
    assert lines[0] == {"in domain": [[6, 0.25]], "out of domain": [[6, 0.5]]}
    assert [list(line.values()) for line in lines[1:]] == [[[[8, value]]] for value in range(4)]
    titles = ("score", "reward", "KL to SFT", "length", "log pi of held-out")
    assert all(axes.get_title().startswith(title) for axes, title in zip(panels, titles, strict=True))


def test_every_setting_of_the_demo_reaches_its_stage(tmp_path):
    settings = dataclasses.replace(
        QUICK, sft_batch_size=5, sft_learning_rate=0.5, iterations=9, prompts_per_iteration=12, mini_batches=3,
        ppo_epochs=7, learning_rate=0.25, value_learning_rate=0.125, kl_coef=0.75, watch_every=4,
    )  # fmt: skip
    sft = sft_config(tmp_path, "longer", 11, settings, 6)
    assert (sft.per_device_train_batch_size, sft.sft_learning_rate, sft.sft_num_train_epochs) == (5, 0.5, 11)
    args = srppo_config(tmp_path, settings, 6)
    assert (args.batch_size, args.num_mini_batches, args.num_ppo_epochs, args.max_steps) == (12, 3, 7, 9)
    assert (args.learning_rate, args.value_learning_rate, args.kl_coef) == (0.25, 0.125, 0.75)
    assert (args.kl_reference, args.eval_steps, args.seed, sft.seed) == ("sft", 4, 6, 6)


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
    for name in ("base", "sft", "sft-longer-8x", "sft-longer-32x", "srppo"):
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
