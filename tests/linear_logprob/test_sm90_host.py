"""The scan for sm_90a without a device: the kernel's own source, run on the host.

sm90_emulator.h has TMA, mbarriers and WGMMA in plain C++ and is as late and as unordered as the hardware may be; under
it csrc/linear_logprob/sm90_kernel.h runs as it is and is held to float64. What the emulator takes on trust, and the
schedule and the scalar maths over many more shapes, are in test_sm90_tables.py.
"""

import ctypes
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backends import compile_host, needs_triton, pointer
from linear_logprob.head_problems import Problem, make, relative, value_bound
from linear_logprob.test_linear_logprob_sm90 import Call, outputs
from torch import Tensor

from srppo_kernels import linear_logprob, linear_loss
from srppo_kernels.linear_logprob import gpu, sm90, vocab_parallel
from srppo_kernels.linear_logprob.backward import Destination, Upstream, gradients
from srppo_kernels.linear_logprob.chunked import kept_columns

CSRC = Path(__file__).parents[2] / "csrc" / "linear_logprob"

SOURCE = """
#include "tests/linear_logprob/sm90_emulator.h"
#include "KERNEL"

using namespace srppo::sm90;

CUtensorMap x_map, w_map, kept_map;
ScanParams params;

template <bool kPlain, bool kKeep, int kCluster>
void block() { scan_block<kPlain, kKeep, kCluster>(x_map, w_map, kept_map, params, nullptr); }

template <int kCluster>
int launch(int blocks, unsigned seed) {
#ifdef ONE_ONLY
  return kCluster == 2 && params.kept_max ? emulator::launch(block<true, true, 2>, blocks, 2, seed) : -1;
#else
  const bool plain = !params.bias && !params.inverse_temperatures && params.softcap == 0.0f;
  const auto kernel = plain ? (params.kept_max ? block<true, true, kCluster> : block<true, false, kCluster>)
                            : (params.kept_max ? block<false, true, kCluster> : block<false, false, kCluster>);
  return emulator::launch(kernel, blocks, kCluster, seed);
#endif
}

extern "C" int scan(const ScanParams* p, std::uint16_t* x, std::uint16_t* w, std::uint16_t* kept, int stride_kept,
                    int cluster, int blocks, unsigned seed) {
  params = *p;
  x_map = {x, p->n, p->width, p->width, kRows, kDepth};
  w_map = {w, p->vocab, p->width, p->width, kColumns / cluster, kDepth};
  kept_map = {kept, p->n, p->vocab, stride_kept, kWarpRows, kPart};
  return cluster == 1 ? launch<1>(blocks, seed) : launch<2>(blocks, seed);
}
"""


class ScanParams(ctypes.Structure):
    """sm90_epilogue.h's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "bias", "targets", "inverse_temperatures", "reference", "count", "state", "target_logits", "kept_max")),
        ("stride_max", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("n", "width", "vocab", "group")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "inverse_softcap", "inverse_temperature")),
    ]  # fmt: skip


class Scan:
    """A call of the kernel: inputs, then ``run`` fills the outputs."""

    def __init__(self, *, n=200, live=150, width=136, vocab=1208, group=384, scale=1.0, softcap=0.0, temperature=1.0,
                 bias=False, row_temperature=False, keep=False):  # fmt: skip
        self.n, self.live, self.vocab, self.group = n, live, vocab, group
        self.scale, self.softcap, self.temperature, self.keep = scale, softcap, temperature, keep
        self.x = torch.randn(n, width).bfloat16()
        self.w = (torch.randn(vocab, width) * 0.3).bfloat16()
        self.targets = torch.randint(0, vocab, (n,))
        self.bias = torch.randn(vocab) if bias else None
        self.inverse = 1 / (torch.rand(n) + 0.5) if row_temperature else None
        # The target's logit, or far from it: 300 below e^(z - m) is inf.
        z, y = self.logits(), self.targets[:live, None].clamp(0, vocab - 1)
        self.reference = torch.zeros(-(-n // 256) * 256)
        self.reference[:live] = z.gather(1, y)[:, 0] + torch.tensor([0.0, -40, -300, 15]).repeat(n)[:live]

    def run(self, host: ctypes.CDLL, *, cluster=2, blocks=2, seed=0) -> int:
        groups = -(-self.vocab // self.group)
        self.state = torch.full((3, groups, self.n), float("nan"))
        self.target_logits = torch.full((self.n,), float("nan"))
        room = torch.full((self.n, kept_columns(self.vocab, "sm90") + 8), float("nan"), dtype=torch.bfloat16)
        self.kept, self.beyond = room[:, : self.vocab], room[:, self.vocab :]
        self.kept_max = torch.full((self.n, -(-self.vocab // sm90.TILE)), float("nan"))
        count = torch.tensor([self.live], dtype=torch.int32)
        optional = {"bias": self.bias, "inverse_temperatures": self.inverse}
        if self.keep:
            optional |= {"kept_max": self.kept_max}
        tensors = {"targets": self.targets, "reference": self.reference, "count": count, "state": self.state}
        tensors |= {"target_logits": self.target_logits}
        tensors |= {name: t for name, t in optional.items() if t is not None}
        p = ScanParams(
            **{name: t.data_ptr() for name, t in tensors.items()}, stride_max=self.kept_max.stride(0), n=self.n,
            width=self.x.shape[1], vocab=self.vocab, group=self.group,
            scale=self.scale, softcap=self.softcap, inverse_softcap=1 / self.softcap if self.softcap else 0.0,
            inverse_temperature=1 / self.temperature,
        )  # fmt: skip
        tensors = map(pointer, (self.x, self.w, self.kept))
        return host.scan(ctypes.byref(p), *tensors, self.kept.stride(0), cluster, blocks, seed)

    def logits(self) -> Tensor:
        z = self.x[: self.live].double() @ self.w.double().T
        z = (z + (0 if self.bias is None else self.bias.double())) * self.scale
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature if self.inverse is None else z * self.inverse[: self.live, None].double()

    def check(self) -> None:
        """State, target's logit and kept exponentials of the live rows against float64; beyond them, nothing but what a
        warp of 16 rows keeps."""
        z, y = self.logits(), self.targets[: self.live, None]
        m, s, t = merged(self.state[:, :, : self.live])
        mine = torch.where((y >= 0) & (y < self.vocab), y, 0)
        others = z.scatter(1, mine, -torch.inf) if bool((mine == y).all()) else z
        # One accumulator over 512 of K: its error goes with the root of the number of products.
        bound = 3e-6 + 4e-7 * float(z.abs().max()) * max(1, self.x.shape[1] / 128) ** 0.5
        # Raised where 28 above it would be passed, to a maximum that is met.
        assert ((m == self.reference[: self.live]) | (m > z.amax(1) - 28)).all() and (m <= z.amax(1) + 16).all()
        e = (others - m[:, None]).exp()
        assert (s / e.sum(1) - 1).abs().max() < 2 * bound
        want = (e * (others - m[:, None]).clamp(min=-1e4)).sum(1)
        assert ((t - want).abs() / (1 + want.abs())).max() < 4 * bound
        assert (self.target_logits[: self.live] - z.gather(1, mine)[:, 0]).abs().max() < bound
        assert self.state[:, :, self.live :].isnan().all() and self.target_logits[self.live :].isnan().all()
        if self.keep:
            around = self.kept_max[: self.live].double().repeat_interleave(sm90.TILE, 1)[:, : self.vocab]
            exact = (others - around).exp()
            assert ((self.kept[: self.live].double() - exact).abs() <= exact * 2**-8 + 1e-37).all()
            assert (around <= m[:, None]).all() and (self.kept[: self.live].double() < 2.0**40).all()
        assert self.kept[-(-self.live // 16) * 16 if self.keep else 0 :].isnan().all() and self.beyond.isnan().all()


def merged(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The groups' states as one, in float64."""
    m, s, t = state.double()
    most = m.amax(0)
    fall = (m - most).clamp(min=-1e4)
    return most, (s * fall.exp()).sum(0), ((t + s * fall) * fall.exp()).sum(0)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_host(SOURCE.replace("KERNEL", "csrc/linear_logprob/sm90_kernel.h"), tmp_path_factory.mktemp("sm90"))


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": -0.5, "keep": True},
        {"keep": True, "temperature": 0.7, "scale": 0.5},
        {"bias": True, "softcap": 4.0},
        {"bias": True, "softcap": 4.0, "row_temperature": True, "scale": -0.5, "keep": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_the_kernel(host, options, cluster):
    scan = Scan(**options)
    assert scan.run(host, cluster=cluster, blocks=2) == 0
    scan.check()


@pytest.mark.parametrize(
    ("shape", "cluster", "blocks"),
    [
        ({"n": 1, "live": 1, "width": 8, "vocab": 2}, 2, 2),
        ({"n": 130, "live": 129, "width": 72, "vocab": 1154}, 2, 4),  # the last group is two entries
        ({"n": 300, "live": 300, "width": 64, "vocab": 384, "group": 192}, 2, 4),  # the last cluster has one row block
        ({"n": 128, "live": 100, "width": 904, "vocab": 1030}, 2, 2),  # a tile is nearly two blocks of K, three laps
        ({"n": 128, "live": 100, "width": 320, "vocab": 1300}, 1, 1),  # or just a lap
        ({"n": 400, "live": 390, "width": 40, "vocab": 770}, 1, 3),
        ({"n": 64, "live": 0}, 2, 2),
    ],
)
def test_shapes(host, shape, cluster, blocks):
    for seed in range(2):
        scan = Scan(**shape)
        assert scan.run(host, cluster=cluster, blocks=blocks, seed=seed) == 0
        if scan.live:
            scan.check()
        else:
            assert scan.state.isnan().all()


def test_bits_of_a_row(host):
    """They depend on neither its neighbours, nor its place, nor clusters and blocks, nor what is kept, nor the order in
    which things happen."""
    whole, few = Scan(keep=True), Scan(n=9, live=9)
    order = torch.randperm(whole.live)
    few.x, few.w, few.targets = whole.x[order[:9]], whole.w, whole.targets[order[:9]]
    few.reference[:9] = whole.reference[order[:9]]
    assert whole.run(host, cluster=2, blocks=2, seed=1) == 0
    assert few.run(host, cluster=1, blocks=3, seed=2) == 0
    assert torch.equal(few.state, whole.state[:, :, order[:9]])
    assert torch.equal(few.target_logits, whole.target_logits[order[:9]])


def test_targets_of_another_shard(host):
    """A target before or behind the vocabulary, even inside its last tile, is nobody's: its logit stays as it was."""
    scan = Scan(vocab=1208, keep=True)
    scan.targets[:4] = torch.tensor([-3, 1208, 1279, 10**9])
    assert scan.run(host) == 0
    exact = (scan.logits()[:4] - scan.kept_max[:4].double().repeat_interleave(sm90.TILE, 1)[:, :1208]).exp()
    assert ((scan.kept[:4].double() - exact).abs() <= exact * 2**-8 + 1e-37).all()
    assert scan.target_logits[:4].isnan().all() and scan.target_logits[4 : scan.live].isfinite().all()
    m, s, _ = merged(scan.state[:, :, :4])
    assert (s / (scan.logits()[:4] - m[:, None]).exp().sum(1) - 1).abs().max() < 1e-5


def test_entries_that_a_bias_rules_out(host):
    """-inf on a whole group and on the first parts of another: neither NaN nor a trace of them."""
    scan = Scan(bias=True, vocab=1210)
    scan.bias[:400] = scan.bias[700:] = -torch.inf
    scan.targets.clamp_(400, 699)
    assert scan.run(host) == 0
    state = scan.state[:, :, : scan.live]
    assert state.isfinite().all() and (state[1:, 0] == 0).all()
    assert (state[0, 0] == scan.reference[: scan.live]).all()
    scan.check()


def test_one_logit_raises_a_row(host):
    """Whichever of the row's four threads holds it, and with what earlier tiles have added up."""
    scan = Scan(bias=True, keep=True)
    scan.bias[205] = 130  # the third thread's, in the group's second tile
    scan.reference -= 20
    assert scan.run(host) == 0
    scan.check()


def test_a_reference_below_all_others(host):
    """As reference_kernel gives it where a target's logit is ruled out or no number: raised in every group."""
    scan = Scan(keep=True)
    scan.reference[: scan.live : 3] = -1e30
    assert scan.run(host) == 0
    scan.check()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_nan_stays_in_its_row(host, softcap):
    scan = Scan(softcap=softcap)
    scan.x[3, 7] = torch.nan
    assert scan.run(host) == 0
    s = scan.state[1, :, : scan.live]
    assert s[:, 3].isnan().all() and s[:, torch.arange(scan.live) != 3].isfinite().all()


@pytest.fixture
def emulated(host):
    """torch.ops.srppo_native.linear_logprob_scan_sm90 on CPU tensors, by the schema that sm90.cu defines."""

    def run(
        x, w, bias, targets, inverse, reference, count, scale, softcap, temperature, group, cluster, state, logits,
        kept, most,
    ):  # fmt: skip
        def address(t: Tensor | None) -> int | None:
            assert t is None or t.stride(-1) == 1
            return None if t is None else t.data_ptr()

        p = ScanParams(
            *map(address, (bias, targets, inverse, reference, count, state, logits, most)),
            0 if most is None else most.stride(0), *x.shape, w.shape[0], group, scale, softcap,
            1 / softcap if softcap else 0.0, temperature,
        )  # fmt: skip
        assert x.is_contiguous() and w.is_contiguous() and x.dtype == w.dtype == torch.bfloat16
        assert kept is None or (kept.stride(0) % 8 == kept.data_ptr() % 16 == 0 and kept.shape == (len(x), len(w)))
        tensors = (pointer(x), pointer(w), ctypes.c_void_p(address(kept)))
        assert host.scan(ctypes.byref(p), *tensors, 0 if kept is None else kept.stride(0), cluster, 2 * cluster, 0) == 0

    name = "linear_logprob_scan_sm90"
    definition = re.search(r"m\.def\((.*?)\);", (CSRC / "sm90.cu").read_text(), re.DOTALL)
    assert definition is not None
    built = hasattr(torch.ops.srppo_native, name)  # by nvcc, for a CUDA build of torch
    with torch.library._scoped_library("srppo_native", "FRAGMENT") as library:
        if not built:
            library.define("".join(re.findall(r'"([^"]*)"', definition[1])))
        library.impl(name, run, "CPU")
        yield
    if not built and hasattr(torch.ops.srppo_native, name):
        delattr(torch.ops.srppo_native, name)


@needs_triton
@pytest.mark.parametrize(("kind", "n", "v"), [("random", 40, 704), ("far", 40, 699), ("random", 150, 703)])
def test_a_loss_around_targets(emulated, kind, n, v, monkeypatch):
    """From references to gradients: the scan's own exponentials, settled, and multiplied as they are; of 150 rows, 128
    and the other 22; whole rows of 16 bytes, and not."""
    monkeypatch.setattr(sm90, "call_obstacle", lambda *_: "")
    p = make(n=n, d=24, v=v, dtype=torch.bfloat16, temperature=0.8)
    if kind == "far":  # logits up to 100 above the target's: some rows are raised, in several tiles or from inf
        with torch.no_grad():
            p.hidden *= torch.linspace(1, 12, n)[:, None]
    from srppo_kernels.linear_logprob import triton_reference

    raised = []
    settle_kernel = triton_reference.settle

    def settle(residual, around, *rest, **more):
        raised.append(int((around.amax(1) > around[:, 0]).sum()))
        settle_kernel(residual, around, *rest, **more)

    monkeypatch.setattr(triton_reference, "settle", settle)
    weights = torch.linspace(-1, 1, n)
    loss, _ = linear_loss(
        p.hidden, p.weight, p.targets, lambda lp, h, w: ((lp * w).sum(), {}), weights, backend="sm90",
        workspace_bytes=1 << 17, **p.options,
    )  # fmt: skip
    twin = p.double()
    want = (twin.oracle()[0] * weights).sum()
    assert (loss - want).abs() < 40 * value_bound(p)
    exact = torch.autograd.grad(want, twin.inputs())
    for got, right in zip(torch.autograd.grad(loss, p.inputs()), exact, strict=True):
        assert relative(got, right) < 1.2e-2  # the interpreter truncates to bf16
    assert len(raised) == -(-n // 128) and (raised[0] > 2) == (kind == "far")


@needs_triton
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "softcap": 6.0, "logit_scale": 0.5}, {"row_temperature": True}],
    ids=lambda o: "-".join(o) or "plain",
)
def test_the_front(emulated, options, monkeypatch):
    """Rows compacted, scanned, merged and put back, beside the Triton scan."""
    from srppo_kernels.linear_logprob import triton_reference

    monkeypatch.setattr(triton_reference, "REFERENCED", (4, 16))  # two steps of a row
    options = dict(options)
    per_row = options.pop("row_temperature", False)
    p = make(n=40, d=24, v=704, dtype=torch.bfloat16, mask=torch.rand(40) > 0.3, **options)
    if per_row:
        p.options["temperature"] = torch.rand(40) + 0.5
    p.hidden.requires_grad_(False)
    call, triton = Call(p), Call(p)
    got, other, want = outputs(call.run()), outputs(triton.run(gpu.scan)), p.double().oracle()
    for a, b, c in zip(got, other, want, strict=True):
        assert (a - c)[call.live].abs().max() < value_bound(p)
        assert (a - b)[call.live].abs().max() < 2 * value_bound(p)
    assert torch.equal(Call(p).run(group=384, cluster=1)[3], call.run()[3])  # z_y has one way to be computed
    assert sm90.obstacle(p.hidden, p.weight).startswith("it is for CUDA devices")


@needs_triton
def test_views_of_other_tensors(emulated, monkeypatch):
    """Targets that are a column of token ids, hidden states that are every other one: the bits of their copies."""
    monkeypatch.setattr(sm90, "call_obstacle", lambda *_: "")
    p = make(n=40, d=24, v=701, dtype=torch.bfloat16)
    columns = torch.stack([p.targets, p.targets.flip(0)], 1)
    every_other = p.hidden.detach().repeat_interleave(2, 0)[::2]
    made = []
    for hidden, targets in ((p.hidden, p.targets), (every_other.requires_grad_(), columns[:, 0])):
        out = linear_logprob(hidden, p.weight, targets, backend="sm90", plan="cache", entropy=True)
        gradients = torch.autograd.grad((out.logprob * torch.linspace(-1, 1, 40)).sum(), [hidden, p.weight])
        made.append((*out[:2], *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@needs_triton
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_of_two_shards(emulated, entropy, monkeypatch):
    """Exponentials around each shard's own number, of rows whose target is the other's and of rows that were raised."""
    p = make(n=40, d=24, v=704, dtype=torch.bfloat16, mask=torch.arange(40) % 5 > 0)
    with torch.no_grad():
        p.hidden *= torch.linspace(1, 12, 40)[:, None]
    monkeypatch.setattr(vocab_parallel, "sum_over_ranks", lambda values, group: values)
    y, calls = p.targets, []
    for first, last in ((0, 393), (393, 704)):  # with NaN behind the rows' exponentials
        shard = Problem(p.hidden.detach(), p.weight.detach()[first:last], y - first, {"mask": p.options["mask"]})
        calls.append(Call(shard, keep=True))
        calls[-1].y = shard.targets
    states = [call.run() for call in calls]
    merged = states[0].clone()
    vocab_parallel.merge_(merged, *states[1][:3])
    merged[3] += states[1][3]
    logprob, h, _ = (values.float() for values in outputs(merged))
    log_sum = merged[3] - merged[0] - logprob
    weights = torch.linspace(-1, 1, 40).masked_fill(~p.live(), 0)
    upstream = Upstream(weights, 0.1 * weights if entropy else None, None, logprob, h, merged[0], log_sum)
    got = []
    for call in calls:
        dweight = torch.empty_like(call.problem.weight)
        _, dhidden = gradients(
            call.problem.hidden, call.head, call.y, call.rows, upstream, Destination(True, dweight, None),
            residual=call.residual, consume=True, group="shards", backend="sm90",
        )  # fmt: skip
        got.append((dhidden.masked_fill(~p.live()[:, None], 0), dweight))
    twin = p.double()
    want = twin.oracle()
    exact = torch.autograd.grad(((want[0] + (0.1 * want[1] if entropy else 0)) * weights).sum(), twin.inputs())
    assert relative(got[0][0].float() + got[1][0].float(), exact[0]) < 1.6e-2
    assert relative(torch.cat([got[0][1], got[1][1]]), exact[1]) < 1.6e-2


@needs_triton
def test_a_shard_whose_entry_nearest_to_the_target_is_ruled_out(emulated):
    """A vocabulary's padding, say: exponentials around 0 would all have vanished where logits are far below it."""
    p = make(n=4, d=24, v=400, dtype=torch.bfloat16, bias=True, grad=(False, False))
    p.options["bias"].fill_(-300.0)[392:] = -torch.inf
    p.targets += 400
    m, s, t, _ = Call(p).run().double()
    z = (p.hidden.double() @ p.weight.double().T + p.options["bias"].double())[:, :392]
    assert (m + s.log() - z.logsumexp(1)).abs().max() < 2e-4
    assert (m + t / s - (torch.softmax(z, 1) * z).sum(1)).abs().max() < 2e-4


@needs_triton
def test_no_rows_and_an_empty_shard(emulated):
    """The state of no entry, as where a vocabulary has fewer blocks than there are ranks."""
    p = make(n=5, d=24, v=400, dtype=torch.bfloat16, grad=(False, False))
    assert Call(Problem(p.hidden[:0], p.weight, p.targets[:0], {})).run().shape == (4, 0)
    m, *rest = Call(Problem(p.hidden, p.weight[:0], p.targets, {})).run()
    assert (m < -1e38).all() and all((values == 0).all() for values in rest)


@needs_triton
def test_what_cublas_multiplies_is_zero_beyond_the_count(emulated):
    """All 150 rows, where a call has no mask and 50 targets are to be ignored."""
    p = make(n=150, d=24, v=400, dtype=torch.bfloat16, grad=(False, False), mask=torch.arange(150) % 3 > 0)
    call = Call(p, keep=True)
    call.rows = replace(call.rows, dense=True)
    call.run()
    assert call.residual.kept[:100].isfinite().all() and (call.residual.kept[100:] == 0).all()


MUTANTS = {
    "a slot released before it is read": ("      hopper::wgmma_wait<1>();", "      //"),
    "accumulators used before they are there": ("    hopper::wgmma_wait<0>();\n", ""),
    "a producer that never waits": ("ring.phase ^ 1", "ring.phase"),
    "half of the releases": ("4 * kConsumers * kCluster);", "4 * kConsumers);"),
    "the other consumer's rows": ("advance(consumer * kHalf, 0)", "advance(0, 0)"),
    "a block of K that is not begun anew": ("multiply_step<true>", "multiply_step<false>"),
    "a block of K that is lost": ("sum[i] += acc[i]", "sum[i] = acc[i]"),
    "no start for consumer 1": ("if (step == signal &&", "if (step == 99 &&"),
    "a wrong half of W": ("rank * kShare * kDepth * 2;", "(1 - rank) * kShare * kDepth * 2;"),
}


KEPT_MUTANTS = {
    "exponentials over what TMA has not read": ("  hopper::wait_until_read();", ""),
    "a half over the other": ("(half * kHalfParts + part) * kPart", "part * kPart"),
    "no swizzle": ("kept_byte(row, lane / kWarpRows)", "row * 64 + lane / kWarpRows * 16"),
    "a raised row beside what was there": ("if (kKeep) hopper::wait_until_stored();", "return;"),
}


@pytest.mark.parametrize("mutant", [*MUTANTS, *KEPT_MUTANTS])
def test_the_emulator_sees(mutant, tmp_path):
    """What a broken kernel does: it hangs, breaks the protocol or gives wrong numbers."""
    before, after = (MUTANTS | KEPT_MUTANTS)[mutant]
    names = ["sm90_kernel.h", "sm90_epilogue.h"]
    sources = [(CSRC / name).read_text() for name in names]
    assert sum(source.count(before) for source in sources) == sources[mutant in KEPT_MUTANTS].count(before) == 1
    for name, source in zip(names, sources, strict=True):
        for header in ("sm90_tiles.h", "softmax_state.h"):
            source = source.replace(f'"{header}"', f'"csrc/linear_logprob/{header}"')
        (tmp_path / name).write_text(source.replace(before, after))
    broken = compile_host("#define ONE_ONLY\n" + SOURCE.replace("KERNEL", str(tmp_path / names[0])), tmp_path)
    scan = Scan(n=256, live=256, width=584, vocab=1030, keep=True)
    if scan.run(broken) == 0:
        with pytest.raises(AssertionError):
            scan.check()
