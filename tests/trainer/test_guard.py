"""The guard: what it says of signs that turn, what it keeps as the best, and a run that was built to collapse."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console as RichConsole
from tiny_runs import QUIET, ROWS, config, examples, full_roles, rollout, trainer
from transformers import AutoModelForCausalLM

from srppo import SRPPOTrainer, ppo, run_sft
from srppo.console import Console
from srppo.data import Example, filler_token
from srppo.demo import run as demo
from srppo.demo import world
from srppo.demo.model import ModelSize, Pretraining
from srppo.guard import LOST_LIKELIHOOD, Guard, HeldOut, KLController, Look, look_at
from srppo.models import load_model, load_tokenizer
from srppo.roles import Role

START = Look(reward=4.0, objective=4.0, objective_error=0.1, kl=0.0, length=10.0, gain=0.0, gain_error=0.0)


def started(**changes: float) -> Guard:
    guard = Guard()
    verdict = guard.look(0, dataclasses.replace(START, **changes), beta=1.0)
    assert verdict.best, "SFT is the first best policy"
    assert verdict.warnings == verdict.notes == ()
    return guard


def later(guard: Guard, step: int = 1, **changes: float):
    return guard.look(step, dataclasses.replace(START, **changes), beta=0.5)


# -- signs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gain": math.log(0.96), "gain_error": 0.01}, "lost 4.0% of their likelihood per token against SFT"),
        ({"kl": 17.0}, "the policy is 8.50 nats from SFT, more than 2 times as far as SFT is from the base (4.00)"),
        ({"length": 21.0}, "completions went from 10.0 tokens under SFT to 15.5"),
        ({"length": 3.0}, "completions went from 10.0 tokens under SFT to 6.5"),
    ],
)
def test_a_sign_that_turns_is_told_in_words_with_the_reward_and_what_to_do(changes, words):
    (text,) = later(started(), reward=6.0, **changes).warnings
    assert text.startswith("after iteration 1: ") and words in text
    assert "while the reward rose from 4.00 to 5.00" in text
    assert "raise kl_coef (now 0.5)" in text and "best/ holds SFT itself" in text
    (text,) = later(started(), reward=2.0, **changes).warnings
    assert "and the reward fell from 4.00 to 3.00" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"gain": math.log(0.98), "gain_error": 0.001},  # not far enough
        {"gain": math.log(0.96), "gain_error": 0.03},  # within what other demonstrations might have shown
        {"gain": 0.5, "gain_error": 0.01},
        {"kl": 15.0},  # averaged with the 0 before
        {"kl": -3.0},  # an estimate
        {"length": 18.0},
        {"length": 5.0},
        {"gain": None},
    ],
)
def test_what_is_small_or_uncertain_is_not_told(changes):
    assert later(started(), reward=6.0, **changes).warnings == ()


def test_a_warning_comes_once_and_again_when_it_has_doubled_and_recovery_is_told():
    guard = started()
    said = [later(guard, step, gain=math.log(1 - lost), gain_error=0.001) for step, lost in
            enumerate([0.04, 0.05, 0.07, 0.09, 0.01, 0.04], 1)]  # fmt: skip
    assert [len(verdict.warnings) for verdict in said] == [1, 0, 0, 1, 0, 1]
    assert [verdict.notes for verdict in said if verdict.notes] == [
        ("after iteration 5: held-out likelihood is back within bounds",)
    ]


def test_where_sft_is_as_the_base_on_the_prompts_the_first_rewards_noise_sets_the_bound_of_the_kl():
    guard = started(reward=-0.1, objective=-0.1)
    assert later(guard, kl=0.3).warnings == ()
    assert later(guard, 2, kl=0.4).warnings != ()
    assert later(started(reward=-0.1, objective_error=0.0), kl=0.4).warnings == (), "and a single sequence has none"


# -- the best ---------------------------------------------------------------------------------------------------------


def test_the_best_has_the_highest_objective_among_those_no_worse_than_sft():
    guard = started()
    assert not later(guard, 1, objective=4.1).best, "0.05 more on average is noise where the standard error is 0.1"
    assert later(guard, 2, objective=5.0).best
    assert not later(guard, 3, objective=9.0, gain=-0.02, gain_error=0.05).best, "2 % less likely than SFT"
    assert not later(guard, 4, objective=9.0, gain=-0.005, gain_error=0.001).best, "less likely for sure"
    assert not later(guard, 5, objective=9.0, length=40.0).best
    assert guard.best is not None and guard.best["step"] == 2
    assert later(guard, 9, objective=9.0, gain=-0.005, gain_error=0.006, length=3.0).best
    assert guard.best["gain"] == -0.005
    assert later(started(), 1, objective=9.0, gain=None).best, "without demonstrations KL and length decide"


def test_state_survives_json_and_goes_on_alike():
    one, two = started(), Guard()
    later(one, 1, kl=20.0)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(2, 6):
        changes = {"kl": 20.0 * step, "objective": 4.0 + step, "gain": -0.01 * step}
        assert later(one, step, **changes) == later(two, step, **changes)
    assert one.state_dict() == two.state_dict()


def test_held_out_likelihood_is_per_token_with_the_error_of_a_ratio(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    roles = full_roles(args)
    rows = examples(ROWS)
    held_out = HeldOut(rows, args, roles.sft, pad_token_id=1, stop_token_ids=[0])
    assert held_out.look(roles.sft)[1:] == (0.0, 0.0)
    assert not held_out.logprobs(roles.policy).requires_grad, "a look keeps no activations"
    logp, gain, error = held_out.look(roles.base)
    pairs = [ppo.logprobs(role, held_out.rollout)[0].sum(-1).double() for role in (roles.base, roles.sft)]
    lengths = torch.tensor([len(row.completion_ids) for row in rows], dtype=torch.float64)
    gains = pairs[0] - pairs[1]
    assert logp == pytest.approx((pairs[0].sum() / lengths.sum()).item(), abs=1e-6)
    assert gain == pytest.approx((gains.sum() / lengths.sum()).item(), abs=1e-6)
    draws = torch.randint(0, 6, (20000, 6), generator=torch.Generator().manual_seed(0))
    bootstrap = (gains[draws].sum(-1) / lengths[draws].sum(-1)).std().item() * math.sqrt(6 / 5)
    assert error == pytest.approx(bootstrap, rel=0.1)


def test_a_single_demonstration_is_logged_and_never_warned_of_by_itself(tmp_path):
    """There is no spread in one, and a standard error of 0 would call any loss of 3 % certain."""
    args = config(tmp_path)
    roles = full_roles(args)
    one = HeldOut(examples(ROWS[:1]), args, roles.sft, pad_token_id=1, stop_token_ids=[0])
    logp, gain, error = one.look(roles.base)
    assert math.isfinite(logp) and gain != 0 and error == math.inf
    assert later(started(), gain=-0.5, gain_error=error).warnings == ()
    assert not later(started(), objective=9.0, gain=-0.5, gain_error=error).best


def test_a_look_costs_no_more_sequences_than_an_iteration_has(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=1)
    many = [Example([10 + i], [30, 0], None, f"row {i}") for i in range(7)]
    held_out = HeldOut(many, args, full_roles(args).sft, pad_token_id=1, stop_token_ids=[0])
    assert held_out.rollout.input_ids[:, 0].tolist() == [10, 13]
    assert [len(part) for part in held_out.parts] == [2]


@pytest.mark.parametrize(("reference", "compared"), [("sft", "reference"), ("base", "sft")])
def test_the_kl_that_is_watched_is_to_sft_whatever_the_penalty_pulls_towards(tmp_path, reference, compared):
    given, generator = rollout(), torch.Generator().manual_seed(0)
    draw = lambda: -torch.rand(given.completion_mask.shape, generator=generator) * given.completion_mask  # noqa: E731
    scores = ppo.Scores(*(draw() for _ in ppo.Scores.__dataclass_fields__))
    args = config(tmp_path, kl_reference=reference, missing_eos_penalty=2.0)
    targets = ppo.advantages(given, scores, args)
    seen = look_at(scores, targets, given, args)
    assert seen.kl == pytest.approx((scores.policy - getattr(scores, compared)).sum(-1).mean().item())
    objective = targets.shaped_scores - (scores.policy - scores.reference).sum(-1)  # with penalty and beta 1
    assert seen.objective == pytest.approx(objective.mean().item(), abs=1e-6)
    assert seen.objective_error == pytest.approx(objective.std().item() / 2, rel=1e-5)
    assert seen.reward == pytest.approx(targets.scores.mean().item()) != pytest.approx(seen.objective)


# -- beta -------------------------------------------------------------------------------------------------------------


def test_beta_follows_the_controllers_formula_and_stays_without_a_target(tmp_path):
    controller = KLController(config(tmp_path, kl_coef=0.5, kl_target=2.0))
    for kl, factor in [(0.0, 1.0), (2.0, 1.0), (3.0, 1.1), (40.0, 1.2), (1.0, 0.9), (-5.0, 0.8)]:
        before = controller.beta
        controller.update(kl)
        assert controller.beta == pytest.approx(before * factor), kl
    constant = KLController(config(tmp_path, kl_coef=0.5))
    constant.update(40.0)
    assert constant.beta == 0.5
    constant.load_state_dict({"beta": 3.0})  # resumed with another kl_coef: that is what was asked for
    assert constant.beta == 0.5


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_with_guard_and_target_resumes_bit_for_bit(tiny_models, tmp_path):
    settings = {"max_steps": 4, "save_steps": 2, "kl_target": 0.01, "learning_rate": 3e-3, "num_ppo_epochs": 1}
    rows = examples(ROWS)
    straight = trainer(tiny_models, tmp_path / "a", eval_dataset=rows, **settings)
    look, seen = straight.guard.look, []
    straight.guard.look = lambda step, given, **options: seen.append((step, given)) or look(step, given, **options)
    straight.train()
    assert [step for step, _ in seen] == [0, 1, 2, 3]  # each policy before its update
    assert [given.gain_error > 0 for _, given in seen] == [False, True, True, True]
    betas = [entry["objective/kl_coef"] for entry in straight.history]
    assert betas[0] == betas[1] == 1.0 and len(set(betas)) == 3, betas
    resumed = trainer(
        tiny_models, tmp_path / "b", eval_dataset=rows, **settings,
        resume_from_checkpoint=str(tmp_path / "a" / "run" / "checkpoint-2"),
    )  # fmt: skip
    resumed.train()
    assert [entry["objective/kl_coef"] for entry in resumed.history] == betas
    card = (tmp_path / "b" / "run" / "README.md").read_text()
    assert f"beta 1.0, adapted to hold 0.01 nats a sequence and {betas[-1]:.3g} at the end, towards sft" in card
    assert resumed.guard.state_dict() == straight.guard.state_dict()
    pairs = zip(straight.roles.policy.parameters(), resumed.roles.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("with_demonstrations", [True, False])
def test_what_the_guard_watches_is_said_at_the_start(tiny_models, tmp_path, with_demonstrations):
    rows = examples(ROWS if with_demonstrations else [{"prompt": "ab"}])
    run, said = trainer(tiny_models, tmp_path, eval_dataset=rows, max_steps=1), io.StringIO()
    run.console.rich = RichConsole(file=said, width=200)
    run.train()
    expected = (
        "likelihood of 4 held-out demonstrations" if with_demonstrations else "no demonstrations whose likelihood"
    )
    assert f"guard: KL to SFT, length{' only' if not with_demonstrations else ''}" in said.getvalue()
    assert expected in said.getvalue()
    assert ("guard/demonstrations_logp" in run.history[0]) == with_demonstrations
    if run.held_out is not None:  # looked at before the update, as what the iteration sampled is
        assert run.history[0]["guard/demonstrations_logp"] == run.held_out.look(run.roles.sft)[0]
    best = json.loads((tmp_path / "run" / "best" / "trainer_state.json").read_text())
    assert best["step"] == 0


# -- a run built to collapse ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collapse:
    run: SRPPOTrainer
    folder: Path
    said: str
    likelihood: list[float]  # of held-out demonstrations against SFT, per token, at each look


@pytest.fixture(scope="module")
def collapse(tmp_path_factory) -> Collapse:
    """The demo's world with a smaller model, SFT over-trained on its 32 demonstrations, and beta 0.05."""
    folder = tmp_path_factory.mktemp("collapse")
    settings = demo.DemoSettings(
        corpus_size=20_000, model=ModelSize(64, 2, 4), pretraining=Pretraining(steps=150, batch_size=64),
        iterations=9, learning_rate=1e-4, value_learning_rate=1e-4, kl_coef=0.05,
    )  # fmt: skip
    source = world.World(0)
    corpus = source.corpus(settings.corpus_size)
    demo.write_data(folder / "data", source, corpus, settings)
    demo.write_base(folder / "base", corpus, settings, 0, QUIET)
    tokenizer = load_tokenizer(folder / "base")
    stage = demo.sft_config(folder, "sft", 3 * settings.sft_epochs, settings, 0)
    run_sft(stage, train_dataset=demo.load(stage, tokenizer, folder / "data" / "demonstrations.jsonl"),
            output_dir=folder / "sft", tokenizer=tokenizer, console=QUIET)  # fmt: skip
    said, console = io.StringIO(), Console()
    console.rich = RichConsole(file=said, width=300)
    args = dataclasses.replace(demo.srppo_config(folder, settings, 0), eval_steps=0, log_completions=0)
    run = SRPPOTrainer(
        str(folder / "sft"), str(folder / "base"), args,
        demo.load(args, tokenizer, folder / "data" / "prompts.jsonl"),
        demo.load(args, tokenizer, folder / "data" / "held_out_demonstrations.jsonl"),
        processing_class=tokenizer, console=console,
    )  # fmt: skip
    run.train()
    logp = [entry["guard/demonstrations_logp"] for entry in run.history]
    return Collapse(run, folder, said.getvalue(), [math.exp(value - logp[0]) for value in logp])


def test_the_run_collapses_while_its_reward_rises(collapse):
    rewards = [entry["objective/scores"] for entry in collapse.run.history]
    assert collapse.likelihood[-1] < 0.9
    assert rewards[-1] > 1.2 * rewards[0]


def test_it_is_warned_of_before_held_out_likelihood_has_lost_a_tenth(collapse):
    first = next(line for line in collapse.said.splitlines() if line.startswith("warning: after iteration"))
    step = int(first.split()[3].rstrip(":"))
    assert 0.9 < collapse.likelihood[step] < 1 - LOST_LIKELIHOOD
    assert all(value > 0.9 for value in collapse.likelihood[: step + 1])
    assert "held-out demonstrations have lost" in first and "while the reward rose" in first


def test_the_best_that_is_kept_loads_and_is_no_worse_than_sft_though_the_last_is(collapse):
    run = collapse.run
    pad = filler_token(run.tokenizer, run.stop_token_ids)
    watched = HeldOut(run.eval_dataset, run.args, run.roles.sft, pad_token_id=pad, stop_token_ids=run.stop_token_ids)
    best = load_model(collapse.folder / "srppo" / "best", run.args)
    # In SFT's layout: the best may be SFT itself, and another layout rounds otherwise.
    _, gain, error = watched.look(Role("best", best, layout=run.roles.sft.layout))
    assert gain >= -error and gain > -0.01
    _, gain, error = watched.look(run.roles.policy)
    assert gain < -2 * error and gain < -0.1
    AutoModelForCausalLM.from_pretrained(collapse.folder / "srppo" / "best")
