"""Masks, shapes, strides, row bits, retain_graph: what may and may not change a row."""

import pytest
import torch
from linear_logprob.head_problems import BACKENDS, make, relative

from srppo_kernels import linear_log_ratio, linear_logprob, linear_loss, linear_ppo_loss
from srppo_kernels.linear_logprob.rows import Rows

BIG = 1 << 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
def test_masked_rows_are_alone(plan, backend):
    """NaN and inf in masked rows stay there; masked and ignored rows give 0 and get 0."""
    p = make("random", grad=(True, plan != "precompute"))
    mask = torch.rand(150) > 0.4
    p.targets[torch.rand(150) > 0.8] = -100
    live = mask & (p.targets != -100)
    clean = p.hidden.detach().clone()
    with torch.no_grad():
        p.hidden[~live] = torch.nan
        p.hidden[(~live).nonzero()[0]] = torch.inf
    p.targets[(~mask).nonzero()[:3, 0]] = 10**6  # a masked target is not looked at
    got = p.run(mask=mask, lse=True, plan=plan, workspace_bytes=BIG, backend=backend)
    upstream = torch.where(live, torch.rand(150), torch.nan)  # nor is its upstream gradient
    gradients = torch.autograd.grad(got.logprob, p.inputs(), upstream)
    assert (got.logprob[~live] == 0).all()
    assert (got.lse[~live] == 0).all()
    assert (gradients[0][~live] == 0).all()
    assert all(g.isfinite().all() for g in gradients)
    alone = make("random", grad=(True, plan != "precompute"))
    alone.hidden, alone.weight = clean[live].requires_grad_(), p.weight
    alone.targets = p.targets[live]
    some = alone.run(lse=True, plan=plan, workspace_bytes=BIG, backend=backend)
    assert torch.equal(some.logprob, got.logprob[live])
    for a, b in zip(torch.autograd.grad(some.logprob, alone.inputs(), upstream[live]), gradients, strict=True):
        assert relative(a, b[live].double() if b.shape[0] == 150 else b.double()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [40, 576])
def test_row_bits(d, dtype, backend):
    """verl 2088, 6280: a row's bits alone, batched, permuted, masked, scored, trained, run to run."""
    p = make("random", n=300, d=d, dtype=dtype, v=4500)
    batched = p.run(entropy=True, lse=True, backend=backend, plan="score")
    again = p.run(entropy=True, lse=True, backend=backend, plan="score")
    order = torch.randperm(300)
    permuted = linear_logprob(
        p.hidden[order], p.weight, p.targets[order], entropy=True, lse=True, backend=backend, plan="score"
    )
    trained = {
        plan: p.run(entropy=True, lse=True, backend=backend, plan=plan, workspace_bytes=BIG)
        for plan in ("recompute", "cache")
    }
    frozen = linear_logprob(p.hidden, p.weight.detach(), p.targets, lse=True, backend=backend, plan="precompute")
    mask = torch.rand(300) > 0.5
    masked = p.run(entropy=True, lse=True, mask=mask, backend=backend)
    for i, whole in enumerate(batched):
        assert torch.equal(whole, again[i])
        assert torch.equal(whole[order], permuted[i])
        assert torch.equal(whole[mask], masked[i][mask])
        for plan, result in trained.items():
            assert torch.equal(whole, result[i]), plan
    assert torch.equal(batched.logprob, frozen.logprob)
    for row in (0, 127, 128, 299):
        one = linear_logprob(p.hidden[row], p.weight, p.targets[row], entropy=True, backend=backend)
        assert torch.equal(one.logprob, batched.logprob[row])
        assert torch.equal(one.entropy, batched.entropy[row])
    few = linear_logprob(p.hidden[100:140], p.weight, p.targets[100:140], backend=backend)
    assert torch.equal(few.logprob, batched.logprob[100:140])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ratio_of_an_unchanged_model_is_one(backend):
    """Scored, then trained in chunks: every ratio is exactly 1 and every KL exactly 0."""
    p = make("random", n=300)
    old = p.run(plan="score", backend=backend).logprob
    mask = torch.rand(300) > 0.2
    _, stats = linear_ppo_loss(
        p.hidden, p.weight, p.targets, old, torch.randn(300), mask, workspace_bytes=0, backend=backend
    )
    assert stats.ratio_max == 1
    assert stats.ratio_mean == 1
    assert stats.approx_kl == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_ratio(backend):
    """Exactly 0 for equal models in equal or other memory; else the difference in float64."""
    p = make("random", dtype=torch.bfloat16, bias=True)
    q = make("random", dtype=torch.bfloat16, d=24)
    h, w, b = p.hidden.detach(), p.weight.detach(), p.options["bias"].detach()
    copies = (h.clone(), torch.cat([w.new_zeros(1, w.shape[1]), w])[1:], b.clone())
    zero = linear_log_ratio(h, w, *copies[:2], p.targets, bias_sft=b, bias_base=copies[2], backend=backend)
    assert (zero == 0).all()
    mask = torch.rand(150) > 0.5
    got = linear_log_ratio(h, w, q.hidden, q.weight, p.targets, bias_sft=b, mask=mask, temperature=0.7, backend=backend)
    p.options["temperature"] = q.options["temperature"] = 0.7
    q.targets = p.targets
    want = p.double().oracle()[0] - q.double().oracle()[0]
    assert (got - torch.where(mask, want, 0)).abs().max() < 2e-5
    (dhidden,) = torch.autograd.grad(got.sum(), [q.hidden])
    assert (dhidden[~mask] == 0).all()
    assert dhidden[mask].abs().sum() > 0


def test_log_ratio_of_equal_models_has_the_gradients_of_both():
    """A policy that starts as its reference has ratio 0 everywhere, and must be able to leave it."""
    p = make("random", n=20, v=90)
    bias = torch.zeros(90)
    bias[p.targets[0]] = -torch.inf  # ruled out by both
    twins = [p.hidden.detach().clone().requires_grad_() for _ in range(2)]
    ratio = linear_log_ratio(twins[0], p.weight, twins[1], p.weight, p.targets, bias_sft=bias, bias_base=bias)
    assert (ratio == 0).all()
    logprob = linear_logprob(p.hidden, p.weight, p.targets, bias=bias).logprob
    (want,) = torch.autograd.grad(logprob.sum(), [p.hidden])
    assert want.abs().sum() > 0
    for got, sign in zip(torch.autograd.grad(ratio.sum(), twins), (1, -1), strict=True):
        torch.testing.assert_close(got, sign * want)


def test_grad_weight_out_of_a_head_in_float64_keeps_its_digits():
    p = make("random", n=20, v=90).double()
    buffer = torch.ones_like(p.weight, requires_grad=False)
    linear_logprob(p.hidden, p.weight, p.targets, grad_weight_out=buffer).logprob.sum().backward()
    assert p.weight.grad is None
    logprob = (p.hidden @ p.weight.T).log_softmax(-1).gather(1, p.targets[:, None])
    (want,) = torch.autograd.grad(logprob.sum(), [p.weight])
    torch.testing.assert_close(buffer - 1, want, rtol=1e-12, atol=1e-12)


def test_log_ratio_of_what_both_models_rule_out_is_zero_and_of_what_one_does_is_not():
    """With the reference alone such a log-prob is -inf, and the difference of two no number."""
    p = make("random", n=20, v=90)
    out = torch.zeros(90)
    out[p.targets[0]] = -torch.inf
    ratio = {
        (sft, base): linear_log_ratio(
            p.hidden, p.weight, p.hidden, p.weight, p.targets,
            bias_sft=out if sft else None, bias_base=out if base else None, backend="reference",
        )
        for sft, base in ((True, True), (True, False), (False, True))
    }  # fmt: skip
    assert (ratio[True, True] == 0).all()
    assert ratio[True, False][0] == -torch.inf
    assert ratio[False, True][0] == torch.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_strides_and_targets(backend):
    """flash-attn, Liger 1304: any leading dimensions, int32, misaligned and strided targets, strided inputs."""
    p = make("random", n=120, d=24)
    want = p.run(backend=backend, entropy=True)
    for shape in ((120,), (4, 30), (2, 3, 20), (120, 1)):
        got = linear_logprob(p.hidden.view(*shape, 24), p.weight, p.targets.view(shape), backend=backend, entropy=True)
        assert got.logprob.shape == shape
        assert torch.equal(got.logprob.reshape(-1), want.logprob)
        assert torch.equal(got.entropy.reshape(-1), want.entropy)
    misaligned = torch.cat([torch.zeros(1, dtype=torch.int32), p.targets.int()])[1:]
    strided = torch.stack([p.targets, p.targets * 0], 1)[:, 0]
    for targets in (misaligned, strided):
        assert torch.equal(linear_logprob(p.hidden, p.weight, targets, backend=backend).logprob, want.logprob)
    odd = torch.cat([p.hidden.detach(), torch.zeros(120, 3)], 1)[:, :24].requires_grad_()
    transposed = p.weight.detach().T.contiguous().T.requires_grad_()
    every_other = torch.stack([p.weight.detach(), p.weight.detach() * 0], 1)[:, 0].requires_grad_()
    g = torch.autograd.grad(want.logprob.sum(), p.inputs())
    for hidden, weight in ((odd, p.weight), (p.hidden, transposed), (p.hidden, every_other)):
        got = linear_logprob(hidden, weight, p.targets, backend=backend)
        assert (got.logprob - want.logprob).abs().max() < 5e-6
        for a, b in zip(torch.autograd.grad(got.logprob.sum(), [hidden, weight]), g, strict=True):
            assert relative(a, b.double()) < 1e-6


@pytest.mark.parametrize("d", [24, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_stored_by_columns(dtype, d):
    """In blocks, whose dhidden adds up unrounded: the product that does so takes rows alone."""
    p = make("random", n=150, d=d, v=4200, dtype=dtype)
    by_columns = p.weight.detach().T.contiguous().as_strided((4200, d), (1, 4200)).requires_grad_()
    want, got = (
        torch.autograd.grad(
            linear_logprob(p.hidden, w, p.targets, plan="recompute", workspace_bytes=0).logprob.sum(), [p.hidden, w]
        )
        for w in (p.weight, by_columns)
    )
    for a, b in zip(got, want, strict=True):
        assert relative(a, b.double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n, backend):
    p = make("random", n=n, d=8, v=50)
    for plan in ("recompute", "cache"):
        got = p.run(entropy=True, lse=True, plan=plan, workspace_bytes=BIG, backend=backend)
        assert got.logprob.shape == (n,)
        for g in torch.autograd.grad(got.logprob.sum() + got.entropy.sum(), p.inputs()):
            assert g.isfinite().all()
    frozen = linear_logprob(p.hidden, p.weight.detach(), p.targets, backend=backend)
    assert torch.autograd.grad(frozen.logprob.sum(), [p.hidden])[0].shape == (n, 8)
    apart = torch.zeros(n, 16)[:, ::2]  # contiguous() leaves it as it is where there are no rows
    assert linear_logprob(apart, p.weight, p.targets, backend=backend).logprob.shape == (n,)
    want = p.run(backend=backend).logprob.detach().sum()
    for plan in ("score", "precompute", "recompute"):
        options = {"plan": plan, "backend": backend}
        assert linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}), **options)[0] == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_masked(backend):
    p = make("random", n=20, d=8, v=50)
    mask = torch.zeros(20, dtype=torch.bool)
    with torch.no_grad():
        p.hidden.fill_(torch.nan)
    got = p.run(mask=mask, entropy=True, backend=backend)
    assert (got.logprob == 0).all()
    assert (got.entropy == 0).all()
    for g in torch.autograd.grad(got.logprob.sum(), p.inputs()):
        assert (g == 0).all()
    loss, stats = linear_ppo_loss(p.hidden, p.weight, p.targets, got.logprob, got.logprob, mask, backend=backend)
    assert loss == 0
    assert stats.ratio_mean == 0
    for g in torch.autograd.grad(loss, p.inputs()):
        assert (g == 0).all()


@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
def test_rows_that_cannot_be_dropped(plan, monkeypatch):
    """The form for devices that must not wait for a count: masked rows are computed, on zeros, and reach nobody."""
    p = make("random", bias=True, grad=(True, plan != "precompute"))
    with torch.no_grad():
        p.options["bias"][::2] = 200.0  # its exponential is infinite
    p.options["mask"] = mask = torch.rand(150) > 0.4
    p.options["temperature"] = torch.where(mask, torch.rand(150) + 0.5, torch.nan)
    with torch.no_grad():
        p.hidden[~mask] = torch.nan
    old, advantages = torch.where(mask, -5.0, torch.nan), torch.where(mask, torch.randn(150), torch.inf)
    upstream = torch.where(mask, torch.rand(150), torch.nan)

    def both():
        out = p.run(plan=plan, workspace_bytes=BIG, backend="torch", entropy=plan != "precompute")
        total = out.logprob if out.entropy is None else out.logprob + 0.3 * out.entropy
        gradients = torch.autograd.grad(total, p.inputs(), upstream)
        loss, _ = linear_ppo_loss(
            p.hidden, p.weight, p.targets, old, advantages, mask, bias=p.options["bias"],
            temperature=p.options["temperature"], entropy_coef=0.1, workspace_bytes=0, backend="torch",
        )  # fmt: skip
        return [out.logprob, *gradients, loss, *torch.autograd.grad(loss, p.inputs())]

    dropped = both()
    monkeypatch.setattr(Rows, "of", staticmethod(lambda live, **_: Rows(0, live.shape[0], live=live)))
    for a, b in zip(both(), dropped, strict=True):
        assert a.isfinite().all()
        assert relative(a.detach(), b.detach().double()) < 1e-6


@pytest.mark.parametrize("v", [1, 2, 17, 2047, 2048, 2049, 4097])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_sizes(v, backend):
    p = make("random", n=9, d=5, v=v)
    p.targets[:7] = torch.tensor([0, 1, 2046, 2047, 2048, 2049, v - 1]).clamp(max=v - 1)  # around a group's end, too
    twin = p.double()
    got = p.run(entropy=True, lse=True, backend=backend)
    oracle = twin.oracle()
    for a, b in zip(got, oracle, strict=True):
        assert (a - b).abs().max() < 5e-6
    want = torch.autograd.grad(oracle[0].sum() + oracle[1].sum(), twin.inputs())
    for a, b in zip(torch.autograd.grad(got.logprob.sum() + got.entropy.sum(), p.inputs()), want, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
def test_backward_twice(plan):
    """QuACK 209: retain_graph gives the same again, and inputs are as they were."""
    p = make("random", grad=(True, plan != "precompute"), softcap=5.0, mask=torch.rand(150) > 0.3)
    before = [t.detach().clone() for t in p.inputs()]
    out = p.run(plan=plan, workspace_bytes=BIG)
    loss = (out.logprob * torch.linspace(-1, 1, 150)).sum()
    first = torch.autograd.grad(loss, p.inputs(), retain_graph=True)
    second = torch.autograd.grad(loss, p.inputs())
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for t, b in zip(p.inputs(), before, strict=True):
        assert torch.equal(t, b)


def test_zero_gradient_rows_are_free(monkeypatch):
    """A row with no upstream gradient enters no backward GEMM: clipped tokens cost nothing. Nor does the entropy of a
    loss that has none."""
    from srppo_kernels.linear_logprob import backward

    seen = []
    original = backward.over_groups
    monkeypatch.setattr(
        backward, "over_groups", lambda *arguments: (seen.append(arguments[3:5]), original(*arguments))[1]
    )
    p = make("random", n=200, v=100)
    g = torch.zeros(200)
    g[::10] = 1.0
    torch.autograd.grad(p.run(entropy=True, lse=True).logprob, p.inputs(), g)
    [(rows, scalars)] = seen
    assert rows.count == 20
    assert scalars.h is None


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "auto"), (torch.float16, "torch")])
@pytest.mark.parametrize("plan", ["auto", "precompute"])
def test_no_grad_and_autocast(plan, dtype, backend):
    """It rounds what torch multiplies: where no GEMM is native, everything."""
    p = make("random", dtype=dtype, backend=backend, plan=plan, grad=(True, plan == "auto"))
    want = p.run()
    with torch.no_grad():
        assert not p.run(plan="auto").logprob.requires_grad
    assert not p.run(plan="score").logprob.requires_grad
    ones, ppo = torch.ones(150), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = p.run()
        gradients = torch.autograd.grad(got.logprob.sum(), p.inputs())
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            loss, _ = linear_ppo_loss(p.hidden, p.weight, p.targets, want.logprob, ones, ones.bool(), backend=backend)
        ppo.append([loss, *torch.autograd.grad(loss, p.inputs())])
    assert torch.equal(got.logprob, want.logprob)
    for a, b in zip(gradients, torch.autograd.grad(want.logprob.sum(), p.inputs()), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(*ppo, strict=True))
    assert abs(ppo[0][0] + 1) < 1e-6


def test_the_reference_under_autocast():
    """An oracle rounds nothing that its inputs did not."""
    p = make("random", backend="reference")
    want = p.run(entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = p.run(entropy=True)
    assert got.logprob.dtype == torch.float32
    assert torch.equal(got.logprob, want.logprob)
    assert torch.equal(got.entropy, want.entropy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_weight_out_accumulates(dtype):
    """Micro-batches add into one fp32 buffer; their graphs may be alive together. dbias comes as ever."""
    p = make("random", dtype=dtype, bias=True)
    bias = p.options["bias"]
    halves = slice(0, 70), slice(70, 150)
    for op in ("logprob", "ppo", "recompute", "precompute"):
        buffer = torch.ones(p.weight.shape)
        losses, options = [], {"bias": bias, "grad_weight_out": buffer}

        def total(logprob, entropy):
            return logprob.sum(), {}

        for s in halves:
            h, y = p.hidden[s], p.targets[s]
            old, advantage = torch.full_like(y, -8.0, dtype=torch.float32), torch.linspace(-1, 1, y.numel())
            if op == "logprob":
                losses.append(linear_logprob(h, p.weight, y, plan="recompute", **options).logprob.sum())
            elif op == "ppo":
                mask = torch.ones_like(y, dtype=torch.bool)
                losses.append(linear_ppo_loss(h, p.weight, y, old, advantage, mask, normalizer=150, **options)[0])
            else:
                losses.append(linear_loss(h, p.weight, y, total, plan=op, **options)[0])
        dbias = torch.zeros(bias.shape)
        for loss in losses:
            before = buffer._version
            none, part = torch.autograd.grad(2.5 * loss, [p.weight, bias], allow_unused=True)
            assert none is None
            assert buffer._version > before  # autograd knows of the write
            dbias += part
        want, want_bias = torch.zeros_like(buffer), torch.zeros_like(dbias)
        for s in halves:
            h, y = p.hidden[s], p.targets[s]
            old, advantage = torch.full_like(y, -8.0, dtype=torch.float32), torch.linspace(-1, 1, y.numel())
            w, b = (t.detach().float().requires_grad_() for t in (p.weight, bias))
            lp = (h.detach().float() @ w.T + b).log_softmax(-1).gather(1, y[:, None])[:, 0]
            if op == "ppo":
                r = (lp - old).exp()
                lp = -torch.minimum(r * advantage, r.clip(0.8, 1.2) * advantage) / 150
            for sums, gradient in zip((want, want_bias), torch.autograd.grad(2.5 * lp.sum(), [w, b]), strict=True):
                sums += gradient
        # Kept exponentials are bf16 for bf16 inputs, so a fused loss's gradients carry their rounding.
        assert relative(buffer - 1, want.double()) < 3e-3  # dz is rounded to bf16, its sums are not
        assert relative(dbias, want_bias.double()) < 5e-3


def test_accumulated_indices_beyond_int32():
    """Liger 803, 1294, 1296, CCE 37: N V > 2^31 (here 2.4e9), a target in the last column, rows at the end."""
    n, v, d = 40_000, 60_000, 2
    hidden = torch.zeros(n, d)
    hidden[:, 0] = 1.0
    weight = torch.zeros(v, d)
    weight[-1, 0] = 3.0
    targets = torch.full((n,), v - 1)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[::1000] = True
    mask[-1] = True
    got = linear_logprob(hidden, weight, targets, mask=mask)
    want = 3.0 - torch.log(torch.tensor(v - 1 + torch.e**3, dtype=torch.float64))
    assert (got.logprob[mask] - want).abs().max() < 5e-6
