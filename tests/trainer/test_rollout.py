"""Sampling: exactly softmax(logits / T) and nothing else, stop tokens, padding, seeds, and extrapolated decoding."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import config, examples, role, rollout
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from srppo import UserError, ppo
from srppo.data import Example
from srppo.evaluation import Extrapolated, evaluate_policy, sequence_logprobs
from srppo.roles import frozen_roles
from srppo.rollout import ExtrapolatedLogits, Rollout, collate, generate, until_stop

V = 6
PROMPT = [2, 3, 4]


def sample(model: PreTrainedModel, prompts, *, length: int = 1, seed: int = 0, stops=(0,), pad: int = 1, **options):
    torch.manual_seed(seed)
    return generate(
        role(model), prompts, max_completion_length=length, pad_token_id=pad, stop_token_ids=list(stops), **options
    )


def next_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].double()


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return tiny_model(vocab_size=V, hidden=16)


LIMIT = 25.7  # chi-square with 5 degrees of freedom passes it once in 10,000
MANY = 4000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_at_the_temperature(small, temperature):
    drawn = sample(small, [PROMPT] * MANY, temperature=temperature).completions[:, 0]
    counts = torch.bincount(drawn, minlength=V).double()
    logits = next_logits(small, PROMPT)
    assert chi_square(counts, (logits / temperature).softmax(-1)) < LIMIT
    assert chi_square(counts, (logits / (1.5 * temperature)).softmax(-1)) > LIMIT  # the test can tell


def test_second_token_follows_the_softmax_given_the_first(small):
    drawn = sample(small, [PROMPT, PROMPT[:2]] * MANY, length=2)
    taken = drawn.completions[::2][drawn.lengths[::2] == 2]
    for first in range(1, V):
        given_first = taken[taken[:, 0] == first][:, 1]
        if len(given_first) > 200:
            counts = torch.bincount(given_first, minlength=V).double()
            assert chi_square(counts, next_logits(small, [*PROMPT, first]).softmax(-1)) < LIMIT


def test_what_a_checkpoint_asks_for_in_its_generation_config_does_not_reach_the_sampler(small):
    plain = sample(small, [PROMPT] * 64, length=4)
    meddling = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0, no_repeat_ngram_size=1,
        suppress_tokens=[2, 3], min_new_tokens=4, forced_eos_token_id=5, max_new_tokens=1,
    )  # fmt: skip
    own, small.generation_config = small.generation_config, meddling
    try:
        again = sample(small, [PROMPT] * 64, length=4)
        assert small.generation_config is meddling
        with pytest.raises(TypeError):
            sample(small, [PROMPT], length=4, on_batch="not callable")
        assert small.generation_config is meddling
        assert not small.training
    finally:
        small.generation_config = own
    assert torch.equal(plain.input_ids, again.input_ids)


def test_training_modes_are_those_from_before_module_by_module():
    model = tiny_model().train()
    frozen, modes = model.model.layers[0].eval(), []
    model.model.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    sample(model, [PROMPT], length=2)
    assert modes and not any(modes), "samples are without dropout, and with a cache"
    assert model.training and model.lm_head.training and not frozen.training and not frozen.mlp.training


def test_top_k_is_off_and_top_p_cuts_the_tail(small):
    wide = tiny_model()  # 264 tokens, of which transformers' own default would keep 50
    drawn = sample(wide, [PROMPT] * MANY, temperature=3.0).completions[:, 0]
    assert len(drawn.unique()) > 200
    probabilities = next_logits(small, PROMPT).softmax(-1)
    drawn = sample(small, [PROMPT] * MANY).completions[:, 0]
    assert set(drawn.tolist()) == set(range(V))
    order = probabilities.argsort(descending=True)
    nucleus = probabilities[order[:3]].sum().item() - 1e-4
    cut = sample(small, [PROMPT] * MANY, top_p=nucleus).completions[:, 0]
    assert set(cut.tolist()) == set(order[:3].tolist())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_the_sampler_s_log_probs_are_those_of_what_it_samples_from(small, temperature, top_p):
    options = {"length": 4, "temperature": temperature, "top_p": top_p, "batch_size": 2}
    drawn = sample(small, [PROMPT, PROMPT[:1], PROMPT[1:]], sampler_logprobs=True, **options)
    plain = sample(small, [PROMPT, PROMPT[:1], PROMPT[1:]], **options)
    assert torch.equal(drawn.input_ids, plain.input_ids) and plain.sampler_logprobs is None
    assert drawn.sampler_logprobs.shape == drawn.completion_mask.shape
    for row, (prompt, mask) in enumerate(zip([PROMPT, PROMPT[:1], PROMPT[1:]], drawn.completion_mask, strict=True)):
        ids = drawn.completions[row][mask].tolist()
        for place, token in enumerate(ids):
            p = (next_logits(small, prompt + ids[:place]) / (temperature or 1)).softmax(-1)
            ordered = p.sort(descending=True)
            p[ordered.indices[ordered.values.cumsum(-1) - ordered.values >= top_p]] = 0
            assert drawn.sampler_logprobs[row, place].item() == pytest.approx(
                (p / p.sum())[token].log().item(), abs=1e-5
            )
    assert not drawn.sampler_logprobs[~drawn.completion_mask].any()


def greedy(model: PreTrainedModel, prompt: list[int], length: int, stops=(0,)) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < length and not (tokens and tokens[-1] in stops):
        tokens.append(int(next_logits(model, prompt + tokens).argmax()))
    return tokens


def completions(given: Rollout) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(given.completions, given.completion_mask, strict=True)]


MIXED = [[20], [21, 22, 23, 24, 25], [26, 27], [28, 29, 30]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_temperature_zero_takes_the_most_likely_token_whatever_the_padding(kind, batch_size):
    model = tiny_model(kind)
    drawn = sample(model, MIXED, length=6, temperature=0, batch_size=batch_size)
    assert completions(drawn) == [greedy(model, prompt, 6) for prompt in MIXED]


def test_a_long_prompt_makes_no_other_batch_wider(monkeypatch):
    model, widths = tiny_model(), []
    plain = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: widths.append(given["input_ids"].shape[1]) or plain(**given))
    sample(model, MIXED, length=2, batch_size=2)
    assert widths == [5, 3]


def test_sampling_is_deterministic_by_seed():
    model = tiny_model()
    one, same, other = (sample(model, MIXED, length=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.input_ids, same.input_ids)
    assert not torch.equal(one.input_ids, other.input_ids)


def test_log_probs_of_a_rollout_are_those_of_the_sampler():
    """Sampled tokens, scored by the training path, must be as likely as they were drawn."""
    model = tiny_model(vocab_size=V, hidden=16, seed=3)
    drawn = sample(model, [PROMPT] * MANY, length=3, temperature=0.7)
    logp = ppo.logprobs(role(model), drawn, temperature=0.7)[0]
    entropy = ppo.logprobs(role(model), drawn, temperature=0.7, entropy=True)[1]
    tokens = drawn.completion_mask.sum()
    assert (-logp.sum() / tokens).item() == pytest.approx((entropy.sum() / tokens).item(), rel=0.03)


# -- stopping ---------------------------------------------------------------------------------------------------------


def test_the_head_gets_contiguous_rows():
    """Under a strided view of the last positions a frozen head was copied once a sequence, inside torch's product."""
    model = tiny_model().requires_grad_(False)
    head, seen = model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, rows, __: seen.append(rows[0]))
    sample(model, [[3, 4, 5]] * 4, length=2)
    assert [rows.shape for rows in seen] == [(4, 1, 32)] * 2
    assert all(rows.is_contiguous() for rows in seen)
    assert not head._forward_pre_hooks  # as it was


def test_a_completion_ends_with_the_first_of_several_stop_tokens():
    model = tiny_model(vocab_size=V, hidden=16)
    drawn = sample(model, [PROMPT] * 200, length=6, stops=(0, 4))
    for tokens, cut in zip(completions(drawn), drawn.truncated.tolist(), strict=True):
        assert not {0, 4} & set(tokens[:-1])
        assert cut == (tokens[-1] not in (0, 4))
        assert len(tokens) == 6 or not cut
    assert {len(tokens) for tokens in completions(drawn)} >= {1, 2, 3}
    assert drawn.truncated.any() and not drawn.truncated.all()
    ((likeliest,),) = completions(sample(model, [PROMPT], temperature=0.0))
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    sample(model, [PROMPT], length=6, stops=((likeliest + 1) % V, likeliest), temperature=0.0)
    assert len(forwards) == 1, "sampling ends with the last completion, whichever stop token it was"


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_completions_do_not_depend_on_the_pad_token_even_if_it_is_the_stop_token(pad):
    model = tiny_model(vocab_size=V, hidden=16)
    drawn = sample(model, [PROMPT, PROMPT[:1]] * 50, length=5, pad=pad)
    expected = sample(model, [PROMPT, PROMPT[:1]] * 50, length=5, pad=1)
    assert completions(drawn) == completions(expected)
    assert torch.equal(drawn.truncated, expected.truncated)
    assert [tokens[-1] == 0 for tokens in completions(drawn)] == (~drawn.truncated).tolist()


def test_tokens_behind_a_stop_token_are_filler():
    stops = torch.tensor([0, 4])
    assert until_stop(torch.tensor([5, 4, 2, 0, 3]), stops) == [5, 4]
    assert until_stop(torch.tensor([0]), stops) == [0]
    assert until_stop(torch.tensor([5, 3]), stops) == [5, 3]


def test_collate_keeps_every_token_and_marks_the_rest_as_padding():
    given = rollout()
    assert given.prompt_length == 5
    assert given.completions.shape == (4, 4)
    assert given.lengths.tolist() == [3, 1, 4, 2]
    prompts, texts = [[10, 11, 12], [13], [14, 15, 16, 17, 18], [19, 20]], [[30, 31, 0], [0], [32, 33, 34, 35], [36, 0]]
    for row, (prompt, completion) in enumerate(zip(prompts, texts, strict=True)):
        assert given.input_ids[row][given.attention_mask[row].bool()].tolist() == prompt + completion
        assert given.position_ids[row][given.attention_mask[row].bool()].tolist() == list(
            range(len(prompt) + len(completion))
        )
    ended = collate([[1]] * 4, [[5, 0], [0, 5], [5], []], pad_token_id=0, stop_token_ids=[0])
    assert ended.truncated.tolist() == [False, True, True, True]  # the last token decides
    with pytest.raises(UserError, match="2 prompts and 1 completions: each prompt needs one"):
        collate([[1], [2]], [[3]], pad_token_id=0, stop_token_ids=[0])


def test_selecting_rows_drops_columns_that_are_padding_in_all_of_them():
    part = rollout().select([1, 3])
    assert part.prompt_length == 2
    assert part.completions.tolist() == [[0, 1], [36, 0]]
    assert part.completion_mask.tolist() == [[True, False], [True, True]]
    assert part.truncated.tolist() == [False, False]
    assert rollout().select([3, 2]).truncated.tolist() == [False, True]


# -- extrapolated decoding --------------------------------------------------------------------------------------------


def extrapolated(sft: PreTrainedModel, base: PreTrainedModel, ids: list[int], beta: float) -> Tensor:
    log_sft, log_base = (next_logits(model, ids).log_softmax(-1) for model in (sft, base))
    return ((1 + 1 / beta) * log_sft - log_base / beta).log_softmax(-1)


def extrapolated_greedy(sft, base, prompt: list[int], length: int, beta: float) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < length and not (tokens and tokens[-1] == 0):
        tokens.append(int(extrapolated(sft, base, prompt + tokens, beta).argmax()))
    return tokens


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_extrapolated_decoding_follows_the_formula_token_by_token(kind, beta):
    sft, base = tiny_model(kind, seed=1), tiny_model(kind)
    drawn = sample(sft, MIXED, length=6, temperature=0, extrapolate=(role(base, "base"), beta))
    assert completions(drawn) == [extrapolated_greedy(sft, base, prompt, 6, beta) for prompt in MIXED]
    assert completions(drawn) != completions(sample(sft, MIXED, length=6, temperature=0))


def test_extrapolated_samples_follow_the_formula(small):
    sft = tiny_model(vocab_size=V, hidden=16, seed=1)
    drawn = sample(sft, [PROMPT] * MANY, extrapolate=(role(small, "base"), 1.0), temperature=0.8).completions[:, 0]
    logits = extrapolated(sft, small, PROMPT, 1.0)
    assert chi_square(torch.bincount(drawn, minlength=V).double(), (logits / 0.8).softmax(-1)) < LIMIT


def test_extrapolated_decoding_with_two_roles_on_one_model(tiny_models, tmp_path):
    base, sft = frozen_roles(config(tmp_path), tiny_models.base, tiny_models.adapter)
    assert base.model is sft.model
    drawn = generate(
        sft, MIXED, max_completion_length=5, pad_token_id=1, stop_token_ids=[0], temperature=0, extrapolate=(base, 1.0)
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_models.base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models.base), tiny_models.adapter)
    assert completions(drawn) == [extrapolated_greedy(tuned.eval(), plain, prompt, 5, 1.0) for prompt in MIXED]


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_extrapolation_needs_a_positive_beta(small, beta):
    with pytest.raises(UserError, match="extrapolation needs beta above 0"):
        ExtrapolatedLogits(role(small), beta, torch.ones(1, 1))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere2"])
def test_log_probs_of_extrapolated_decoding_are_those_of_the_formula(kind):
    sft, base, beta, given = tiny_model(kind, seed=1), tiny_model(kind), 0.7, rollout()
    got = Extrapolated(role(sft), role(base, "base"), beta).logprobs(given, temperature=0.8)
    for row, tokens in enumerate(completions(given)):
        prompt = given.input_ids[row, : given.prompt_length][given.attention_mask[row, : given.prompt_length].bool()]
        for t, token in enumerate(tokens):
            logp = (extrapolated(sft, base, prompt.tolist() + tokens[:t], beta) / 0.8).log_softmax(-1)
            assert got[row, t].item() == pytest.approx(logp[token].item(), abs=2e-4)
    assert got.masked_select(~given.completion_mask).abs().sum() == 0


def test_evaluation_of_extrapolated_decoding_measures_the_policy_that_sampled(small, tmp_path):
    """With the SFT model's own log-probs its KL to SFT would come out as 0."""
    sft = tiny_model(vocab_size=V, hidden=16, seed=1)
    rows = [Example(PROMPT, [2, 0], None, "row")] * 512
    args = config(tmp_path, stop_token_ids=[0], max_completion_length=1, per_device_train_batch_size=512)
    results = {}
    for beta in (None, 1.0):
        results[beta], _ = evaluate_policy(
            role(sft), role(sft, "sft"), role(small, "base"), rows, args, tiny_tokenizer(),
            stop_token_ids=[0], extrapolate=beta,
        )  # fmt: skip
    assert results[None]["eval/objective/kl"] == 0
    log_sft = next_logits(sft, PROMPT).log_softmax(-1)
    log_pi = extrapolated(sft, small, PROMPT, 1.0)
    exact = (log_pi.exp() * (log_pi - log_sft)).sum().item()
    assert exact > 0.05
    assert results[1.0]["eval/objective/kl"] == pytest.approx(exact, rel=0.25)
    after = extrapolated(sft, small, [*PROMPT, 2], 1.0)
    assert results[1.0]["eval/demonstrations/logp"] == pytest.approx((log_pi[2] + after[0]).item() / 2, abs=1e-4)
    assert results[1.0]["eval/demonstrations/logp_sft"] == results[None]["eval/demonstrations/logp_sft"]


def test_evaluation_leaves_the_random_state_alone_and_repeats_itself(tiny_models, tmp_path):
    args = config(tmp_path, temperature=0.7)
    base, sft = frozen_roles(args, tiny_models.base, tiny_models.sft)
    rows = examples([{"prompt": "ab"}, {"prompt": "cde"}])
    state = torch.get_rng_state()
    one, two = (evaluate_policy(sft, sft, base, rows, args, tiny_tokenizer(), stop_token_ids=[0]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == two
    assert one[0]["eval/objective/kl"] == 0, "of SFT itself, at the temperature that it samples at"


def test_evaluation_scores_nothing_twice(tiny_models, tmp_path, monkeypatch):
    """``srppo eval`` without a model judges the SFT model, which is what it compares with as well."""
    base, sft = frozen_roles(config(tmp_path), tiny_models.base, tiny_models.sft)
    rows = [Example([1, 2], [3, 0], None, "row")] * 4
    scored = []

    def note(scoring, given, temperature, args):
        scored.append((scoring.name, given.prompt_length, given.completions.tolist(), temperature))
        return sequence_logprobs(scoring, given, temperature, args)

    monkeypatch.setattr("srppo.evaluation.sequence_logprobs", note)
    for policy in (sft, base):
        for settings in ({}, {"score_temperature": 0.5}):
            scored.clear()
            args = config(tmp_path, max_completion_length=3, **settings)
            evaluate_policy(policy, sft, base, rows, args, tiny_tokenizer(), stop_token_ids=[0])
            assert scored
            assert all(scored.count(one) == 1 for one in scored)
