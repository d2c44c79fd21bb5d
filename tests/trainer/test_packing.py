"""Packing and micro-batches by tokens: no token is padding, no sequence sees another, and no result depends on them."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from hypothesis import given as over
from hypothesis import settings as examples_settings
from hypothesis import strategies as st
from ppo_steps import assert_same_gradients, laid_out, one_update, trained_head
from tiny import ATTENTIONS, tiny_model
from tiny_runs import config, full_roles, role, rollout, trainer, widened
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel

from srppo import SelfReward, UserError, ppo
from srppo.packing import Layout, fill, fill_padded, keeps_sequences_apart, layout_of, narrowest, pack, plan
from srppo.roles import Role, build_roles
from srppo.rollout import collate

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)

# -- arithmetic -------------------------------------------------------------------------------------------------------


@examples_settings(deadline=None, max_examples=60)
@over(LENGTHS, st.integers(1, 200))
def test_bins_hold_every_sequence_once_and_no_more_than_they_may(lengths, capacity):
    bins = fill(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[i] for i in members) <= capacity or len(members) == 1
    loads = sorted(sum(lengths[i] for i in members) for members in bins)
    assert all(a + b > capacity for a, b in itertools.pairwise(loads))  # no two of them would fit into one


@examples_settings(deadline=None, max_examples=60)
@over(LENGTHS, st.integers(1, 200))
def test_a_sequence_goes_to_the_first_bin_with_room_the_longest_first(lengths, capacity):
    wanted: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        loads = [sum(lengths[i] for i in members) for members in wanted]
        room = [members for members, load in zip(wanted, loads, strict=True) if load + lengths[index] <= capacity]
        if room:
            room[0].append(index)
        else:
            wanted.append([index])
    assert fill(lengths, capacity) == wanted


@examples_settings(deadline=None, max_examples=60)
@over(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=20), st.integers(1, 300))
def test_padded_micro_batches_hold_every_sequence_once_within_the_limit(pairs, limit):
    prompts, completions = zip(*pairs, strict=True)
    batches = fill_padded(prompts, completions, limit)
    assert sorted(i for members in batches for i in members) == list(range(len(pairs)))
    for members in batches:
        slots = len(members) * (max(prompts[i] for i in members) + max(completions[i] for i in members))
        assert slots <= limit or len(members) == 1


@examples_settings(deadline=None, max_examples=60)
@over(LENGTHS, st.sampled_from([1, 64, 4096]), st.booleans(), st.sampled_from([20, 2**31]))
def test_rows_hold_every_sequence_in_one_piece_and_apart(lengths, hidden_size, one_row, widest):
    width, starts = plan(tuple(lengths), hidden_size, one_row, widest)
    taken = [place for start, n in zip(starts, lengths, strict=True) for place in range(start, start + n)]
    assert len(set(taken)) == sum(lengths)
    assert all(start // width == (start + n - 1) // width for start, n in zip(starts, lengths, strict=True))
    for start, n in zip(starts, lengths, strict=True):
        row = [(other, m) for other, m in zip(starts, lengths, strict=True) if other // width == start // width]
        assert len(row) == 1 or start % width + n <= widest
    if one_row and widest > sum(lengths):
        assert width == sum(lengths) and sorted(taken) == list(range(width))


def test_rows_are_few_and_wide_where_matrices_cost_more_and_narrow_where_attention_does():
    lengths = (100, 60, 60, 60, 60, 60)
    assert plan(lengths, 10_000, False)[0] >= 200  # gaps beside 60 in rows of 100 would cost more than attention does
    assert plan(lengths, 1, False)[0] < 200


def test_packing_has_no_padding_and_restarts_positions():
    given = widened(rollout(), 3, 4)
    packed = pack(given, 32, one_row=True)
    assert packed.input_ids.shape == (1, int(given.attention_mask.sum()))
    assert packed.position_ids[0].tolist() == [*range(9), *range(6), *range(4), *range(2)]
    assert packed.input_ids[0, packed.predicting + 1].tolist() == given.tokens.tolist()
    rows = pack(given, 1)
    assert rows.input_ids.flatten()[rows.predicting + 1].tolist() == given.tokens.tolist()


def test_tokens_go_to_their_places_and_back():
    given = widened(rollout(), 2, 3)
    values = torch.arange(1.0, 1 + len(given.tokens))
    assert torch.equal(given.of_tokens(given.in_place(values)), values)
    assert given.in_place(values)[~given.completion_mask].abs().sum() == 0
    assert torch.equal(given.in_place(given.tokens.float())[given.completion_mask], given.tokens.float())


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "attention"), ATTENTIONS)
def test_packed_states_are_those_of_each_sequence_alone(kind, attention):
    """Absolute positions (GPT-2), rotary ones, sliding windows (Gemma 2), in one row and in several."""
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    given, packing = rollout(), role(model, layout=Layout.PACKED)
    with torch.no_grad():
        alone = torch.cat([packing.padded_states(given.select([row])) for row in range(len(given))])
        for one_row in (True, False):
            got = packing.packed_states(given, one_row=one_row)
            torch.testing.assert_close(got, alone, atol=2e-6 * alone.abs().max().item(), rtol=1e-5)
    assert keeps_sequences_apart(packing)


def counting_places(kind: str) -> PreTrainedModel:
    """A model that counts places in a row, from more of them on than it is asked with at the start."""
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama4":
        config = Llama4TextConfig(
            **sizes, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=2, attention_chunk_size=32,
            floor_scale=32, no_rope_layers=[1, 0],
        )  # fmt: skip
        return Llama4ForCausalLM(config).eval()
    if not hasattr(transformers, "MiniMaxM3VLForCausalLM"):
        pytest.skip("this transformers has no MiniMax M3")
    config = transformers.MiniMaxM3VLTextConfig(
        **sizes, intermediate_size=16, dense_intermediate_size=16, shared_intermediate_size=16, rotary_dim=4,
        num_local_experts=2, num_experts_per_tok=1, index_n_heads=1, index_head_dim=8, index_block_size=32,
        index_topk_blocks=2, layer_types=["full_attention", "minimax_m3_sparse"],
    )  # fmt: skip
    return transformers.MiniMaxM3VLForCausalLM(config).eval()


@pytest.mark.parametrize("kind", [Llama4TextConfig, transformers.Gemma3TextConfig, transformers.LlamaConfig])
def test_the_widest_row_is_read_from_the_settings_without_a_copy_of_them(kind, monkeypatch):
    made = kind()
    names = ("window", "window_size", "chunk_size", "floor_scale")
    copied = min([2**31, *(n for key, n in made.to_dict().items() if key.endswith(names) and type(n) is int)])
    monkeypatch.setattr(kind, "to_dict", lambda _: pytest.fail("every forward would copy all settings"))
    assert narrowest(made, *names) == copied


@pytest.mark.parametrize("kind", ["llama4", "minimax_m3"])
def test_rows_are_no_wider_than_a_model_counts_places_alike(kind):
    """The chunks and the temperature of Llama 4, and MiniMax M3's blocks of keys, begin at a place in the row: what it
    is asked at the start is shorter, and a micro-batch that is wider had other log-probs, in silence."""
    model = counting_places(kind)
    asked = role(model, layout=layout_of(role(model)))
    assert asked.layout == Layout.SHARED
    words = [[(7 * i + shift) % 60 for i in range(n)] for shift, n in ((0, 20), (3, 25), (11, 45), (5, 18), (2, 6))]
    given = collate([w[:5] for w in words], [w[5:] for w in words], pad_token_id=0, stop_token_ids=[63])
    alone = torch.cat([ppo.logprobs(asked, given.select([i]))[0].flatten() for i in range(len(words))])
    for layout in (Layout.PACKED, Layout.SHARED):
        together = ppo.logprobs(role(model, layout=layout), given)[0]
        torch.testing.assert_close(together[given.completion_mask], alone, atol=1e-4, rtol=0)


def test_sequences_that_see_each_other_are_found_out(monkeypatch):
    """What leaving position ids out would do, or an architecture that does not read where a sequence begins."""
    model = tiny_model()
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, position_ids=None, **k: forward(*a, **k))
    assert not keeps_sequences_apart(role(model))


def test_a_model_that_reads_padding_is_refused(monkeypatch):
    """As RWKV, which knows no mask, and decoders that count their positions from the padding on."""
    model = tiny_model()
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda input_ids, use_cache, **_: forward(input_ids))
    with pytest.raises(UserError, match="padded on the left"):
        layout_of(role(model))
    with pytest.raises(UserError, match="padded on the left"):
        SelfReward(role(tiny_model()), role(model), stop_token_ids=[0])


def test_padded_and_packed_states_are_held_against_the_same_forwards_of_each_alone():
    model, widths = tiny_model(), []
    model.model.register_forward_pre_hook(lambda *a: widths.append(a[-1]["input_ids"].shape), with_kwargs=True)
    assert layout_of(role(model)) == Layout.SHARED
    assert widths[:5] == [(1, 9), (1, 5), (1, 12), (3, 12), (1, 26)] and len(widths) == 10, "then those of a tree"


def test_a_model_that_mixes_packed_sequences_is_given_padded_ones(tmp_path, monkeypatch):
    model = tiny_model(seed=1)
    forward = type(model.model).forward
    monkeypatch.setattr(type(model.model), "forward", lambda self, *a, position_ids=None, **k: forward(self, *a, **k))
    roles = build_roles(config(tmp_path), tiny_model(), model)
    assert [r.layout for r in roles] == [Layout.PADDED] * 4
    monkeypatch.undo()
    roles = build_roles(config(tmp_path), tiny_model(), tiny_model(seed=1))
    assert [r.layout for r in roles] == [Layout.SHARED] * 4
    asked = iter([Layout.SHARED, Layout.PADDED])
    monkeypatch.setattr("srppo.roles.layout_of", lambda _: next(asked))
    roles = build_roles(config(tmp_path), tiny_model(), tiny_model(seed=1))
    assert [r.layout for r in roles] == [Layout.PADDED] * 4, "what one of the two takes"


# -- nothing depends on it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_gradients_and_scores_are_those_of_padded_micro_batches(tmp_path, gradients, kind, checkpointing):
    args = config(tmp_path, num_ppo_epochs=1, entropy_coef=0.1, gradient_checkpointing=checkpointing)
    roles = trained_head(full_roles(args, kind))
    packed, _, with_packing = one_update(roles, args, rollout())
    padded, _, without = one_update(laid_out(roles, Layout.PADDED), args, rollout())
    for name in ppo.Scores.__dataclass_fields__:
        torch.testing.assert_close(getattr(packed, name), getattr(padded, name), atol=1e-5, rtol=0)
    assert_same_gradients(gradients[:2], gradients[2:])
    assert with_packing.policy_loss == pytest.approx(without.policy_loss, abs=1e-6)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("limit", [1, 11, 15, 1000])
def test_gradients_loss_and_scores_do_not_depend_on_the_token_limit(tmp_path, gradients, limit, layout):
    roles = laid_out(trained_head(full_roles(config(tmp_path))), layout)
    results = []
    for bound in (None, limit):
        args = config(
            tmp_path, num_ppo_epochs=1, entropy_coef=0.1, num_mini_batches=2, gradient_accumulation_steps=1,
            max_tokens_per_micro_batch=bound,
        )  # fmt: skip
        results.append(one_update(roles, args, rollout()))
    assert_same_gradients(gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :])
    for name in ppo.Scores.__dataclass_fields__:
        torch.testing.assert_close(getattr(results[0][0], name), getattr(results[1][0], name), atol=1e-5, rtol=0)
    assert results[0][2].policy_loss == pytest.approx(results[1][2].policy_loss, abs=1e-6)
    assert results[0][2].value_loss == pytest.approx(results[1][2].value_loss, rel=1e-5)


def test_micro_batches_by_tokens_take_what_fits_and_forwards_get_no_more(tmp_path, monkeypatch):
    args = config(tmp_path, max_tokens_per_micro_batch=15, num_ppo_epochs=2)
    given = rollout()
    assert given.sequence_lengths == [6, 2, 9, 4]
    parts = ppo.split_rows(torch.arange(4), given, args, role=role(tiny_model(), layout=Layout.PACKED))
    assert [sorted(rows.tolist()) for rows in parts[0]] == [[0, 2], [1, 3]]
    sizes = []
    states = Role.packed_states
    monkeypatch.setattr(
        Role, "packed_states", lambda self, part, **k: sizes.append(sum(part.sequence_lengths)) or states(self, part)
    )
    roles = full_roles(args)
    sizes.clear()
    one_update(roles, args, given)
    assert sizes == [15, 6] * 4 + [15, 6, 15, 6] * 2


@pytest.mark.parametrize("kind", ["sft", "adapter"])
@pytest.mark.parametrize("limit", [10, 40])
def test_first_ratio_is_exactly_one_with_a_token_limit(tiny_models, tmp_path, kind, limit):
    settings = {"num_mini_batches": 2, "gradient_accumulation_steps": 1, "max_steps": 1}
    run = trainer(tiny_models, tmp_path, kind=kind, max_tokens_per_micro_batch=limit, **settings)
    first = []
    update = ppo.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "update", lambda *a, **k: first.append(update(*a, **k)) or first[-1])
        run.train()
    assert first[0].first.ratio_max == 1 and first[0].first.ratio_var == 0 and first[0].first.ratio_mean == 1
