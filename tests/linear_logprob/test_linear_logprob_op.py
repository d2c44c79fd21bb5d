"""The ops as PyTorch sees them: opcheck, torch.compile, errors, explain."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from linear_logprob.head_problems import BACKENDS, make, relative

from srppo_kernels import explain, gae, linear_log_ratio, linear_logprob, linear_loss, linear_ppo_loss
from srppo_kernels.linear_logprob.checks import check_targets, check_temperatures

BIG = 1 << 30


def head_arguments(p, plan, backend, *, entropy=True, chunk=128):
    return (
        p.hidden, p.weight, p.targets, p.options.get("bias"), p.options.get("mask"), None, None, -100, 0.8, 1.5, 4.0,
        entropy, plan, backend, chunk, None, "",
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["score", "recompute", "cache", "precompute"])
def test_opcheck(plan, backend):
    half = plan == "recompute"  # its dhidden is rounded at the end, and with no mask in another place
    p = make(
        "random", n=9, d=4, v=30, bias=plan != "precompute", grad=(plan != "score", plan in ("recompute", "cache")),
        dtype=torch.float16 if half else torch.float32,
    )  # fmt: skip
    p.options["mask"] = None if half else torch.rand(9) > 0.3
    arguments = head_arguments(p, plan, backend, entropy=plan != "precompute")
    torch.library.opcheck(torch.ops.srppo.linear_logprob.default, arguments)
    if plan == "score":
        return
    with torch.no_grad():
        logprob, entropy, _, norm, kept, group_max = torch.ops.srppo.linear_logprob(*arguments)
    hidden, weight, targets, bias, mask, *_ = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    train = plan != "precompute"
    for out in (None, torch.zeros(30, 4)) if train else (None,):
        torch.library.opcheck(
            torch.ops.srppo.linear_logprob_backward.default,
            (
                torch.rand(9), torch.rand(9) if train else None, None, logprob, entropy, norm, kept, group_max, hidden,
                weight, targets, bias, mask, None, out, -100, 0.8, 1.5, 4.0, plan, "torch", 0, None, "", True,
                train and out is None, train,
            ),
        )  # fmt: skip


def test_opcheck_ppo():
    p = make("random", n=9, d=4, v=30, bias=True)
    mask = torch.rand(9) > 0.3
    torch.library.opcheck(
        torch.ops.srppo.linear_ppo_loss.default,
        (
            p.hidden, p.weight, p.targets, torch.full((9,), -3.0), torch.randn(9), mask, p.options["bias"], None, None,
            None, -100, 0.8, 1.5, 4.0, 0.2, 0.2, None, 0.01, None, "torch", 128, None, "", True, True, True,
        ),
    )  # fmt: skip


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
def test_compile_fullgraph(plan):
    p = make("random", n=20, d=8, v=60, grad=(True, plan != "precompute"))
    mask = torch.rand(20) > 0.3

    def step(hidden, weight):
        out = linear_logprob(
            hidden * 2,
            weight,
            p.targets,
            mask=mask,
            entropy=plan != "precompute",
            lse=True,
            plan=plan,
            workspace_bytes=BIG,
        )
        total = out.logprob.sum() + out.lse.sum()
        return total if out.entropy is None else total + out.entropy.sum()

    want = step(p.hidden, p.weight)
    got = compiled(step)(p.hidden, p.weight)
    assert torch.equal(want, got)
    for a, b in zip(torch.autograd.grad(got, p.inputs()), torch.autograd.grad(want, p.inputs()), strict=True):
        assert torch.equal(a, b)


def test_compile_losses():
    """linear_ppo_loss compiles as itself; linear_loss as its loss on the per-token op, with the same values."""
    p = make("random", n=20, d=8, v=60)
    mask = torch.rand(20) > 0.3
    old, advantages = torch.full((20,), -4.0), torch.randn(20)

    def ppo(hidden, weight):
        loss, stats = linear_ppo_loss(hidden, weight, p.targets, old, advantages, mask, entropy_coef=0.1)
        return loss, stats.ratio_mean

    def loss_fn(logprob, entropy, a):
        return (a * logprob - 0.1 * entropy).sum(), {"a": a}

    def any_loss(hidden, weight):
        loss, aux = linear_loss(hidden, weight, p.targets, loss_fn, advantages, mask=mask, plan="precompute")
        return loss, aux["a"]

    def ratio(hidden, weight):
        r = linear_log_ratio(hidden, weight, hidden * 2, weight, p.targets, mask=mask)
        return r.sum(), r

    for f in (ppo, any_loss, ratio):
        want, got = f(p.hidden, p.weight), compiled(f)(p.hidden, p.weight)
        assert torch.allclose(want[0], got[0], rtol=1e-6)
        assert torch.equal(want[1], got[1])
        for a, b in zip(torch.autograd.grad(got[0], p.inputs()), torch.autograd.grad(want[0], p.inputs()), strict=True):
            assert relative(a, b.double()) < 1e-6


def test_compiled_for_any_number_of_tokens():
    def step(hidden, weight, targets):
        return linear_logprob(hidden, weight, targets, entropy=True, temperature=0.7, softcap=5.0).entropy.sum()

    torch._dynamo.reset()
    traced = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    for n in (20, 33):
        p = make("random", n=n, d=8, v=60)
        assert torch.equal(traced(p.hidden, p.weight, p.targets), step(p.hidden, p.weight, p.targets))


@pytest.mark.parametrize("workspace_bytes", [0, 1 << 20, 1 << 70])
@pytest.mark.parametrize("plan", ["score", "recompute"])
def test_compiled_within_a_workspace(plan, workspace_bytes):
    """Any number of tokens, and a bound that no 64 bits hold."""

    def step(hidden, weight, targets):
        return linear_logprob(hidden, weight, targets, plan=plan, workspace_bytes=workspace_bytes).logprob.sum()

    torch._dynamo.reset()
    traced = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    for n in (40, 70):
        p = make("random", n=n, d=8, v=5000)
        assert torch.equal(traced(p.hidden, p.weight, p.targets), step(p.hidden, p.weight, p.targets))


def test_compiled_grad_weight_out():
    p = make("random", n=20, d=8, v=60)
    buffers = [torch.zeros(60, 8), torch.zeros(60, 8)]

    def step(hidden, weight, buffer):
        return linear_logprob(hidden, weight, p.targets, grad_weight_out=buffer).logprob.sum()

    step(p.hidden, p.weight, buffers[0]).backward()
    compiled(step)(p.hidden, p.weight, buffers[1]).backward()
    assert torch.equal(*buffers)
    assert buffers[0].abs().sum() > 0
    assert p.weight.grad is None


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile's default backend needs a C++ compiler")
def test_inductor():
    p = make("random", n=20, d=8, v=60)
    torch._dynamo.reset()
    step = torch.compile(lambda h, w: linear_logprob(h, w, p.targets).logprob.exp().sum(), fullgraph=True)
    want = p.run().logprob.exp().sum()
    got = step(p.hidden, p.weight)
    assert torch.allclose(got, want)
    for a, b in zip(torch.autograd.grad(got, p.inputs()), torch.autograd.grad(want, p.inputs()), strict=True):
        assert relative(a, b.double()) < 1e-6


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_score_has_no_gradient(backend):
    assert not make(n=4, d=3, v=7).run(plan="score", backend=backend).logprob.requires_grad


def test_differentiable_once():
    p = make("random", n=5, d=4, v=9)
    (g,) = torch.autograd.grad(p.run().logprob.sum(), [p.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob is differentiable once"):
        torch.autograd.grad(g.sum(), [p.hidden])
    zero, mask = torch.zeros(5), torch.ones(5, dtype=torch.bool)
    for loss, _ in (
        linear_ppo_loss(p.hidden, p.weight, p.targets, zero - 2, zero + 1, mask),
        linear_loss(p.hidden, p.weight, p.targets, lambda logprob, _: (logprob.sum(), {})),
    ):
        for outer in (loss.square(), loss):  # and neither the upstream gradient's part of it, nor a constant
            upstream = torch.ones(())
            (g,) = torch.autograd.grad(outer, [p.hidden], upstream, create_graph=True)
            assert not upstream.requires_grad  # it is the caller's
            with pytest.raises(RuntimeError, match="differentiate twice"):
                (g.sum() + p.hidden.sum()).backward()


def test_forward_mode_is_refused():
    """torch takes a derivative that an op does not have in forward mode for 0."""
    p = make("random", n=5, d=4, v=9)
    per_token, mask, bias = torch.randn(1, 5), torch.ones(1, 5, dtype=torch.bool), torch.zeros(9)

    def loss(hidden, weight, bias):
        return linear_loss(hidden, weight, p.targets, lambda logprob, _: (logprob.sum(), {}), bias=bias)[0]

    calls = [
        (lambda w: loss(p.hidden, w, bias), p.weight.detach()),
        (lambda b: loss(p.hidden, p.weight, b), bias),
        (lambda h: linear_logprob(h, p.weight, p.targets).logprob, p.hidden.detach()),
        (lambda h: linear_loss(h, p.weight, p.targets, lambda logprob, _: (logprob.sum(), {}))[0], p.hidden.detach()),
        (lambda rewards: gae(rewards, per_token, mask)[0], per_token),
    ]
    for function, x in calls:
        with pytest.raises(NotImplementedError, match="forward mode"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("call", ["linear_logprob", "linear_ppo_loss", "linear_loss", "linear_log_ratio", "reference"])
def test_bad_target_is_named(call):
    p = make("random", n=6, d=4, v=9)
    h, w = p.hidden.view(2, 3, 4), p.weight
    y, zero, mask = p.targets.view(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    calls = {
        "linear_logprob": lambda: linear_logprob(h, w, y),
        "reference": lambda: linear_logprob(h, w, y, backend="reference"),
        "linear_ppo_loss": lambda: linear_ppo_loss(h, w, y, zero, zero, mask),
        "linear_loss": lambda: linear_loss(h, w, y, lambda lp, e: (lp.sum(), {})),
        "linear_log_ratio": lambda: linear_log_ratio(h, w, h, w, y),
    }
    for bad in (9, -1, 2**40):
        y[1, 2] = bad
        op = call if call in ("linear_ppo_loss", "linear_loss") else "linear_logprob"
        with pytest.raises(ValueError, match=rf"^{op}: targets\[1, 2\] is {bad}, outside the vocabulary \[0, 9\)"):
            calls[call]()
        y[0, 1] = bad
        with pytest.raises(ValueError, match=r"targets\[0, 1\]"):
            calls[call]()
        y[0, 1] = y[1, 2] = -100
        calls[call]()


def test_a_bad_target_of_one_hidden_state():
    p = make("random", n=6, d=4, v=9)
    with pytest.raises(ValueError, match=r"targets\[\] is 9, outside the vocabulary"):
        linear_logprob(p.hidden[0], p.weight, torch.tensor(9))


def test_on_a_device_targets_are_asserted_there_and_temperatures_not_waited_for():
    """On one that is pretended."""
    pretended = type("OnDevice", (torch.Tensor,), {"device": property(lambda self: torch.device("cuda", 0))})
    targets = torch.tensor([0, 8, 9, -1]).as_subclass(pretended)
    live, shape = torch.tensor([True, True, False, False]), torch.Size([4])
    check_targets("op", targets, live, 9, shape)
    for bad in (2, 3):
        with pytest.raises(RuntimeError, match="a live target is outside the vocabulary"):
            check_targets("op", targets, live | (torch.arange(4) == bad), 9, shape)
    check_temperatures("op", torch.zeros(4).as_subclass(pretended), live, shape)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weight": torch.zeros(9, 5)}, ValueError, "last dimensions"),
        ({"weight": torch.zeros(36)}, ValueError, r"\[vocabulary, hidden size\]"),
        ({"weight": torch.zeros(9, 4, 2)}, ValueError, r"\[vocabulary, hidden size\]"),
        ({"hidden": torch.zeros(6, 5)}, ValueError, "last dimensions"),
        ({"hidden": torch.zeros(())}, ValueError, r"hidden has shape \(\) but weight"),
        ({"hidden": torch.zeros(6, 4, dtype=torch.float64)}, TypeError, "float64 takes both or none"),
        ({"weight": torch.zeros(9, 0), "hidden": torch.zeros(6, 0)}, ValueError, "at least 1 wide"),
        ({"weight": torch.zeros(9, 4, dtype=torch.float64)}, TypeError, "float64 takes both or none"),
        ({"hidden": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "hidden has dtype"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"weight": torch.nn.Linear(4, 9)}, TypeError, "weight must be a tensor, got Linear: pass its weight"),
        ({"targets": [0] * 6}, TypeError, "targets must be a tensor, got list"),
        ({"targets": torch.zeros(6)}, TypeError, "int64 or int32"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, "one target for every hidden state"),
        ({"targets": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "one target for every hidden state"),
        (
            {"targets": torch.zeros(6, dtype=torch.int16)},
            TypeError,
            "targets has dtype torch.int16; pass int64 or int32",
        ),
        ({"bias": torch.zeros(8)}, ValueError, "bias has shape"),
        ({"bias": torch.zeros(9, 1)}, ValueError, "bias has shape"),
        ({"bias": torch.zeros(9, device="meta")}, ValueError, "bias is on meta but hidden on cpu"),
        (
            {"targets": torch.zeros(6, dtype=torch.int64, device="meta")},
            ValueError,
            "targets is on meta but the hidden",
        ),
        ({"mask": torch.ones(6)}, TypeError, "mask has dtype"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask has shape"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature=inf must be positive and finite"),
        ({"temperature": torch.ones(5)}, ValueError, "temperature has shape"),
        ({"temperature": torch.ones(6, requires_grad=True)}, ValueError, "temperature.detach"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0 must be positive"),
        ({"softcap": float("inf")}, ValueError, "softcap=inf must be positive, or None"),
        ({"softcap": torch.ones(2)}, TypeError, "softcap=.* must be a number, got Tensor"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, ValueError, "pass logit_scale.detach"),
        ({"temperature": "1"}, TypeError, "temperature='1' must be a number, got str"),
        ({"logit_scale": None}, TypeError, "logit_scale=None must be a number, got NoneType"),
        ({"hidden": torch.zeros(6, 4).to_sparse()}, TypeError, r"hidden is laid out as .*; pass hidden.to_dense"),
        (
            {"weight": torch.zeros(9, 4).as_subclass(type("DTensor", (torch.Tensor,), {}))},
            TypeError,
            "weight is a DTensor; pass it through srppo_kernels.parallel first",
        ),
        ({"plan": "fast"}, ValueError, "plan='fast' is unknown"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
        ({"workspace_bytes": -1}, ValueError, "workspace_bytes"),
        ({"plan": "precompute"}, ValueError, "linear_loss"),
        ({"plan": "precompute", "entropy": True, "weight": torch.zeros(9, 4)}, ValueError, "call has entropy=True"),
        ({"plan": "cache", "workspace_bytes": 0}, ValueError, "keeps 216 bytes and workspace_bytes allows 0; pass"),
        ({"workspace_bytes": 1e6}, TypeError, "workspace_bytes=1000000.0 is a float"),
        ({"workspace_bytes": "1"}, TypeError, "workspace_bytes=1 is a str"),
        ({"grad_weight_out": torch.zeros(9, 4).double()}, ValueError, "pass a torch.float32 buffer of weight's shape"),
        ({"grad_weight_out": torch.zeros(9, 3)}, ValueError, "grad_weight_out has shape"),
        ({"grad_weight_out": [0.0]}, TypeError, "grad_weight_out must be a tensor"),
        ({"grad_weight_out": torch.zeros(9, 4, device="meta")}, ValueError, "grad_weight_out is on meta"),
        ({"grad_weight_out": torch.zeros(9, 4), "backend": "reference"}, ValueError, "adds nothing to grad_weight_out"),
        ({"grad_weight_out": torch.zeros(9, 4), "weight": torch.zeros(9, 4)}, ValueError, "needs no gradient"),
    ],
)
def test_bad_arguments(change, error, text):
    p = make("random", n=6, d=4, v=9)
    arguments = {"hidden": p.hidden, "weight": p.weight, "targets": p.targets, **change}
    with pytest.raises(error, match=text):
        linear_logprob(**arguments)
    with pytest.raises(error, match=text):
        explain(**arguments)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_a_temperature_that_no_row_can_have(bad, backend):
    """It is told with its place; what a masked row has is not looked at."""
    p = make("random", n=6, d=4, v=9)
    hidden, targets = p.hidden.view(2, 3, 4), p.targets.view(2, 3)
    temperature, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    temperature[1, 0] = bad
    with pytest.raises(ValueError, match=rf"temperature\[1, 0\] is {bad}; it must be positive and finite"):
        linear_logprob(hidden, p.weight, targets, temperature=temperature, mask=mask, backend=backend)
    mask[1, 0] = False
    out = linear_logprob(hidden, p.weight, targets, temperature=temperature, mask=mask, backend=backend).logprob
    same = linear_logprob(hidden, p.weight, targets, mask=mask, backend=backend).logprob
    assert torch.equal(out, same)


@pytest.mark.parametrize("plan", ["auto", "cache"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"old_logprobs": torch.zeros(6, dtype=torch.int64)}, TypeError, "old_logprobs has dtype torch.int64"),
        ({"advantages": [0.0] * 6}, TypeError, "advantages must be a tensor, got list"),
        (
            {"advantages": torch.zeros(5)},
            ValueError,
            r"advantages has shape \(5,\) .*; pass one number for every target",
        ),
        ({"old_logprobs": torch.zeros(6, device="meta")}, ValueError, "old_logprobs is on meta but hidden on cpu"),
        ({"entropy_coef": float("nan")}, ValueError, "entropy_coef=nan must be finite"),
        ({"clip_low": "0.2"}, TypeError, "clip_low='0.2' must be a number, got str"),
        ({"clip_low": 2.0}, ValueError, r"clip_low=2.0 must lie in \[0, 1\]"),
        ({"clip_high": -1.0}, ValueError, "clip_high=-1.0 must not be negative"),
        ({"dual_clip": 0.5}, ValueError, "dual_clip=0.5 must be above 1"),
        ({"normalizer": -1.0}, ValueError, "normalizer=-1.0 must be positive"),
    ],
)
def test_bad_arguments_of_the_loss(change, error, text, plan):
    """They are refused by the name of the op that was called, and before any GEMM."""
    p = make("random", n=6, d=4, v=9)
    zero = torch.zeros(6)
    given = {"old_logprobs": zero, "advantages": zero, "mask": zero == 0, "plan": plan, **change}
    with pytest.raises(error, match=f"linear_ppo_loss: {text}"):
        linear_ppo_loss(p.hidden, p.weight, p.targets, **given)


def test_log_ratio_of_two_vocabularies_is_refused():
    p, q = make("random", n=6, d=4, v=9), make("random", n=6, d=4, v=10)
    with pytest.raises(ValueError, match=r"weight_sft has 9 .* weight_base 10; a ratio needs one vocabulary"):
        linear_log_ratio(p.hidden, p.weight, q.hidden, q.weight, p.targets)
    with pytest.raises(ValueError, match=r"weight_sft has 10 .* weight_base 9; a ratio needs one vocabulary"):
        linear_log_ratio(q.hidden, q.weight, p.hidden, p.weight, p.targets)
    with pytest.raises(ValueError, match=r"hidden_base has shape .* but weight_base"):
        linear_log_ratio(p.hidden, p.weight, q.hidden[:, :3], p.weight, p.targets)
    with pytest.raises(ValueError, match="bias_base has shape"):
        linear_log_ratio(p.hidden, p.weight, q.hidden, p.weight, p.targets, bias_base=torch.zeros(10))


def test_log_ratio_hands_every_option_to_both_log_probs_and_each_model_its_own(monkeypatch):
    models = [make("random", n=6, d=4, v=9, bias=True) for _ in range(2)]
    targets, given = models[0].targets, []

    def logprob(*tensors, **options):
        given.append((*tensors, options))
        return SimpleNamespace(logprob=torch.zeros(6))

    monkeypatch.setattr(sys.modules[linear_log_ratio.__module__], "linear_logprob", logprob)
    options = {
        "mask": targets > 3, "ignore_index": 3, "temperature": 0.5, "logit_scale": 2.0, "softcap": 9.0,
        "plan": "recompute", "workspace_bytes": 5, "backend": "torch", "group": "a group",
    }  # fmt: skip
    tensors = [t for p in models for t in (p.hidden, p.weight)]
    biases = [p.options["bias"] for p in models]
    linear_log_ratio(*tensors, targets, bias_sft=biases[0], bias_base=biases[1], **options)
    for (*got, seen), p, bias in zip(given, models, biases, strict=True):
        assert all(a is b for a, b in zip(got, (p.hidden, p.weight, targets), strict=True))
        assert seen.pop("bias") is bias
        assert seen == options


def test_explain():
    """GEMMs and plans as the design's table has them."""
    n, d, v = 256, 64, 3000

    def plan(hidden_grad=True, weight_grad=True, rows=n, **options):
        p = make("random", n=rows, d=d, v=v, dtype=torch.bfloat16, grad=(hidden_grad, weight_grad))
        return explain(p.hidden, p.weight, p.targets, **options)

    def found(*a, **k):
        result = plan(*a, **k)
        return result.plan, result.gemms

    assert found(False, False) == ("score", 1)
    assert found(plan="score") == ("score", 1)
    assert found(rows=128) == ("cache", 3)  # N = 2 D: bf16 exponentials are as large as an fp32 dweight
    assert found(rows=129) == ("recompute", 4)
    assert found(workspace_bytes=BIG) == ("cache", 3)
    assert found(True, False) == ("precompute", 2)
    assert found(True, False, entropy=True) == ("recompute", 3)
    assert found(op="linear_ppo_loss") == ("precompute", 3)
    assert found(True, False, op="linear_loss") == ("precompute", 2)
    assert found(False, False, op="linear_loss") == ("score", 1)
    assert found(op="linear_log_ratio", plan="score") == ("score", 1)
    with torch.no_grad():
        assert found() == ("score", 1)
    text = str(plan(backend="torch", op="linear_ppo_loss"))
    assert "torch backend, plan precompute: 3 GEMMs" in text
    assert "because the loss is known" in text
    large, small = (plan(rows=1024, op="linear_loss", workspace_bytes=b) for b in (BIG, 0))
    assert large.rows_per_chunk == 1024
    assert small.rows_per_chunk == 128
    assert large.workspace_bytes > small.workspace_bytes
    with pytest.raises(ValueError, match="op='other'"):
        plan(op="other")


def test_an_ignore_index_that_no_target_can_be():
    """2^32 is 0 in 32 bits, and token 0 was ignored."""
    p = make("random", n=4, d=8, v=10)
    targets = torch.tensor([0, 1, 3, 0], dtype=torch.int32)
    want = linear_logprob(p.hidden, p.weight, targets).logprob
    assert (want != 0).all()
    assert torch.equal(linear_logprob(p.hidden, p.weight, targets, ignore_index=1 << 32).logprob, want)
