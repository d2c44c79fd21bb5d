"""Sequences that begin alike are computed once: each token sees its own history, and nothing depends on the layout."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given as over
from hypothesis import settings as examples_settings
from hypothesis import strategies as st
from ppo_steps import assert_same_gradients, laid_out, one_update, trained_head
from tiny import ATTENTIONS, KINDS, tiny_model
from tiny_runs import config, full_roles, role, rollout, widened

from srppo import SelfReward, ppo, prefixes
from srppo.packing import Layout, layout_of, pack, row_cost, takes_trees, widest_tree
from srppo.roles import build_roles
from srppo.rollout import collate, generate

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=10)
TURN = (40, 41, 42, 43, 44, 45, 46)


def alike(**options):
    """Completions of three prompts with one system turn, of which one is another's beginning; two are sampled alike."""
    prompts = [(*TURN, 10, 11, 12), (*TURN, 13), (*TURN, 10, 11), (*TURN, 13), (*TURN, 13)]
    completions = [(30, 31, 0), (0,), (32, 33, 34, 35), (36, 37, 0), (36, 37, 0)]
    return rollout(prompts, completions, **options)


def ragged(sequences):
    ids = torch.full((len(sequences), max(map(len, sequences))), -7)
    keep = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)], keep[row, : len(tokens)] = torch.tensor(tokens), True
    return ids, keep


# -- the tree ---------------------------------------------------------------------------------------------------------


@examples_settings(deadline=None, max_examples=100)
@over(SEQUENCES, st.integers(1, 60))
def test_each_token_attends_to_its_own_history_and_each_history_is_there_once(sequences, capacity):
    found = prefixes.in_order(*ragged(sequences))
    trees = list(found.rows(capacity))
    assert [k for tree in trees for k in range(tree.first, tree.end)] == list(range(len(sequences)))
    forest = prefixes.lay_out(found, trees)
    width = forest.input_ids.shape[1]
    for row, tokens in enumerate(sequences):
        places = forest.places[row, : len(tokens)].tolist()
        r = places[0] // width
        assert forest.input_ids.flatten()[places].tolist() == tokens
        assert forest.position_ids.flatten()[places].tolist() == list(range(len(tokens)))
        for depth, place in enumerate(places):
            seen = forest.attends[r, 0, place % width].nonzero().flatten() + r * width
            assert sorted(seen.tolist()) == sorted(places[: depth + 1])
    for tree, filled in zip(trees, range(len(trees)), strict=True):
        mine = [sequences[i] for i in found.order[tree.first : tree.end].tolist()]
        assert mine
        histories = {tuple(s[:n]) for s in mine for n in range(1, len(s) + 1)}
        assert tree.size == len(histories) and (tree.size <= capacity or len(histories) == max(map(len, mine)))
        gaps = forest.attends[filled, 0, tree.size :]
        assert gaps.sum() == width - tree.size and bool(gaps.any(-1).all())
    assert found.nodes == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})


@examples_settings(deadline=None, max_examples=60)
@over(SEQUENCES, st.sampled_from([1, 64, 4096]))
def test_the_layout_that_is_taken_costs_no_more_than_one_tree_or_none(sequences, hidden_size):
    given = collate([s[:1] for s in sequences], [s[1:] for s in sequences], pad_token_id=0, stop_token_ids=[0])
    cost_of = functools.partial(row_cost, hidden_size)
    shared, apart = pack(given, hidden_size, widest_tree=100), pack(given, hidden_size)
    nodes = prefixes.in_order(*ragged(sequences)).nodes
    assert cost_of(*shared.input_ids.shape) <= min(cost_of(*apart.input_ids.shape), cost_of(1, nodes))
    assert (shared.attends is None) == (cost_of(*shared.input_ids.shape) == cost_of(*apart.input_ids.shape))
    for packed in (shared, apart):
        assert torch.equal(packed.input_ids.flatten()[packed.predicting], given.input_ids[given.predicting])


def test_sequences_that_begin_unlike_lie_apart_where_attention_is_all_that_costs():
    found = prefixes.in_order(*ragged([[k] * 12 for k in range(4)]))
    cost, trees = prefixes.cheapest(found, lambda rows, width: rows * width**2)
    assert (cost, len(trees)) == (4 * 12**2, 4)


def test_what_is_shared_is_laid_out_once_for_the_whole_micro_batch():
    packed = pack(widened(alike(), 2, 3), 10_000, widest_tree=100)
    # 7 of the turn; 10 11 12 30 31 0; 32 33 34 35 under 10 11; 13 0; 36 37 0 under 13, of two sequences
    assert packed.input_ids.shape == (1, 7 + 6 + 4 + 2 + 3)
    assert packed.input_ids[0, packed.predicting].tolist() == alike().input_ids[alike().predicting].tolist()


def test_no_row_is_wider_than_a_tree_may_be():
    nodes = pack(alike(), 10_000, widest_tree=100).input_ids.shape[1]
    assert pack(alike(), 10_000, widest_tree=nodes).attends is not None
    assert pack(alike(), 10_000, widest_tree=nodes - 1).attends is None


def test_the_layout_of_a_micro_batch_is_found_once_for_all_roles(tmp_path, monkeypatch):
    """On a GPU they wait for it: for a small model it takes as long as a forward."""
    args = config(tmp_path, num_ppo_epochs=1)
    roles, calls, find = full_roles(args), [], prefixes.in_order
    monkeypatch.setattr(prefixes, "in_order", lambda *given: calls.append(given) or find(*given))
    given = alike()
    micro_batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    ppo.score(roles, given, args, micro_batches)
    assert roles.policy.layout == Layout.SHARED and len(calls) == 2
    one_update(roles, args, given, mini_batches=[micro_batches])
    assert len(calls) == 2 + 2 + 2  # scored again, and the update


def test_a_layout_is_the_same_when_it_is_asked_for_again_and_another_rollouts_is_its_own():
    given = alike()
    first, again = (pack(given, 10_000, widest_tree=100) for _ in range(2))
    for name in ("input_ids", "position_ids", "predicting", "attends"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert pack(given, 10_000).attends is None  # other options
    fewer = dataclasses.replace(given, completion_mask=given.completion_mask & False)
    assert len(pack(fewer, 10_000, widest_tree=100).predicting) == 0 < len(first.predicting)
    assert given.laid_out and not given.select([0, 1]).laid_out and not given.to(torch.device("cpu")).laid_out


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "attention"), ATTENTIONS)
def test_states_are_those_of_each_sequence_alone(kind, attention):
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    taking = role(model, layout=Layout.SHARED)
    assert layout_of(taking) == Layout.SHARED
    for given in (alike(), rollout()):
        with torch.no_grad():
            alone = torch.cat([taking.padded_states(given.select([row])) for row in range(len(given))])
            torch.testing.assert_close(taking.hidden(given), alone, atol=2e-6 * alone.abs().max().item(), rtol=1e-5)


def test_trees_are_no_wider_than_a_sliding_window(monkeypatch):
    model = tiny_model("gemma2")
    model.config.sliding_window = 8
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 8 if layer.self_attn.sliding_window else None
    assert widest_tree(model.config) == 8 and widest_tree(tiny_model().config) > 10**6
    taking, given = role(model, layout=Layout.SHARED), alike()
    with torch.no_grad():
        alone = torch.cat([taking.padded_states(given.select([row])) for row in range(len(given))])
        torch.testing.assert_close(taking.hidden(given), alone, atol=2e-6 * alone.abs().max().item(), rtol=1e-5)
        monkeypatch.setattr("srppo.roles.widest_tree", lambda _: 100)
        assert not torch.allclose(taking.hidden(given), alone, atol=1e-3)  # what the limit is for


def without_mask(forward):
    return lambda *a, attention_mask=None, **k: forward(*a, **k)


def refusing(forward):
    def refuse(*a, attention_mask=None, **k):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError("Expected a mask of two dimensions")
        return forward(*a, attention_mask=attention_mask, **k)

    return refuse


@pytest.mark.parametrize("wrapped", [without_mask, refusing])
def test_a_model_that_takes_no_such_mask_is_given_sequences_end_to_end(tmp_path, monkeypatch, wrapped):
    other = type(tiny_model("llama").model)
    monkeypatch.setattr(other, "forward", wrapped(other.forward))
    assert not takes_trees(role(tiny_model()))
    roles = build_roles(config(tmp_path), tiny_model(), tiny_model(seed=1))
    assert [r.layout for r in roles] == [Layout.PACKED] * 4


def test_flash_attention_takes_no_trees():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_trees(role(model))


# -- nothing depends on it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_gradients_and_scores_are_those_of_sequences_apart(tmp_path, gradients, kind, checkpointing):
    args = config(
        tmp_path, num_ppo_epochs=1, entropy_coef=0.1, gradient_checkpointing=checkpointing,
        per_device_train_batch_size=5, gradient_accumulation_steps=1,
    )  # fmt: skip
    roles = trained_head(full_roles(args, kind))
    shared, _, with_trees = one_update(laid_out(roles, Layout.SHARED), args, alike())
    apart, _, without = one_update(laid_out(roles, Layout.PACKED), args, alike())
    for name in ppo.Scores.__dataclass_fields__:
        torch.testing.assert_close(getattr(shared, name), getattr(apart, name), atol=1e-5, rtol=0)
    assert_same_gradients(gradients[:2], gradients[2:])
    assert with_trees.policy_loss == pytest.approx(without.policy_loss, abs=1e-6)
    assert with_trees.first.ratio_max == 1 and with_trees.first.ratio_var == 0


def forwards(model, monkeypatch):
    """The shapes of the forwards that follow."""
    shapes = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, **k: shapes.append(input_ids.shape) or forward(
        input_ids=input_ids, **k))  # fmt: skip
    return shapes


def test_rewards_of_several_completions_compute_their_prompt_once(monkeypatch):
    base, sft = tiny_model(seed=1), tiny_model(seed=2)
    reward = SelfReward(base, sft, stop_token_ids=[0], batch_size=4)
    prompts = [[10] * 30 + [i % 2] for i in range(8)]  # two prompts, in turns, four completions each
    completions = [[i + 1, 0] for i in range(8)]
    shapes = forwards(sft, monkeypatch)
    together = reward.reward(prompts, completions)
    assert sum(shape.numel() for shape in shapes) <= 2 * (31 + 4 * 2)
    alone = torch.cat([reward.reward([p], [c]) for p, c in zip(prompts, completions, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


# -- sampling ---------------------------------------------------------------------------------------------------------

TURNED = [[*range(40, 60), *rest] for rest in ([20], [21, 22, 23, 24, 25], [26, 27], [3] * 7, [4], [5, 6], [7], [8])]


def sampled(model, prompts=TURNED, layout=Layout.SHARED, **options):
    torch.manual_seed(0)
    settings = {"max_completion_length": 6, "pad_token_id": 1, "stop_token_ids": [0], **options}
    return generate(role(model, layout=layout), prompts, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [None, 3, 7])
def test_samples_are_those_of_prompts_apart(kind, batch_size):
    model = tiny_model(kind)
    together, apart = (
        sampled(model, layout=layout, batch_size=batch_size) for layout in (Layout.SHARED, Layout.PACKED)
    )
    assert torch.equal(together.input_ids, apart.input_ids)
    assert torch.equal(together.attention_mask, apart.attention_mask)


def test_extrapolated_samples_are_those_of_prompts_apart():
    base, sft = tiny_model(seed=1), tiny_model(seed=2)
    one, other = (sampled(sft, layout=layout, extrapolate=(role(base, "base"), 1.0)) for layout in Layout if layout)
    assert torch.equal(one.input_ids, other.input_ids)


def test_what_all_prompts_begin_with_is_computed_once(monkeypatch):
    model = tiny_model()
    shapes = forwards(model, monkeypatch)
    sampled(model, max_completion_length=1)
    assert shapes == [(1, 20), (8, 7)]
    shapes.clear()
    sampled(model, [TURNED[4]] * 8, max_completion_length=1)  # a token is left for each to start from
    assert shapes == [(1, 20), (8, 1)]


@pytest.mark.parametrize("prompts", [TURNED[:4], [[1, *prompt] for prompt in TURNED[:4]] + TURNED[4:]])
def test_little_in_common_is_not_worth_a_forward(prompts, monkeypatch):
    model = tiny_model()
    shapes = forwards(model, monkeypatch)
    sampled(model, prompts, max_completion_length=1)
    assert shapes == [(len(prompts), max(map(len, prompts)))]


def test_prompts_that_leave_a_sliding_window_are_not_shared(monkeypatch):
    model = tiny_model("gemma2")
    model.config.sliding_window = 27 + 6
    shapes = forwards(model, monkeypatch)
    sampled(model)
    assert shapes[0] == (1, 20)
    shapes.clear()
    sampled(model, max_completion_length=7)
    assert shapes[0] == (8, 27)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_mask_of_a_tree_is_where_the_tree_is(attention):
    attends = torch.ones(2, 1, 5, 5, dtype=torch.bool, device="meta")
    mask = prefixes.tree_mask(attends, torch.bfloat16, attention)
    assert (mask.device, mask.shape) == (attends.device, attends.shape)
    assert mask.dtype == (torch.bool if attention == "sdpa" else torch.bfloat16)
