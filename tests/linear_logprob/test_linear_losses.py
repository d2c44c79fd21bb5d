"""linear_loss and linear_ppo_loss: equal to the same loss on the per-token op, at every chunk size and plan."""

import pytest
import torch
from linear_logprob.head_problems import BACKENDS, make, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from srppo_kernels import explain, linear_logprob, linear_loss, linear_ppo_loss, ppo_loss
from srppo_kernels.linear_logprob import native

BIG = 1 << 30


def ppo_inputs(p, spread=0.4):
    n = p.targets.shape[0]
    mask = torch.rand(n) > 0.3
    old = p.double().oracle()[0].float() + spread * torch.randn(n)
    advantages = torch.randn(n)
    old[~mask], advantages[~mask] = torch.nan, torch.inf
    return old.detach(), advantages, mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.05])
def test_ppo_loss_equals_its_parts(kind, entropy_coef, backend):
    p = make(kind, n=300, v=2100, bias=True)
    old, advantages, mask = ppo_inputs(p)
    twin = p.double()
    p.options["mask"] = twin.options["mask"] = mask
    logprob, entropy, _ = twin.oracle()
    settings = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0, "entropy_coef": entropy_coef}
    want, want_stats = ppo_loss(logprob, old.double(), advantages.double(), mask, entropy=entropy, **settings)
    want_gradients = torch.autograd.grad(want, twin.inputs())
    for more in ({}, {"workspace_bytes": 0}, {"plan": "recompute"}, {"plan": "cache", "workspace_bytes": BIG}):
        loss, stats = linear_ppo_loss(
            p.hidden, p.weight, p.targets, old, advantages, mask, bias=p.options["bias"], backend=backend,
            **settings, **more,
        )  # fmt: skip
        assert abs(loss - want) < 1e-5 * (1 + abs(want))
        for name, a, b in zip(stats._fields, stats, want_stats, strict=True):
            assert abs(a - b) < 2e-5 * (1 + abs(b)), name
        for a, b in zip(torch.autograd.grad(2.5 * loss, p.inputs()), want_gradients, strict=True):
            assert relative(a / 2.5, b) < 2e-5


def test_loss_does_not_depend_on_the_split():
    """Liger 1082, trl 6024: with a normalizer, micro-batches add up to the batch."""
    p = make("random", n=200, v=300)
    old, advantages, mask = ppo_inputs(p)
    count = int(mask.sum())
    whole, _ = linear_ppo_loss(p.hidden, p.weight, p.targets, old, advantages, mask)
    want = torch.autograd.grad(whole, p.inputs())
    pieces = [slice(0, 10), slice(10, 130), slice(130, 200)]
    losses = [
        linear_ppo_loss(p.hidden[s], p.weight, p.targets[s], old[s], advantages[s], mask[s], normalizer=n)[0]
        for s, n in zip(pieces, (count, torch.tensor(count), float(count)), strict=True)
    ]
    assert abs(sum(losses) - whole) < 1e-6
    for a, b in zip(torch.autograd.grad(sum(losses), p.inputs()), want, strict=True):
        assert relative(a, b.double()) < 1e-6


@pytest.mark.parametrize("plan", ["score", "precompute", "cache", "recompute"])
def test_a_count_of_no_tokens_divides_by_one(plan):
    """As in ppo_loss: a batch without tokens has loss 0, whatever the plan, and not 0 / 0."""
    p = make("random", n=5, v=30)
    old, advantages, _ = ppo_inputs(p)
    mask = torch.zeros(5, dtype=torch.bool)
    loss, _ = linear_ppo_loss(p.hidden, p.weight, p.targets, old, advantages, mask, normalizer=mask.sum(), plan=plan)
    assert loss == 0
    if plan != "score":
        assert all((g == 0).all() for g in torch.autograd.grad(loss, p.inputs()))


def test_value_does_not_depend_on_chunk_size():
    """NeMo 3803: per-token terms have the same bits, whatever the chunk."""
    p = make("random", n=400, v=2500)
    rows = [
        linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {"lp": lp, "h": h}), **more)[1]
        for more in ({}, {"workspace_bytes": 0}, {"plan": "recompute"})
    ]
    for other in rows[1:]:
        assert torch.equal(rows[0]["lp"], other["lp"])
        assert torch.equal(rows[0]["h"], other["h"])
    assert explain(p.hidden, p.weight, p.targets, op="linear_loss", workspace_bytes=0).rows_per_chunk == 128


@pytest.mark.parametrize("more", [{}, {"workspace_bytes": 0}, {"plan": "recompute"}])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_any_loss(masked, frozen, more):
    """Chunked arguments, constants, gradients of arguments, aux summed and joined, leading dimensions; rows that have
    no gradient."""
    p = make("random", n=300, v=500, grad=(True, not frozen))
    p.hidden = p.hidden.detach().view(3, 100, -1).requires_grad_()
    p.targets = p.targets.view(3, 100)
    mask = torch.rand(3, 100) > (0.3 if masked else -1)
    weights = (torch.rand(3, 100) * (torch.rand(3, 100) > 0.3)).requires_grad_()
    scale = torch.tensor([0.3, -0.2], requires_grad=True)

    def loss_fn(logprob, entropy, w, s, name, m):
        assert name == "constant"
        assert logprob.shape == entropy.shape == w.shape == m.shape
        assert m.dtype == torch.bool  # an argument keeps its dtype
        terms = s[0] * w * logprob.exp() + s[1] * entropy * w.square()
        aux = {"count": m.sum(), "terms": terms, "pair": torch.stack([terms.sum(), m.sum() * 1.0])}
        return terms.sum(), aux | {"bins": torch.ones(44)}  # as many as the last chunk without a mask has rows

    twin = p.double()
    twin.options["mask"] = mask
    lp, h, _ = (t.view(-1) for t in twin.oracle())
    w2, s2 = (t.detach().double().requires_grad_() for t in (weights, scale))
    want, want_aux = loss_fn(lp, h, torch.where(mask, w2, 0).view(-1), s2, "constant", mask.view(-1))
    options = {**more, "mask": mask} if masked else more
    loss, aux = linear_loss(p.hidden, p.weight, p.targets, loss_fn, weights, scale, "constant", mask, **options)
    assert abs(loss - want) < 1e-4
    assert aux["count"] == mask.sum()
    assert aux["terms"].shape == (3, 100)
    assert aux["bins"].shape == (44,)
    assert (aux["terms"].view(-1) - want_aux["terms"]).abs().max() < 1e-5
    assert (aux["pair"] - want_aux["pair"]).abs().max() < 1e-3
    assert not any(a.requires_grad for a in aux.values())
    ours = [*p.inputs(), weights, scale]
    want_gradients = torch.autograd.grad(want, [*twin.inputs(), w2, s2])
    first = torch.autograd.grad(loss, ours, retain_graph=True)
    for a, b in zip(first, want_gradients, strict=True):
        assert relative(a, b) < 1e-5
    for a, b in zip(torch.autograd.grad(loss, ours), first, strict=True):
        assert torch.equal(a, b)


def test_a_loss_runs_under_the_callers_autocast():
    """On chunks as on all rows."""
    p = make("random", n=300, v=500)

    def loss_fn(logprob, entropy):
        squares = torch.mm(logprob[None], logprob[:, None])
        return squares.float().sum(), {"squares": squares}

    for plan in ("precompute", "score", "recompute"):
        options = {"plan": plan, "workspace_bytes": 0}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, aux = linear_loss(p.hidden, p.weight, p.targets, loss_fn, **options)
        assert aux["squares"].dtype == torch.bfloat16
        _, aux = linear_loss(p.hidden, p.weight, p.targets, loss_fn, **options)
        assert aux["squares"].dtype == torch.float32


@pytest.mark.parametrize("op", ["linear_loss", "linear_ppo_loss"])
def test_gradients_of_a_freed_graph_are_not_copied_and_those_of_a_kept_one_are(op, monkeypatch):
    """What a retained graph has handed out may be written to, as clipping does, before the next backward."""
    from srppo_kernels.linear_logprob import fused

    formed = []
    original = fused.run
    monkeypatch.setattr(fused, "run", lambda *a, **k: (formed.append(original(*a, **k)), formed[-1])[1])
    p = make("random", n=20, v=90)

    def loss():
        if op == "linear_loss":
            return linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}))[0]
        ones = torch.ones(20)
        return linear_ppo_loss(p.hidden, p.weight, p.targets, p.run(plan="score").logprob, ones, ones.bool())[0]

    kept = loss()
    first = torch.autograd.grad(kept, p.inputs(), retain_graph=True)
    want = [g.clone() for g in first]
    for g in first:
        g.mul_(7.0)
    second = torch.autograd.grad(kept, p.inputs())
    assert all(torch.equal(a, b) for a, b in zip(second, want, strict=True))
    assert second[1].data_ptr() == formed[0].weight.data_ptr()
    scaled = torch.autograd.grad(3.0 * loss(), p.inputs())
    assert all(torch.equal(a, 3.0 * b) for a, b in zip(scaled, want, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op", ["linear_loss", "linear_ppo_loss", "linear_logprob"])
def test_activation_checkpointing_around_the_loss(op, reentrant):
    p = make("random", n=20, v=90)
    ones, calls = torch.ones(20), []

    def loss(hidden):
        calls.append(op)
        if op == "linear_loss":
            return linear_loss(hidden, p.weight, p.targets, lambda lp, h, w: ((lp * w).sum(), {}), ones)[0]
        if op == "linear_ppo_loss":
            return linear_ppo_loss(hidden, p.weight, p.targets, -4 * ones, ones, ones.bool())[0]
        return linear_logprob(hidden, p.weight, p.targets).logprob.sum()

    want = torch.autograd.grad(loss(p.hidden), p.inputs())
    calls.clear()
    checkpoint(loss, p.hidden, use_reentrant=reentrant).backward()
    assert len(calls) == 2  # once in the forward, once again in the backward
    assert all(torch.equal(x.grad, w) for x, w in zip(p.inputs(), want, strict=True))


@pytest.mark.parametrize("plan", ["precompute", "cache"])
def test_one_token_without_a_dimension(plan):
    p = make("random", n=1, d=4, v=9)
    hidden, target, weight = p.hidden[0], p.targets[0], torch.tensor(2.0)

    def loss_fn(logprob, entropy, by):
        return (logprob * by).sum(), {"lp": logprob, "pair": torch.stack([logprob, entropy], 1)}

    loss, aux = linear_loss(hidden, p.weight, target, loss_fn, weight, plan=plan)
    assert aux["lp"].shape == ()
    assert aux["pair"].shape == (2,)
    assert loss == 2 * aux["lp"]


@pytest.mark.parametrize("op", ["linear_loss", "linear_ppo_loss"])
def test_batched_upstream_gradients(op):
    """vmap over the backward, as in a Jacobian: the upstream gradient has no one value to look at."""
    p = make("random", n=5, d=4, v=9)
    if op == "linear_loss":
        loss, _ = linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}))
    else:
        zero = torch.zeros(5)
        loss, _ = linear_ppo_loss(p.hidden, p.weight, p.targets, zero - 2, zero + 1, zero == 0)
    want = torch.autograd.grad(loss, p.inputs(), retain_graph=True)
    got = torch.autograd.grad(loss, p.inputs(), torch.tensor([1.0, -2.0]), is_grads_batched=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.stack([b, -2 * b]))


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_give_shapes(kind):
    """As for an estimate of memory before a run."""
    with torch.device("meta") if kind == "meta" else FakeTensorMode():
        hidden, weight = torch.empty(2, 5, 8, requires_grad=True), torch.empty(11, 8, requires_grad=True)
        targets = torch.empty(2, 5, dtype=torch.int64)
        for score in (False, True):
            with torch.set_grad_enabled(not score):
                loss, aux = linear_loss(
                    hidden, weight, targets, lambda lp, e: (-lp.sum(), {"row": e, "sum": lp.sum()}), mask=targets > 0
                )
        assert loss.shape == aux["sum"].shape == () and aux["row"].shape == (2, 5)
        loss, _ = linear_loss(hidden, weight, targets, lambda lp, e: (-lp.sum(), {}))
        loss.backward()
    assert hidden.grad.shape == (2, 5, 8) and weight.grad.shape == (11, 8)


def test_without_gradient_only_the_score_runs(monkeypatch):
    from srppo_kernels.linear_logprob import fused

    monkeypatch.setattr(fused.grads, "gradients", lambda *a, **k: pytest.fail("a gradient was formed"))
    p = make("random", n=30, v=50, grad=(False, False))
    loss, aux = linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {"lp": lp}))
    assert not loss.requires_grad
    assert torch.equal(aux["lp"], p.run().logprob)
    p = make("random", n=30, v=50)
    with torch.no_grad():
        assert not linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}))[0].requires_grad
    assert not linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}), plan="score")[0].requires_grad


def test_clipped_tokens_cost_no_backward_gemm(monkeypatch):
    from srppo_kernels.linear_logprob import backward

    seen = []
    original = backward.over_groups
    monkeypatch.setattr(
        backward, "over_groups", lambda *arguments: (seen.append(arguments[3:5]), original(*arguments))[1]
    )
    p = make("random", n=100, v=60, grad=(True, False))
    old = p.run(plan="score").logprob - torch.where(torch.arange(100) < 70, 1.0, 0.0)  # ratio e or 1
    ones = torch.ones(100)
    linear_ppo_loss(p.hidden, p.weight, p.targets, old, ones, ones.bool())
    [(rows, scalars)] = seen
    assert rows.count == 30
    assert scalars.h is None  # of an entropy without a weight there is no gradient to form


def test_fp16_gradients_wait_for_the_loss_scale():
    """Formed for an upstream of 1 in fp16 they would underflow before the loss scale arrives."""
    p = make("random", n=20, v=3000, dtype=torch.float16)
    q = make("random", n=20, v=3000)
    q.hidden, q.weight, q.targets = p.hidden.detach().float().requires_grad_(), p.weight.detach().float(), p.targets
    g = {}
    for name, problem in (("half", p), ("single", q)):
        loss, _ = linear_loss(problem.hidden, problem.weight, p.targets, lambda lp, h: (lp.sum() * 1e-7, {}))
        (g[name],) = torch.autograd.grad(loss * 65536.0, [problem.hidden])
    assert relative(g["half"], g["single"].double()) < 4e-3


@pytest.mark.parametrize(
    ("loss_fn", "error", "text"),
    [
        (None, TypeError, "loss_fn must be a function of .*, got NoneType"),
        (lambda lp, h: lp.sum(), TypeError, "must return"),
        (lambda lp, h: (lp, {}), ValueError, "0-d tensor"),
        (lambda lp, h: (lp.sum(), {"n": 3}), TypeError, r"aux\['n'\]"),
    ],
)
def test_a_loss_that_returns_something_else(loss_fn, error, text):
    p = make("random", n=4, v=9)
    with pytest.raises(error, match=text):
        linear_loss(p.hidden, p.weight, p.targets, loss_fn)


def test_aux_of_other_names_in_a_later_chunk_is_refused():
    p, names = make("random", n=300, v=9), iter("abc")
    with pytest.raises(ValueError, match=r"aux has keys \['b'\] now and \['a'\] before; return the same"):
        linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {next(names): h}), workspace_bytes=0)


def test_a_closure_over_a_trained_tensor_is_refused():
    p = make("random", n=4, v=9)
    alpha = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="loss_args"):
        linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: ((alpha.exp() * lp).sum(), {}))
    loss, _ = linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: ((alpha.detach() * lp).sum(), {}))
    assert loss.requires_grad
    for off in (torch.no_grad, torch.inference_mode):  # nobody wants a gradient of it
        with off():
            scored, _ = linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: ((alpha * lp).sum(), {}))
        assert not scored.requires_grad
        assert torch.equal(scored, loss.detach())
    with pytest.raises(ValueError, match="loss_args"):  # of a model that is frozen it would be lost as well
        linear_loss(p.hidden.detach(), p.weight.detach(), p.targets, lambda lp, h: ((alpha * lp).sum(), {}))


def test_policy_gradient_of_the_op_and_the_loss_agree_in_bits():
    """The log-probs that a loss sees are those that the op returns."""
    p = make("peaked", n=200, dtype=torch.bfloat16)
    seen = []
    linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (seen.append(lp.detach()) or lp.sum(), {}))
    assert torch.equal(torch.cat(seen), linear_logprob(p.hidden, p.weight, p.targets).logprob)


@pytest.mark.skipif(
    bool(native.obstacle(torch.device("cpu"), (torch.float32, torch.float32))), reason="the extension is not built"
)
def test_a_score_hands_its_bound_to_the_scan(monkeypatch):
    """Of the ops without a gradient; where exponentials are kept, workspace_bytes bounds these and not the scan."""
    p = make("random", n=20)
    scan, bounds = native.scan, []

    def noting(*arguments):
        bounds.append(arguments[-1])
        return scan(*arguments)

    monkeypatch.setattr(native, "scan", noting)
    ones, options = torch.ones(20), {"workspace_bytes": 1 << 20, "backend": "native"}
    with torch.no_grad():
        linear_logprob(p.hidden, p.weight, p.targets, **options)
        linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}), **options)
        linear_ppo_loss(p.hidden, p.weight, p.targets, -ones, ones, ones.bool(), **options)
    assert bounds == [1 << 20] * 3
    linear_ppo_loss(p.hidden, p.weight, p.targets, -ones, ones, ones.bool(), **options)
    assert bounds[3:] == [None]
