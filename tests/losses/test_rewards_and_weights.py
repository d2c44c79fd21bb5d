"""Advantages, rewards and weights that go into the losses: by hand, and by the identities that tie them together."""

from __future__ import annotations

import math

import pytest
import torch
from losses.problems import MASK, batch

from srppo import losses
from srppo_kernels import log_ratio_reward


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    got = losses.group_advantages(rewards, 3, eps=0.0)[:3]
    std = math.sqrt((4 + 1 + 9) / 2)
    torch.testing.assert_close(got, torch.tensor([-2 / std, -1 / std, 3 / std]))
    torch.testing.assert_close(losses.group_advantages(rewards, 3)[0], torch.tensor(-2 / (std + 1e-4)))
    assert losses.group_advantages(rewards, 3)[3:].abs().sum() == 0  # a group of one mind teaches nothing
    assert losses.group_advantages(rewards, 3, scale=False).tolist() == [-2, -1, 3, 0, 0, 0]
    for bad, size in ((rewards, 4), (rewards, 1), (rewards.view(2, 3), 3)):
        with pytest.raises(ValueError, match="no groups of"):
            losses.group_advantages(bad, size)


@pytest.mark.parametrize("group", [2, 3, 12, 64])
def test_equal_rewards_of_any_size_teach_nothing(group):
    """An fp32 mean of equal numbers need not be that number: groups of -312.7613 got advantages of -0.23."""
    rewards = torch.cat([torch.tensor([-312.7613]), 300 * torch.randn(200)]).repeat_interleave(group)
    assert not losses.group_advantages(rewards, group).any()
    close = 1e8 + torch.arange(4, dtype=torch.float64)
    assert losses.group_advantages(close, 4, scale=False).tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_mean_weights_give_means_of_sequences():
    weights = losses.mean_weights(MASK)
    assert weights.sum(-1).tolist() == [1, 1, 0, 1, 1, 1]
    given = batch(("old_logprobs", "advantages"))
    args = (given["logprob"], None, MASK, given["old_logprobs"], given["advantages"])
    rows = [losses.ppo(*(None if t is None else t[i : i + 1] for t in args), normalizer=1)[0] for i in range(6)]
    lengths = MASK.sum(-1).clamp(min=1)
    want = sum(row / n for row, n in zip(rows, lengths, strict=True)) / 6
    torch.testing.assert_close(losses.grpo(*args, normalizer=6)[0], want)
    torch.testing.assert_close(losses.grpo(*args, weights, normalizer=6)[0], want)


def test_importance_weights_by_hand():
    q = [0.1, 0.5, 0.9, 1.5, 2.5, 6.0, 1e12]
    old = torch.log(torch.tensor(q, dtype=torch.float64)).float() - 3
    rollout = torch.full((7,), -3.0)
    mask = torch.ones(7).bool()
    mask[1], rollout[1] = False, math.nan
    tis = losses.tis_weights(old, rollout, mask)
    torch.testing.assert_close(tis, torch.tensor([0.1, 0, 0.9, 1.5, 2, 2, 2]))
    assert losses.tis_weights(old, rollout, mask, low=0.8)[0] == pytest.approx(0.8)
    assert losses.tis_weights(old, rollout, mask, high=math.inf)[-1] == pytest.approx(math.exp(20))  # and no further
    torch.testing.assert_close(losses.icepop_weights(old, rollout, mask), torch.tensor([0, 0, 0.9, 1.5, 2.5, 0, 0]))
    unknown = rollout.masked_fill(torch.arange(7) == 3, math.nan)
    for function in (losses.tis_weights, losses.icepop_weights):
        assert function(old, unknown, mask).isnan().nonzero().tolist() == [[3]]
    given = old.clone().requires_grad_()
    for function in (losses.tis_weights, losses.icepop_weights):
        assert not function(given, rollout, mask).requires_grad
        with pytest.raises(ValueError, match="rollout_logprobs is missing; it is the log-probs that the sampler"):
            function(old, None, mask)
        with pytest.raises(ValueError, match="0 <= low <= high"):
            function(old, rollout, mask, low=3.0, high=2.0)
        with pytest.raises(ValueError, match="rollout_logprobs has shape"):
            function(old, rollout[:3], mask)


def test_a_weight_multiplies_a_tokens_loss():
    given = batch(("old_logprobs", "advantages", "weights"), spread=0.6)
    args = (given["logprob"], None, MASK, given["old_logprobs"], given["advantages"])
    for loss in (losses.ppo, losses.cispo, losses.dppo):
        want = 0.0
        for place in map(tuple, MASK.nonzero().tolist()):
            only = torch.zeros_like(MASK)
            only[place] = True
            alone, _ = loss(args[0], None, only, *args[3:], normalizer=1)
            want += float(given["weights"][place]) * float(alone)
        assert float(loss(*args, given["weights"], normalizer=1)[0]) == pytest.approx(want, rel=1e-4)


def test_exopd_is_token_level_self_rewarding_ppo():
    """With the SFT model as teacher: lam times (self-reward minus beta KL to the base), beta = 1 / lam."""
    names = ("teacher_logprobs", "base_logprobs")
    given = batch(names, spread=1.0)
    lam = 1.25
    got = losses.exopd_advantages(given["logprob"], given[names[0]], given[names[1]], MASK)
    reward = log_ratio_reward(
        given[names[0]], given[names[1]], MASK, placement="token", logprobs_policy=given["logprob"],
        logprobs_ref=given[names[1]], kl_coef=1 / lam,
    )  # fmt: skip
    torch.testing.assert_close(got, lam * reward, rtol=1e-5, atol=1e-5)
    assert got[~MASK].abs().sum() == 0
    # lam = 1 is on-policy distillation: the base drops out
    plain = losses.exopd_advantages(given["logprob"], given[names[0]], given[names[1]], MASK, lam=1.0)
    torch.testing.assert_close(plain[MASK], (given[names[0]] - given["logprob"])[MASK], rtol=1e-5, atol=1e-5)


def test_dense_path_returns_are_sums_of_what_follows():
    given = batch(("sft_logprobs", "ref_logprobs"), spread=12.0)
    sft, ref = given["sft_logprobs"], given["ref_logprobs"]
    got = losses.dense_path_returns(sft.clone().requires_grad_(), ref, MASK, gamma=0.9)
    assert not got.requires_grad
    rewards = losses.dense_path_rewards(sft, ref, MASK)
    torch.testing.assert_close(losses.dense_path_returns(sft, ref, MASK)[0, 0], rewards[0].sum())
    for row in range(6):
        places = MASK[row].nonzero().flatten().tolist()
        follow = 0.0
        for t in reversed(places):
            assert float(rewards[row, t]) == pytest.approx(float(sft[row, t]) - float(ref[row, t]), abs=1e-5)
            follow = float(sft[row, t]) - float(ref[row, t]) + 0.9 * follow
            assert float(got[row, t]) == pytest.approx(follow, rel=1e-5, abs=1e-5)
    assert got[~MASK].abs().sum() == 0
