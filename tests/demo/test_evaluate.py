"""Judging: rewards and KL against their formulas, extrapolated decoding against the explicit distribution."""

import pytest
import torch

from srppo import ppo
from srppo.data import Example
from srppo.demo.evaluate import Candidate, distributions, judge, reward_and_kl
from srppo.demo.model import ModelSize, build_model, build_tokenizer
from srppo.demo.world import TASKS, World, make_prompt
from srppo.evaluation import fixed_seed
from srppo.roles import Role
from srppo.rollout import collate, generate


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def roles(tokenizer):
    """Three small models whose distributions are far from uniform."""
    found = {}
    for seed, name in enumerate(("base", "sft", "policy")):
        model = build_model(tokenizer, ModelSize(16, 1, 2), seed=seed).eval()
        with torch.no_grad():
            model.lm_head.weight *= 8
        found[name] = Role(name, model)
    return found


@pytest.fixture(scope="module")
def rollout(tokenizer):
    eos = tokenizer.eos_token_id
    prompts = [tokenizer(text)["input_ids"] for text in ("roll badge>", "copy dabc>", "next ab>")]
    completions = [[*tokenizer("adgeb")["input_ids"], eos], [eos], tokenizer("no end here")["input_ids"]]
    return collate(prompts, completions, pad_token_id=tokenizer.pad_token_id, stop_token_ids=[eos])


def row_log_probs(role, rollout, row):
    """Next-token log-probs at one row's completion positions from a forward of that row alone, without padding."""
    ids = rollout.input_ids[row][rollout.attention_mask[row].bool()]
    length = int(rollout.lengths[row])
    with torch.no_grad():
        logits = role.model(ids[None]).logits[0]
    return logits[-length - 1 : -1].log_softmax(-1), ids[-length:]


def test_distributions_do_not_depend_on_padding(roles, rollout):
    with torch.no_grad():
        found = distributions(roles["sft"], rollout)
    for row in range(len(rollout)):
        expected, _ = row_log_probs(roles["sft"], rollout, row)
        torch.testing.assert_close(found[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_reward_is_the_librarys_log_ratio(roles, rollout):
    reward, _ = reward_and_kl(Candidate("policy", roles["policy"]), roles["sft"], roles["base"], rollout)
    sft, base = (ppo.logprobs(roles[name], rollout)[0].sum(-1) for name in ("sft", "base"))
    torch.testing.assert_close(reward, sft - base, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("beta", "temperature"), [(None, 1.0), (1.0, 1.0), (1 / 3, 1.0), (None, 0.5), (1.0, 0.5)])
def test_kl_to_sft_against_the_sum_over_the_vocabulary(roles, rollout, beta, temperature):
    candidate = Candidate("policy", roles["policy"], beta, temperature)
    _, kl = reward_and_kl(candidate, roles["sft"], roles["base"], rollout)
    for row in range(len(rollout)):
        policy, sft, base = (row_log_probs(roles[name], rollout, row)[0] for name in ("policy", "sft", "base"))
        if beta is not None:
            weights = (policy.exp() ** (1 + 1 / beta)) / (base.exp() ** (1 / beta))
            policy = (weights / weights.sum(-1, keepdim=True)).log()
        weights = policy.exp() ** (1 / temperature)
        policy = (weights / weights.sum(-1, keepdim=True)).log()
        expected = (policy.exp() * (policy - sft)).sum()
        assert kl[row].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)
        assert kl[row] > 0


def test_sft_has_no_kl_to_itself(roles, rollout):
    _, kl = reward_and_kl(Candidate("SFT", roles["sft"]), roles["sft"], roles["base"], rollout)
    assert torch.equal(kl, torch.zeros(3))


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_extrapolated_decoding_samples_from_the_formula(roles, tokenizer, beta):
    """Shares of the first two sampled tokens, over many samples, against ``pi_sft^(1+1/beta) / pi_base^(1/beta)``.

    Two tokens, so that the second comes out of the base model's cache; prompts of two lengths, so that one is padded.
    """
    prompts = [tokenizer(text)["input_ids"] for text in ("roll badge>", "copy ab>")]
    count = 2500
    with fixed_seed(0):
        sampled = generate(
            roles["sft"], [prompt for prompt in prompts for _ in range(count)], max_completion_length=2,
            pad_token_id=tokenizer.pad_token_id, stop_token_ids=[tokenizer.eos_token_id],
            extrapolate=(roles["base"], beta),
        )  # fmt: skip

    def explicit(ids):
        with torch.no_grad():
            sft, base = (roles[name].model(ids).logits[:, -1].softmax(-1) for name in ("sft", "base"))
        weights = sft ** (1 + 1 / beta) / base ** (1 / beta)
        return weights / weights.sum(-1, keepdim=True)

    size = len(tokenizer)
    for i, prompt in enumerate(prompts):
        first = explicit(torch.tensor([prompt]))[0]
        after = explicit(torch.tensor([[*prompt, token] for token in range(size)]))
        second = first.clone()
        second[tokenizer.eos_token_id] = 0  # a completion that ended has no second token
        second = second @ after
        tokens = sampled.completions[i * count : (i + 1) * count]
        alive = tokens[:, 0] != tokenizer.eos_token_id
        for column, expected in ((tokens[:, 0], first), (tokens[alive, 1], second)):
            shares = torch.bincount(column, minlength=size) / count
            plain = roles["sft"].model(torch.tensor([prompt])).logits[0, -1].softmax(-1).detach()
            noise = (expected * (1 - expected) / count).sqrt()
            assert ((shares - expected).abs() < 5 * noise + 3 / count).all()
            # The test has power: the SFT model's own distribution is outside of what it accepts.
            assert not ((plain - expected).abs() < 5 * noise + 3 / count).all()


class Answering:
    """Stands in for `generate`: gives the completions of a table, so that judging is tested on known answers."""

    def __init__(self, tokenizer, completions):
        self.tokenizer, self.completions = tokenizer, completions

    def __call__(self, role, prompts, **options):
        self.asked = options
        eos = self.tokenizer.eos_token_id
        rows = []
        for prompt in prompts:
            text, ended = self.completions[self.tokenizer.decode(prompt)]
            rows.append(self.tokenizer(text)["input_ids"] + [eos] * ended)
        return collate(prompts, rows, pad_token_id=options["pad_token_id"], stop_token_ids=options["stop_token_ids"])


def test_judge_counts_ways_in_and_out_of_domain(roles, tokenizer, monkeypatch):
    completions = {
        "roll badge>": ("adgeb", True),
        "roll dabc>": ("roll dabc", True),
        "copy badge>": ("badge", True),
        "copy dabc>": ("dabc um ok", True),
        "next badge>": ("cbehf", False),
        "prev badge>": ("wrong", True),
        "upper badge>": ("BADGE", True),
        "swap badge>": ("eadgb", True),
    }
    answering = Answering(tokenizer, completions)
    monkeypatch.setattr("srppo.demo.evaluate.generate", answering)
    held_out = [Example(tokenizer(prompt)["input_ids"], None, None, "test") for prompt in completions]
    candidate = Candidate("extrapolated", roles["policy"], 0.5, 0.7)
    found = judge(candidate, roles["sft"], roles["base"], held_out, tokenizer, max_completion_length=20, seed=0,
                  batch_size=3)  # fmt: skip
    assert (answering.asked["extrapolate"], answering.asked["temperature"]) == ((roles["base"], 0.5), 0.7)
    both = reward_and_kl(candidate, roles["sft"], roles["base"], answering("policy", [e.prompt_ids for e in held_out],
                                                                           **answering.asked))  # fmt: skip
    for domain, rows in ((found.in_domain, slice(0, 2)), (found.out_of_domain, slice(2, 8))):
        assert [domain.reward, domain.kl_to_sft] == pytest.approx([x[rows].mean().item() for x in both], rel=1e-4)
    assert found.in_domain.score == 1 / 2
    assert found.in_domain.ways == {"right": 0.5, "ramble": 0.0, "echo": 0.5, "other": 0.0}
    assert found.in_domain.length == (6 + 10) / 2
    assert found.out_of_domain.score == 3 / 6
    assert found.out_of_domain.ways == {"right": 3 / 6, "ramble": 1 / 6, "echo": 0.0, "other": 2 / 6}
    assert found.score_by_task == {"copy": 0.5, "upper": 1, "next": 0, "prev": 0, "swap": 1, "roll": 0.5}
    assert found.samples[0] == ("copy badge>", "badge")


def test_judging_is_seeded_and_leaves_torchs_generator_alone(roles, tokenizer):
    held_out = [Example(tokenizer(e.prompt)["input_ids"], None, None, "test") for e in World(0).held_out(2)]

    def run(seed):
        return judge(
            Candidate("policy", roles["policy"]), roles["sft"], roles["base"], held_out, tokenizer,
            max_completion_length=6, seed=seed,
        )  # fmt: skip

    before = torch.get_rng_state()
    assert run(0) == run(0)
    assert run(0) != run(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_held_out_prompts_decode_to_prompts_of_the_world(tokenizer):
    for task in TASKS:
        prompt = make_prompt(task, "badge")
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
