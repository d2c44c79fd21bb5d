"""The CUDA C++ scan for sm_90a: on a Hopper device against float64 and the Triton scan; anywhere, what it refuses.

What can be shown without a device is in test_sm90_host.py.
"""

from types import SimpleNamespace

import pytest
import torch
from backends import needs_triton
from linear_logprob.head_problems import KINDS, Problem, make, relative, value_bound
from torch import Tensor

from srppo_kernels import _extension, explain, linear_logprob, linear_ppo_loss
from srppo_kernels.linear_logprob import gpu, plan, sm90
from srppo_kernels.linear_logprob.chunked import Head, Residual, RowOutputs, kept_columns, maxima_of
from srppo_kernels.linear_logprob.rows import Rows

STEP = 128  # triton_dz.STEP
N, D, V = 700, 200, 5008  # ragged row blocks, steps of K, tiles and groups; more units than one cluster takes


@pytest.fixture
def hopper():
    """A device for the kernel."""
    reason = sm90._device_obstacle(torch.device("cuda"))
    if reason:
        pytest.skip(reason)


def outputs(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy and lse of a state, in float64."""
    made = RowOutputs.of(state.double(), entropy=True)
    return made.logprob, made.entropy, made.lse


class Call:
    """Arguments of a scan for a problem."""

    def __init__(self, p: Problem, *, keep: bool = False):
        temperature = p.options.get("temperature", 1.0)
        rowwise = temperature if isinstance(temperature, Tensor) else None
        self.problem, self.live = p, p.live()
        self.head = Head(
            p.weight, p.options.get("bias"), rowwise, 1.0 if rowwise is not None else temperature,
            p.options.get("logit_scale", 1.0), p.options.get("softcap"),
        )  # fmt: skip
        self.rows = Rows.of(self.live, backend="triton")
        self.y = p.targets.masked_fill(~self.live, 0)
        self.temperature = None if rowwise is None else rowwise.masked_fill(~self.live, 1.0)
        self.residual = None
        if keep:
            n, v = len(p.targets), p.weight.shape[0]
            kept = p.hidden.new_full((n, kept_columns(v, "sm90")), float("nan"))
            self.residual = Residual(kept[:, :v], p.hidden.new_empty(n, maxima_of(v, "sm90"), dtype=torch.float32))

    def run(self, scan=sm90.scan, **how) -> Tensor:
        return scan(
            self.problem.hidden, self.head, self.y, self.temperature, self.rows, True, self.residual, None, **how
        )


def check_kept(residual: Residual, z: Tensor, targets: Tensor, tolerance: float) -> None:
    """Exponentials of logits ``z`` [rows, V], those of the first rows that were kept."""
    live = len(z)
    # Minus the sum of the others in the target's place.
    exact = (z - residual.group_max[:live].double()).exp().scatter(1, targets[:, None], 0.0)
    exact.scatter_(1, targets[:, None], -exact.sum(1, keepdim=True))
    assert ((residual.kept[:live].double() - exact).abs() <= exact.abs() * tolerance + 1e-30).all()


def on_device(p: Problem) -> Problem:
    def move(t):
        return t.detach().cuda() if isinstance(t, Tensor) else t

    return Problem(move(p.hidden), move(p.weight), move(p.targets), {k: move(v) for k, v in p.options.items()})


def problem(kind: str = "random", **options) -> Problem:
    shape = {"n": N, "d": D, "v": V, **options}
    shape.setdefault("mask", torch.rand(shape["n"]) > 0.3)
    return on_device(make(kind, dtype=torch.bfloat16, **shape))


def truncation(p: Problem, block: int) -> float:
    """What tensor cores lose beside what fp32 does: at every 16 of K half a unit of the last place, of a sum that grows
    over a block of K. On an H100 some half of that: at D = 4096 an lse of 108 is off by 6.7e-5, and 5e-4 from Triton's.
    """
    largest = float((p.hidden.double() @ p.weight.double().T).abs().max())
    return min(p.hidden.shape[1], block) / 16 * 2**-25 * largest


def check(p: Problem, **how) -> None:
    call = Call(p)
    got, triton = outputs(call.run(**how)), outputs(call.run(gpu.scan))
    bound = value_bound(p) + truncation(p, 512)
    for value, other, want in zip(got, triton, p.double().oracle(), strict=True):
        assert (value - want)[call.live].abs().max() <= bound
        assert (value - other)[call.live].abs().max() <= bound + truncation(p, p.hidden.shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64_and_triton(hopper, kind, cluster):
    check(problem(kind), cluster=cluster)


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.6}, {"logit_scale": 0.25, "softcap": 4.0}, {"bias": True}, {"bias": True, "softcap": 6.0}],
    ids=lambda o: "-".join(o),
)
def test_options(hopper, options, cluster):
    check(problem(**options), cluster=cluster)
    per_row = problem(**{k: v for k, v in options.items() if k != "temperature"})
    per_row.options["temperature"] = torch.rand(N, device="cuda") + 0.5
    check(per_row, cluster=cluster)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 8, 1), (129, 64, 128), (128, 4096, 32001), (3000, 576, 49152)])
def test_shapes(hopper, shape):
    n, d, v = shape
    check(problem(n=n, d=d, v=v, mask=None))


@pytest.mark.gpu
@pytest.mark.parametrize("v", [V, V + 1, V + 7])
def test_kept_exponentials(hopper, v):
    call = Call(problem(v=v), keep=True)
    call.run()
    live = int(call.live.sum())
    z = (call.problem.hidden.double() @ call.problem.weight.double().T)[call.live]
    check_kept(call.residual, z, call.problem.targets[call.live], 1 / 128)
    end = -(-live // STEP) * STEP  # what a product's last step of K reads is zero
    assert (call.residual.kept[live:end] == 0).all() and call.residual.kept[end:].isnan().all()


@pytest.mark.gpu
def test_bits_of_a_row(hopper):
    p = problem(mask=None)
    whole = Call(p).run()
    order = torch.randperm(N, device="cuda")
    for rows in (order, order[:7], order[:200]):
        part = Problem(p.hidden[rows], p.weight, p.targets[rows], {})
        for cluster in (1, 2):
            assert torch.equal(Call(part).run(cluster=cluster), whole[:, rows])
    assert torch.equal(Call(p, keep=True).run(), whole)


@pytest.mark.gpu
def test_more_than_2_to_the_31_kept(hopper):
    """Liger 803: rows beyond 2^31 / V have their exponentials where they belong."""
    p = on_device(make(n=17000, d=64, v=131072, dtype=torch.bfloat16))
    call = Call(p, keep=True)
    got = outputs(call.run())
    last = slice(16900, 17000)
    z = p.hidden[last].double() @ p.weight.double().T
    assert (got[2][last] - z.logsumexp(1)).abs().max() < 1e-4
    check_kept(Residual(*(t[last] for t in call.residual)), z, p.targets[last], 1e-2)


@pytest.mark.gpu
def test_nothing_waits(hopper):
    call = Call(problem())
    want = call.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_in_a_graph(hopper):
    """The tensor maps and the number of blocks are the capture's; the count of live rows is the replay's."""
    call = Call(problem())
    want = call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run()
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, want)
    call.live.zero_()
    call.live[::5] = True
    graph.replay()
    assert torch.equal(captured, call.run())


@pytest.mark.gpu
@pytest.mark.parametrize("v", [V, V - 3])
@pytest.mark.parametrize("plan", ["score", "recompute", "cache", "precompute"])
def test_as_a_backend(hopper, plan, v):
    """Values and gradients of every plan; the scan is this one, the gradients follow Triton's."""
    p = problem(n=600, d=72, v=v)
    leaves = [p.hidden, p.weight][: {"score": 0, "precompute": 1}.get(plan, 2)]
    for leaf in leaves:
        leaf.requires_grad_()
    twin, live = p.double(), p.live()
    got = p.run(plan=plan, workspace_bytes=1 << 30, backend="sm90").logprob
    want = twin.oracle()[0]
    assert (got - want)[live].abs().max() <= value_bound(p)
    if leaves:
        upstream = torch.linspace(0, 1, 600, device="cuda")
        exact = torch.autograd.grad((want * upstream).sum(), [twin.hidden, twin.weight][: len(leaves)])
        for a, b in zip(torch.autograd.grad((got * upstream).sum(), leaves), exact, strict=True):
            assert relative(a, b) < 8e-3


@pytest.mark.gpu
def test_an_unchanged_model_as_a_backend(hopper):
    """Scored and trained have the same bits: the ratio is 1, exactly."""
    p = problem(mask=None)
    old = p.run(plan="score", backend="sm90").logprob
    ones = torch.ones(N, device="cuda")
    arguments = (p.hidden.requires_grad_(), p.weight.requires_grad_(), p.targets, old, ones, ones.bool())
    loss, stats = linear_ppo_loss(*arguments, backend="sm90")
    loss.backward()
    assert stats.ratio_max == 1 and stats.approx_kl == 0
    assert p.weight.grad.isfinite().all()


@needs_triton
@pytest.mark.parametrize("plan", ["score", "recompute"])
def test_the_backend_is_tritons_with_another_scan(plan, monkeypatch):
    """Its scan replaced by Triton's, interpreted: where no exponentials are kept, all else is the Triton backend, bit
    for bit. Those that are kept are test_around_target.py's."""
    monkeypatch.setattr(sm90, "call_obstacle", lambda *_: "")
    scans = []
    monkeypatch.setattr(sm90, "scan", lambda *arguments: (scans.append(1), gpu.scan(*arguments))[1])
    made = {}
    for backend in ("triton", "sm90"):
        p = make("random", n=40, d=16, v=200, mask=torch.arange(40) % 3 > 0)
        got = p.run(entropy=True, plan=plan, workspace_bytes=1 << 30, backend=backend)
        made[backend] = [got.logprob.detach()]
        if plan != "score":
            made[backend] += torch.autograd.grad(got.logprob.sum(), p.inputs())
        torch.manual_seed(0)
    assert scans and all(torch.equal(a, b) for a, b in zip(made["triton"], made["sm90"], strict=True))


@needs_triton
def test_a_head_that_starts_between_two_multiples_of_16_bytes(monkeypatch):
    """Only its address says so: Triton's scan runs, and one line says why."""
    monkeypatch.setattr(_extension, "_warned", set())
    p = make(n=40, d=24, v=704, dtype=torch.bfloat16, grad=(False, False))
    p.weight = torch.cat([torch.zeros(1).bfloat16(), p.weight.flatten()])[1:].view(704, 24)
    with pytest.warns(RuntimeWarning, match="Triton's scan instead of the one for sm_90a: TMA reads"):
        got = Call(p).run()
    assert torch.equal(got, Call(p).run(gpu.scan))


def test_elsewhere_the_backend_is_refused_in_words(monkeypatch):
    x, w, y = torch.zeros(4, 64).bfloat16(), torch.zeros(16, 64).bfloat16(), torch.zeros(4, dtype=torch.int64)
    for call in (linear_logprob, explain):
        with pytest.raises(ValueError, match=r"backend='sm90' cannot run: it is for CUDA devices of .*; pass backend"):
            call(x, w, y, backend="sm90")
    monkeypatch.setattr(sm90, "_device_obstacle", lambda device: "")
    assert explain(x, w, y, backend="sm90").backend == "sm90"
    with pytest.raises(ValueError, match=r"it multiplies bfloat16, and the inputs are torch\.float32"):
        explain(x.float(), w, y, backend="sm90")
    with pytest.raises(ValueError, match="a hidden size of 60 is none of 8 elements"):
        explain(x[:, :60], w[:, :60], y, backend="sm90")
    with pytest.raises(ValueError, match=r"backend='sm90' cannot run: TMA reads rows that are contiguous"):
        linear_logprob(x, torch.zeros(64, 16).bfloat16().T, y, backend="sm90")


@pytest.mark.parametrize(
    ("hidden", "weight", "reason"),
    [
        (torch.zeros(4, 64), torch.zeros(16, 64), "multiplies bfloat16"),
        (torch.zeros(4, 60).bfloat16(), torch.zeros(16, 60).bfloat16(), "hidden size of 60"),
        (torch.zeros(4, 64).bfloat16(), torch.zeros(64, 16).bfloat16().T, "contiguous"),
        (torch.zeros(4, 64).bfloat16(), torch.zeros(16, 68).bfloat16()[:, :64], "multiples of 16 bytes"),
        (torch.zeros(4, 64).bfloat16(), torch.zeros(64).bfloat16().expand(16, 64), "contiguous"),
        (torch.zeros(4, 64).bfloat16(), torch.zeros(16, 128).bfloat16()[:, ::2], "contiguous"),
        (torch.zeros(4, 0).bfloat16(), torch.zeros(16, 0).bfloat16(), "hidden size of 0"),
        (torch.zeros(4, 64).bfloat16(), torch.zeros(13, 64).bfloat16(), ""),
    ],
)
def test_what_it_refuses(hidden, weight, reason):
    said = sm90.operand_obstacle(hidden, weight)
    assert reason in said and bool(said) == bool(reason)
    assert "compute capability 9.0" in sm90.obstacle(hidden, weight)


def test_how_many_it_counts():
    """Rows, and entries of the vocabulary: sm90.cu's own limit for the latter, of groups as they are by default."""
    few = torch.empty(16, 64, dtype=torch.bfloat16, device="meta")
    most, more = few.new_empty(sm90.LARGEST, 64), few.new_empty(sm90.LARGEST + 8, 64)
    assert sm90.GROUP % sm90.TILE == 0
    assert not sm90.operand_obstacle(most, few) and not sm90.operand_obstacle(few, most)
    for operands in ((more, few), (few, more)):
        assert "counts rows and vocabulary entries up to 2147471360" in sm90.operand_obstacle(*operands)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"hip": "6.4"}, "for CUDA devices of compute capability 9.0"),
        ({"capability": (8, 0)}, "for compute capability 9.0 alone"),
        ({"capability": (9, 1)}, "for compute capability 9.0 alone"),
        ({"extension": "it was not built"}, "it was not built"),
        ({"ops": ()}, "the extension was built without CUDA"),
        ({"driver": "the driver is for CUDA 12"}, "the driver is for CUDA 12"),
        ({"triton": "triton is not installed"}, "triton is not installed"),
    ],
)
def test_which_devices_it_is_for(change, reason, monkeypatch):
    here = {"hip": None, "capability": (9, 0), "extension": "", "ops": ("linear_logprob_scan_sm90",), "driver": "",
            "triton": "", **change}  # fmt: skip
    monkeypatch.setattr(torch.version, "hip", here["hip"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: here["capability"])
    monkeypatch.setattr(_extension, "available", lambda: not here["extension"])
    monkeypatch.setattr(_extension, "why", lambda: here["extension"])
    monkeypatch.setattr(_extension, "driver_obstacle", lambda: here["driver"])
    monkeypatch.setattr(sm90._triton, "obstacle", lambda device: here["triton"])
    monkeypatch.setattr(torch.ops, "srppo_native", SimpleNamespace(**dict.fromkeys(here["ops"])))
    said = sm90.call_obstacle(torch.device("cuda", 0), (torch.bfloat16,) * 2, 64)
    assert reason in said and bool(said) == bool(reason)


def test_what_auto_takes(monkeypatch):
    """This scan where a device and the head allow it, else Triton's: by what scoring and training have in common."""
    monkeypatch.setattr(sm90, "_device_obstacle", lambda device: "")
    x, w, y = torch.zeros(4, 64).bfloat16(), torch.zeros(16, 64).bfloat16(), torch.zeros(4, dtype=torch.int64)
    assert (
        explain(x, w, y).backend == explain(x, w.requires_grad_(), y).backend == explain(x, w[:13], y).backend == "sm90"
    )
    w = w.detach()
    for hidden, weight in ((x.half(), w.half()), (x, w.T.contiguous().T), (x[:, :60], w[:, :60])):
        assert explain(hidden, weight, y).backend != "sm90"


MIB = 2.0**20
MEASURED = {  # MiB beyond inputs, outputs and gradients: bench/results/gpu-nvidia-h200-2026-11-26-heads.csv
    "score": 73.86,
    "precompute": 2632.28,  # of linear_ppo_loss
    "cache": 2567.67,
    "recompute": 512.87,
}


def posed(**changes) -> plan.Problem:
    """8192 x 4096 x 151936 in bf16 on a device."""
    fields = {
        "op": "linear_logprob", "rows": 8192, "width": 4096, "vocab": 151936, "device": torch.device("cuda"),
        "hidden_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "needs_hidden": True, "needs_weight": True,
        "needs_bias": False, "entropy": False, "plain": True, **changes,
    }  # fmt: skip
    return plan.Problem(**fields)


def said(problem: plan.Problem, which: str = "auto", backend: str = "sm90") -> float:
    return plan.choose(problem, plan=which, workspace_bytes=None, backend=backend).workspace_bytes / MIB


@pytest.mark.parametrize("which", MEASURED)
def test_what_explain_says_bounds_what_an_allocator_counted(which, monkeypatch):
    monkeypatch.setattr(sm90, "call_obstacle", lambda *_: "")
    problem = posed(op="linear_ppo_loss", entropy=True) if which == "precompute" else posed()
    assert MEASURED[which] <= said(problem, which) <= 1.005 * MEASURED[which]


@pytest.mark.parametrize("groups", [1, 3, 74, 100])
def test_a_dz_of_its_own_is_within_its_bytes(groups):
    """In whole groups of the vocabulary, one at least; by default eight."""
    rows, vocab = 8192, 151936
    one = rows * 2 * gpu.GROUP
    for size in (groups * one, (groups + 1) * one - 1):
        assert gpu.chunk_entries(rows, vocab, 2, size) == min(groups * gpu.GROUP, vocab)
    size = groups * one
    assert gpu.chunk_entries(rows, vocab, 4, 2 * size) == gpu.chunk_entries(rows, vocab, 2, size, gpu.GROUP // 2)
    assert gpu.chunk_entries(rows, vocab, 4, 2 * size) == min(groups * gpu.GROUP, vocab)
    assert gpu.chunk_entries(rows, vocab, 2, 1) == gpu.GROUP
    assert gpu.chunk_entries(rows, vocab, 2, 0) == 8 * gpu.GROUP and gpu.chunk_entries(rows, 100, 2, 0) == 100


def test_what_explain_counts(monkeypatch):
    """What none of the measured calls had, in MiB."""
    monkeypatch.setattr(sm90, "call_obstacle", lambda *_: "")
    monkeypatch.setattr(gpu, "obstacle", lambda *_, **__: "")
    cache = said(posed(), "cache")
    dz = 8192 * 16384 * 2 / MIB  # where the products cannot read the exponentials
    for more in ({"plain": False}, {"entropy": True}, {"lse": True}, {"needs_bias": True}):
        assert said(posed(**more), "cache") - cache == pytest.approx(dz + 64)  # and dhidden by row in fp32
    maxima = 8192 * gpu.maxima(151936) * 4 / MIB
    triton = said(posed(plain=False), "cache", "triton")
    assert triton - said(posed(plain=False), "cache") == pytest.approx(maxima - 8192 * 4 / MIB)
    loss = posed(op="linear_loss", entropy=True)
    many = said(posed(op="linear_loss", entropy=True, rows=1 << 16))  # eight chunks: an fp32 dweight, and vectors
    assert 0 < many - said(loss) - 151936 * 4096 * 4 / MIB < 8
    assert said(posed(op="linear_loss", entropy=True, rows=1 << 16, masked=False)) - many == 256 - 64
    nothing = {"mask": None, "softcap": None, "group": None, "grad_weight_out": None}  # a PPO loss has a mask
    x = torch.empty(8, 8)
    assert plan.problem_of("linear_ppo_loss", x, x, None, entropy=True, **nothing).masked
    assert not plan.problem_of("linear_loss", x, x, None, entropy=True, **nothing).masked
    wide = said(posed(op="linear_loss", entropy=True, wide_weight=True))
    assert wide - said(loss) == 151936 * 4096 * 4 / MIB


def test_what_explain_counts_of_other_shapes_and_dtypes(monkeypatch):
    """And of no rows: a workspace that is too small then has nothing to divide by."""
    monkeypatch.setattr(sm90, "call_obstacle", lambda *_: "")
    monkeypatch.setattr(gpu, "obstacle", lambda *_: "")

    def more(which, backend, changes, others):
        """MiB of one problem beyond those of another."""
        return said(posed(**changes), which, backend) - said(posed(**others), which, backend)

    fp32, fp16 = ({"hidden_dtype": t, "weight_dtype": t} for t in (torch.float32, torch.float16))
    row, of_rows = 8192 / MIB, 8192 * 4096 / MIB
    assert more("score", "triton", fp32, {}) == 2 * of_rows  # gathered
    assert more("score", "triton", {"vocab": 4097}, {"vocab": 4096}) == 12 * row  # a group's three numbers
    assert gpu.scan_bytes(8192, 64, 8192, 2, tiles=7) - gpu.scan_bytes(8192, 64, 8192, 2) == 7 * 4 * 8192
    small = {"vocab": 8192, "masked": False}
    assert more("recompute", "triton", {**small, **fp16}, small) == 4 * of_rows  # sums in fp32, by position and by row
    assert more("recompute", "triton", {**small, "wide_weight": True}, small) == of_rows * 4 - of_rows * 2
    mixed = {"hidden_dtype": torch.float32}
    assert more("recompute", "triton", mixed, {}) == 0  # dz is in bf16; fp32 rows go before an fp32 result comes
    nothing = posed(rows=0, masked=False, wide_weight=True)
    made = plan.choose(nothing, plan="recompute", workspace_bytes=1 << 20, backend="triton")
    assert made.workspace_bytes > 0


def test_rows_of_exponentials_that_are_padded(monkeypatch):
    """A vocabulary that is no multiple of 16 is planned as the next one that is, and its bytes are said."""
    monkeypatch.setattr(sm90, "call_obstacle", lambda *_: "")
    for op in ("linear_logprob", "linear_loss"):
        made = [
            plan.choose(posed(op=op, vocab=v), plan="auto", workspace_bytes=None, backend="sm90")
            for v in (49985, 50000)
        ]
        assert made[0].plan == made[1].plan and made[0].rows_per_chunk == made[1].rows_per_chunk
        assert 8192 * 15 * 2 > made[1].workspace_bytes - made[0].workspace_bytes >= 0
    kept = 8192 * 50000 * 2
    for allowed, expected in ((kept, "cache"), (kept - 1, "recompute")):
        made = plan.choose(posed(vocab=49985), plan="auto", workspace_bytes=allowed, backend="sm90")
        assert made.plan == expected
