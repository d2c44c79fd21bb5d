"""The Triton kernels in Triton's interpreter, against float64, on shapes that are small and ragged in every dimension.

Tiles are 16 x 64 x 16 there and groups 128 entries, so that 37 rows over 300 entries of width 24 are several blocks,
tiles, groups and steps of K, each with a rest. The interpreter truncates where a GPU rounds to bf16, which doubles that
error; bounds for 16-bit gradients allow for it.
"""

from dataclasses import replace

import pytest
import torch
from interpreted import fresh_memory_is_nan
from linear_logprob.head_problems import KINDS, Problem, make, relative, value_bound
from torch import Tensor

from srppo_kernels import _triton, explain, linear_log_ratio, linear_logprob, linear_loss, linear_ppo_loss
from srppo_kernels.linear_logprob import fused, gpu, triton_gradients
from srppo_kernels.linear_logprob.backward import Destination, RowScalars
from srppo_kernels.linear_logprob.chunked import Head, Residual, RowOutputs
from srppo_kernels.linear_logprob.rows import Rows

pytestmark = pytest.mark.skipif(not _triton.interpreted(), reason=f"not interpreted here: {_triton.why()}")
BIG = 1 << 30
N, D, V = 37, 24, 300
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Loops and grids that small shapes would go through once take several turns, as those of large ones do."""
    from srppo_kernels.linear_logprob import triton_dz, triton_passes, triton_scan

    monkeypatch.setattr(triton_scan, "MERGED", (32, 2))
    monkeypatch.setattr(triton_passes, "GATHERED", (8, 16))
    monkeypatch.setattr(triton_passes, "SCALED", 1024)
    monkeypatch.setattr(triton_passes, "SCALE_PROGRAMS", 2)
    monkeypatch.setattr(triton_dz, "DZ_STILL_MAXIMA", 4)
    monkeypatch.setattr(gpu, "CHUNK_GROUPS", 1)  # a dz of its own is one of 128 entries
    with fresh_memory_is_nan():
        yield


def small(kind: str = "random", **options: object) -> Problem:
    return make(kind, **{"n": N, "d": D, "v": V, "mask": torch.rand(N) > 0.3, **options})  # type: ignore[arg-type]


def weighted(logprob: Tensor, entropy: Tensor | None, lse: Tensor | None) -> Tensor:
    """A scalar in which every output of every row has a weight of its own, the first log-prob's being 0."""
    w = torch.linspace(0, 1, logprob.numel()).reshape(logprob.shape)
    total = (w * logprob).sum()
    if entropy is not None:
        total = total + ((1 - w) * entropy).sum()
    return total if lse is None else total + (w * w * lse).sum()


def check(p: Problem, plan: str, **more: object) -> None:
    """Values in fp32 bounds; gradients in those of one rounding (here: truncation) to the inputs' dtype."""
    twin = p.double()
    entropy = plan != "precompute"
    got = p.run(backend="triton", plan=plan, entropy=entropy, lse=True, workspace_bytes=BIG, **more)
    oracle = twin.oracle()
    want = (oracle[0], oracle[1] if entropy else None, oracle[2])
    for a, b in zip(got, want, strict=True):
        if a is not None and b is not None:
            assert (a.double() - b).abs().max() <= 2 * value_bound(p)
    bound = value_bound(p) if p.hidden.dtype == torch.float32 else 1.2e-2
    gradients = torch.autograd.grad(weighted(*got), p.inputs())
    for a, b in zip(gradients, torch.autograd.grad(weighted(*want), twin.inputs()), strict=True):
        assert relative(a, b) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["cache", "recompute", "precompute"])
def test_against_float64(plan, dtype):
    check(small(dtype=dtype, bias=True, grad=(True, plan != "precompute")), plan)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_rows_of_every_kind(kind):
    """Peaked rows, all logits negative or positive, offsets of +-1e4 (verl 2656, 2899, 5349; torch 195829)."""
    check(small(kind), "cache")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"logit_scale": 0.25},
        {"softcap": 4.0},
        {"bias": True, "temperature": 1.7, "logit_scale": 2.0, "softcap": 6.0},
        {"bias": True, "row_temperature": True, "logit_scale": -0.5, "softcap": 3.0},
    ],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("plan", ["cache", "recompute"])
def test_options(plan, options):
    """CCE 52, 53 (bias on and off), and the order of scale, cap and temperature."""
    options = dict(options)
    per_row = options.pop("row_temperature", False)
    p = small(**options)
    if per_row:
        p.options["temperature"] = torch.rand(N) + 0.5
    check(p, plan)


@pytest.mark.parametrize("which", ["logprob", "entropy", "lse", "none"])
@pytest.mark.parametrize("plan", ["cache", "recompute"])
def test_each_gradient_alone(plan, which):
    """TRL 6625: entropy only, log-prob only, neither; targets on both sides of parts, tiles and groups among others."""
    p = small(n=20)
    p.options["mask"] = None
    p.targets[:10] = torch.tensor([0, 31, 32, 63, 64, 127, 128, 255, 256, V - 1])
    twin = p.double()
    got = p.run(entropy=True, lse=True, plan=plan, workspace_bytes=BIG, backend="triton")
    if which == "none":
        assert all((t == 0).all() for t in torch.autograd.grad(got.logprob.sum() * 0.0, p.inputs()))
        return
    index = ("logprob", "entropy", "lse").index(which)
    want = torch.autograd.grad(twin.oracle()[index].sum(), twin.inputs())
    for a, b in zip(torch.autograd.grad(got[index].sum(), p.inputs()), want, strict=True):
        assert relative(a, b) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row(dtype):
    """Alone, in a batch, permuted, scored and trained (verl 2088, 6280), and from run to run.

    Of sixteenths, whose products add up exactly: here NumPy's BLAS multiplies, and one of its kernels adds up rows in
    another order at a block's end.
    """
    p = small(dtype=dtype)
    p.options["mask"] = None
    with torch.no_grad():
        for t in (p.hidden, p.weight):
            t.copy_((t * 16).round() / 16)
    whole = p.run(plan="score", entropy=True, backend="triton")
    order = torch.randperm(N)
    permuted = linear_logprob(p.hidden[order], p.weight, p.targets[order], entropy=True, plan="score", backend="triton")
    alone = linear_logprob(p.hidden[5:6], p.weight, p.targets[5:6], entropy=True, plan="score", backend="triton")
    for a, b, c in zip(whole[:2], permuted[:2], alone[:2], strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[5:6], c)
    for plan in ("cache", "recompute"):
        trained = p.run(plan=plan, entropy=True, workspace_bytes=BIG, backend="triton")
        assert torch.equal(trained.logprob, whole.logprob) and torch.equal(trained.entropy, whole.entropy)
    ones = torch.ones(N)
    _, stats = linear_ppo_loss(
        p.hidden, p.weight, p.targets, whole.logprob.detach(), ones, ones.bool(), backend="triton"
    )
    assert stats.ratio_max == 1 and stats.approx_kl == 0


@pytest.mark.parametrize("plan", ["cache", "recompute", "precompute"])
@pytest.mark.parametrize("probability", [0.99, 1 - 1e-6])
def test_gradient_of_a_certain_target(probability, plan):
    """Liger 1329, TE 3193: 1 - p_y must keep its digits where p_y is near 1."""
    a = torch.log(torch.tensor((V - 1) * probability / (1 - probability), dtype=torch.float64))
    weight = torch.zeros(V, 8)
    weight[123, 0] = 1.0
    hidden = torch.zeros(3, 8)
    hidden[:, 0] = a.float()
    hidden.requires_grad_()
    weight.requires_grad_(plan != "precompute")
    out = linear_logprob(hidden, weight, torch.full((3,), 123), plan=plan, workspace_bytes=BIG, backend="triton")
    out.logprob.sum().backward()
    exact = (V - 1) / (hidden[0, 0].detach().double().exp() + V - 1)
    assert hidden.grad is not None
    assert abs(hidden.grad[0, 0].double() / exact - 1) < 2e-6
    assert abs(out.logprob[0].detach().double() / torch.log1p(-exact) - 1) < 2e-6


@pytest.mark.parametrize("plan", ["cache", "recompute", "precompute"])
def test_masked_rows_reach_nobody(plan):
    """NaN and inf in masked rows stay there; so do targets outside of the vocabulary, and NaN temperatures.

    Of 150 rows fewer than 128 are live: dz is not written from there on.
    """
    p = small(n=150, d=16, v=60, mask=torch.rand(150) > 0.3, grad=(True, plan != "precompute"))
    mask = p.options["mask"]
    with torch.no_grad():
        p.hidden[~mask] = torch.tensor([float("nan"), float("inf")])[torch.arange(int((~mask).sum())) % 2][:, None]
    p.targets[~mask] = 10**6
    p.options["temperature"] = torch.where(mask, 1.5, float("nan"))
    got = p.run(plan=plan, workspace_bytes=BIG, backend="triton", lse=True)
    gradients = torch.autograd.grad(weighted(*got), p.inputs())
    assert (got.logprob[~mask] == 0).all() and (got.lse[~mask] == 0).all()
    assert (gradients[0][~mask] == 0).all()
    clean = Problem(p.hidden[mask].detach().requires_grad_(), p.weight, p.targets[mask], {"temperature": 1.5})
    assert torch.equal(clean.run(plan="score", backend="triton").logprob, got.logprob[mask])
    assert all(t.isfinite().all() for t in gradients)


@pytest.mark.parametrize("plan", ["cache", "recompute"])
def test_products_over_all_rows_read_zeros_of_those_without_a_gradient(plan):
    """Where there is no mask cuBLAS multiplies all 150, of which 75 have one."""
    p = small(n=150, d=16, v=60, mask=None)
    g, twin = torch.arange(150.0) % 2, p.double()
    logprob = p.run(plan=plan, workspace_bytes=BIG, backend="triton").logprob
    gradients = torch.autograd.grad((g * logprob).sum(), p.inputs())
    for a, b in zip(gradients, torch.autograd.grad((g * twin.oracle()[0]).sum(), twin.inputs()), strict=True):
        assert relative(a, b) < 3e-6


@pytest.mark.parametrize("keep", [torch.arange(70) % 3 == 1, torch.arange(70) != 1], ids=["a third", "all but one"])
def test_rows_without_a_gradient_are_dropped(keep):
    """Zero upstream gradients, as clipped PPO tokens have: in place, the rows that stay move up over them."""
    p = small(dtype=torch.float32, n=70, bias=True)
    p.options["mask"] = torch.arange(70) % 7 != 0

    def loss(logprob, entropy, w):
        return (w * logprob).sum() + (w * w * entropy).sum(), {}

    w = torch.where(keep, torch.linspace(0.1, 1, 70), 0)
    value, _ = linear_loss(p.hidden, p.weight, p.targets, loss, w, **p.options, backend="triton", plan="precompute")
    twin = p.double()
    oracle = twin.oracle()
    want = torch.autograd.grad(loss(oracle[0], oracle[1], w.double())[0], twin.inputs())
    for a, b in zip(torch.autograd.grad(value, p.inputs()), want, strict=True):
        assert relative(a, b) < 3e-6


def test_no_row_and_one():
    p = small(n=1)
    p.options["mask"] = None
    check(p, "cache")
    nothing = linear_logprob(p.hidden[:0], p.weight, p.targets[:0], backend="triton", plan="cache")
    assert nothing.logprob.shape == (0,)
    (dweight,) = torch.autograd.grad(nothing.logprob.sum(), [p.weight])
    assert (dweight == 0).all()
    buffer = torch.full_like(p.weight, 2.0)
    args = (p.hidden[:0], p.weight, p.targets[:0])
    linear_logprob(*args, grad_weight_out=buffer, backend="triton", plan="cache").logprob.sum().backward()
    assert (buffer == 2).all()


def test_all_rows_masked():
    p = small(bias=True)
    p.options["mask"] = torch.zeros(N, dtype=torch.bool)
    for plan in ("cache", "recompute"):
        got = p.run(plan=plan, workspace_bytes=BIG, backend="triton", entropy=True)
        assert (got.logprob == 0).all() and (got.entropy == 0).all()
        assert all((t == 0).all() for t in torch.autograd.grad(weighted(*got), p.inputs()))


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)])
def test_chunks_of_rows_and_a_callers_buffer(dtype, masked, monkeypatch):
    """Chunks that add up: dweight in fp32, or into grad_weight_out (Liger 1082: invariance to the split); unmasked by
    cuBLAS, in parts of the vocabulary."""
    monkeypatch.setattr(triton_gradients, "WIDE_PART", 64)
    mask = torch.rand(150) > 0.3 if masked else None
    p = small(n=150, d=16, v=96, dtype=dtype, bias=True, mask=mask)
    g = torch.linspace(0, 1, 150)
    twin = p.double()
    want = torch.autograd.grad((twin.oracle()[0] * g).sum(), twin.inputs())
    bound = 3e-6 if dtype == torch.float32 else 1.2e-2
    options = {**p.options, "backend": "triton", "workspace_bytes": 128 * 96 * dtype.itemsize}
    args = (p.hidden, p.weight, p.targets, lambda lp, h, w: ((lp * w).sum(), {}), g)
    assert explain(*args, op="linear_loss", **options).rows_per_chunk == 128
    loss, _ = linear_loss(*args, **options)
    for a, b in zip(torch.autograd.grad(loss, p.inputs()), want, strict=True):
        assert relative(a, b) < bound
    buffer = torch.full((96, 16), 2.0)
    loss, _ = linear_loss(*args, **options, grad_weight_out=buffer)
    loss.backward()
    assert relative(buffer - 2, want[1]) < bound and relative(p.options["bias"].grad, want[2]) < bound
    buffer.fill_(2.0)
    p.run(plan="recompute", backend="triton", grad_weight_out=buffer).logprob.backward(g)
    assert relative(buffer - 2, want[1]) < bound


def test_backward_twice():
    """QuACK 209: the kept exponentials survive a backward."""
    p = small(dtype=torch.bfloat16)
    before = [t.detach().clone() for t in p.inputs()]
    loss = weighted(*p.run(plan="cache", entropy=True, workspace_bytes=BIG, backend="triton"))
    first = torch.autograd.grad(loss, p.inputs(), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, p.inputs()), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, p.inputs(), strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("op", ["linear_loss", "linear_ppo_loss"])
def test_an_upstream_gradient_is_multiplied_in_place_where_the_graph_is_freed(op, backend, monkeypatch):
    """No second dweight, and a retained graph's is not touched; "triton" as on a device, which looks at the factor."""
    formed = []
    original = fused.run
    monkeypatch.setattr(fused, "run", lambda *a, **k: (formed.append(original(*a, **k)), formed[-1])[1])
    if backend == "triton":
        monkeypatch.setattr(fused, "_on_device", lambda *_: True)
        monkeypatch.setattr(fused, "_are_there", lambda *_: False)
    p = small(dtype=torch.bfloat16, mask=None)
    old, ones = p.run(plan="score", backend=backend).logprob, torch.ones(N)

    def loss():
        if op == "linear_loss":
            return linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}), backend=backend)[0]
        return linear_ppo_loss(p.hidden, p.weight, p.targets, old, ones, ones.bool(), backend=backend)[0]

    for factor in (1.0, 2.0, -0.75):
        kept = factor * loss()
        want = [t.float() * factor for t in formed[-1][:2]]
        first = torch.autograd.grad(kept, p.inputs(), retain_graph=True)
        bound = 0 if factor != -0.75 else 2**-7  # to bf16, which the interpreter truncates to
        assert all(relative(a.float(), b) <= bound for a, b in zip(first, want, strict=True))
        copies = [g.clone() for g in first]
        for g in first:
            g.mul_(7.0)  # what a retained graph has handed out may be written to, as clipping does
        second = torch.autograd.grad(kept, p.inputs())
        assert all(torch.equal(a, b) for a, b in zip(second, copies, strict=True))
        assert [g.data_ptr() for g in second] == [t.data_ptr() for t in formed[-1][:2]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [0, 1, 4097])
def test_live_rows_and_their_targets(n, masked, dtype):
    from srppo_kernels.linear_logprob.gpu import live_targets
    from srppo_kernels.linear_logprob.op import live_rows

    targets, mask = torch.randint(-2, V + 2, (n,)).to(dtype), (torch.rand(n, 2) < 0.7)[:, 0] if masked else None
    for ignore_index in (-1, 3):
        fine = live_rows(targets, mask, ignore_index) & (targets >= 0) & (targets < V)
        some = targets.masked_fill(~fine, ignore_index)
        live, fit = live_targets(torch.stack([some, some + 1], 1)[:, 0], mask, ignore_index, V)
        assert torch.equal(live, live_rows(some, mask, ignore_index)) and fit.tolist() == [1]
        if mask is not None:  # what was viewed as bool may be any number but 0
            bytes_ = (mask.to(torch.uint8) * torch.randint(2, 256, (n,)).to(torch.uint8)).view(torch.bool)
            assert torch.equal(live_targets(some, bytes_, ignore_index, V)[0], live)
        for wrong, at in ((-5, slice(-1, None)), (V, slice(-1, None)), (V + 1, slice(1))):
            off = some.clone()
            off[at] = wrong
            live, fit = live_targets(off, mask, ignore_index, V)
            assert torch.equal(live, live_rows(off, mask, ignore_index))
            assert fit.tolist() == [int(not live[at].any())]


def test_outputs_of_a_state():
    """As accurate as torch's, of states around a maximum and around a target's logit; 0 in masked rows."""
    n = 5000
    m, s = torch.randn(n) * 50, torch.empty(n).uniform_(-30, 15).exp()
    d = -torch.empty(n).uniform_(-15, 4.7).exp()
    d[::3] = 0
    d[1::6] *= -1e-6  # z_y as the scan has it may be above the number that it was around
    s[d < -0.3] += 1  # a maximum that is not the target's logit is in the sum
    s[7], d[8] = torch.inf, torch.nan
    state = torch.stack([m, s, -10 * s * torch.rand(n), m + d])
    live = torch.rand(n) < 0.9
    live[7:9] = True
    for entropy in (False, True):
        got = gpu.outputs(state, live, entropy)
        own = RowOutputs.of(state, entropy=entropy)
        m, s, t, z_y = state.double()
        total = s + (z_y - m).exp()
        of_log_s = (s + torch.expm1(z_y - m).abs()) / total
        sizes = (z_y - m).abs() + of_log_s, of_log_s + (t / total).abs() + 1, m.abs() + of_log_s + 1, m.abs(), of_log_s
        exact = RowOutputs.of(state.double(), entropy=entropy)
        for value, torchs, wanted, size in zip(got, own, exact, sizes, strict=True):
            assert (value[~live] == 0).all() and torch.equal(value.isnan(), torchs.isnan() & live)
            finite = live & wanted.isfinite()
            assert torch.equal(value[live & ~finite].nan_to_num(), torchs[live & ~finite].nan_to_num())
            assert ((value - wanted).abs() <= 3e-7 * (size + wanted.abs()).nan_to_num())[finite].all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 2, 4095, 4096, 4097, 9000])
def test_rows_are_listed(n, share):
    from srppo_kernels.linear_logprob.triton_tiles import row_list

    live = torch.rand(n) < share
    rows, want = row_list(live), live.nonzero()[:, 0]
    assert rows.count.tolist() == [len(want)]
    assert torch.equal(rows.index, torch.cat([want, (~live).nonzero()[:, 0]]))


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 60, 5000])
def test_rows_with_a_gradient_fill_the_places_of_others(n, share, monkeypatch):
    from srppo_kernels.linear_logprob import triton_passes
    from srppo_kernels.linear_logprob.triton_passes import place

    monkeypatch.setattr(triton_passes, "MOVED", (2, 32))  # of 48 columns
    monkeypatch.setattr(triton_passes, "PLACED", 512)
    live, log_sum, temperature = torch.rand(n) < 0.8, torch.rand(n) * 20, torch.rand(n) + 0.5
    log_sum[~live] = torch.nan
    order, g = live.nonzero()[:, 0], torch.randn(n).masked_fill(torch.rand(n) >= share, 0)
    kept = torch.zeros(n + 1, gpu.whole_columns(35))[:, :35]
    kept[: len(order)] = order[:, None] + torch.arange(1.0, 36.0)
    live, g, log_sum = (torch.stack([t, t], 1)[:, 0] for t in (live, g, log_sum))  # views, as an upstream may be
    for moves in (False, True):
        listed = live & (g != 0) if moves else live
        index, count, factor = place(kept[:n], live, g, log_sum, temperature, -0.7, moves=moves)
        total = int(listed.sum())
        assert count.tolist() == [total]
        rows, others = index.split([total, n - total])
        assert torch.equal(rows.sort()[0], listed.nonzero()[:, 0]) and torch.equal(others, (~listed).nonzero()[:, 0])
        assert torch.equal(kept[:total], rows[:, None] + torch.arange(1.0, 36.0))
        stay = listed[order[:total]]  # those that need not move do not
        assert torch.equal(rows[stay], order[:total][stay])
        exact = torch.where(live & (g != 0), -0.7 * g.double() * (-log_sum.double()).exp() / temperature, 0)
        assert ((factor - exact).abs() <= 4e-7 * exact.abs()).all()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32, torch.float16), (torch.float64,) * 2])
@pytest.mark.parametrize("elements", [0, 1, 5000])
def test_scale(elements, dtypes):
    from srppo_kernels.linear_logprob import triton_passes

    formed = torch.randn(elements, dtype=torch.float64).to(dtypes[0])
    kept = formed.clone()
    for factor in (1.0, 0.5, float("nan")):
        upstream = torch.tensor(factor)
        apart = triton_passes.scale(formed, upstream, dtypes[1], in_place=False)
        assert torch.equal(formed, kept) and apart.dtype == dtypes[1]
        assert apart.data_ptr() != formed.data_ptr() or not elements
        same = triton_passes.scale(formed.clone(), upstream, dtypes[1], in_place=True)
        assert torch.equal(apart.nan_to_num(), same.nan_to_num())
        assert torch.equal((formed * upstream).to(dtypes[1]).nan_to_num(), apart.nan_to_num())


def test_strides_and_integer_targets():
    """Rows, biases and heads that are views, a transposed head, int32 targets, leading dimensions."""
    p = small(n=36, bias=True, mask=None)
    expected = p.run(plan="score", backend="triton").logprob
    wide = torch.zeros(36, 2 * D)
    wide[:, ::2] = p.hidden.detach()
    transposed, bias = p.weight.detach().T.contiguous().T, torch.stack([p.options["bias"].detach()] * 2, 1)[:, 0]
    got = linear_logprob(
        wide[:, ::2].view(4, 9, D), transposed, p.targets.view(4, 9).int(), bias=bias, backend="triton", plan="score"
    )
    assert torch.equal(got.logprob.flatten(), expected)


@pytest.mark.parametrize("plan", ["cache", "recompute"])
def test_gradients_of_a_transposed_head_and_of_strided_rows(plan):
    p = small()
    wide, head = torch.zeros(N, 2 * D)[:, ::2].copy_(p.hidden.detach()), p.weight.detach().T.contiguous().T
    check(replace(p, hidden=wide.requires_grad_(), weight=head.requires_grad_()), plan)


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_mixed_dtypes(pair):
    p = small()
    mixed = Problem(
        p.hidden.detach().to(pair[0]).requires_grad_(), p.weight.detach().to(pair[1]).requires_grad_(), p.targets,
        p.options,
    )  # fmt: skip
    check(mixed, "recompute")


def test_a_bias_rules_an_entry_out():
    p = small(bias=True)
    with torch.no_grad():
        p.options["bias"] += 96  # a masked row's exponentials overflow
        p.options["bias"][::3] = float("-inf")
        p.targets.clamp_(max=V - 2).add_((p.targets % 3 == 0).long())
    twin = p.double()
    got = p.run(backend="triton", entropy=True, plan="recompute")
    want = twin.oracle()
    assert (got.logprob - want[0]).abs().max() < 3e-5 and (got.entropy - want[1]).abs().max() < 3e-5
    assert all(t.isfinite().all() for t in torch.autograd.grad(8 * weighted(*got), p.inputs()))


def test_a_first_part_and_a_whole_group_that_are_ruled_out():
    """Parts are 64 entries and groups 128 here: entries 0 to 63, and 128 to 255."""
    p = small(bias=True)
    with torch.no_grad():
        p.options["bias"][:64] = float("-inf")
        p.options["bias"][128:256] = float("-inf")
        p.targets.copy_(64 + p.targets % 64)
    twin = p.double()
    want = twin.oracle()
    for plan in ("cache", "recompute"):
        got = p.run(backend="triton", entropy=True, plan=plan, workspace_bytes=BIG)
        assert (got.logprob - want[0]).abs().max() < 1e-5 and (got.entropy - want[1]).abs().max() < 1e-5
        assert all(t.isfinite().all() for t in torch.autograd.grad(weighted(*got), p.inputs()))


def test_a_nan_in_a_live_row_stays_in_its_row():
    for options in ({}, {"softcap": 4.0}, {"bias": True}):
        p = small(**options)
        p.options["mask"] = None
        with torch.no_grad():
            p.hidden[3, 5] = float("nan")
        got = p.run(backend="triton", entropy=True, plan="score")
        bad = torch.arange(N) == 3
        assert got.logprob.isnan().equal(bad) and got.entropy.isnan().equal(bad), options


def test_a_target_of_another_ranks_shard():
    """What a rank scans may hold targets just beyond its shard: they are not the columns that fill up its last tile."""
    p = small()
    live = torch.arange(N) != 5
    rows = Rows(0, N, live=live)
    head = Head(p.weight.detach(), None, None, 1.0, 1.0, None)
    targets = torch.tensor([-5, V, V + 3]).repeat(N)[:N]
    state = gpu.scan(p.hidden.detach(), head, targets, None, rows, True, None, None)
    assert (state[3] == 0).all()
    assert state[0, 5] < -1e38 and (state[1:, 5] == 0).all()  # a masked row's is that of no entry
    z = p.hidden.detach().double() @ p.weight.detach().double().T
    assert (state[0] + state[1].log() - torch.logsumexp(z, 1))[live].abs().max() < 1e-5
    assert (state[0] - z.amax(1))[live].abs().max() < 1e-5


@pytest.fixture
def checked(monkeypatch):
    """Arithmetic in the interpreter that overflows 32 bits is an error, in masked lanes as well."""
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))


def far(t: Tensor) -> Tensor:
    """One row, or one column, with a stride of 2^30."""
    return t.as_strided(t.shape, tuple(1 if size > 1 else 1 << 30 for size in t.shape))


@pytest.mark.parametrize("plan", ["cache", "recompute"])
@pytest.mark.parametrize("shape", [(1, 40, 1), (5, 1, 70)])
def test_offsets_take_64_bits(plan, shape, checked):
    """Of hidden states and weights."""
    n, d, v = shape
    p = small(n=n, d=d, v=v, mask=None)
    away = Problem(far(p.hidden.detach()).requires_grad_(), far(p.weight.detach()).requires_grad_(), p.targets, {})
    check(away, plan)


def test_offsets_of_exponentials_take_64_bits(checked):
    """From a scan that keeps them to dz in their place, and the products of that."""
    from srppo_kernels.linear_logprob.triton_gradients import over_vocabulary

    v = 150
    p = small(n=1, d=16, v=v, mask=None, grad=(False, False))
    live, head = torch.ones(1, dtype=torch.bool), Head(p.weight, None, None, 1.0, 1.0, None)
    kept = far(torch.zeros(1, gpu.whole_columns(v)))[:, :v]
    residual = Residual(kept, far(torch.zeros(1, gpu.maxima(v))))
    state = gpu.scan(p.hidden, head, p.targets, None, Rows(0, 1, live=live), False, residual, None)
    _, _, _, row_max, log_sum = RowOutputs.of(state, entropy=False)
    dz = torch.softmax(p.hidden.double() @ p.weight.double().T, 1)
    dz[0, p.targets] -= 1
    scalars = RowScalars(torch.ones(1), None, dz[0, p.targets].float(), row_max, log_sum)
    into = Destination(True, torch.empty(v, 16), torch.empty(v))
    dhidden = over_vocabulary(
        p.hidden, head, p.targets, live, scalars, None, into, residual, live, consume=True, dense=False, dz_bytes=BIG
    )
    for got, want in ((dhidden, dz @ p.weight.double()), (into.weight, dz.T @ p.hidden.double()), (into.bias, dz[0])):
        assert relative(got, want) < 3e-6
    assert relative(residual.kept, dz) < 3e-6


def test_offsets_of_rows_that_move_take_64_bits(checked):
    """Of four rows 2^30 apart the last, at 3 x 2^30, comes to the place of the third, at 2^31."""
    from srppo_kernels.linear_logprob.triton_passes import place

    kept = torch.empty(3 * 2**30 + 64, dtype=torch.uint8).as_strided((4, 5), (2**30, 1))  # nine pages of it are touched
    kept.copy_(torch.arange(20).view(4, 5))
    g, live = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.ones(4, dtype=torch.bool)
    index, count, _ = place(kept, live, g, torch.zeros(4), None, 1.0, moves=True)
    assert count.tolist() == [3] and index.tolist() == [0, 1, 3, 2]
    assert torch.equal(kept[:3], torch.arange(20, dtype=torch.uint8).view(4, 5)[[0, 1, 3]])


@pytest.mark.parametrize("scatter", [False, True])
def test_offsets_of_gathered_rows_take_64_bits(scatter, checked):
    """Of a matrix whose columns, and of a result whose rows, are 2^30 apart: masked lanes would overflow 32 bits."""
    from srppo_kernels.linear_logprob.triton_passes import GATHERED, gather_kernel

    matrix, columns = torch.randn(1, 1).as_strided((1, 1), (1, 2**30)), GATHERED[1]
    index, count, out = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32), torch.zeros(columns)
    how = {"ROWS": GATHERED[0], "COLUMNS": columns, "FACTOR": False, "SCATTER": scatter}
    gather_kernel[(1, 1)](matrix, index, count, count, out, 1, 1, *matrix.stride(), **how)
    wide = torch.randn(1, columns)
    assert out[0] == matrix[0, 0] and not out[1:].any()
    gather_kernel[(1, 1)](wide, index, count, count, out, 1, 2**30, columns, 1, **how)  # its first 1024 columns
    assert torch.equal(out, wide[0])


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (20, 70), (300, 70)])  # 300 rows are more than a band
def test_products_into_memory_of_any_strides(shape, checked):
    """In 64 bits: a dweight has more than 2^31 elements from a vocabulary of 262144 and a width of 8192 on."""
    from srppo_kernels.linear_logprob.triton_products import columns_product, rows_product

    a, b = torch.randn(shape[0], 18), torch.randn(18, shape[1])
    out, (rows, depth) = torch.empty(shape[::-1]).T, torch.tensor([[shape[0]], [18]], dtype=torch.int32)
    out = far(out) if 1 in shape else out
    rows_product(a, b, out, rows, accumulate=False)
    assert relative(out, a.double() @ b.double()) < 1e-6
    columns_product(a.T.contiguous(), b, out, depth, accumulate=True)
    assert relative(out, 2 * (a.double() @ b.double())) < 1e-6


def test_a_product_back_to_where_its_rows_were():
    """Zeros where a row has no factor, or lies beyond the count, be it NaN."""
    from srppo_kernels.linear_logprob.triton_products import rows_product_back
    from srppo_kernels.linear_logprob.triton_tiles import RowList

    n, count = 40, 21
    e, w, index, factor = torch.randn(n, 18), torch.randn(18, 70), torch.randperm(n), torch.randn(n)
    factor[index[count:]] = factor[index[3:9]] = 0
    e[factor[index] == 0] = torch.nan
    out = torch.empty(n, 70)
    rows_product_back(e, w, out, RowList(index, torch.tensor([count], dtype=torch.int32)), factor)
    want = torch.zeros(n, 70, dtype=torch.float64)
    want[index] = factor[index, None] * (e.nan_to_num().double() @ w.double())
    assert relative(out, want) < 1e-6 and (out[factor == 0] == 0).all()


def test_a_model_against_itself():
    p = small(dtype=torch.bfloat16)
    ratio = linear_log_ratio(
        p.hidden, p.weight, p.hidden, p.weight, p.targets, mask=p.options["mask"], backend="triton"
    )
    assert (ratio == 0).all()


def test_explained_and_refused():
    p = small(dtype=torch.bfloat16)
    said = explain(p.hidden, p.weight, p.targets, backend="triton", plan="recompute")
    assert said.backend == "triton" and said.gemms == 4
    assert said.workspace_bytes >= N * V * 2
    with pytest.raises(ValueError, match="inputs are float64"):
        linear_logprob(p.hidden.double(), p.weight.double(), p.targets, backend="triton")
    assert explain(p.hidden, p.weight, p.targets).backend != "triton"  # "auto" never takes the interpreter


def test_compiled():
    """torch.compile(fullgraph=True) sees the op alone."""
    p = small(n=16, v=100)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, p.targets, entropy=True, plan="recompute", backend="triton").logprob.sum()

    eager = torch.autograd.grad(loss(p.hidden, p.weight), p.inputs())
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(p.hidden, p.weight), p.inputs())
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_fp16_gradients_of_a_loss_over_many_tokens():
    """They wait in fp32 for a gradient scaler's factor: fp16 ends at 6e-8."""
    p = make(n=5, d=24, v=200, dtype=torch.float16)
    loss, _ = linear_loss(p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum() / 1e7, {}), backend="triton")
    twin = p.double()
    exact = torch.autograd.grad(twin.oracle()[0].sum() / 1e7, twin.inputs())
    for got, want in zip(torch.autograd.grad(loss * 2**17, p.inputs()), exact, strict=True):
        assert relative(got, 2**17 * want) < 1.2e-2  # the interpreter truncates to bf16
