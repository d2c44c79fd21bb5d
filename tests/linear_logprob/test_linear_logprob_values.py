"""Values and gradients against float64, over the rows of the bug table that a CPU can show.

Each test names who shipped the bug it stands for. Log-probs, entropies and lse are judged absolutely, within what fp32
arithmetic must lose; gradients relative to the error of torch's own path in the same dtype.
"""

import pytest
import torch
from backends import needs_triton
from linear_logprob.head_problems import BACKENDS, KINDS, make, naive_gradients, relative, value_bound

from srppo_kernels import linear_logprob
from srppo_kernels.linear_logprob.chunked import kept_dtype
from srppo_kernels.linear_logprob.plan import problem_of

BIG = 1 << 30
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weighted(logprob, entropy, lse):
    """Non-uniform upstream gradients, the first of each zero (Liger 1298, NeMo 3853)."""
    w = torch.arange(logprob.numel(), dtype=torch.float32).view(logprob.shape) / logprob.numel()
    return (w * logprob).sum() + (w.flip(0) * w * entropy).sum() * 0.7 - (w * w * lse).sum() * 0.3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_in_fp32_bounds(kind, dtype, backend):
    """verl 2656, 2899, 5349, SkyRL 2141: ragged V, all logits far below or above 0; torch 195829: a common offset."""
    p = make(kind, dtype=dtype)
    got = p.run(entropy=True, lse=True, backend=backend)
    bound = value_bound(p)
    for name, a, b in zip(("logprob", "entropy", "lse"), got, p.double().oracle(), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() <= bound, name
    assert (got.logprob <= 0).all()
    assert (got.entropy >= -bound).all()


@pytest.mark.parametrize("plan", ["recompute", "cache"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_no_worse_than_torch(kind, dtype, plan):
    p = make(kind, dtype=dtype)
    twin = p.double()
    want = torch.autograd.grad(weighted(*twin.oracle()), twin.inputs())
    got = torch.autograd.grad(weighted(*p.run(entropy=True, lse=True, plan=plan, workspace_bytes=BIG)), p.inputs())
    theirs = naive_gradients(p, weighted)
    for a, b, t, x in zip(got, want, theirs, p.inputs(), strict=True):
        assert a.dtype == x.dtype
        # 1e-6 where torch's fp32 path happens to be exact to the last bits.
        assert relative(a, b) <= max(1.2 * relative(t, b), 1e-6)


@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_head_gradient(kind, dtype):
    """Plan precompute of the per-token op: dhidden in two GEMMs."""
    p = make(kind, dtype=dtype, grad=(True, False))
    twin = p.double()

    def loss(logprob, lse):
        w = torch.linspace(0, 1, logprob.numel())
        return (w * logprob).sum() + (w * w * lse).sum()

    o = twin.oracle()
    (want,) = torch.autograd.grad(loss(o[0], o[2]), [twin.hidden])
    got = p.run(lse=True, plan="precompute", backend="torch")
    (dhidden,) = torch.autograd.grad(loss(got.logprob, got.lse), [p.hidden])
    theirs = naive_gradients(p, lambda a, b, c: loss(a, c))
    assert relative(dhidden, want) <= max(1.2 * relative(theirs[0], want), 1e-6)


@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
@pytest.mark.parametrize("probability", [0.99, 1 - 1e-6])
def test_gradient_of_a_certain_target(probability, plan):
    """Liger 1329, TE 3193: 1 - p_y must keep its digits where p_y is near 1."""
    v, n = 3000, 5
    a = torch.log(torch.tensor((v - 1) * probability / (1 - probability), dtype=torch.float64))
    weight = torch.zeros(v, 8)
    weight[1234, 0] = 1.0
    hidden = torch.zeros(n, 8)
    hidden[:, 0] = a.float()
    hidden.requires_grad_()
    weight.requires_grad_(plan != "precompute")
    targets = torch.full((n,), 1234)
    out = linear_logprob(hidden, weight, targets, plan=plan, workspace_bytes=BIG)
    out.logprob.sum().backward()
    exact = (v - 1) / (hidden[0, 0].detach().double().exp() + v - 1)
    assert hidden.grad is not None
    # torch's fp32 log_softmax has 5e-2 here, at 1 - 1e-6.
    assert abs(hidden.grad[0, 0].double() / exact - 1) < 2e-6
    assert abs(out.logprob[0].detach().double() / torch.log1p(-exact) - 1) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"temperature": 0.6},
        {"logit_scale": 0.25},
        {"softcap": 4.0},
        {"bias": True, "temperature": 1.7, "logit_scale": 2.0, "softcap": 6.0},
        {"bias": True, "row_temperature": True, "logit_scale": -0.5, "softcap": 3.0},
    ],
    ids=lambda o: "-".join(o),
)
def test_options(options, backend):
    """CCE 52, 53 (bias on and off), and the order of scale, cap and temperature."""
    options = dict(options)
    per_row = options.pop("row_temperature", False)
    p = make("random", **options)
    if per_row:
        p.options["temperature"] = torch.rand(150, dtype=torch.float64) + 0.5
    p.options["mask"] = torch.rand(150) > 0.3
    twin = p.double()
    oracle = twin.oracle()
    want = torch.autograd.grad(weighted(*oracle), twin.inputs())
    for plan in ("recompute", "cache"):
        got = p.run(entropy=True, lse=True, plan=plan, workspace_bytes=BIG, backend=backend)
        for a, b in zip(got, oracle, strict=True):
            assert (a.double() - b).abs().max() <= 2 * value_bound(p)
        for a, b in zip(torch.autograd.grad(weighted(*got), p.inputs()), want, strict=True):
            assert relative(a, b) < 3e-6


@pytest.mark.parametrize("plan", ["recompute", "cache"])
@pytest.mark.parametrize("which", ["logprob", "entropy", "lse", "none"])
def test_each_gradient_alone(which, plan):
    """TRL 6625: entropy only, log-prob only, neither."""
    p = make("random", n=40)
    twin = p.double()
    got = p.run(entropy=True, lse=True, plan=plan, workspace_bytes=BIG)
    if which == "none":
        for t in torch.autograd.grad(got.logprob.sum() * 0.0, p.inputs()):
            assert (t == 0).all()
        return
    index = ("logprob", "entropy", "lse").index(which)
    want = torch.autograd.grad(twin.oracle()[index].sum(), twin.inputs())
    for a, b in zip(torch.autograd.grad(got[index].sum(), p.inputs()), want, strict=True):
        assert relative(a, b) < 3e-6


@pytest.mark.parametrize("which", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_some_gradients(which):
    p = make("random", bias=True, grad=(False, False))
    for name, tensor in (("hidden", p.hidden), ("weight", p.weight), ("bias", p.options["bias"])):
        tensor.requires_grad_(name in which)
    twin = p.double()
    oracle = twin.oracle()
    for entropy in (True, False):
        loss = weighted if entropy else lambda logprob, *_: (torch.linspace(0, 1, 150) * logprob).sum()
        want = torch.autograd.grad(loss(*oracle), twin.inputs(), retain_graph=True)
        got = torch.autograd.grad(loss(*p.run(entropy=entropy, lse=entropy)), p.inputs())
        assert all(relative(a, b) < 3e-6 for a, b in zip(got, want, strict=True))


def test_finite_differences():
    """The formulas themselves, in float64, on every plan."""
    p = make("random", n=5, d=3, v=7, dtype=torch.float64, bias=True, softcap=3.0, temperature=0.7, logit_scale=1.3)

    def call(plan):
        def f(hidden, weight, bias):
            o = {**p.options, "bias": bias}
            r = linear_logprob(hidden, weight, p.targets, entropy=True, lse=True, plan=plan, workspace_bytes=BIG, **o)
            return r.logprob, r.entropy, r.lse

        return f

    for plan in ("recompute", "cache"):
        assert torch.autograd.gradcheck(call(plan), (p.hidden, p.weight, p.options["bias"]))
    fixed = {**p.options, "bias": p.options["bias"].detach()}
    assert torch.autograd.gradcheck(
        lambda h: linear_logprob(h, p.weight.detach(), p.targets, plan="precompute", **fixed).logprob, (p.hidden,)
    )


def test_a_ruled_out_entry():
    """A bias of -inf takes an entry out of the vocabulary; value, entropy and gradients as if it were not there."""
    p = make("random", n=30, v=2100, bias=True)
    out = torch.arange(0, 2100, 7)
    p.targets[:] = torch.randint(0, 299, (30,)) * 7 + 1
    with torch.no_grad():
        p.options["bias"][out] = -torch.inf
    kept = torch.ones(2100, dtype=torch.bool)
    kept[out] = False
    twin = p.double()
    z = (twin.hidden @ twin.weight.T + twin.options["bias"])[:, kept]
    logp = z.log_softmax(-1)
    oracle = (
        logp.gather(1, (kept.cumsum(0) - 1)[p.targets, None])[:, 0],
        -(logp.exp() * logp).sum(-1),
        z.logsumexp(-1),
    )
    want = torch.autograd.grad(weighted(*oracle), [twin.hidden])[0]
    for plan in ("recompute", "cache"):
        got = p.run(entropy=True, lse=True, plan=plan, workspace_bytes=BIG)
        for a, b in zip(got, oracle, strict=True):
            assert (a.double() - b).abs().max() < 1e-5
        dhidden, dweight = torch.autograd.grad(weighted(*got), [p.hidden, p.weight])
        assert relative(dhidden, want) < 3e-6
        assert (dweight[out] == 0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_ruled_out_vocabulary_group(backend, dtype, place):
    """A whole group of -inf leaves nothing behind, neither in the entropy nor, where dL/dentropy > 1, in gradients."""
    if dtype == torch.float64 and backend == "native":
        pytest.skip("computes in float32")
    p = make("random", n=9, v=4096, bias=True, dtype=dtype)
    kept = slice(2048, None) if place == "first" else slice(0, 2048)
    out = slice(0, 2048) if place == "first" else slice(2048, None)
    p.targets[:] = torch.randint(0, 2048, (9,)) + kept.start
    with torch.no_grad():
        p.options["bias"][out] = -torch.inf
    twin = p.double()
    logp = (twin.hidden @ twin.weight[kept].T + twin.options["bias"][kept]).log_softmax(-1)
    want = -(logp.exp() * logp).sum(-1)
    (gradient,) = torch.autograd.grad((want * 3).sum(), [twin.hidden])
    for plan in ("recompute", "cache"):
        got = p.run(entropy=True, plan=plan, workspace_bytes=BIG, backend=backend).entropy
        assert (got.double() - want).abs().max() < 1e-5
        assert relative(torch.autograd.grad((got * 3).sum(), [p.hidden])[0], gradient) < 5e-6


def test_mixed_dtypes():
    """fp32 master weights under bf16 hidden states: both are read exactly."""
    p = make("random")
    p.hidden = p.hidden.detach().bfloat16().requires_grad_()
    twin = p.double()
    want = torch.autograd.grad(weighted(*twin.oracle()), twin.inputs())
    got = p.run(entropy=True, lse=True)
    assert (got.logprob - twin.oracle()[0]).abs().max() < value_bound(p)
    dhidden, dweight = torch.autograd.grad(weighted(*got), p.inputs())
    assert dhidden.dtype == torch.bfloat16
    assert dweight.dtype == torch.float32
    assert relative(dweight, want[1]) < 3e-6
    for hidden, weight in ((p.hidden, p.weight), (p.hidden.float(), p.weight.bfloat16()), (p.weight, p.weight)):
        problem = problem_of(
            "linear_logprob", hidden, weight, None, entropy=True, mask=None, softcap=None, group=None,
            grad_weight_out=None,
        )  # fmt: skip
        assert kept_dtype(hidden, weight).itemsize == problem.kept_bytes


@pytest.mark.parametrize("plan", ["cache", "recompute", "precompute"])
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=needs_triton)])
def test_softcap_at_an_unlikely_target(backend, plan):
    """The cap's slope there is that of z_y itself: e^(z_y - m) underflows 87 below the maximum."""
    p = make(n=6, d=16, v=300, softcap=30.0, temperature=0.3, grad=(True, plan != "precompute"))
    with torch.no_grad():
        p.hidden *= 30
    p.targets = (p.hidden @ p.weight.T).argmin(1).detach()
    twin = p.double()
    outputs = p.run(backend=backend, plan=plan, workspace_bytes=1 << 30, lse=True)
    want = twin.oracle()
    assert (outputs.logprob < -87).all()
    for got, right in ((outputs.logprob, want[0]), (outputs.logprob + 0.1 * outputs.lse, want[0] + 0.1 * want[2])):
        exact = torch.autograd.grad(right.sum(), twin.inputs(), retain_graph=True)
        for a, b in zip(torch.autograd.grad(got.sum(), p.inputs(), retain_graph=True), exact, strict=True):
            assert relative(a, b) < 2e-4
