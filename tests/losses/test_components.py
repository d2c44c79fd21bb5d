"""SAPO's and SGPO's parts: averages, segments, buffer, pairs, the improver's rows; and a step of DPO on what they
make."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tiny import tiny_model
from torch import nn

from srppo import losses
from srppo.losses.sapo import EMA, Pair, PairBuffer, collate_pairs, random_segment, rewrite_segments, writer
from srppo.losses.sgpo import TEMPLATE, improve, improver_prompts
from srppo.roles import Role
from srppo.rollout import collate


def test_ema_follows_the_trained_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[1].requires_grad_(False)
    ema = EMA(model, decay=0.5)
    assert set(ema.values) == {"0.weight", "0.bias"}  # what is frozen is not kept twice
    start = model[0].weight.detach().clone()
    expected = start.clone()
    for step in (1.0, 2.0):
        with torch.no_grad():
            model[0].weight += step
        ema.update(model)
        expected = 0.5 * expected + 0.5 * model[0].weight
    torch.testing.assert_close(ema.values["0.weight"], expected)
    torch.testing.assert_close(expected - start, torch.full((2, 2), 0.5 * (0.5 * 1) + 0.5 * 3))
    own = model[0].weight.detach().clone()
    with ema.applied(model):
        torch.testing.assert_close(model[0].weight.detach(), expected)
    assert torch.equal(model[0].weight, own)
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model):
        raise RuntimeError("inside")
    assert torch.equal(model[0].weight, own)  # also after an error
    assert model[0].weight.requires_grad

    resumed = EMA(model, decay=0.1)
    resumed.load_state_dict(ema.state_dict())
    assert resumed.decay == 0.5
    assert torch.equal(resumed.values["0.weight"], ema.values["0.weight"])
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match="other trainable parameters"):
        EMA(model).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="does not have the parameters"):
        ema.update(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no trainable parameters"):
        EMA(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="decay=1"):
        EMA(model, decay=1)
    assert EMA(model).decay == 0.5


def test_ema_of_16_bit_weights_is_kept_in_32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, decay=0.99)
    with torch.no_grad():
        model.weight.fill_(1.0078125)
    for _ in range(10):
        ema.update(model)
    assert 1.0005 < ema.values["weight"].item() < 1.001  # in bfloat16 each step would round back to 1


def test_random_segments_are_uniform_and_whole_where_short():
    generator = torch.Generator().manual_seed(0)
    seen = Counter(random_segment(10, 4, generator=generator) for _ in range(7000))
    assert set(seen) == {(i, i + 4) for i in range(7)}
    assert all(850 < count < 1150 for count in seen.values())
    assert random_segment(3, 256) == (0, 3)
    start, stop = random_segment(1000)
    assert stop - start == 256
    with pytest.raises(ValueError, match="at least 1"):
        random_segment(0)


def test_segments_are_rewritten_in_place():
    prompts, chosen = [[1, 2], [3], [4]], [[10, 11, 12, 13, 0], [20, 21, 0], [30, 31, 32, 33, 34, 0]]
    asked = {}

    def write(prefixes, limits):
        asked["prefixes"], asked["limits"] = prefixes, limits
        return [[90 + i] * limit for i, limit in enumerate(limits)]

    generator = torch.Generator().manual_seed(1)
    cuts = [random_segment(len(c), 2, generator=torch.Generator().manual_seed(1)) for c in chosen[:1]]
    pairs = rewrite_segments(prompts, chosen, write, stop_token_ids=[0], segment=2, generator=generator)
    assert asked["limits"] == [2, 2, 2]
    assert cuts[0] == (len(asked["prefixes"][0]) - 2, len(asked["prefixes"][0]))
    for i, pair in enumerate(pairs):
        start = len(asked["prefixes"][i]) - len(prompts[i])
        assert pair.prompt_ids == prompts[i]
        assert pair.chosen_ids == chosen[i]
        assert pair.rejected_ids == [*chosen[i][:start], 90 + i, 90 + i, *chosen[i][start + 2 :]]
        assert asked["prefixes"][i] == [*prompts[i], *chosen[i][:start]]


def test_a_rewriting_that_stops_ends_the_answer_and_one_that_changes_nothing_is_left_out():
    chosen = [[10, 11, 12, 0]]
    for written, rejected in (
        ([0], [0]),
        ([9, 0, 7, 7], [9, 0]),
        ([9, 9], [9, 9]),
        ([9] * 5, [9] * 4),
        ([10, 11, 12, 0, 5], None),
    ):
        pairs = rewrite_segments([[1]], chosen, lambda *_, w=written: [w], stop_token_ids=[0])
        assert [p.rejected_ids for p in pairs] == ([] if rejected is None else [rejected])
    with pytest.raises(ValueError, match="2 continuations of 1"):
        rewrite_segments([[1]], chosen, lambda *_: [[1], [2]], stop_token_ids=[0])
    with pytest.raises(ValueError, match="2 prompts and 1 chosen"):
        rewrite_segments([[1], [2]], chosen, lambda *_: [], stop_token_ids=[0])


def test_buffer_is_first_in_first_out():
    buffer = PairBuffer(3)
    pairs = [Pair([i], [i, 0], [i, 1]) for i in range(5)]
    buffer.add(pairs[:2])
    assert len(buffer) == 2
    buffer.add(pairs[2:])
    assert list(buffer.pairs) == pairs[2:]
    drawn = buffer.sample(2, generator=torch.Generator().manual_seed(0))
    assert len({p.prompt_ids[0] for p in drawn}) == 2
    draws = [buffer.sample(3, generator=torch.Generator().manual_seed(seed // 2)) for seed in range(20)]
    assert draws[::2] == draws[1::2]
    assert any(draw != draws[0] for draw in draws)
    assert sorted(p.prompt_ids[0] for p in buffer.sample(9)) == [2, 3, 4]
    other = PairBuffer()
    other.load_state_dict(buffer.state_dict())
    other.add(pairs[:1])
    assert [p.prompt_ids[0] for p in other.pairs] == [3, 4, 0]
    assert PairBuffer().pairs.maxlen == 2000
    with pytest.raises(ValueError, match="capacity=0"):
        PairBuffer(0)


def test_a_batch_of_pairs_has_the_chosen_first():
    pairs = [Pair([5], [7, 8, 0], [7, 9, 9, 0]), Pair([6, 6], [3, 0], [4])]
    batch = collate_pairs(pairs, pad_token_id=1, stop_token_ids=[0])
    rows = [ids[keep].tolist() for ids, keep in zip(batch.completions, batch.completion_mask, strict=True)]
    assert rows == [[7, 8, 0], [3, 0], [7, 9, 9, 0], [4]]
    prompts = [ids[keep.bool()].tolist()[:-n] for ids, keep, n in
               zip(batch.input_ids, batch.attention_mask, batch.lengths, strict=True)]  # fmt: skip
    assert prompts == [[5], [6, 6]] * 2


def test_a_writer_gives_each_prefix_its_tokens_and_no_padding(monkeypatch):
    asked = []

    def generate(role, prompts, **options):
        asked.append(options)
        return collate(prompts, [[7, 8, 0], [3, 0]], pad_token_id=1, stop_token_ids=[0])

    monkeypatch.setattr("srppo.rollout.generate", generate)
    tokens = {"pad_token_id": 1, "stop_token_ids": [0]}
    assert writer(None, **tokens)([[5], [6]], [1, 3]) == [[7], [3, 0]]
    assert writer(None, **tokens, temperature=0.7, top_p=0.9, batch_size=4)([[5], [6]], [3, 3]) == [[7, 8, 0], [3, 0]]
    common = {"max_completion_length": 3, **tokens}
    assert asked == [{**common, "temperature": 1.0, "top_p": 1.0, "batch_size": None},
                     {**common, "temperature": 0.7, "top_p": 0.9, "batch_size": 4}]  # fmt: skip


def test_a_step_of_sapo():
    """EMA model, segment, buffer, DPO straight from hidden states: the loss of the logits, and a step that lowers
    it."""
    model, reference = tiny_model(seed=0), tiny_model(seed=1)
    role = Role("policy", model, trainable=True)
    ema = EMA(model)
    chosen = [[30, 31, 32, 33, 34, 35, 0], [40, 41, 42, 43, 0]]
    write = writer(role, pad_token_id=1, stop_token_ids=[0])
    with ema.applied(model):
        pairs = rewrite_segments([[5, 6], [7]], chosen, write, stop_token_ids=[0], segment=3)
    assert len(pairs) == 2
    buffer = PairBuffer()
    buffer.add(pairs)
    batch = collate_pairs(buffer.sample(2), pad_token_id=1, stop_token_ids=[0])
    assert batch.completions.shape[0] == 4

    def logprobs(of):
        logits = of(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
        logp = logits[:, batch.prompt_length - 1 : -1].double().log_softmax(-1)
        taken = logp.gather(-1, batch.completions[..., None]).squeeze(-1)
        return torch.where(batch.completion_mask, taken, 0)

    with torch.no_grad():
        ref = logprobs(reference)
        own = logprobs(model)
    margins = (own - ref).sum(-1)
    want = -torch.nn.functional.logsigmoid(0.1 * (margins[:2] - margins[2:])).mean()
    fn = partial(losses.dpo, normalizer=2)
    values = []
    for _ in range(2):
        hidden = batch.in_place(role.hidden(batch))
        loss, aux = losses.linear(
            fn, hidden, role.head.weight, batch.completions, batch.completion_mask, ref.float(), **role.head.options
        )
        values.append(loss.item())
        assert aux["pairs"] == 2
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None
    assert values[0] == pytest.approx(want.item(), rel=1e-4)
    assert values[1] < values[0]
    ema.update(model)


def test_improver_rows():
    asked = []

    def rewrite(texts):
        asked.extend(texts)
        return ["better", " same ", "", "{prompt}"]

    prompts, answers = ["P{answer}", "q", "r", "s"], ["a {demonstration}", "same", "x", "y"]
    rows = improve(prompts, answers, ["D0", "D1", "D2", "D3"], rewrite)
    assert rows == [
        {"prompt": "P{answer}", "chosen": "better", "rejected": "a {demonstration}"},
        {"prompt": "s", "chosen": "{prompt}", "rejected": "y"},
    ]
    want = TEMPLATE.replace("{prompt}", "P@").replace("{answer}", "a #").replace("{demonstration}", "D0")
    assert asked[0] == want.replace("P@", "P{answer}").replace("a #", "a {demonstration}")  # fields in answers are text
    assert improver_prompts(["p"], ["a"], ["d"], template="{demonstration}{answer}{prompt}{other}") == ["dap{other}"]
    with pytest.raises(ValueError, match="rewrite returned 1 texts for 2"):
        improve(["p", "q"], ["a", "b"], ["c", "d"], lambda _: ["x"])
    with pytest.raises(ValueError, match="2 prompts, 1 answers"):
        improve(["p", "q"], ["a"], ["c", "d"], rewrite)
    with pytest.raises(ValueError, match=r"template has no \{answer\}"):
        improver_prompts(["p"], ["a"], ["d"], template="{prompt}{demonstration}")
