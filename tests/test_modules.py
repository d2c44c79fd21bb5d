"""The ops as modules: equal to the ops and to torch's own criteria, by weight or by nn.Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import srppo
from srppo import modules
from srppo.modules import LinearCrossEntropy, LinearLogprob, LinearPPOLoss

B, T, D, V = 3, 7, 16, 101


@pytest.fixture
def given():
    hidden = torch.randn(B, T, D, requires_grad=True)
    head = nn.Linear(D, V)
    targets = torch.randint(V, (B, T))
    targets[0, :3] = -100
    return hidden, head, targets


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, head.weight, head.bias])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(given, reduction):
    hidden, head, targets = given
    want = nn.CrossEntropyLoss(reduction=reduction)(head(hidden).view(-1, V), targets.view(-1))
    got = LinearCrossEntropy(reduction=reduction)(hidden, head, targets)
    want = want.view(B, T) if reduction == "none" else want
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(got.sum(), *given[:2]), gradients(want.sum(), *given[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    by_weight = LinearCrossEntropy(reduction=reduction)(hidden, head.weight, targets, bias=head.bias)
    assert torch.equal(by_weight, got)


def test_cross_entropy_with_mask_and_normalizer(given):
    hidden, head, targets = given
    mask = torch.rand(B, T) > 0.4
    live = mask & (targets != -100)
    each = -head(hidden).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    total = each[live].sum()
    criterion = LinearCrossEntropy()
    torch.testing.assert_close(criterion(hidden, head, targets, mask=mask), total / live.sum())
    for normalizer in (40, 40.0, torch.tensor(40)):  # num_items_in_batch of several micro-batches
        got = criterion(hidden, head, targets, mask=mask, normalizer=normalizer)
        torch.testing.assert_close(got, total / 40)
    other = LinearCrossEntropy(ignore_index=7)(hidden, head, targets.masked_fill(targets == -100, 7), mask=mask)
    live = mask & (targets != -100) & (targets != 7)
    torch.testing.assert_close(other, each[live].sum() / live.sum())
    nothing = criterion(hidden, head, targets, mask=torch.zeros_like(mask))
    assert nothing == 0
    assert all(g.abs().sum() == 0 for g in gradients(nothing, hidden, head))


def test_logprob_and_head_options(given):
    hidden, head, targets = given
    out = LinearLogprob(entropy=True, lse=True, temperature=0.5, softcap=3.0)(hidden, head, targets)
    z = 3 * torch.tanh(head(hidden) / 3) / 0.5
    logp = z.log_softmax(-1)
    live = targets != -100
    want = logp.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(out.logprob, torch.where(live, want, 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.entropy, torch.where(live, -(logp.exp() * logp).sum(-1), 0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.lse, torch.where(live, z.logsumexp(-1), 0), rtol=1e-4, atol=1e-4)
    assert isinstance(out, srppo.LinearLogprob)  # the named tuple keeps its name at the top
    for name in ("entropy", "lse"):
        one = LinearLogprob(**{name: True})(hidden, head, targets)
        assert [getattr(one, n) is not None for n in ("entropy", "lse")] == [name == "entropy", name == "lse"]


def test_ppo_loss(given):
    hidden, head, targets = given
    mask = targets != -100
    old = LinearLogprob()(hidden, head, targets).logprob.detach() + 0.3 * torch.randn(B, T)
    advantages = torch.randn(B, T)
    options = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.4, "entropy_coef": 0.02}
    got, stats = LinearPPOLoss(**options)(hidden, head, targets, old, advantages, mask, normalizer=9.0)
    logp = head(hidden).log_softmax(-1)
    taken = logp.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    want, _ = srppo.ppo_loss(taken, old, advantages, mask, entropy=entropy, normalizer=9.0, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for a, b in zip(gradients(got, hidden, head), gradients(want, hidden, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert stats.count == mask.sum()


def test_every_option_of_the_head_reaches_the_op(given, monkeypatch):
    hidden, head, targets = given
    seen, options = [], {"ignore_index": 3, "temperature": 0.5, "logit_scale": 2.0, "softcap": 9.0, "plan": "recompute",
                         "workspace_bytes": 5, "backend": "torch", "group": "a group"}  # fmt: skip
    for name in ("linear_logprob", "linear_loss", "linear_ppo_loss"):
        monkeypatch.setattr(modules, name, lambda *_, **given: seen.append(given) or (None, None))
    LinearLogprob(**options)(hidden, head, targets)
    LinearCrossEntropy(**options)(hidden, head, targets)
    LinearPPOLoss(**options)(hidden, head, targets, targets.float(), targets.float(), targets > 0)
    for given in seen:
        assert {name: given[name] for name in options} == options
        assert given["bias"] is head.bias
    assert len(seen) == 3


def test_they_hold_no_parameters_and_show_their_options():
    modules = [
        LinearCrossEntropy(reduction="sum", ignore_index=0),
        LinearLogprob(entropy=True),
        LinearPPOLoss(softcap=9.0),
    ]
    assert all(not list(m.parameters()) and not m.state_dict() for m in modules)
    assert [str(m) for m in modules] == [
        "LinearCrossEntropy(ignore_index=0, reduction='sum')",
        "LinearLogprob(entropy=True)",
        "LinearPPOLoss(softcap=9.0)",
    ]


def test_wrong_use_is_refused_in_words(given):
    hidden, head, targets = given
    for call, error, text in (
        (lambda: LinearCrossEntropy(reduction="batchmean"), ValueError, "reduction='batchmean' is unknown"),
        (lambda: LinearCrossEntropy()(hidden, nn.Sequential(head), targets), TypeError, "must be an nn.Linear or its"),
        (
            lambda: LinearCrossEntropy()(hidden, Scaled(D, V), targets),
            TypeError,
            r"an nn.Linear or .*modules\.Scaled: merge",
        ),
        (lambda: LinearLogprob()(hidden, head, targets, bias=head.bias), ValueError, "brings its own"),
        (lambda: LinearCrossEntropy(reduction="sum")(hidden, head, targets, normalizer=3), ValueError, "goes with"),
        (lambda: LinearCrossEntropy()(hidden, head, targets[:2]), ValueError, "targets"),
        (lambda: LinearCrossEntropy()(hidden, head, targets, mask=torch.ones(B).bool()), ValueError, "mask"),
        (lambda: LinearCrossEntropy()(hidden, head, targets, mask=torch.ones(B, T)), TypeError, "mask has dtype"),
        (lambda: LinearCrossEntropy()(hidden, head, targets.tolist()), TypeError, "targets must be a tensor, got list"),
    ):
        with pytest.raises(error, match=text):
            call()


class Scaled(nn.Linear):
    """A head that is more than its weight and bias."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_import_is_light():
    import subprocess
    import sys

    code = (
        "import sys, srppo; srppo.losses.ppo, srppo.modules.LinearLogprob, srppo.losses.level_of\n"
        "import srppo.losses.sapo, srppo.losses.sgpo\n"
        "heavy = [m for m in ('transformers', 'peft', 'datasets', 'trl', 'triton') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
