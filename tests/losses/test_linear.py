"""Losses straight from hidden states: equal to those on materialised logits, in fewer GEMMs, whole where need be."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from srppo import losses
from srppo_kernels import explain, linear_loss

B, T, D, V = 6, 50, 16, 601  # 300 rows: three chunks where a chunk has 128
OLD = ("old", "advantage", "weight")
TOKEN = {
    "ppo": (partial(losses.ppo, entropy_coef=0.02), OLD),
    "dppo": (losses.dppo, OLD),
    "dppo kl": (partial(losses.dppo, divergence="kl"), OLD),
    "cispo": (partial(losses.cispo, clip_low=0.2, clip_high=0.3), OLD),
    "apa": (losses.apa, OLD),
    "reinforce": (losses.reinforce, ("advantage", "weight")),
    "kl_penalty": (partial(losses.kl_penalty, coef=0.3), ("old", "weight")),
    "entropy_bonus": (partial(losses.entropy_bonus, coef=0.3), ("weight",)),
    "grpo": (losses.grpo, OLD),
    "dr_grpo": (losses.dr_grpo, OLD),
    "dapo": (losses.dapo, OLD),
    "sft": (losses.sft, ("weight",)),
    "dft": (losses.dft, ("weight",)),
    "idft": (losses.idft, ("weight",)),
    "implicit_reward": (losses.implicit_reward, ("old", "weight")),
    "exopd": (losses.exopd, ("old", "other", "weight")),
}
WHOLE = {
    "gspo": (partial(losses.gspo, clip_low=0.01, clip_high=0.01), ("old", "row")),
    "poft": (losses.poft, ("row",)),
    "dpo": (losses.dpo, ("old",)),
    "spin": (losses.spin, ("old",)),
    "orpo": (losses.orpo, ()),
    "asft": (losses.asft, ()),
}


class Problem:
    """Hidden states, a head and what losses take; masked rows hold NaN everywhere."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.mask = torch.rand(B, T) > 0.3
        self.mask[1] = False
        self.hidden = torch.randn(B, T, D)
        self.weight = torch.randn(V, D) * 0.5
        self.targets = torch.randint(V, (B, T))
        self.targets[0, :4] = -100
        self.live = self.mask & (self.targets != -100)
        logprob, _ = self.on_logits(self.hidden, self.weight)
        self.tensors = {
            "old": (logprob + 0.3 * torch.randn(B, T)).float(),
            "other": (logprob + 0.3 * torch.randn(B, T)).float(),
            "advantage": torch.randn(B, T),
            "weight": torch.rand(B, T),
            "row": torch.randn(B),
        }
        for value in (self.hidden, *self.tensors.values()):
            if value.shape[:2] == (B, T):
                value[~self.mask] = torch.nan
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    def on_logits(self, hidden, weight):
        """Log-probs and entropies from materialised logits, in float64."""
        hidden = torch.where(self.live[..., None], hidden.double(), 0)
        logp = (hidden @ weight.double().T).log_softmax(-1)
        taken = logp.gather(-1, self.targets.clamp(min=0)[..., None]).squeeze(-1)
        return taken, -(logp.exp() * logp).sum(-1)

    def want(self, loss, names):
        """Loss, gradients and aux from the logits."""
        twins = [t.detach().double().requires_grad_() for t in (self.hidden, self.weight)]
        logprob, entropy = self.on_logits(*twins)
        given = [self.tensors[n].double() for n in names]
        value, aux = loss(logprob, entropy, self.live, *given, normalizer=11.0)
        return value, torch.autograd.grad(value, twins), aux

    def check(self, loss, names, got, aux):
        value, grads, want_aux = self.want(loss, names)
        assert abs(got - value) <= 2e-5 * (1 + abs(value))
        for mine, theirs in zip(torch.autograd.grad(got, [self.hidden, self.weight]), grads, strict=True):
            assert (mine - theirs).abs().max() <= 3e-5 * theirs.abs().max()
        assert aux.keys() == want_aux.keys()
        for name, number in want_aux.items():
            torch.testing.assert_close(aux[name].double(), number.double(), rtol=1e-4, atol=1e-3, msg=name)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def multiply_adds(run) -> int:
    """Of all matrix products in ``run``, those inside custom ops included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    total = 0
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (m, k), (_, n) = [s for s in event.input_shapes if len(s) == 2][-3 if event.name == "aten::mm" else 1 :][:2]
            total += m * k * n
    return total


@pytest.mark.parametrize("name", TOKEN)
@pytest.mark.parametrize("way", ["linear", "linear_loss", "chunks", "recompute"])
def test_token_losses_equal_those_on_logits(name, way):
    loss, names = TOKEN[name]
    p = Problem()
    bound = partial(loss, normalizer=11.0)
    given = [p.tensors[n] for n in names]
    if way == "linear":
        got, aux = losses.linear(bound, p.hidden, p.weight, p.targets, p.mask, *given)
    else:
        more = {"chunks": {"workspace_bytes": 0}, "recompute": {"plan": "recompute"}}.get(way, {})
        got, aux = linear_loss(p.hidden, p.weight, p.targets, bound, p.mask, *given, mask=p.mask, **more)
    assert aux["tokens"] == p.live.sum()
    p.check(loss, names, got, aux)


@pytest.mark.parametrize("name", TOKEN)
def test_token_losses_take_three_gemms_in_chunks_and_explain_says_so(name):
    """Score, dhidden, dweight: what the logits themselves cost. The per-token op without kept logits takes four."""
    loss, names = TOKEN[name]
    p = Problem()
    p.hidden.data.nan_to_num_()
    bound, given = partial(loss, normalizer=11.0), [p.tensors[n] for n in names]
    options = {"workspace_bytes": 0, "backend": "torch"}  # whose GEMMs torch can see
    plan = explain(p.hidden, p.weight, p.targets, bound, op="linear_loss", **options)
    assert (plan.plan, plan.gemms, plan.rows_per_chunk) == ("precompute", 3, 128)
    per_token = explain(p.hidden, p.weight, p.targets, op="linear_logprob", entropy=True, **options)
    assert (per_token.plan, per_token.gemms) == ("recompute", 4)
    frozen = explain(p.hidden, p.weight.detach(), p.targets, bound, op="linear_loss", **options)
    assert (frozen.plan, frozen.gemms) == ("precompute", 2)

    calls = []

    def counted(logprob, *rest):
        calls.append(logprob.shape[0])
        return bound(logprob, *rest)

    with Largest() as seen:
        got, _ = linear_loss(p.hidden, p.weight, p.targets, counted, p.mask, *given, mask=p.mask, **options)
        got.backward()
    assert len(calls) > 1
    assert sum(calls) == B * T
    assert seen.elements < B * T * V


def test_gemms_as_counted():
    """What explain says, counted by the profiler, in units of one product of all rows with the head.

    Logits in memory take three and keep them; the per-token op, under a bound on memory, four; linear_loss three under
    the same bound, and less where rows are masked or get no gradient, as where a group's answers are all as good.
    """
    torch.manual_seed(0)
    rows = 512  # whole blocks, so that padding costs nothing
    # in float64, which no native scan serves: every product is then one that the profiler sees
    hidden, weight = (torch.randn(n, 64, dtype=torch.float64, requires_grad=True) for n in (rows, 2048))
    targets = torch.randint(2048, (rows,))
    every, half = torch.ones(rows).bool(), torch.arange(rows) < rows // 2
    advantages = torch.where(torch.arange(rows) < rows // 4, 1.0, 0.0)
    fn = partial(losses.reinforce, normalizer=rows)

    def fused(mask, advantages, **options):
        options = {"workspace_bytes": 0, "backend": "torch", **options}
        return linear_loss(hidden, weight, targets, fn, mask, advantages, mask=mask, **options)[0]

    def on_logits(mask, advantages):
        logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        return fn(logprob, None, mask, advantages)[0]

    def work(make, *args, **options):
        return multiply_adds(lambda: make(*args, **options).backward()) / (rows * 64 * 2048)

    assert work(on_logits, half, advantages) == pytest.approx(3)
    assert work(fused, every, torch.ones(rows), plan="recompute") == pytest.approx(4)
    assert work(fused, every, torch.ones(rows)) == pytest.approx(3)
    assert work(fused, half, torch.ones(rows)) == pytest.approx(1.5)
    assert work(fused, half, advantages) == pytest.approx(0.5 + 2 * 0.25)

    def on_pairs(mask):
        given = (hidden.view(4, -1, 64), weight, targets.view(4, -1), mask.view(4, -1))
        return losses.linear(partial(losses.orpo, normalizer=2), *given, backend="torch", plan="recompute")[0]

    assert work(on_pairs, every) == pytest.approx(4)
    assert work(on_pairs, torch.arange(rows) % 128 < 64) == pytest.approx(2)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("way", ["linear", "whole, recompute", "whole, cache", "whole, one chunk"])
def test_whole_losses_equal_those_on_logits(name, way):
    loss, names = WHOLE[name]
    p = Problem()
    bound, given = partial(loss, normalizer=11.0), [p.tensors[n] for n in names]
    if way == "linear":
        got, aux = losses.linear(bound, p.hidden, p.weight, p.targets, p.mask, *given)
    else:
        more = {
            "whole, recompute": {"plan": "recompute"},
            "whole, cache": {"plan": "cache", "workspace_bytes": 1 << 30},
            "whole, one chunk": {"workspace_bytes": 1 << 30},
        }[way]
        fn = losses.whole_sequences(bound, p.targets.shape)
        got, aux = linear_loss(p.hidden, p.weight, p.targets, fn, p.mask, *given, mask=p.mask, **more)
    p.check(loss, names, got, aux)


@pytest.mark.parametrize("name", WHOLE)
def test_a_chunk_that_cuts_sequences_is_refused(name):
    loss, names = WHOLE[name]
    p = Problem()
    bound, given = partial(loss, normalizer=11.0), [p.tensors[n] for n in names]
    what = {"sequence": "sequences", "pair": "pairs of sequences"}[losses.level_of(loss)]
    with pytest.raises(ValueError, match=f"{name}: needs whole {what}, .*use srppo.losses.linear"):
        linear_loss(p.hidden, p.weight, p.targets, bound, p.mask, *given, mask=p.mask)
    fn = losses.whole_sequences(bound, p.targets.shape)
    with pytest.raises(ValueError, match=rf"{name}: got \d+ of 300 rows: linear_loss cut.*plan='recompute'"):
        linear_loss(p.hidden, p.weight, p.targets, fn, p.mask, *given, mask=p.mask, workspace_bytes=0)
    flat = (p.hidden.view(-1, D), p.weight, p.targets.view(-1), p.mask.view(-1))
    with pytest.raises(ValueError, match=rf"{name}: needs whole sequences, and targets has shape \(300,\)"):
        losses.linear(bound, *flat, *given)


def test_a_number_a_sequence_does_not_pass_for_one_a_row():
    """With as many sequences as a chunk has rows, each chunk would take the sequences' numbers for its rows'."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(128, 3, D), torch.randn(V, D, requires_grad=True), torch.randint(V, (128, 3))
    mask, advantages = torch.ones(128, 3).bool(), torch.randn(128)
    loss = partial(losses.reinforce, normalizer=384)
    assert explain(hidden, weight, targets, op="linear_loss").rows_per_chunk == 128
    with pytest.raises(ValueError, match=r"advantages has shape \(128,\) but targets.*advantages\[:, None\].expand_as"):
        losses.linear(loss, hidden, weight, targets, mask, advantages)
    losses.linear(loss, hidden, weight, targets, mask, advantages[:, None].expand_as(mask))


def test_sequences_of_one_token():
    """Then a value a sequence has the shape of a value a row, and both still find their place."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 1, D, requires_grad=True), torch.randn(V, D)
    targets, mask, row = torch.randint(V, (4, 1)), torch.ones(4, 1).bool(), torch.randn(4)
    for loss, tensors in ((losses.poft, (row,)), (losses.gspo, (row.abs().neg(), row)), (losses.dpo, (row,))):
        bound = partial(loss, normalizer=4)
        got, _ = linear_loss(hidden, weight, targets, losses.whole_sequences(bound, (4, 1)), mask, *tensors)
        want, _ = losses.linear(bound, hidden, weight, targets, mask, *tensors)
        torch.testing.assert_close(got, want)


def test_linear_without_marks_and_with_head_options():
    """A user's own function counts as token level; options of the head reach it; ignored targets are masked for it."""
    p = Problem()
    seen = []

    def own(logprob, entropy, mask, scale):
        seen.append(mask)
        return (scale * logprob).sum(), {"n": mask.sum()}

    bias = torch.randn(V)
    loss, aux = losses.linear(own, p.hidden, p.weight, p.targets, p.mask, torch.tensor(2.0), bias=bias, temperature=0.7)
    assert losses.level_of(own) == "token"
    assert aux["n"] == p.live.sum()
    assert torch.equal(torch.cat(seen), p.live.view(-1))
    other = p.targets.masked_fill(p.targets == -100, 7)
    _, aux = losses.linear(own, p.hidden, p.weight, other, p.mask, torch.tensor(2.0), ignore_index=7)
    assert aux["n"] == (p.mask & (other != 7)).sum()
    pairs = partial(losses.orpo, normalizer=3)
    colder, _ = losses.linear(pairs, p.hidden, p.weight, p.targets, p.mask, temperature=0.5)
    torch.testing.assert_close(colder, losses.linear(pairs, p.hidden, 2 * p.weight, p.targets, p.mask)[0])
    z = (torch.where(p.live[..., None], p.hidden.double(), 0) @ p.weight.double().T + bias.double()) / 0.7
    want = z.log_softmax(-1).gather(-1, p.targets.clamp(min=0)[..., None]).squeeze(-1)[p.live].sum() * 2
    assert abs(loss - want) < 1e-4 * abs(want)


def test_levels_are_marked():
    for name, (loss, _) in itertools.chain(TOKEN.items(), WHOLE.items()):
        level = "token" if name in TOKEN else "sequence" if name in ("gspo", "poft") else "pair"
        assert losses.level_of(loss) == level
        assert losses.level_of(partial(partial(loss), normalizer=1)) == level


def test_compiled():
    """Traced, a token-level loss goes through the per-token op, with the same values."""
    p = Problem()
    p.hidden.data.nan_to_num_()
    bound = partial(losses.dapo, normalizer=11.0)
    given = [torch.nan_to_num(p.tensors[n]) for n in OLD]
    fn = torch.compile(
        lambda h, w: losses.linear(bound, h, w, p.targets, p.mask, *given)[0], backend="eager", fullgraph=True
    )
    want, grads, _ = p.want(losses.dapo, OLD)
    got = fn(p.hidden, p.weight)
    assert abs(got - want) < 1e-5 * (1 + abs(want))
    for mine, theirs in zip(torch.autograd.grad(got, [p.hidden, p.weight]), grads, strict=True):
        assert (mine - theirs).abs().max() <= 3e-5 * theirs.abs().max()
