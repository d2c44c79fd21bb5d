"""Both GPU backends on a device: values, gradients and bits against float64, and nothing that waits for the device."""

import pytest
import torch
from linear_logprob.head_problems import KINDS, Problem, make, relative, value_bound
from torch import Tensor

from srppo_kernels import explain, linear_logprob, linear_loss, linear_ppo_loss
from srppo_kernels.linear_logprob import fused, sm90

pytestmark = pytest.mark.gpu
BIG = 1 << 30
BACKENDS = ["triton", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(p: Problem, device: str = "cuda") -> Problem:
    def move(t):
        return t.detach().to(device).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return Problem(move(p.hidden), move(p.weight), move(p.targets), {k: move(v) for k, v in p.options.items()})


def check(p: Problem, plan: str, backend: str) -> None:
    """Values in fp32 bounds; gradients within what one rounding to the inputs' dtype makes of them."""
    twin = p.double()
    entropy = plan != "precompute"
    got = p.run(entropy=entropy, plan=plan, workspace_bytes=BIG, backend=backend)
    want = twin.oracle()
    assert (got.logprob - want[0]).abs().max() <= 2 * value_bound(p)
    total, total_want = (got.logprob, want[0]) if not entropy else (got.logprob + got.entropy, want[0] + want[1])
    weights = torch.linspace(0, 1, total.numel(), device=total.device)
    bound = max(1e-5, value_bound(p)) if p.hidden.dtype == torch.float32 else 8e-3
    gradients = torch.autograd.grad((weights * total).sum(), p.inputs())
    for a, b in zip(gradients, torch.autograd.grad((weights * total_want).sum(), twin.inputs()), strict=True):
        assert relative(a, b) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, kind, plan, dtype):
    p = make(kind, n=1100, d=72, dtype=dtype, bias=True, mask=torch.rand(1100) > 0.3, grad=(True, plan != "precompute"))
    check(on_device(p), plan, backend)


@pytest.mark.parametrize("kind", KINDS[2:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_from_zero(backend, kind):
    """verl 2656, 2899, 5349, SkyRL 2141; torch 195829."""
    check(on_device(make(kind, n=300, d=72)), "cache", backend)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("plan", ["recompute", "cache"])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 4.0},
        {"temperature": 0.6, "logit_scale": 0.25},
        {"bias": True, "row_temperature": True, "softcap": 3.0},
    ],
    ids=lambda o: "-".join(o),
)
def test_options(options, plan, dtype):
    options = dict(options)
    per_row = options.pop("row_temperature", False)
    p = make("random", n=500, d=72, dtype=dtype, mask=torch.rand(500) > 0.3, **options)
    if per_row:
        p.options["temperature"] = torch.rand(500) + 0.5
    check(on_device(p), plan, "triton")


@pytest.mark.parametrize("v", [1, 17, 31, 33, 255, 257, 2047, 2049, 4097])
@pytest.mark.parametrize("n", [1, 127, 129])
def test_ragged_sizes(n, v):
    p = on_device(make("random", n=n, d=72, v=v, dtype=torch.bfloat16))
    check(p, "cache", "triton")
    check(p, "recompute", "triton")


@pytest.mark.parametrize("d", [1, 7, 8, 63, 64, 65, 576])
def test_ragged_widths(d):
    """Rows that TMA cannot read, at multiples of less than 16 bytes, go through pointers."""
    check(on_device(make("random", n=200, d=d, dtype=torch.bfloat16)), "cache", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_bits_and_an_unchanged_model(backend):
    """verl 2088, 6280: scored or trained, alone or in a batch; so the ratio is 1 and the reward 0, exactly."""
    p = on_device(make("random", n=1100, dtype=torch.bfloat16))
    whole = p.run(plan="score", backend=backend).logprob
    order = torch.randperm(1100, device="cuda")
    assert torch.equal(
        linear_logprob(p.hidden[order], p.weight, p.targets[order], backend=backend).logprob, whole[order]
    )
    assert torch.equal(linear_logprob(p.hidden[:7], p.weight, p.targets[:7], backend=backend).logprob, whole[:7])
    for plan in ("cache", "recompute"):
        assert torch.equal(p.run(plan=plan, workspace_bytes=BIG, backend=backend).logprob, whole)
    ones = torch.ones(1100, device="cuda")
    _, stats = linear_ppo_loss(p.hidden, p.weight, p.targets, whole, ones, ones.bool(), backend=backend)
    assert stats.ratio_max == 1
    assert stats.approx_kl == 0


@pytest.mark.parametrize("probability", [0.99, 1 - 1e-6])
@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
def test_gradient_of_a_certain_target(plan, probability):
    """Liger 1329, TE 3193."""
    v = 3000
    a = torch.log(torch.tensor((v - 1) * probability / (1 - probability), dtype=torch.float64))
    weight = torch.zeros(v, 8, device="cuda")
    weight[1234, 0] = 1.0
    hidden = torch.zeros(5, 8, device="cuda")
    hidden[:, 0] = a.float()
    hidden.requires_grad_()
    weight.requires_grad_(plan != "precompute")
    targets = torch.full((5,), 1234, device="cuda")
    out = linear_logprob(hidden, weight, targets, plan=plan, workspace_bytes=BIG, backend="triton")
    out.logprob.sum().backward()
    exact = (v - 1) / (hidden[0, 0].detach().double().exp() + v - 1)
    assert abs(hidden.grad[0, 0].double() / exact - 1) < 2e-6
    assert abs(out.logprob[0].detach().double() / torch.log1p(-exact) - 1) < 2e-6


@pytest.mark.parametrize("plan", ["recompute", "cache", "precompute"])
def test_masked_rows_reach_nobody(plan):
    p = on_device(make("random", n=700, mask=torch.rand(700) > 0.5, grad=(True, plan != "precompute")))
    mask = p.options["mask"]
    with torch.no_grad():
        p.hidden[~mask] = torch.nan
    p.targets[~mask] = 10**6
    got = p.run(plan=plan, workspace_bytes=BIG, backend="triton")
    gradients = torch.autograd.grad(got.logprob.sum(), p.inputs())
    assert (got.logprob[~mask] == 0).all() and (gradients[0][~mask] == 0).all()
    assert all(t.isfinite().all() for t in gradients)


def test_chunks_and_a_callers_buffer():
    p = on_device(make("random", n=3000, d=72, dtype=torch.bfloat16, mask=torch.rand(3000) > 0.3))
    g = torch.linspace(0, 1, 3000, device="cuda")
    twin = p.double()
    want = torch.autograd.grad((twin.oracle()[0] * g).sum(), twin.inputs())
    buffer = torch.full_like(p.weight, 2.0, dtype=torch.float32)
    options = {"mask": p.options["mask"], "backend": "triton", "workspace_bytes": 1024 * 2500 * 2}
    args = (p.hidden, p.weight, p.targets, lambda lp, h, w: ((lp * w).sum(), {}), g)
    assert explain(*args, op="linear_loss", **options).rows_per_chunk == 1024
    loss, _ = linear_loss(*args, **options, grad_weight_out=buffer)
    loss.backward()
    assert relative(buffer - 2, want[1]) < 8e-3
    assert relative(p.hidden.grad, want[0]) < 8e-3


@pytest.mark.parametrize("op", ["linear_loss", "linear_ppo_loss"])
def test_an_upstream_gradient_is_multiplied_in_place_where_the_graph_is_freed(op, monkeypatch):
    """No second dweight, and a retained graph's is not touched."""
    formed = []
    original = fused.run
    monkeypatch.setattr(fused, "run", lambda *a, **k: (formed.append(original(*a, **k)), formed[-1])[1])
    p = on_device(make("random", n=300, dtype=torch.bfloat16))
    old, ones = p.run(plan="score").logprob, torch.ones(300, device="cuda")

    def loss():
        if op == "linear_loss":
            return linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}))[0]
        return linear_ppo_loss(p.hidden, p.weight, p.targets, old, ones, ones.bool())[0]

    for factor in (1.0, 2.0, 1 / 3):
        kept = factor * loss()
        want = [(t.float() * torch.tensor(factor).item()).bfloat16() for t in formed[-1][:2]]
        first = torch.autograd.grad(kept, p.inputs(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, want, strict=True))
        for g in first:
            g.mul_(7.0)  # what a retained graph has handed out may be written to, as clipping does
        second = torch.autograd.grad(kept, p.inputs())
        assert all(torch.equal(a, b) for a, b in zip(second, want, strict=True))
        assert [g.data_ptr() for g in second] == [t.data_ptr() for t in formed[-1][:2]]


def test_a_whole_step_in_a_graph():
    """Forward and backward of the PPO loss, captured once: replays see another mask and another upstream gradient."""
    p = on_device(make("random", n=600, dtype=torch.bfloat16))
    mask, factor = torch.rand(600, device="cuda") > 0.3, torch.ones((), device="cuda")
    old, advantages = torch.full((600,), -8.0, device="cuda"), torch.randn(600, device="cuda")

    def gradients():
        loss, _ = linear_ppo_loss(p.hidden, p.weight, p.targets, old, advantages, mask)
        return torch.autograd.grad(loss, p.inputs(), factor)

    stream = torch.cuda.Stream()  # a graph's backward must not meet the default stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    for share, upstream in ((0.9, 1.0), (0.3, 0.5)):
        mask.copy_(torch.rand(600, device="cuda") < share)
        factor.fill_(upstream)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, gradients(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits(backend):
    p = on_device(make("random", n=300, dtype=torch.bfloat16, mask=torch.rand(300) > 0.3))
    ones = torch.ones(300, device="cuda")
    mask = p.options["mask"]
    p.run(entropy=True, plan="recompute", backend=backend).logprob.sum().backward()  # kernels compile here
    linear_ppo_loss(p.hidden, p.weight, p.targets, -ones, ones, mask, backend=backend)[0].backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.run(entropy=True, plan="recompute", backend=backend).logprob.sum().backward()
        linear_ppo_loss(p.hidden, p.weight, p.targets, -ones, ones, mask, backend=backend)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_a_graph_with_another_mask():
    """A captured call, replayed with other rows masked: the count is read on the device."""
    p = on_device(make("random", n=600, dtype=torch.bfloat16, mask=torch.rand(600) > 0.3, grad=(False, False)))
    mask = p.options["mask"]
    for _ in range(2):
        p.run(entropy=True, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = p.run(entropy=True, backend="triton")
    for share in (0.9, 0.1):
        mask.copy_(torch.rand(600, device="cuda") < share)
        graph.replay()
        again = p.run(entropy=True, backend="triton")
        assert torch.equal(out.logprob, again.logprob) and torch.equal(out.entropy, again.entropy)


def test_on_another_stream():
    p = on_device(make("random", n=600, dtype=torch.bfloat16))
    expected = p.run(backend="triton", plan="score").logprob
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = p.run(backend="triton", plan="score").logprob
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_a_device_that_is_not_current():
    p = make("random", n=100, dtype=torch.bfloat16)
    first, second = (on_device(p, f"cuda:{i}").run(backend="triton", plan="score").logprob for i in range(2))
    assert torch.equal(first.cpu(), second.cpu())


def test_compiled():
    p = on_device(make("random", n=200, dtype=torch.bfloat16))

    def loss(hidden, weight):
        return linear_logprob(hidden, weight, p.targets, entropy=True, plan="recompute", backend="triton").logprob.sum()

    eager = torch.autograd.grad(loss(p.hidden, p.weight), p.inputs())
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(p.hidden, p.weight), p.inputs())
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_more_than_2_to_the_31_logits():
    """Liger 803, 1294, 1296, CCE 37: N V = 2.3e9 kept exponentials, N > 65535, and the last rows are right."""
    n, d, v = 70_000, 16, 33_000
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free device memory")
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(v, d, device="cuda", dtype=torch.bfloat16).mul_(0.3)
    targets = torch.randint(v, (n,), device="cuda")
    out = linear_logprob(
        hidden, weight.requires_grad_(), targets, plan="cache", workspace_bytes=1 << 40, backend="triton"
    )
    dhidden, _ = torch.autograd.grad(out.logprob.sum(), [hidden, weight])
    tail = slice(n - 64, n)
    x = hidden[tail].detach().double().requires_grad_()
    want = torch.log_softmax(x @ weight.detach().double().T, 1).gather(1, targets[tail, None])[:, 0]
    assert (out.logprob[tail] - want).abs().max() < 1e-5
    assert relative(dhidden[tail], torch.autograd.grad(want.sum(), x)[0]) < 8e-3


@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_error_of_a_real_head(kind):
    """D = 4096, V = 151936, bf16 inputs. Tensor cores truncate their accumulator: Triton's scan is off by what cuBLAS
    is with fp32 results, 6e-5 and 1.2e-4 here; the scan for sm_90a adds K up in blocks and stays within 2e-5."""
    p = on_device(make(kind, n=256, d=4096, v=151_936, dtype=torch.bfloat16, grad=(False, False)))
    if kind == "random":
        p.hidden.mul_(0.15)

    def logprob(logits: Tensor, part: slice) -> Tensor:
        return torch.log_softmax(logits.double(), 1).gather(1, p.targets[part, None])[:, 0]

    parts = [slice(a, a + 32) for a in range(0, 256, 32)]
    want = torch.cat([logprob(p.hidden[r].double() @ p.weight.double().T, r) for r in parts])
    cublas = torch.cat([logprob(torch.mm(p.hidden[r], p.weight.T, out_dtype=torch.float32), r) for r in parts])
    assert (p.run(backend="triton").logprob - want).abs().max() < 1.1 * (cublas - want).abs().max()
    if not sm90.obstacle(p.hidden, p.weight):
        assert (p.run().logprob - want).abs().max() < 2e-5
