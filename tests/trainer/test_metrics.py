"""Metrics and what a run leaves behind: documented, computed as documented, and readable."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import (
    QUIET,
    ROWS,
    STOPS,
    config,
    examples,
    full_roles,
    learners,
    read_jsonl,
    rollout,
    trainer,
    with_plots,
)

from srppo import PipelineConfig, SRPPOTrainer, UserError, distributed, evaluation, ppo, run_sft, sft
from srppo.evaluation import EVAL_METRICS, answers_match, completion_rows, evaluate_policy, write_completions
from srppo.learner import Learner
from srppo.metrics import METRICS, MetricsWriter, iteration_metrics
from srppo.model_card import model_card
from srppo.models import Head, load_model, load_tokenizer
from srppo.plots import RUN_PLOTS, UNITS, plot_history
from srppo.roles import Role, frozen_roles
from srppo.rollout import collate, generate
from srppo.sft import SFT_METRICS

PNG = b"\x89PNG\r\n\x1a\n"
EVAL_ROWS = [{"prompt": "2+2=", "completion": "4", "answer": "4"}, {"prompt": "xyz", "answer": "no"}, {"prompt": "q"}]


@pytest.fixture(scope="module")
def finished(tiny_models, tmp_path_factory):
    """A whole run with everything on: trainer and output folder."""
    folder = tmp_path_factory.mktemp("finished")
    run = trainer(
        tiny_models, folder, max_steps=3, eval_steps=2, save_steps=3, log_completions=2, report_to=["tensorboard"],
        eval_dataset=examples(EVAL_ROWS), missing_eos_penalty=0.5,
    )  # fmt: skip
    with with_plots():
        last = run.train()
    return run, folder / "run", last


def test_every_metric_of_a_run_is_documented_and_every_documented_one_is_written(finished):
    run, _, _ = finished
    written = {name for entry in run.history for name in entry} - {"step"}
    assert written == set(METRICS) | set(EVAL_METRICS)
    assert all(len(text) > 10 for text in {**METRICS, **EVAL_METRICS, **SFT_METRICS}.values())


def test_every_metric_of_sft_is_documented_and_what_a_computation_by_hand_gives(tiny_models, tmp_path, monkeypatch):
    rows, modes, limits = examples(ROWS), [], []
    loss_of, step = sft.demonstration_loss, Learner.step
    recomputes = lambda role: role.causal_lm.model.layers[0].gradient_checkpointing  # noqa: E731
    monkeypatch.setattr(
        sft,
        "demonstration_loss",
        lambda role, *rest: modes.append((role.model.training, recomputes(role))) or loss_of(role, *rest),
    )
    monkeypatch.setattr(Learner, "step", lambda self, limit: limits.append(limit) or step(self, limit))
    args = config(
        tmp_path, base_model_name_or_path=tiny_models.base, warmup_ratio=0.0, sft_learning_rate=1e-3,
        gradient_checkpointing=True,
    )  # fmt: skip
    run_sft(args, train_dataset=rows, eval_dataset=rows[:3], output_dir=tmp_path / "sft", console=QUIET)
    history = read_jsonl(tmp_path / "sft" / "metrics.jsonl")
    assert {name for entry in history for name in entry} - {"step"} == set(SFT_METRICS)
    assert [entry["step"] for entry in history if "eval/loss" in entry] == [2, 4]  # the end of each epoch
    assert [entry["lr"] for entry in history] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert limits == [args.max_grad_norm] * 4
    assert [training for training, _ in modes] == [True, True, True, False, False] * 2  # no dropout on those held out
    assert all(asked for _, asked in modes)
    first = torch.randperm(6, generator=torch.Generator().manual_seed(args.seed))[:4].tolist()
    for folder, given, found in (
        (tiny_models.base, [rows[i] for i in first], history[0]["sft/loss"]),
        (tmp_path / "sft", rows[:3], history[-1]["eval/loss"]),
    ):
        model, losses = load_model(folder, args), []
        for row in given:
            ids, begin = torch.tensor([*row.prompt_ids, *row.completion_ids]), len(row.prompt_ids)
            with torch.no_grad():
                logits = model(ids[None]).logits[0, begin - 1 : -1]
            losses += torch.nn.functional.cross_entropy(logits, ids[begin:], reduction="none").tolist()
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_sft_ends_at_a_gradient_that_is_not_finite(tiny_models, tmp_path, monkeypatch):
    loss_of = sft.demonstration_loss
    monkeypatch.setattr(sft, "demonstration_loss", lambda *given: loss_of(*given) * math.inf)
    args = config(tmp_path, base_model_name_or_path=tiny_models.base)
    with pytest.raises(UserError, match="SFT gradient is not finite"):
        run_sft(args, train_dataset=examples(ROWS), output_dir=tmp_path / "sft", console=QUIET)
    assert not (tmp_path / "sft").exists()


def test_metrics_are_what_a_computation_by_hand_gives(tmp_path):
    settings = {"kl_coef": 0.3, "kl_reference": "base", "score_temperature": 1.5, "missing_eos_penalty": 1.5}
    args = config(tmp_path, num_ppo_epochs=1, cliprange_value=0.1, **settings)
    roles, given = full_roles(args, sft_seed=2), rollout()
    with torch.no_grad():
        roles.critic.value_head.weight.fill_(0.1)
        roles.policy.parameters()[0][1].mul_(1.1)  # so that the KL is not 0
    scores = ppo.score(roles, given, args)
    targets = ppo.advantages(given, scores, args)
    mini_batches = [[torch.tensor([0, 1]), torch.tensor([2, 3])]]
    result = ppo.update(*learners(roles, args), given, scores, targets, args, mini_batches)
    got = iteration_metrics(given, scores, targets, result)

    mask, lengths = given.completion_mask, [3, 1, 4, 2]
    rows = [
        {name: getattr(scores, name)[i, :n].double().tolist() for name in ppo.Scores.__dataclass_fields__}
        for i, n in enumerate(lengths)
    ]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    reward = [sum(r["sft"]) - sum(r["base"]) for r in rows]
    kl = [sum(r["policy"]) - sum(r["reference"]) for r in rows]
    returns, values = targets.returns[mask].double(), scores.values[mask].double()
    expected = {
        "objective/scores": mean(reward),
        "objective/scores_per_token": sum(reward) / 10,
        "objective/kl": mean(kl),
        "objective/entropy": mean([-sum(r["policy"]) for r in rows]),
        "objective/non_score_reward": -0.3 * mean(kl),
        "objective/rlhf_reward": mean(reward) - 0.3 * mean(kl) - 1.5 / 4,
        "objective/logp_sft": sum(sum(r["sft"]) for r in rows) / 10,
        "objective/logp_base": sum(sum(r["base"]) for r in rows) / 10,
        "policy/approxkl_avg": 0.0,
        "policy/clipfrac_avg": 0.0,
        "policy/entropy_avg": sum(sum(r["entropy"]) for r in rows) / 10,
        "loss/policy_avg": -targets.advantages[mask].mean().item(),
        "loss/value_avg": 0.5 * (values - returns).square().mean().item(),
        "val/ratio": 1.0,
        "val/ratio_var": 0.0,
        "val/clipfrac_avg": 0.0,
        "val/explained_variance": 1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item(),
        "val/num_eos_tokens": 3,
        "completions/mean_length": 2.5,
        "completions/min_length": 1,
        "completions/max_length": 4,
        "completions/clipped_ratio": 0.25,
        "skipped_steps": 0,
        "ppo_epochs": 1,
    }
    assert abs(expected["objective/kl"]) > 1e-3
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=2e-5, rel=2e-5), name
    clipped = result.policy._replace(clipfrac_low=torch.tensor(0.25), clipfrac_high=torch.tensor(0.125))
    result = dataclasses.replace(result, policy=clipped)
    assert iteration_metrics(given, scores, targets, result)["policy/clipfrac_avg"] == 0.375  # on either side
    assert set(got) - set(expected) == {"grad_norm", "value_grad_norm"}
    assert got["grad_norm"] > 0 and got["value_grad_norm"] > 0


def test_clip_fraction_counts_the_tokens_whose_clipped_term_was_the_smaller_one(tmp_path):
    """The second epoch sees the weights after the first step: they are made here by an update of one epoch."""
    settings = {"learning_rate": 5e-4, "max_grad_norm": None, "kl_coef": 0.0, "cliprange": 0.4}
    given, rows, outcomes = rollout(), [[torch.arange(4)]], []
    for epochs in (1, 2):
        args = config(tmp_path, num_ppo_epochs=epochs, **settings)
        roles = full_roles(args, sft_seed=2)
        scores = ppo.score(roles, given, args)
        targets = ppo.advantages(given, scores, args)
        generator = torch.Generator().manual_seed(0)
        result = ppo.update(*learners(roles, args), given, scores, targets, args, rows, generator=generator)
        outcomes.append((roles, scores, targets, iteration_metrics(given, scores, targets, result)))
    (moved, *_), (_, scores, targets, got) = outcomes
    mask = given.completion_mask
    ratio = (ppo.logprobs(moved.policy, given)[0] - scores.policy)[mask].double().exp()
    advantage = targets.advantages[mask]
    clipped = ((ratio > 1.4) & (advantage > 0)) | ((ratio < 0.6) & (advantage < 0))
    assert 0 < clipped.sum() < 10
    assert got["policy/clipfrac_avg"] == pytest.approx(clipped.double().mean().item() / 2)  # the first epoch has none
    assert got["val/ratio"] == pytest.approx((1 + ratio.mean().item()) / 2, rel=1e-3)
    k3 = (ratio - 1 - ratio.log()).mean().item()
    assert got["policy/approxkl_avg"] == pytest.approx(k3 / 2, rel=1e-3)
    assert result.policy.count == result.value.count == 20  # of both epochs


def test_metrics_that_are_no_number_are_left_out(tmp_path):
    with MetricsWriter(tmp_path, config(tmp_path)) as writer:
        writer.write(1, {"a": 1.0, "b": math.nan, "c": math.inf})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]
    one = collate([[10]], [[0]], pad_token_id=1, stop_token_ids=[0])
    args = config(tmp_path)
    roles = full_roles(args)
    scores = ppo.score(roles, one, args)
    targets = ppo.advantages(one, scores, args)
    result = ppo.update(*learners(roles, args), one, scores, targets, args, [[torch.tensor([0])]])
    assert math.isnan(iteration_metrics(one, scores, targets, result)["val/explained_variance"])


def test_a_step_has_one_entry_however_often_it_is_written(tmp_path):
    with MetricsWriter(tmp_path, config(tmp_path)) as writer:
        writer.write(1, {"a": 1.0})
        writer.write(2, {"a": 2.0})
        writer.write(2, {"eval/a": 3.0})
        writer.write(3, {"a": 4.0})
    entries = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "eval/a": 3.0}, {"step": 3, "a": 4.0}]
    assert read_jsonl(tmp_path / "metrics.jsonl") == writer.history == entries


def test_the_evaluation_at_the_end_joins_the_last_iterations_entry(finished):
    run, folder, _ = finished
    assert [entry["step"] for entry in run.history] == [1, 2, 3]
    assert "eval/objective/kl" in run.history[-1] and "objective/kl" in run.history[-1]
    assert read_jsonl(folder / "metrics.jsonl") == run.history


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_metrics_are_means_over_the_rows_it_returns(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "answers_match", lambda completion, answer: answer == "4")
    args = config(tmp_path, temperature=0.9)
    base, sft = frozen_roles(args, tiny_models.base, tiny_models.sft)
    rows = examples([*EVAL_ROWS, *ROWS])
    metrics, judged = evaluate_policy(base, sft, base, rows, args, tiny_tokenizer(), stop_token_ids=STOPS)
    assert set(metrics) == set(EVAL_METRICS)
    assert [row["prompt"] for row in judged] == [tiny_tokenizer().decode(e.prompt_ids) for e in rows]
    lengths = [row["length"] for row in judged]
    for name, expected in {
        "eval/objective/scores": sum(row["score"] for row in judged) / 9,
        "eval/objective/scores_per_token": sum(row["score"] for row in judged) / sum(lengths),
        "eval/objective/kl": sum(row["kl"] for row in judged) / 9,
        "eval/completions/mean_length": sum(lengths) / 9,
        "eval/completions/clipped_ratio": sum(row["truncated"] for row in judged) / 9,
        "eval/exact_match": 1 / 2,  # of the rows that have an answer
    }.items():
        assert metrics[name] == pytest.approx(expected, abs=1e-5), name
    assert metrics["eval/objective/kl"] != 0
    assert ["exact_match" in row for row in judged] == [True, True, *[False] * 7]
    assert all(row["score_per_token"] == pytest.approx(row["score"] / row["length"]) for row in judged)


@pytest.mark.parametrize("beta", [None, 0.5])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere2"])
def test_evaluation_is_what_the_models_logits_give_in_float64(tmp_path, monkeypatch, kind, beta):
    """Three models and three temperatures, so that none passes for another; heads with softcap, scale and bias."""
    settings = {"temperature": 0.7, "top_p": 0.9, "score_temperature": 1.5, "seed": 3}
    args = config(tmp_path, **settings)
    policy, sft, base = (Role(name, tiny_model(kind, seed=n)) for n, name in enumerate(("policy", "sft", "base")))
    for role in (policy, sft, base) if kind == "cohere2" else ():
        role.causal_lm.lm_head = torch.nn.Linear(32, 264)
    seen = {}

    def sampled(role, prompts, **options):
        drawn = generate(role, prompts, **options)
        seen.update(options, role=role, prompts=prompts, rollout=drawn, seed=torch.initial_seed())
        return drawn

    monkeypatch.setattr(evaluation, "generate", sampled)
    rows = examples([*ROWS[:3], {"prompt": "only a prompt"}])
    metrics, judged = evaluate_policy(policy, sft, base, rows, args, tiny_tokenizer(), stop_token_ids=STOPS,
                                      extrapolate=beta)  # fmt: skip
    told = (seen["temperature"], seen["top_p"], seen["max_completion_length"], seen["seed"], seen["stop_token_ids"])
    assert told == (0.7, 0.9, 5, 3, STOPS)
    assert seen["role"] is policy and seen["extrapolate"] == (None if beta is None else (base, beta))
    assert seen["prompts"] == [row.prompt_ids for row in rows]

    def logits(role, prompt, completion):
        with torch.no_grad():
            return role.causal_lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()

    def logp(role, prompt, completion, temperature):
        z = logits(role, prompt, completion)
        if role is policy and beta is not None:
            z = (1 + 1 / beta) * z.log_softmax(-1) - 1 / beta * logits(base, prompt, completion).log_softmax(-1)
        return (z / temperature).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum().item()

    drawn = seen["rollout"]
    for n, (row, got) in enumerate(zip(rows, judged, strict=True)):
        ids = drawn.completions[n][drawn.completion_mask[n]].tolist()
        scores, kl = ([logp(role, row.prompt_ids, ids, t) for role in pair]
                      for pair, t in (((sft, base), 1.5), ((policy, sft), 0.7)))  # fmt: skip
        assert got["score"] == pytest.approx(scores[0] - scores[1], abs=1e-4)
        assert got["kl"] == pytest.approx(kl[0] - kl[1], abs=1e-4)
    demos = rows[:3]
    for name, role in (("logp", policy), ("logp_sft", sft)):
        total = sum(logp(role, row.prompt_ids, row.completion_ids, 1.0) for row in demos)
        mean = total / sum(len(row.completion_ids) for row in demos)
        assert metrics[f"eval/demonstrations/{name}"] == pytest.approx(mean, abs=1e-4)


def test_capped_logits_of_a_head_in_16_bit_with_everything():
    hidden, weight, bias = torch.randn(3, 8), torch.randn(5, 8).bfloat16(), torch.randn(5).bfloat16()
    got = evaluation.capped_logits(hidden, Head(weight, bias, 0.5, 3.0))
    torch.testing.assert_close(got, 3 * torch.tanh((hidden @ weight.float().T + bias.float()) * 0.5 / 3))


def test_likelihood_of_held_out_demonstrations_is_a_mean_over_their_tokens(tiny_models, tmp_path):
    args = config(tmp_path, per_device_train_batch_size=4)
    base, sft = frozen_roles(args, tiny_models.base, tiny_models.sft)
    rows = examples([*ROWS, {"prompt": "no completion"}])
    metrics, _ = evaluate_policy(base, sft, base, rows, args, tiny_tokenizer(), stop_token_ids=[0])
    total, tokens = 0.0, 0
    for row in rows:
        if row.completion_ids is not None:
            ids = torch.tensor([row.prompt_ids + row.completion_ids])
            logp = sft.causal_lm(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])
            total += logp[len(row.prompt_ids) - 1 :].sum().item()
            tokens += len(row.completion_ids)
    assert metrics["eval/demonstrations/logp_sft"] == pytest.approx(total / tokens, abs=1e-4)
    assert metrics["eval/demonstrations/logp"] < metrics["eval/demonstrations/logp_sft"]  # SFT has seen them


@pytest.mark.parametrize(
    ("completion", "answer", "match"),
    [
        ("The answer is 12.", "12", True),
        ("12 then 13", "12", False),
        ("1,234 apples", "1234", True),
        ("of 1,234,567.5 people", "1,234,567.5", True),
        ("1,2,3", "3", True),
        ("12,3", "1,2,3", False),
        ("1,2,3 ", "1,2,3", True),
        ("10-12", "12", True),
        ("it costs 3.50", "3.5", True),
        ("-4", "-4", True),
        ("none", "12", False),
        ("Paris ", "paris", True),
        ("Paris, France", "paris", False),
        ("", "0", False),
    ],
)
def test_exact_match_compares_the_last_number_or_the_whole_text(completion, answer, match):
    assert answers_match(completion, answer) is match


def test_a_judged_completion_is_without_its_stop_token_though_that_is_no_special_one():
    tokenizer = tiny_tokenizer()
    paris, stop = (tokenizer(text)["input_ids"] for text in ("Paris", "#"))
    rows = examples([{"prompt": "Capital?"}] * 2)
    sampled = collate([e.prompt_ids for e in rows], [[*paris, *stop], paris], pad_token_id=1, stop_token_ids=stop)
    texts = []
    for skip in (True, False):
        judged = completion_rows(rows, sampled, *torch.zeros(2, 2), tokenizer, skip_special_tokens=skip)
        texts.append([row["completion"] for row in judged])
    assert texts == [["Paris", "Paris"], ["Paris#", "Paris"]]
    scored = completion_rows(rows, sampled, torch.tensor([6.0, 5.0]), torch.zeros(2), tokenizer,
                             skip_special_tokens=True)  # fmt: skip
    assert [row["score_per_token"] for row in scored] == [1, 1]  # of all tokens, the stop token too


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_train_returns_the_last_entry_of_the_history(finished):
    run, folder, last = finished
    assert last == run.history[-1]
    assert "eval/objective/kl" in last  # evaluated at the end though eval_steps does not divide max_steps
    assert read_jsonl(folder / "metrics.jsonl") == run.history


def test_counters_add_up(finished):
    run, _, _ = finished
    entries = [entry for entry in run.history if "episode" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert [entry["episode"] for entry in entries] == [4, 8, 12]
    tokens = [round(entry["completions/mean_length"] * 4) for entry in entries]
    assert [entry["num_tokens"] for entry in entries] == [sum(tokens[: n + 1]) for n in range(3)]
    for entry in entries:
        parts = entry["time/rollout"] + entry["time/score"] + entry["time/update"]
        assert entry["step_time"] == pytest.approx(parts, rel=1e-6)
        assert entry["perf/tokens_per_second"] > 0 and entry["perf/peak_memory_gib"] > 0


def test_trainer_state_and_configuration_can_be_read_back(finished):
    run, folder, _ = finished
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["step"], state["episode"]) == (3, 12)
    assert state["log_history"] == run.history
    assert PipelineConfig.from_yaml(folder / "srppo_config.yaml") == run.args
    assert list(yaml.safe_load((folder / "srppo_config.yaml").read_text())) == list(PipelineConfig.__dataclass_fields__)


def test_tensorboard_has_every_metric_at_every_step(finished):
    run, folder, _ = finished
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(METRICS) | set(EVAL_METRICS)
    kept = [(event.step, event.value) for event in board.Scalars("objective/scores")]
    expected = [(e["step"], e["objective/scores"]) for e in run.history if "objective/scores" in e]
    assert [step for step, _ in kept] == [step for step, _ in expected]
    assert [value for _, value in kept] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_plots_are_png_files(finished):
    _, folder, _ = finished
    names = {path.name for path in (folder / "plots").iterdir()}
    assert names >= {"reward.png", "kl.png", "length.png", "reward_per_token.png"}
    for path in (folder / "plots").iterdir():
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 2000


def test_each_curve_has_its_own_metric_at_its_steps(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: drawn.update({path: figure.axes}))
    history = [
        {"step": 3, "objective/scores": 1.0, "eval/objective/scores": 5.0, "loss/value_avg": 7.0},
        {"step": 4, "objective/scores": 2.0, "objective/rlhf_reward": 6.0},
    ]
    assert plot_history(history, tmp_path) == list(drawn) == [tmp_path / "reward.png", tmp_path / "losses.png"]
    for (axes,) in drawn.values():
        assert axes.get_xlabel() == "step"
        named = [line.get_label() for line in axes.get_lines()]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == named
    found = [
        (axes.get_ylabel(), {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()})
        for (axes,) in drawn.values()
    ]
    scores = {"objective/scores": [[3, 1], [4, 2]], "objective/rlhf_reward": [[4, 6]]}
    assert found == [
        ("nats per sequence", {**scores, "eval/objective/scores": [[3, 5]]}),
        ("loss per token", {"loss/value_avg": [[3, 7]]}),
    ]


def test_points_are_marked_while_there_are_few(tmp_path, monkeypatch):
    """A curve of one point would not be seen."""
    markers = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, path, **_: markers.extend(line.get_marker() for line in figure.axes[0].get_lines()),
    )
    for steps in (1, 24, 25):
        plot_history([{"step": step, "objective/kl": 1.0} for step in range(steps)], tmp_path)
    assert markers == ["o", "o", "None"]


def test_plots_are_of_metrics_that_there_are_and_beside_each_is_its_evaluation():
    assert {metric for metrics in RUN_PLOTS.values() for metric in metrics} <= set(METRICS) | set(EVAL_METRICS)
    for metrics in RUN_PLOTS.values():
        assert {f"eval/{metric}" for metric in metrics} & set(EVAL_METRICS) <= set(metrics)
    assert set(RUN_PLOTS) <= set(UNITS)


def test_a_plot_without_data_is_not_drawn(tmp_path):
    assert plot_history([{"step": 1, "other": 2.0}], tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_completions_of_each_logged_iteration_are_kept_as_parquet(finished):
    run, folder, _ = finished
    assert sorted(p.name for p in (folder / "completions").iterdir()) == [
        "completions_00001.parquet", "completions_00002.parquet",
    ]  # fmt: skip
    table = pyarrow.parquet.read_table(folder / "completions" / "completions_00001.parquet").to_pylist()
    assert len(table) == 4
    entry = run.history[0]
    assert sum(row["score"] for row in table) / 4 == pytest.approx(entry["objective/scores"], abs=1e-5)
    assert sum(row["length"] for row in table) / 4 == entry["completions/mean_length"]
    assert {row["prompt"] for row in table} <= {row["prompt"] for row in ROWS}
    assert all(row["step"] == 1 and len(row["completion"]) > 0 for row in table)


@pytest.mark.parametrize("name", ["run:1", "~"])
def test_completions_are_written_to_a_folder_whose_name_pyarrow_would_read_otherwise(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_completions(Path(name), [{"prompt": "a", "completion": "b"}], step=1)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["completions_00001.parquet"]


def test_model_card_names_models_settings_and_results(finished):
    run, folder, _ = finished
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and front["tags"] == ["srppo", "ppo", "self-reward"]
    assert "This is a fully fine-tuned model, " in card
    assert Path(front["base_model"]).name == "base"
    assert "learning_rate: 0.001" in card and "missing_eos_penalty: 0.5" in card
    assert f"{run.history[0]['objective/scores']:.3f}" in card
    assert f"{run.history[-1]['eval/objective/kl']:.4f}" in card
    assert "3 iterations of 4 prompts" in card
    assert f"SFT model: `{run.sft_model}`" in card and Path(run.sft_model).name == "sft"
    assert "data: `given from Python`\n" in card
    assert "beta 1.0 towards sft\n" in card
    assert "The reward rises in collapsed runs too" in card
    table = card.split("| evaluation | value |\n|---|---|\n")[1].split("\n\n")[0]
    assert {line.split("`")[1] for line in table.splitlines()} == set(EVAL_METRICS)
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert "learning_rate" in settings and "kl_coef" not in settings  # which is the default


def test_model_card_of_a_run_of_a_command(tiny_models, tmp_path):
    """Its data and its beta; how to run it again is told where the command line alone says all."""
    names = {"base_model_name_or_path": "base", "dataset_name": "dämonstrations.jsonl"}
    run = trainer(tiny_models, tmp_path, kl_target=5.0, kl_coef=0.5, kl_reference="base", **names)
    judged = {"step": 0, "eval/objective/kl": 0.0}  # of no iteration at all
    card = model_card(run.args, run.roles, [judged], sft="sft")
    assert "- data: `dämonstrations.jsonl`\n" in card and 'dataset_name: "dämonstrations.jsonl"' in card
    assert "beta 0.5 towards base\n- 0 iterations" in card and "first iteration" not in card
    assert "```sh\nsrppo train" in card and "| `eval/objective/kl` | 0.0000 |\n" in card
    more = model_card(dataclasses.replace(run.args, prompt_dataset_name="more"), run.roles, [], sft="sft")
    assert "- data: `dämonstrations.jsonl`, prompts: `more`\n" in more
    for name in names:
        less = dataclasses.replace(run.args, **{name: None})
        assert "```sh" not in model_card(less, run.roles, [], sft="sft")


def test_model_card_is_yaml_and_shell_whatever_a_folder_is_called(tiny_models, tmp_path):
    run = trainer(tiny_models, tmp_path)
    for name in ("my: base #2", "- 'ü\"", "[b]", "%b", "3"):
        args = config(tmp_path / name, base_model_name_or_path=name, dataset_name="data.jsonl")
        run.roles.base.causal_lm.config._name_or_path = name
        card = model_card(args, run.roles, [], sft="sft")
        assert yaml.safe_load(card.split("---")[1])["base_model"] == name
        settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
        assert PipelineConfig.from_dict(settings) == args
        command = shlex.split(card.split("```sh\n")[1].split("```")[0])
        assert command[3] == f"{args.output_dir}/srppo_config.yaml"


def test_model_card_of_a_resumed_run_tells_how_to_start_afresh(tiny_models, tmp_path):
    paths = {"base_model_name_or_path": tiny_models.base, "dataset_name": "data.jsonl"}
    run = trainer(tiny_models, tmp_path, **paths)
    again = f"srppo train --config {run.args.output_dir}/srppo_config.yaml --output_dir another-folder"
    assert f"{again}\n" in model_card(run.args, run.roles, [], sft="sft")
    resumed = dataclasses.replace(run.args, resume_from_checkpoint="run/checkpoint-2")
    assert f"{again} --resume_from_checkpoint false\n" in model_card(resumed, run.roles, [], sft="sft")
    kept = dataclasses.replace(run.args, save_rollouts="kept")  # a folder that holds those of this run
    assert f"{again} --save_rollouts none\n" in model_card(kept, run.roles, [], sft="sft")


@pytest.mark.parametrize(("kind", "made_on"), [("sft", "sft"), ("adapter", "base")])
def test_model_card_of_an_adapter_names_the_model_that_it_is_loaded_onto(tiny_models, tmp_path, kind, made_on):
    run = trainer(tiny_models, tmp_path, kind=kind, use_peft=True)
    card = model_card(run.args, run.roles, [], sft="sft")
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["base_model"]) == ("peft", getattr(tiny_models, made_on))
    assert f"- base model: `{tiny_models.base}`" in card


def test_model_card_tells_the_adapters_own_rank_and_the_batch_of_all_processes(tiny_models, tmp_path, monkeypatch):
    run = trainer(tiny_models, tmp_path, kind="adapter")
    assert run.args.lora_r == 16
    monkeypatch.setattr(distributed, "size", lambda: 2)
    card = model_card(run.args, run.roles, [], sft="sft")
    assert "a LoRA adapter of rank 4," in card and "iterations of 8 prompts" in card


def test_model_card_is_written_where_a_metric_was_no_number(tiny_models, tmp_path):
    run = trainer(tiny_models, tmp_path)
    first = {"objective/scores": 1.0, "objective/scores_per_token": 0.5, "objective/kl": 0.25}
    last = {"objective/scores": 2.0, "completions/mean_length": 3.0}
    card = model_card(run.args, run.roles, [first, last], sft="sft")
    adapting = dataclasses.replace(run.args, kl_target=5.0)
    steps = [{**first, "objective/kl_coef": 1.0}, {**last, "objective/kl_coef": 0.375}]
    assert "sequence and 0.375 at the end" in model_card(adapting, run.roles, steps, sft="sft")
    assert "| `objective/kl` | 0.250 | - |" in card and "| `completions/mean_length` | - | 3.000 |" in card


def test_a_tokenizer_without_a_pad_token_is_written_as_it_was(tiny_models, tmp_path):
    """A trainer that takes labels of pad tokens out would take out every EOS, were that made the pad token."""
    tiny_tokenizer(pad=None).save_pretrained(tmp_path / "own")
    tokenizer = load_tokenizer(tmp_path / "own")
    run = SRPPOTrainer(
        tiny_models.sft, tiny_models.base, config(tmp_path), ROWS, processing_class=tokenizer, console=QUIET
    )
    assert load_tokenizer(run.save_model()).pad_token is None


def test_nothing_temporary_is_left(finished):
    _, folder, _ = finished
    assert not list(folder.rglob(".writing-*"))
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "best", "checkpoint-3", "completions", "config.json", "generation_config.json", "metrics.jsonl",
        "model.safetensors", "plots", "srppo_config.yaml", "tensorboard", "tokenizer.json", "tokenizer_config.json",
        "trainer_state.json", "chat_template.jinja",
    }  # fmt: skip


def test_a_callback_sees_every_iteration_and_may_end_the_run(tiny_models, tmp_path):
    """The others see the last one too: where it ends on one rank alone, they may be collectives."""
    seen, seen_by_other = [], []

    def stop_at_two(run, step, metrics):
        seen.append((step, metrics["episode"]))
        if step == 2:
            raise StopIteration

    def other(run, step, metrics):
        seen_by_other.append(step)

    run = trainer(tiny_models, tmp_path, max_steps=9, callbacks=[stop_at_two, other])
    run.train()
    assert seen == [(1, 4), (2, 8)] and seen_by_other == [1, 2]
    assert run.step == 2 and (tmp_path / "run" / "model.safetensors").exists()


def test_models_may_be_given_as_paths(tiny_models, tmp_path):
    made = SRPPOTrainer(
        Path(tiny_models.sft), Path(tiny_models.base), config(tmp_path), examples(EVAL_ROWS), console=QUIET
    )
    assert made.sft_model == tiny_models.sft


def test_evaluate_without_data_says_what_to_give(tiny_models, tmp_path):
    with pytest.raises(UserError, match="no evaluation data: give eval_dataset"):
        trainer(tiny_models, tmp_path).evaluate()


def test_zero_iterations_write_the_sft_model_and_its_evaluation(tiny_models, tmp_path):
    run = trainer(tiny_models, tmp_path, max_steps=0, eval_dataset=examples(EVAL_ROWS))
    last = run.train()
    assert last["step"] == 0 and last["eval/objective/kl"] == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
