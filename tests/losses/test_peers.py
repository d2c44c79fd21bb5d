"""Our losses against the implementations that people trust: TRL's GRPO family and DPO, Liger's chunked losses.

TRL's loss methods are called as they are, on a stand-in for the trainer that hands them our log-probs, so every line of
their arithmetic runs and no model does. Liger's are called on hidden states and a head.
"""

from __future__ import annotations

import os
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from inspect import signature
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from srppo import losses
from srppo_kernels import linear_logprob

B, T, D, V, LONGEST = 4, 9, 12, 83, 16


@pytest.fixture
def given():
    """Log-probs, entropies, old and reference log-probs, advantages per sequence; every sequence has tokens."""
    torch.manual_seed(0)
    mask = torch.rand(B, T) > 0.3
    mask[:, 0] = True
    logprob = (-2 * torch.rand(B, T)).requires_grad_()
    old, ref = (logprob.detach() + 0.4 * torch.randn(B, T) for _ in range(2))
    rollout = old + 0.3 * torch.randn(B, T)
    entropy = torch.rand(B, T)
    return SimpleNamespace(
        mask=mask, logprob=logprob, old=old, ref=ref, rollout=rollout, entropy=entropy,
        advantages=torch.tensor([1.3, -0.8, 0.4, -1.1]),
    )  # fmt: skip


def agree(ours, theirs, inputs, rtol=2e-6):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-6)
    assert theirs.abs() > 1e-3
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


# -- TRL --------------------------------------------------------------------------------------------------------------


class Accelerator:
    """One process: gathering and reducing change nothing."""

    device, num_processes, sync_gradients = torch.device("cpu"), 1, True

    def gather(self, tensor):
        return tensor

    def gather_for_metrics(self, tensor):
        return tensor

    def reduce(self, tensor, reduction=None):
        return tensor


def on_stand_in(method, stand_in, *args, **options):
    """A trainer's method; another version of TRL may read what the stand-in, made for 1.16, does not have."""
    try:
        return method(stand_in, *args, **options)
    except (AttributeError, KeyError) as error:
        if version("trl").startswith("1.16."):
            raise
        pytest.skip(f"this TRL, {version('trl')}, reads more of its trainer than the stand-in has: {error}")


def trl_grpo(given, *, loss_type, level="token", epsilon=(0.2, 0.2), beta=0.0, importance=None, delta=None):
    """TRL's ``GRPOTrainer._compute_loss`` with these settings."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")
    of_tokens = grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies
    third = (None,) if "compute_aux_loss" in signature(of_tokens).parameters else ()  # since 1.7
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (given.logprob, given.entropy, *third),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, beta=beta, loss_type=loss_type,
        epsilon_low=epsilon[0], epsilon_high=epsilon[1],
        use_vllm=importance is not None, vllm_importance_sampling_correction=True, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST, accelerator=Accelerator(),
        args=SimpleNamespace(delta=delta, steps_per_generation=1, use_bias_correction_kl=False),
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids, "completion_mask": given.mask.int(),
        "advantages": given.advantages, "old_per_token_logps": given.old, "ref_per_token_logps": given.ref,
        "num_items_in_batch": given.mask.sum(), "importance_sampling_ratio": importance,
    }  # fmt: skip
    return on_stand_in(grpo_trainer.GRPOTrainer._compute_loss, stand_in, None, inputs)


def per_token(given):
    return given.logprob, None, given.mask, given.old, given.advantages[:, None].expand(B, T)


def test_trl_grpo(given):
    agree(losses.grpo(*per_token(given), normalizer=B)[0], trl_grpo(given, loss_type="grpo"), [given.logprob])


def test_trl_grpo_with_kl_and_a_correction_for_the_sampler(given):
    tis = losses.tis_weights(given.old, given.rollout, given.mask, high=1.1)
    mean = losses.mean_weights(given.mask)
    ours, _ = losses.grpo(*per_token(given), mean * tis, normalizer=B)
    penalty, _ = losses.kl_penalty(given.logprob, None, given.mask, given.ref, mean, normalizer=B, coef=0.3)
    ratio = (given.old - given.rollout).exp().clamp(max=1.1)
    agree(ours + penalty, trl_grpo(given, loss_type="grpo", beta=0.3, importance=ratio), [given.logprob])


def test_trl_dr_grpo(given):
    ours, _ = losses.dr_grpo(*per_token(given), normalizer=B * LONGEST)
    agree(ours, trl_grpo(given, loss_type="dr_grpo"), [given.logprob])


def test_trl_dapo(given):
    ours, _ = losses.dapo(*per_token(given), normalizer=given.mask.sum())
    agree(ours, trl_grpo(given, loss_type="dapo", epsilon=(0.2, 0.28)), [given.logprob])


def test_trl_ppo_as_its_bnpo_with_a_dual_clip(given):
    """TRL's delta bounds the ratio of tokens with a negative advantage: the dual clip of PPO."""
    ours, _ = losses.ppo(*per_token(given), normalizer=given.mask.sum(), dual_clip=1.3)
    agree(ours, trl_grpo(given, loss_type="bnpo", delta=1.3), [given.logprob])


def test_trl_cispo(given):
    ours, _ = losses.cispo(*per_token(given), normalizer=given.mask.sum(), clip_low=1.0, clip_high=0.2)
    agree(ours, trl_grpo(given, loss_type="cispo", epsilon=(0.2, 1.2)), [given.logprob])


def test_trl_gspo(given):
    low, high = 0.02, 0.03
    ours, _ = losses.gspo(
        given.logprob, None, given.mask, given.old, given.advantages, normalizer=B, clip_low=low, clip_high=high
    )
    agree(ours, trl_grpo(given, loss_type="grpo", level="sequence", epsilon=(low, high)), [given.logprob])


def test_trl_dpo(given):
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
    shown = torch.where(given.mask, given.logprob, 0)
    reference = torch.where(given.mask, given.ref, 0).sum(-1)
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=0.2,
        label_smoothing=0.0, use_weighting=False, args=SimpleNamespace(), _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    mask = torch.cat([torch.zeros(B, 1, dtype=torch.bool), given.mask], 1).int()
    inputs = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long), "attention_mask": torch.ones(B, T + 1, dtype=torch.long),
        "completion_mask": mask, "ref_chosen_logps": reference[: B // 2], "ref_rejected_logps": reference[B // 2 :],
    }  # fmt: skip

    def model(**_):
        nothing = torch.zeros(B, T)  # what only its metrics read
        return SimpleNamespace(log_probs=shown, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    theirs = on_stand_in(dpo_trainer.DPOTrainer._compute_loss, stand_in, model, inputs, return_outputs=False)
    ours, _ = losses.dpo(given.logprob, None, given.mask, given.ref, normalizer=B // 2, beta=0.2)
    agree(ours, theirs, [given.logprob])


def test_trl_orpo_odds_ratio(given):
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="trl has no ORPO trainer here")
    lengths = given.mask.sum(-1)
    means = torch.where(given.mask, given.logprob, 0).sum(-1) / lengths
    stand_in = SimpleNamespace(beta=0.1, accelerator=Accelerator())
    theirs = on_stand_in(orpo_trainer.ORPOTrainer.odds_ratio_loss, stand_in, means[: B // 2], means[B // 2 :])[0]
    ours, aux = losses.orpo(given.logprob, None, given.mask, normalizer=B // 2, weight=0.1)
    agree(ours, -means[: B // 2].mean() - theirs.mean(), [given.logprob])
    assert aux["nll"] == pytest.approx(-means[: B // 2].sum().item(), rel=1e-6)


# -- Liger ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def head():
    torch.manual_seed(1)
    hidden, weight = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(B, T, D), torch.randn(V, D)
    targets = torch.randint(V, (B, T))
    mask = torch.rand(B, T) > 0.3
    mask[:, 0] = True
    return SimpleNamespace(
        hidden=hidden, weight=weight, targets=targets, mask=mask, ref_hidden=ref_hidden, ref_weight=ref_weight
    )


def liger(name, **options):
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    return getattr(chunked, f"LigerFusedLinear{name}Loss")(compiled=False, **options)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_liger_dpo(head, beta):
    labels = head.targets.masked_fill(~head.mask, -100)
    theirs = liger("DPO", beta=beta, compute_nll_loss=False, average_log_prob=False)(
        head.weight, head.hidden, labels, ref_input=head.ref_hidden, ref_weight=head.ref_weight
    )[0]
    ref = linear_logprob(head.ref_hidden, head.ref_weight, head.targets, mask=head.mask).logprob
    fn = partial(losses.dpo, beta=beta, normalizer=B // 2)
    ours, _ = losses.linear(fn, head.hidden, head.weight, head.targets, head.mask, ref)
    agree(ours, theirs, [head.hidden, head.weight], rtol=3e-5)


def test_liger_orpo(head):
    """Liger's NLL is a mean over the batch's tokens and ours over each sequence's: equal with equal lengths."""
    mask = torch.ones(B, T).bool()
    theirs = liger("ORPO", beta=0.1)(head.weight, head.hidden, head.targets)[0]
    fn = partial(losses.orpo, weight=0.1, normalizer=B // 2)
    ours, _ = losses.linear(fn, head.hidden, head.weight, head.targets, mask)
    agree(ours, theirs, [head.hidden, head.weight], rtol=3e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_liger_grpo(head, loss_type):
    options = {"loss_type": loss_type, "use_ref_model": False, "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28}
    advantages = torch.tensor([1.3, -0.8, 0.4, -1.1])
    old = linear_logprob(head.hidden.detach(), head.weight.detach(), head.targets).logprob + 0.4 * torch.randn(B, T)
    token, whole = (old, advantages[:, None].expand(B, T).contiguous()), (old, advantages)
    clip = {"clip_low": 0.2, "clip_high": 0.28}
    if loss_type == "gspo":
        options |= {"loss_type": "grpo", "importance_sampling_level": "sequence"}
        fn, tensors = partial(losses.gspo, normalizer=B, **clip), whole
    elif loss_type == "grpo":
        fn, tensors = partial(losses.grpo, normalizer=B, **clip), (*token, losses.mean_weights(head.mask))
    elif loss_type == "dr_grpo":
        options |= {"max_completion_length": LONGEST}
        fn, tensors = partial(losses.dr_grpo, normalizer=B * LONGEST, **clip), token
    elif loss_type == "dapo":
        fn, tensors = partial(losses.dapo, normalizer=head.mask.sum()), token
    else:
        options |= {"epsilon_high": 1.28}
        fn, tensors = partial(losses.cispo, normalizer=head.mask.sum(), clip_high=0.28), token
    theirs = liger("GRPO", **options)(
        head.hidden, head.weight, head.targets, head.mask.float(), advantages, old_per_token_logps=old
    )[0]
    ours, _ = losses.linear(fn, head.hidden, head.weight, head.targets, head.mask, *tensors)
    agree(ours, theirs, [head.hidden, head.weight], rtol=3e-5)
