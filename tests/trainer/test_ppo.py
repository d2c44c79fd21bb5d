"""The details that decide PPO: ratios, masks, normalisers, whitening, truncation, warm-up and bad gradients."""

from __future__ import annotations

import dataclasses
import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from ppo_steps import assert_same_gradients, one_update, trained_head
from tiny import tiny_model
from tiny_runs import config, full_roles, learners, role, rollout, snapshot, trainer, widened
from torch import Tensor

from srppo import UserError, ppo
from srppo.metrics import iteration_metrics
from srppo.packing import Layout
from srppo.roles import build_roles
from srppo.rollout import Rollout, collate
from srppo.startup import check_first_ratio, check_start, forwards_apart

STEP = ppo.Learner.step


def rows(*groups) -> list[list[Tensor]]:
    """One mini-batch of the given micro-batches."""
    return [[torch.tensor(group) for group in groups]]


# -- ratio ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "use_peft"), [("sft", False), ("adapter", True), ("sft", True)])
def test_first_mini_batch_has_ratio_exactly_one(tiny_models, tmp_path, kind, use_peft, checkpointing):
    args = config(
        tmp_path, use_peft=use_peft, gradient_checkpointing=checkpointing, num_mini_batches=2,
        gradient_accumulation_steps=1, temperature=0.8,
    )  # fmt: skip
    sft = {"sft": tiny_models.sft, "adapter": tiny_models.adapter}[kind]
    _, _, result = one_update(build_roles(args, tiny_models.base, sft), args, rollout())
    assert result.first.ratio_max == 1
    assert result.first.ratio_mean == 1
    assert result.first.ratio_var == 0
    assert result.policy.ratio_var > 0  # later mini-batches have moved


def test_training_stops_when_the_first_ratio_is_not_one(tiny_models, tmp_path, monkeypatch):
    run = trainer(tiny_models, tmp_path)
    honest = ppo.score
    monkeypatch.setattr(
        ppo, "score", lambda *a: (s := honest(*a)) and dataclasses.replace(s, policy=s.policy + 0.01, sft=s.sft + 0.01)
    )
    with pytest.raises(UserError, match="ratio on the first mini-batch is off 1 by"):
        run.train()


def test_a_first_mini_batch_of_empty_completions_has_no_ratio_to_stop_at(tmp_path):
    args = config(tmp_path)
    _, _, result = one_update(full_roles(args), args, rollout(completions=((),) * 4))
    assert "no token" in check_first_ratio(result)
    assert result.policy_loss == result.grad_norm == 0


@pytest.mark.parametrize(
    ("device", "dtype", "most"), [("cpu", "bfloat16", 1e-4), ("cuda", "float32", 1e-3), ("cuda", "bfloat16", 0.1)]
)
def test_a_gpu_may_round_one_forward_otherwise_than_the_next_and_a_cpu_hardly(device, dtype, most):
    head = SimpleNamespace(weight=torch.ones(1, dtype=getattr(torch, dtype)))
    assert forwards_apart(SimpleNamespace(device=torch.device(device), head=head)) == most


@pytest.mark.parametrize(("off", "apart", "stops"), [
    (1e-6, 0.0, "policy"), (0.01, 0.1, None), (0.01, 1e-3, "policy"), (0.01, 1e-3, "ratio"), (math.nan, 0.1, "ratio"),
    (0.2, 0.1, "ratio"),
])  # fmt: skip
def test_a_run_starts_where_forwards_differ_by_rounding_and_no_more(tiny_models, tmp_path, off, apart, stops):
    args, given = config(tmp_path), rollout()
    roles = build_roles(args, tiny_models.base, tiny_models.sft)
    everything = [torch.arange(len(given))]
    scores = ppo.score(roles, given, args, everything)
    signs = torch.where(torch.arange(given.completion_mask.shape[1]) % 2 > 0, off, -off)  # a mean of next to nothing
    scores = dataclasses.replace(scores, policy=scores.policy + signs * given.completion_mask)
    targets = ppo.advantages(given, scores, args)
    result = ppo.update(*learners(roles, args), given, scores, targets, args, [everything])
    with pytest.raises(UserError, match=stops) if stops else nullcontext():
        if stops != "ratio":
            assert "differ by rounding" in check_start(roles, args, given, scores, everything, apart)
        assert "by rounding" in check_first_ratio(result, apart)


@pytest.mark.parametrize(
    ("kind", "value_model"), [("sft", "separate"), ("adapter", "adapter"), ("adapter", "separate")]
)
def test_gradient_checkpointing_recomputes_the_layers_of_policy_and_critic(tiny_models, tmp_path, kind, value_model):
    """A flag that is set and read by nobody would save no memory."""
    forwards = {}
    for asked in (False, True):
        args = config(tmp_path, use_peft=kind == "adapter", gradient_checkpointing=asked, value_model=value_model)
        roles = trained_head(build_roles(args, tiny_models.base, getattr(tiny_models, kind)))
        given, old = rollout(), torch.zeros(10)
        for learner, backward in zip(learners(roles, args), (ppo.policy_backward, ppo.value_backward), strict=True):
            seen = []
            layer = learner.role.causal_lm.model.layers[0].self_attn  # behind it recomputing may stop early
            hook = layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            backward(learner.role, given, old, old + 1, torch.tensor(10.0), args)
            hook.remove()
            forwards[asked, learner.role.name] = len(seen)
    assert forwards == {(False, "policy"): 1, (False, "critic"): 1, (True, "policy"): 2, (True, "critic"): 2}


def test_a_model_without_gradient_checkpointing_is_refused(tiny_models, tmp_path, monkeypatch):
    args, model = config(tmp_path, gradient_checkpointing=True), tiny_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*gradient_checkpointing_enable. is deprecated")
        build_roles(args, tiny_models.base, model)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"gradient_checkpointing is not for this model.*LlamaForCausalLM"):
        build_roles(args, tiny_models.base, model)


# -- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [([0], [1], [2], [3]), ([0, 1, 2], [3]), ([1, 3], [0, 2])])
def test_gradients_loss_and_statistics_do_not_depend_on_micro_batches(tmp_path, gradients, split):
    args = config(tmp_path, num_ppo_epochs=1, entropy_coef=0.1)
    roles = trained_head(full_roles(args))
    _, _, whole = one_update(roles, args, rollout(), mini_batches=rows([0, 1, 2, 3]))
    expected = list(gradients)
    gradients.clear()
    _, _, parts = one_update(roles, args, rollout(), mini_batches=rows(*split))
    assert_same_gradients(expected, gradients)
    assert parts.policy_loss == pytest.approx(whole.policy_loss, abs=1e-6)
    assert parts.value_loss == pytest.approx(whole.value_loss, rel=1e-5)
    for name in ("entropy", "ratio_mean", "count", "approx_kl"):
        torch.testing.assert_close(getattr(parts.policy, name), getattr(whole.policy, name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 6), (3, 4)])
def test_nothing_depends_on_further_padding(tmp_path, gradients, left, right):
    args = config(tmp_path, num_ppo_epochs=1, missing_eos_penalty=1.0, whiten_rewards=True)
    roles = trained_head(full_roles(args))
    metrics = []
    for given in (rollout(), widened(rollout(), left, right)):
        outcome = one_update(roles, args, given, mini_batches=rows([0, 1], [2, 3]))
        metrics.append(iteration_metrics(given, *outcome))
    assert_same_gradients(gradients[:2], gradients[2:])
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():
        assert metrics[1][name] == pytest.approx(value, abs=1e-5, rel=1e-5, nan_ok=True), name


def test_filler_tokens_are_never_read(tmp_path, gradients):
    """Padding with a stop token, with an ordinary token and with the pad token: the same, to the last bit."""
    args = config(tmp_path, num_ppo_epochs=1)
    roles = trained_head(full_roles(args))
    outcomes = [one_update(roles, args, widened(rollout(), 2, 3, filler=filler)) for filler in (0, 7, 1)]
    for scores, targets, _ in outcomes[1:]:
        assert torch.equal(scores.policy, outcomes[0][0].policy)
        assert torch.equal(targets.advantages, outcomes[0][1].advantages)
    for a, b in zip(gradients[:2], gradients[2:4], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batch_order_does_not_matter(tmp_path, gradients):
    args = config(tmp_path, num_ppo_epochs=1)
    roles = trained_head(full_roles(args))
    given = rollout()
    one_update(roles, args, given, mini_batches=rows([0, 1, 2, 3]))
    one_update(roles, args, given.select([2, 0, 3, 1]), mini_batches=rows([0, 1, 2, 3]))
    assert_same_gradients(gradients[:2], gradients[2:])


def test_prompts_of_different_lengths_score_as_they_do_alone(tmp_path):
    args = config(tmp_path)
    roles = full_roles(args)
    given = rollout()
    together = ppo.score(roles, given, args)
    for row in range(len(given)):
        alone = ppo.score(roles, given.select([row]), args)
        width = alone.policy.shape[1]
        for name in ("policy", "sft", "base", "entropy"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[row, :width], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_score_is_the_same_for_every_micro_batch_size(tmp_path, size):
    args = config(tmp_path)
    roles = full_roles(args)
    expected = ppo.score(roles, rollout(), args)
    got = ppo.score(roles, rollout(), config(tmp_path, per_device_train_batch_size=size))
    for name in ("policy", "reference", "sft", "base", "entropy", "values"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=0)


# -- rewards and advantages -------------------------------------------------------------------------------------------


def made_up_scores(given: Rollout, seed: int = 0) -> ppo.Scores:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: -torch.rand(given.completion_mask.shape, generator=generator) * given.completion_mask  # noqa: E731
    return ppo.Scores(*(draw() for _ in ppo.Scores.__dataclass_fields__))


def by_hand(given: Rollout, scores: ppo.Scores, args, extra=(0.0,) * 4) -> tuple[list[float], list[list[float]]]:
    """Scores as they enter the reward, and GAE's advantages, in plain Python."""
    shaped, advantages = [], []
    for row in range(len(given)):
        length = int(given.lengths[row])
        take = lambda x, row=row, length=length: x[row, :length].double().tolist()  # noqa: E731
        ratios = [s - b for s, b in zip(take(scores.sft), take(scores.base), strict=True)]
        if args.reward_placement == "eos":
            ratios = [0.0] * (length - 1) + [sum(ratios)]
        if args.reward_normalization == "length":
            ratios = [x / length for x in ratios]
        clip = args.reward_clip if args.reward_clip is not None else math.inf
        rewards = [min(max(x * args.reward_scale, -clip), clip) for x in ratios]
        rewards[-1] += extra[row]
        if given.truncated[row] and args.missing_eos_penalty is not None:
            rewards[-1] -= args.missing_eos_penalty
        shaped.append(sum(rewards))
        differences = [p - r for p, r in zip(take(scores.policy), take(scores.reference), strict=True)]
        estimate = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}
        rewards = [x - args.kl_coef * estimate[args.kl_estimator](d) for x, d in zip(rewards, differences, strict=True)]
        values, running, mine = [*take(scores.values), 0.0], 0.0, []
        for t in reversed(range(length)):
            delta = rewards[t] + args.gamma * values[t + 1] - values[t]
            running = delta + args.gamma * args.lam * running
            mine.append(running)
        advantages.append(mine[::-1])
    return shaped, advantages


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reward_placement": "token", "kl_estimator": "k3"},
        {"kl_estimator": "k2", "kl_coef": 0.3, "gamma": 0.9, "lam": 0.8},
        {"reward_normalization": "length", "reward_scale": 3.0, "missing_eos_penalty": 0.7},
        {"reward_clip": 0.05, "kl_coef": 0.0},
        {"reward_clip": 0.05, "reward_placement": "token", "missing_eos_penalty": 0.7},
    ],
)
def test_advantages_are_what_plain_python_gives(tmp_path, settings):
    args = config(tmp_path, whiten_advantages=False, **settings)
    given = rollout()
    scores = made_up_scores(given)
    other = dataclasses.replace(args, kl_coef=args.kl_coef + 5)  # of a run that adapts beta
    got = ppo.advantages(
        given, scores, other, reward_fn=lambda prompts, completions: [len(c) for c in completions], kl_coef=args.kl_coef
    )
    shaped, expected = by_hand(given, scores, args, extra=(3.0, 1.0, 4.0, 2.0))
    torch.testing.assert_close(got.shaped_scores.double(), torch.tensor(shaped, dtype=torch.float64), atol=1e-5, rtol=0)
    for row, mine in enumerate(expected):
        torch.testing.assert_close(
            got.advantages[row, : len(mine)].double(), torch.tensor(mine, dtype=torch.float64), atol=1e-5, rtol=1e-5
        )
    assert got.advantages.masked_select(~given.completion_mask).abs().sum() == 0
    torch.testing.assert_close(got.returns, (got.advantages + scores.values) * given.completion_mask)


def test_advantages_are_whitened_over_the_whole_batch_and_only_over_its_tokens(tmp_path):
    given = widened(rollout(), 0, 5)
    scores = made_up_scores(given)
    raw = ppo.advantages(given, scores, config(tmp_path, whiten_advantages=False)).advantages
    white = ppo.advantages(given, scores, config(tmp_path)).advantages
    tokens = raw[given.completion_mask].double()
    returns = [
        ppo.advantages(given, scores, config(tmp_path, whiten_advantages=whiten)).returns for whiten in (False, True)
    ]
    assert torch.equal(*returns), "the critic learns returns in nats"
    expected = (tokens - tokens.mean()) / tokens.std()
    torch.testing.assert_close(white[given.completion_mask].double(), expected, atol=1e-5, rtol=1e-5)
    assert white[given.completion_mask].var().item() == pytest.approx(1, abs=1e-5)


def test_whitened_rewards_keep_their_mean(tmp_path):
    """A reward that is positive on average says that the answer was good, and a shifted one would not."""
    given = widened(rollout(), 0, 5)
    scores = made_up_scores(given)

    def rewards(whiten: bool) -> Tensor:
        args = config(tmp_path, whiten_rewards=whiten, whiten_advantages=False, gamma=1.0, lam=1.0)
        returns = ppo.advantages(given, scores, args).returns.double()  # sums from here to the end
        following = torch.nn.functional.pad(returns[:, 1:], (0, 1))
        return (returns - following)[given.completion_mask]

    raw, white = rewards(False), rewards(True)
    torch.testing.assert_close(white, (raw - raw.mean()) / raw.std() + raw.mean(), atol=1e-5, rtol=1e-5)
    assert abs(raw.mean()) > 0.01


def test_missing_eos_penalty_hits_the_cut_completion_alone(tmp_path):
    given = rollout()
    assert given.truncated.tolist() == [False, False, True, False]
    scores = made_up_scores(given)
    without, with_it = (
        ppo.advantages(given, scores, config(tmp_path, missing_eos_penalty=p)).shaped_scores for p in (None, 2.5)
    )
    torch.testing.assert_close(without - with_it, torch.tensor([0.0, 0.0, 2.5, 0.0]))


def test_running_normalisation_divides_by_the_deviation_of_all_scores_so_far(tmp_path):
    args = config(tmp_path, reward_normalization="running", kl_coef=0.0)
    given, moments, seen = rollout(), ppo.RunningMoments(), []
    for seed in range(3):
        scores = made_up_scores(given, seed)
        got = ppo.advantages(given, scores, args, moments=moments)
        seen += got.scores.double().tolist()
        expected = got.scores.double() / torch.tensor(seen, dtype=torch.float64).std()
        torch.testing.assert_close(got.shaped_scores.double(), expected, atol=1e-5, rtol=1e-5)


def test_running_normalisation_leaves_a_score_alone_that_has_nothing_to_be_compared_with(tmp_path):
    args = config(tmp_path, reward_normalization="running", kl_coef=0.0)
    one = rollout().select([0])
    got = ppo.advantages(one, made_up_scores(one), args, moments=ppo.RunningMoments())
    torch.testing.assert_close(got.shaped_scores, got.scores)
    moments = ppo.RunningMoments()
    moments.update(torch.full((3,), 0.7))
    assert moments.std == 1, "nor do scores that are all the same"


def test_reward_fn_gets_token_ids_without_padding(tmp_path):
    seen = {}

    def reward(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    given = widened(rollout(), 2, 2)
    ppo.advantages(given, made_up_scores(given), config(tmp_path), reward_fn=reward)
    assert seen["prompts"] == [[10, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20]]
    assert seen["completions"] == [[30, 31, 0], [0], [32, 33, 34, 35], [36, 0]]
    placed = ppo.at_last_token(torch.tensor([2.0, 3.0]), torch.tensor([[True, True, False], [False, False, False]]))
    assert placed.tolist() == [[0, 2, 0], [0, 0, 0]]  # an empty completion has no place for one


@pytest.mark.parametrize("given", [{"callbacks": [object()]}, {"reward_fn": [len]}])
def test_what_is_no_function_is_refused_before_the_first_iteration(tiny_models, tmp_path, given):
    with pytest.raises(UserError, match=r"^(a callback|reward_fn) must be a function, got (object|list)"):
        trainer(tiny_models, tmp_path, **given)


def test_no_callbacks_and_no_evaluation_data_may_be_none(tiny_models, tmp_path):
    trainer(tiny_models, tmp_path, callbacks=None, eval_dataset=None, max_steps=1).train()


def test_reward_fn_that_gives_a_number_that_is_none_is_told_which(tmp_path):
    for bad, said in (([1.0, math.nan, 2.0, 3.0], "got nan at sequence 1"), ([1.0] * 3, r"got shape \(3,\)")):
        with pytest.raises(UserError, match=rf"\(4 here\), {said}"):
            ppo.advantages(rollout(), made_up_scores(rollout()), config(tmp_path), reward_fn=lambda *_, bad=bad: bad)


@pytest.mark.parametrize("bad", [[1.0], [1.0, 2.0, 3.0, math.nan], [math.inf] * 4, [None] * 4, ["1"] * 4, 1.0, None])
def test_reward_fn_that_gives_something_else_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match="reward_fn must give a finite number per sequence"):
        ppo.advantages(rollout(), made_up_scores(rollout()), config(tmp_path), reward_fn=lambda *_: bad)


# -- edge cases -------------------------------------------------------------------------------------------------------


def test_pad_token_that_is_the_stop_token_changes_nothing(tmp_path, gradients):
    args = config(tmp_path, num_ppo_epochs=1)
    roles = trained_head(full_roles(args))
    prompts, completions = [[10, 11], [12]], [[30, 0], [31, 32, 33]]
    for pad in (0, 1):
        given = collate(prompts, completions, pad_token_id=pad, stop_token_ids=[0])
        assert given.lengths.tolist() == [2, 3]
        assert given.truncated.tolist() == [False, True]
        one_update(roles, args, given, mini_batches=rows([0, 1]))
    for a, b in zip(gradients[:2], gradients[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_rollout_of_one_token_completions_learns(tmp_path):
    args = config(tmp_path, missing_eos_penalty=1.0)
    given = collate([[10], [11, 12], [13], [14]], [[0], [30], [0], [31]], pad_token_id=1, stop_token_ids=[0])
    assert given.completions.shape == (4, 1)
    roles = full_roles(args)
    before = snapshot(roles.policy.model)
    _, targets, result = one_update(roles, args, given)
    assert targets.advantages.isfinite().all()
    assert result.skipped_steps == 0 and result.grad_norm > 0
    assert any(not torch.equal(v, before[k]) for k, v in roles.policy.model.state_dict().items())


def test_a_single_token_in_the_whole_batch_gives_no_gradient_and_no_nan(tmp_path):
    """Whitening one advantage gives 0: nothing can be learnt, and nothing may break."""
    args = config(tmp_path)
    given = collate([[10]], [[0]], pad_token_id=1, stop_token_ids=[0])
    roles = full_roles(args)
    before = snapshot(roles.policy.model)
    _, targets, result = one_update(roles, args, given)
    assert targets.advantages.item() == 0
    assert result.grad_norm == 0 and result.skipped_steps == 0
    assert all(torch.equal(value, before[name]) for name, value in roles.policy.model.state_dict().items())  # no decay


def test_target_kl_ends_the_epochs(tmp_path):
    args = config(tmp_path, num_ppo_epochs=8, learning_rate=1e-2)
    assert one_update(full_roles(args), args, rollout())[2].epochs == 8
    stopped = config(tmp_path, num_ppo_epochs=8, learning_rate=1e-2, target_kl=1e-3)
    result = one_update(full_roles(stopped), stopped, rollout())[2]
    assert 2 <= result.epochs < 8  # the first epoch's KL is 0 as nothing has moved
    assert result.policy.approx_kl > 0


def test_target_kl_looks_at_the_epoch_that_ended_and_at_all_of_it(tmp_path):
    def run(epochs: int, target: float | None = None, **batches: int):
        args = config(tmp_path, num_ppo_epochs=epochs, learning_rate=1e-2, target_kl=target, **batches)
        return one_update(full_roles(args), args, rollout())[2]

    of_two = run(2).policy.approx_kl.item()
    of_second = 2 * of_two  # the first epoch's is 0: nothing has moved
    assert of_two > 1e-6
    assert run(3, target=(of_two + of_second) / 2).epochs == 2
    assert run(3, target=1.1 * of_second).epochs == 3
    halves = {"num_mini_batches": 2, "gradient_accumulation_steps": 1}
    of_first = run(1, **halves).policy.approx_kl.item()  # all of its second half's, where its first half's is 0
    assert of_first > 1e-6 and run(2, target=1.1 * of_first, **halves).epochs == 2


def test_gradient_that_is_not_finite_is_skipped_and_counted_and_the_run_goes_on(tiny_models, tmp_path, monkeypatch):
    run = trainer(tiny_models, tmp_path, max_steps=3, num_ppo_epochs=1)
    backward, policies = ppo.policy_backward, []

    def poisoned(*arguments):
        outcome = backward(*arguments)
        if run.step == 1:
            run.policy.parameters[0].grad[0] = math.nan
        policies.append(run.step)
        return outcome

    monkeypatch.setattr(ppo, "policy_backward", poisoned)
    weights = []
    run.callbacks = [lambda t, step, m: weights.append(snapshot(t.roles.policy.model))]
    run.train()
    assert [entry["skipped_steps"] for entry in run.history] == [0, 1, 0]
    assert all(torch.equal(value, weights[0][name]) for name, value in weights[1].items())
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[2].items())
    assert all(value.isfinite().all() for value in weights[2].values())


def test_a_log_prob_that_is_no_number_spoils_its_own_iteration_and_no_running_figure(
    tiny_models, tmp_path, monkeypatch
):
    """beta, the deviation of scores and the guard's means would be NaN from there on."""
    run = trainer(tiny_models, tmp_path, max_steps=3, kl_target=0.1, reward_normalization="running")
    score = ppo.score

    def poisoned(*arguments):
        scores = score(*arguments)
        if run.step == 1:
            scores.sft[0, 0] = scores.reference[0, 0] = math.nan
        return scores

    monkeypatch.setattr(ppo, "score", poisoned)
    run.train()
    kept, skipped = ([entry[name] for entry in run.history] for name in ("objective/kl_coef", "skipped_steps"))
    assert kept[0] == kept[1] == kept[2] and skipped == [0, 4, 0]
    assert run.controller.beta != kept[2], "the last iteration's KL is a number, and followed"
    assert run.moments.count == 11 and math.isfinite(run.moments.m2)
    assert all(map(math.isfinite, run.guard.mean.values()))


def test_the_critic_goes_on_where_the_policys_gradient_is_not_finite(tmp_path, monkeypatch):
    args = config(tmp_path, num_ppo_epochs=1)
    roles = full_roles(args)
    backward = ppo.policy_backward

    def poisoned(*arguments):
        outcome = backward(*arguments)
        roles.policy.parameters()[0][1].grad.fill_(math.inf)
        return outcome

    monkeypatch.setattr(ppo, "policy_backward", poisoned)
    before = snapshot(roles.critic.value_head)
    result = one_update(roles, args, rollout())[2]
    assert result.skipped_steps == 1 and math.isnan(result.grad_norm) and result.value_grad_norm > 0
    assert not torch.equal(roles.critic.value_head.weight, before["weight"])


@pytest.mark.parametrize("kind", ["sft", "adapter"])
def test_value_warm_up_leaves_the_policys_bits_and_trains_the_critic(tiny_models, tmp_path, kind):
    run = trainer(tiny_models, tmp_path, kind=kind, value_warmup_steps=2, max_steps=3)
    start = [p.detach().clone() for _, p in run.roles.policy.parameters()]
    states = []

    def keep(t, step, metrics):
        states.append((
            [p.detach().clone() for _, p in t.roles.policy.parameters()],
            t.roles.critic.value_head.weight.detach().clone(),
            metrics,
        ))  # fmt: skip

    run.callbacks = [keep]
    run.train()
    for policy, _, metrics in states[:2]:
        assert all(torch.equal(a, b) for a, b in zip(start, policy, strict=True))
        assert metrics["val/ratio"] == 1 and metrics["objective/kl"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(start, states[2][0], strict=True))
    heads = [head for _, head, _ in states]
    assert heads[0].abs().max() > 0 and not torch.equal(heads[0], heads[1])


def test_clipping_bounds_the_gradient_norm_and_reports_what_it_was(tmp_path, monkeypatch):
    norms = []

    def watched(self, max_grad_norm):
        returned = STEP(self, max_grad_norm)
        norms.append((max_grad_norm, returned))
        return returned

    taken = []
    real = torch.optim.AdamW.step

    def adamw(self, *a, **k):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        taken.append(torch.stack([g.norm() for g in grads]).norm().item())
        return real(self, *a, **k)

    monkeypatch.setattr(ppo.Learner, "step", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", adamw)
    for limit in (1e-3, None, 0.0):
        args = config(tmp_path, max_grad_norm=limit, num_ppo_epochs=1)
        one_update(full_roles(args), args, rollout())
    assert [limit for limit, _ in norms] == [1e-3, 1e-3, None, None, 0.0, 0.0]  # of policy and critic
    before = [norm for _, norm in norms]
    assert before[:2] == pytest.approx(before[2:4]) and min(before) > 1e-2
    assert taken[:2] == pytest.approx([1e-3] * 2, rel=1e-3)
    assert taken[2:] == pytest.approx(before[2:], rel=1e-5)  # 0 means off, as in transformers


def test_split_rows_is_a_partition_into_mini_batches_of_micro_batches(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3, num_mini_batches=2)
    given = rollout([[10]] * 12, [[11, 0]] * 12)
    split = lambda seed, rows: ppo.split_rows(  # noqa: E731
        rows, given, args, role=role(tiny_model(), layout=Layout.PACKED), generator=torch.Generator().manual_seed(seed)
    )
    parts = split(0, torch.arange(12))
    assert [[len(rows) for rows in mini] for mini in parts] == [[2, 2, 2], [2, 2, 2]]
    assert sorted(torch.cat([rows for mini in parts for rows in mini]).tolist()) == list(range(12))
    assert torch.equal(torch.cat(parts[0]), torch.cat(split(0, torch.arange(12))[0]))
    assert not torch.equal(torch.cat(parts[0]), torch.cat(split(1, torch.arange(12))[0]))
    part = split(0, torch.arange(3, 9))
    assert sorted(torch.cat([rows for mini in part for rows in mini]).tolist()) == list(range(3, 9))


def test_every_epoch_draws_mini_batches_of_its_own(tmp_path, monkeypatch):
    args = config(tmp_path, num_ppo_epochs=6, num_mini_batches=2, gradient_accumulation_steps=1)
    backward, seen = ppo.policy_backward, []
    monkeypatch.setattr(ppo, "policy_backward", lambda *a: seen.append(a[1].lengths.tolist()) or backward(*a))
    one_update(full_roles(args), args, rollout())  # completions of 3, 1, 4 and 2 tokens
    epochs = [(sorted(first), sorted(second)) for first, second in zip(seen[::2], seen[1::2], strict=True)]
    assert len(epochs) == 6 and all(sorted(first + second) == [1, 2, 3, 4] for first, second in epochs)
    assert len({str(epoch) for epoch in epochs}) > 2


def test_loss_is_divided_by_the_mini_batchs_tokens_and_not_by_its_sequences(tmp_path, gradients):
    """A mini-batch of long and short completions weighs every token alike, whatever the other one has."""
    args = config(tmp_path, num_ppo_epochs=1, entropy_coef=0.0, whiten_advantages=False)
    given = rollout()
    _, targets, result = one_update(full_roles(args), args, given, mini_batches=rows([0, 1], [2]) + rows([3]))
    of = lambda values: [values[mini][given.completion_mask[mini]] for mini in ([0, 1, 2], [3])]  # noqa: E731
    losses = [-tokens.mean().item() for tokens in of(targets.advantages)]  # ratio 1: the loss is -A
    assert result.policy_loss == pytest.approx(sum(losses) / 2, abs=1e-5)
    losses = [0.5 * tokens.square().mean().item() for tokens in of(targets.returns)]  # V = 0
    assert result.value_loss == pytest.approx(sum(losses) / 2, rel=1e-5)
