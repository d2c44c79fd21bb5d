"""Exponentials around the targets' logits (triton_reference.py), as the scan for sm_90a keeps them: what is kept, and
products straight from it, against float64.

The scan is Triton's here, interpreted, and every row is settled from maxima of its own; test_sm90_host.py has the rest.
"""

from dataclasses import replace

import pytest
import torch
from backends import needs_triton
from interpreted import fresh_memory_is_nan
from launches import launched
from linear_logprob.head_problems import make, relative, value_bound
from linear_logprob.test_linear_logprob_sm90 import Call

from srppo_kernels import _extension, explain, linear_logprob, linear_loss, linear_ppo_loss
from srppo_kernels.linear_logprob import gpu, sm90, triton_dz, triton_gradients
from srppo_kernels.linear_logprob.backward import Destination
from srppo_kernels.linear_logprob.chunked import Residual, RowOutputs

pytestmark = needs_triton
N, V = 40, 197  # rows of exponentials end between two multiples of 16 bytes


@pytest.fixture(autouse=True)
def around_target(monkeypatch):
    monkeypatch.setattr(sm90, "call_obstacle", lambda *_: "")
    monkeypatch.setattr(sm90, "operand_obstacle", lambda *_: "there is no device")
    monkeypatch.setattr(_extension, "warn_once", lambda *_: None)
    with fresh_memory_is_nan():
        yield


@pytest.fixture
def formed(monkeypatch):
    """The dz that were formed, one for each."""
    calls, from_kept = [], triton_dz.from_kept
    monkeypatch.setattr(triton_dz, "from_kept", lambda *a: (calls.append(1), from_kept(*a)))
    return calls


def some(masked: bool) -> dict[str, torch.Tensor]:
    return {"mask": torch.arange(N) % 5 > 0} if masked else {}


UPSTREAM = {
    "all": torch.ones(N, dtype=torch.bool),
    "all but one": torch.arange(N) != 7,
    "every third": torch.arange(N) % 3 == 0,
    "the first": torch.arange(N) < 20,
    "none": torch.zeros(N, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("wanted", "masked", "dtype"),
    [
        *((wanted, True, torch.float32) for wanted in UPSTREAM),
        *((wanted, False, torch.float32) for wanted in ("all but one", "none")),
        *(("all", masked, torch.bfloat16) for masked in (False, True)),
    ],
)
def test_a_loss(wanted, masked, dtype, formed):
    """Its gradients come in where UPSTREAM says; peaked rows and others."""
    weights = torch.linspace(-1, 1, N).masked_fill(~UPSTREAM[wanted], 0)
    for kind in ("random", "peaked"):
        p = make(kind, n=N, d=24, v=V, dtype=dtype, temperature=0.7, **some(masked))
        loss, _ = linear_loss(
            p.hidden, p.weight, p.targets, lambda lp, h, w: ((lp * w).sum(), {}), weights, backend="sm90", **p.options
        )
        twin = p.double()
        want = (twin.oracle()[0] * weights).sum()
        assert (loss - want).abs() < N * value_bound(p)
        exact = torch.autograd.grad(want, twin.inputs())
        for got, right in zip(torch.autograd.grad(loss, p.inputs()), exact, strict=True):
            # The interpreter truncates to bf16, here exponentials twice: half an ulp of 2^-8 a time, and they add up.
            assert relative(got, right) < (2e-5 if dtype == torch.float32 else 1.2e-2)
    assert not formed  # products read the exponentials


@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_nobody_wrote_are_not_read(masked):
    """Of 150 rows 100 are live, and with a mask exponentials of the first 128 are there."""
    live = torch.arange(150) % 3 > 0
    p = make(n=150, d=16, v=60, **({"mask": live} if masked else {}))
    if not masked:
        p.targets[~live] = -100
    args = (p.hidden, p.weight, p.targets, lambda lp, h: (lp.sum(), {}))
    loss, _ = linear_loss(*args, backend="sm90", workspace_bytes=1 << 30, **p.options)
    twin = p.double()
    exact = torch.autograd.grad(twin.oracle()[0].sum(), twin.inputs())
    for got, right in zip(torch.autograd.grad(loss, p.inputs()), exact, strict=True):
        assert relative(got, right) < 2e-5


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_of_rows(masked):
    """Each chunk's exponentials are of its own rows: 128, and 22."""
    p = make(n=150, d=16, v=64, **({"mask": torch.arange(150) % 3 > 0} if masked else {}))
    args = (p.hidden, p.weight, p.targets, lambda lp, h, w: ((lp * w).sum(), {}), torch.linspace(-1, 1, 150))
    options = {"backend": "sm90", "workspace_bytes": 128 * 64 * 4, **p.options}
    assert explain(*args, op="linear_loss", **options).rows_per_chunk == 128
    twin = p.double()
    exact = torch.autograd.grad((twin.oracle()[0] * args[-1]).sum(), twin.inputs())
    for got, right in zip(torch.autograd.grad(linear_loss(*args, **options)[0], p.inputs()), exact, strict=True):
        assert relative(got, right) < 2e-5


def test_a_loss_of_the_entropy(formed):
    """Its dz is formed, over exponentials that are around one number, with rows that move up."""
    weights = torch.linspace(-1, 1, N).masked_fill(~UPSTREAM["every third"], 0)
    p = make(n=N, d=24, v=V, **some(True))

    def loss_fn(lp, h, w):
        return ((lp + 0.1 * h) * w).sum(), {}

    loss, _ = linear_loss(p.hidden, p.weight, p.targets, loss_fn, weights, backend="sm90", **p.options)
    twin = p.double()
    want = ((twin.oracle()[0] + 0.1 * twin.oracle()[1]) * weights).sum()
    exact = torch.autograd.grad(want, twin.inputs())
    for got, right in zip(torch.autograd.grad(loss, p.inputs()), exact, strict=True):
        assert relative(got, right) < 2e-5
    assert formed == [1]


@pytest.mark.parametrize("plan", ["cache", "precompute"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"bias": True}], ids=lambda o: "-".join(o) or "plain")
def test_plans(plan, options):
    """With the log-prob's gradient alone, with all three outputs', and again: a cache is not used up."""
    frozen = plan == "precompute"
    p = make(n=N, d=16, v=V, grad=(True, not frozen), logit_scale=0.8, **some(True), **options)
    p.options["temperature"] = torch.rand(N) + 0.5
    twin = p.double()
    got = p.run(plan=plan, workspace_bytes=1 << 30, backend="sm90", entropy=not frozen, lse=True)
    want = twin.oracle()
    upstream = torch.linspace(-1, 1, N)
    some_rows = upstream * UPSTREAM["every third"]
    losses = [lambda lp, h, lse: (lp * some_rows).sum(), lambda lp, h, lse: (lp * upstream + lse).sum()]
    if not frozen:
        losses.append(lambda lp, h, lse: (lp * upstream + h).sum())
    for loss in (*losses, lambda lp, h, lse: (lp * upstream).sum()):
        exact = torch.autograd.grad(loss(*want), twin.inputs(), retain_graph=True)
        for a, b in zip(torch.autograd.grad(loss(*got), p.inputs(), retain_graph=True), exact, strict=True):
            assert relative(a, b) < 2e-5


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_kept(dense):
    """E of a row: around one number, -s at the target, a row of zeros for NaN and beyond the count."""
    p = make(n=N, d=16, v=V, grad=(False, False), **some(not dense))
    p.hidden[12] = torch.nan
    p.targets[1:3] = torch.tensor([0, V - 1])
    call = Call(p, keep=True)
    kept = torch.full((N + 3, gpu.whole_columns(V)), torch.nan)[:, :V]
    call.residual = Residual(kept, torch.full((N + 3, 1), torch.nan))
    call.rows = type(call.rows)(0, N, live=call.live, dense=dense)
    m, s, _, _ = call.run()
    order = call.live.nonzero()[:, 0]
    fine = (order != 12).nonzero()[:, 0]
    rows = order[fine]
    assert torch.equal(call.residual.group_max[fine, 0], m[rows])
    z = (p.hidden.double() @ p.weight.double().T)[rows]
    exact = (z - m[rows, None]).exp()
    exact.scatter_(1, p.targets[rows, None], -s[rows, None].double())
    assert ((kept[fine] - exact).abs() <= 1e-5 * exact.abs()).all()
    assert (kept[len(order) : N] == 0).all() and (kept[(order == 12).nonzero()[:, 0]] == 0).all()
    assert kept[N:].isnan().all()


def test_offsets_of_what_is_kept_take_64_bits(monkeypatch):
    """Of one row whose stride is 2^30: beyond it 32 bits overflow, in masked lanes as well, which is an error here."""
    from triton.runtime.interpreter import interpreter_builder

    monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))
    p = make(n=1, d=16, v=V, grad=(False, False))
    call = Call(p, keep=True)
    kept = torch.zeros(1, gpu.whole_columns(V)).as_strided((1, V), (1 << 30, 1))
    call.residual = Residual(kept, torch.zeros(1, 1).as_strided((1, 1), (1 << 30, 1)))
    log_sum = RowOutputs.of(call.run(), entropy=False).log_sum
    into = Destination(True, torch.empty(V, 16), None)
    dhidden = triton_gradients.from_exponentials(
        p.hidden, call.head, torch.ones(1), log_sum, None, into, call.residual, call.live, consume=True, dense=False
    )
    dz = -torch.softmax(p.hidden.double() @ p.weight.double().T, 1)
    dz[0, p.targets] += 1
    assert relative(dhidden, dz @ p.weight.double()) < 2e-5 and relative(into.weight, dz.T @ p.hidden.double()) < 2e-5


def test_a_nan_without_a_gradient_reaches_nobody(formed):
    """A row that no loss reads may hold one; where a loss reads it, it is seen."""
    weights = torch.ones(N)
    for reads in (0.0, 1.0):
        p = make(n=N, d=16, v=V)
        with torch.no_grad():
            p.hidden[12] = torch.nan
        weights[12] = reads

        def loss_fn(lp, h, w):
            return torch.where(w == 0, 0, lp * w).sum(), {}

        loss, _ = linear_loss(p.hidden, p.weight, p.targets, loss_fn, weights, backend="sm90")
        (dweight,) = torch.autograd.grad(loss, [p.weight])
        assert bool(dweight.isfinite().all()) == (reads == 0)
    assert not formed


def test_launches(monkeypatch):
    """What is run beside the scan, from the list of rows on: each is some microseconds of a GPU's time."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    p = make(n=N, d=16, v=V, grad=(True, False), **some(True))
    inputs = (p.hidden, p.weight, p.targets)

    def after_the_list(call):
        names = launched(call)
        return names[names.index("list_kernel") + 1 :]

    scan = [
        "gather_kernel",
        "aten::index_select",
        "scan_kernel",
        "merge_kernel",
    ]  # the sm_90a scan's is reference_kernel
    assert after_the_list(
        lambda: linear_logprob(*inputs, mask=p.options["mask"], plan="score", backend="triton", entropy=True)
    ) == [*scan, "outputs_kernel", "aten::stack"]
    if not _extension.available():
        pytest.skip(f"the loss itself is many of torch's operators: {_extension.why()}")

    old, advantages, mask = torch.zeros(N), torch.randn(N), p.options["mask"]
    names = after_the_list(lambda: linear_ppo_loss(*inputs, old, advantages, mask, backend="sm90", normalizer=7.0))
    last = names[names.index("settle_kernel") + 1 :]  # the loss itself is one kernel, of C++ here
    assert last[: last.index("product_kernel") + 1] == [
        "outputs_kernel", "aten::div", "place_kernel", "move_kernel", "product_kernel",
    ]  # fmt: skip
    assert set(last[last.index("product_kernel") + 1 :]) <= {"aten::div", "aten::stack"}
