"""The scan for sm_90a without a device: the kernel's own source, run on the host.

sm90_emulator.h has TMA, mbarriers and WGMMA in plain C++ and is as late and as unordered as the hardware may be; under
it csrc/linear_logprob/sm90_kernel.h runs as it is and is held to float64. The layouts that the emulator takes on trust
are compared with Triton's, which run on devices. Schedule, ring and scalar maths are tested on their own, over many
shapes.
"""

import ctypes
import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from backends import compile_host, needs_triton, pointer
from linear_logprob.head_problems import make, value_bound
from linear_logprob.test_linear_logprob_sm90 import Call, outputs
from torch import Tensor

from srppo_kernels.linear_logprob import gpu, sm90

CSRC = Path(__file__).parents[2] / "csrc" / "linear_logprob"
LOWEST = -2e38

SOURCE = """
#include "tests/linear_logprob/sm90_emulator.h"
#include "KERNEL"

using namespace srppo::sm90;

CUtensorMap x_map, w_map;
ScanParams params;

template <bool kPlain, bool kKeep, int kCluster>
void block() { scan_block<kPlain, kKeep, kCluster>(x_map, w_map, params, nullptr); }

template <int kCluster>
int launch(bool keep, int blocks, unsigned seed) {
#ifdef PLAIN_ONLY
  return kCluster == 2 && !keep ? emulator::launch(block<true, false, 2>, blocks, 2, seed) : -1;
#else
  const bool plain = !params.bias && !params.inverse_temperatures && params.softcap == 0.0f;
  const auto kernel = plain ? (keep ? block<true, true, kCluster> : block<true, false, kCluster>)
                            : (keep ? block<false, true, kCluster> : block<false, false, kCluster>);
  return emulator::launch(kernel, blocks, kCluster, seed);
#endif
}

extern "C" int scan(const ScanParams* p, const std::uint16_t* x, const std::uint16_t* w, int cluster, int blocks,
                    unsigned seed) {
  params = *p;
  x_map = {x, p->n, p->width, p->width, kRows / cluster};
  w_map = {w, p->vocab, p->width, p->width, kColumns};
  return cluster == 1 ? launch<1>(p->kept, blocks, seed) : launch<2>(p->kept, blocks, seed);
}
"""
TABLES = """
#include <initializer_list>

#include "csrc/linear_logprob/sm90_tiles.h"
#include "csrc/linear_logprob/softmax_state.h"

using namespace srppo::sm90;
using namespace srppo::softmax;

// For every block of the grid, its turns in order: row block, group, tile, consumer. Returns how many there are.
extern "C" int turns(int live, int vocab, int group, int cluster, int grid, int* out) {
  const Schedule s{(live + kRows - 1) / kRows, vocab, group, cluster};
  int n = 0;
  for (int block = 0; block < grid; ++block)
    for (int i = block / cluster; i < s.units(); i += grid / cluster) {
      const Unit unit = s.unit(i);
      const int n1 = s.tiles(unit, 1), all = s.tiles(unit, 0) + n1;
      for (int at = 0; at < all; ++at) {
        const Turn turn = Schedule::turn(at, n1);
        if (Schedule::place(turn, n1) != at || turn.tile >= s.tiles(unit, turn.consumer)) return -1;
        const int number = s.group_of(unit, turn.consumer, block % cluster);
        for (int value : {block, unit.block, number, turn.tile, turn.consumer}) out[n++] = value;
      }
    }
  return n / 5;
}

extern "C" bool skips(int from, int by) {
  Ring a, b;
  for (int i = 0; i < from; ++i) a.next();
  b.skip(from);
  b.skip(by);
  for (int i = 0; i < by; ++i) a.next();
  return a.stage == b.stage && a.phase == b.phase && a.stage == (from + by) % kStages &&
         static_cast<int>(a.phase) == (from + by) / kStages % 2;
}

extern "C" void shared_bytes(int* tma, int* wgmma) {
  const std::uint32_t base = 5 * 1024;
  for (int row = 0; row < 128; ++row)
    for (int k = 0; k < kDepth; ++k) {
      tma[row * kDepth + k] = tma_byte(row, k);
      const auto operand = descriptor(base) + advance(row / kHalf * kHalf, k / kStep * kStep);
      wgmma[row * kDepth + k] = static_cast<int>(wgmma_byte(operand, row % kHalf, k % kStep) - base);
    }
}

extern "C" void fragment(int* row, int* column) {  // [thread][half][register]
  for (int thread = 0; thread < 128; ++thread)
    for (int slot = 0; slot < kThreadRows; ++slot)
      for (int i = 0; i < kColumns / 4; ++i) {
        const int at = (thread * 2 + slot / 2) * 64 + register_of(slot, i);
        row[at] = first_row(thread) + row_offset(slot);
        column[at] = column_of(thread, i);
      }
}

extern "C" float capped_logit(float z, float softcap) { return capped(z, softcap, 1.0f / softcap); }

// One row of logits through a quad of threads, in the kernel's order; entries that do not count are kLowest.
extern "C" void absorb_row(const float* z, int vocab, int target, float* out) {
  RowState state[4];
  const float peak = target < 0 ? kLowest : z[target];
  for (int v0 = 0; v0 < vocab; v0 += kColumns)
    for (int part = 0; part < kColumns / kPart; ++part) {
      float mine[4][kEntries], m = kLowest;
      for (int lane = 0; lane < 4; ++lane) {
        for (int i = 0; i < kEntries; ++i) {
          const int v = v0 + column_of(lane, part * kEntries + i);
          mine[lane][i] = v < vocab && v != target ? z[v] : kLowest;
        }
        m = fmaxf(m, largest(mine[lane]));
      }
      if (part == 0 && target >= v0 && target < v0 + kColumns) m = fmaxf(m, peak);
      for (int lane = 0; lane < 4; ++lane) absorb(state[lane], m, mine[lane]);
    }
  RowState sum{state[0].m, (state[0].s + state[1].s) + (state[2].s + state[3].s),
               (state[0].t + state[1].t) + (state[2].t + state[3].t)};
  sum = finished(sum);
  out[0] = sum.m;
  out[1] = sum.s;
  out[2] = sum.t;
}
"""


class ScanParams(ctypes.Structure):
    """sm90_epilogue.h's."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "bias", "targets", "inverse_temperatures", "count", "state", "target_logits", "kept", "kept_max")),
        *((name, ctypes.c_int64) for name in ("stride_kept", "stride_max")),
        *((name, ctypes.c_int) for name in ("n", "width", "vocab", "group")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "inverse_softcap", "inverse_temperature")),
    ]  # fmt: skip


class Scan:
    """A call of the kernel: inputs, then ``run`` fills the outputs."""

    def __init__(self, *, n=200, live=150, width=136, vocab=1210, group=256, scale=1.0, softcap=0.0, temperature=1.0,
                 bias=False, row_temperature=False, keep=False):  # fmt: skip
        self.n, self.live, self.vocab, self.group = n, live, vocab, group
        self.scale, self.softcap, self.temperature, self.keep = scale, softcap, temperature, keep
        self.x = torch.randn(n, width).bfloat16()
        self.w = (torch.randn(vocab, width) * 0.3).bfloat16()
        self.targets = torch.randint(0, vocab, (n,))
        self.bias = torch.randn(vocab) if bias else None
        self.inverse = 1 / (torch.rand(n) + 0.5) if row_temperature else None

    def run(self, host: ctypes.CDLL, *, cluster=2, blocks=2, seed=0) -> int:
        groups = -(-self.vocab // self.group)
        self.state = torch.full((3, groups, self.n), float("nan"))
        self.target_logits = torch.full((self.n,), float("nan"))
        self.kept = torch.full((self.n, self.vocab), float("nan"), dtype=torch.bfloat16)
        self.kept_max = torch.full((self.n, -(-self.vocab // 32)), float("nan"))
        count = torch.tensor([self.live], dtype=torch.int32)
        optional = {"bias": self.bias, "inverse_temperatures": self.inverse}
        if self.keep:
            optional |= {"kept": self.kept, "kept_max": self.kept_max}
        tensors = {"targets": self.targets, "count": count, "state": self.state, "target_logits": self.target_logits}
        tensors |= {name: t for name, t in optional.items() if t is not None}
        p = ScanParams(
            **{name: t.data_ptr() for name, t in tensors.items()}, stride_kept=self.kept.stride(0),
            stride_max=self.kept_max.stride(0), n=self.n, width=self.x.shape[1], vocab=self.vocab, group=self.group,
            scale=self.scale, softcap=self.softcap, inverse_softcap=1 / self.softcap if self.softcap else 0.0,
            inverse_temperature=1 / self.temperature,
        )  # fmt: skip
        return host.scan(ctypes.byref(p), pointer(self.x), pointer(self.w), cluster, blocks, seed)

    def logits(self) -> Tensor:
        z = self.x[: self.live].double() @ self.w.double().T
        z = (z + (0 if self.bias is None else self.bias.double())) * self.scale
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature if self.inverse is None else z * self.inverse[: self.live, None].double()

    def check(self) -> None:
        """State, target's logit and kept exponentials of the live rows against float64; nothing beyond them."""
        z, y = self.logits(), self.targets[: self.live, None]
        m, s, t = merged(self.state[:, :, : self.live])
        mine = torch.where((y >= 0) & (y < self.vocab), y, 0)
        others = z.scatter(1, mine, -torch.inf) if bool((mine == y).all()) else z
        # One accumulator over K: its error goes with the root of the number of products.
        bound = 3e-6 + 4e-7 * float(z.abs().max()) * max(1, self.x.shape[1] / 128) ** 0.5
        assert (m - z.amax(1)).abs().max() < bound
        e = (others - m[:, None]).exp()
        assert (s / e.sum(1) - 1).abs().max() < 2 * bound
        want = (e * (others - m[:, None]).clamp(min=-1e4)).sum(1)
        assert ((t - want).abs() / (1 + want.abs())).max() < 4 * bound
        assert (self.target_logits[: self.live] - z.gather(1, mine)[:, 0]).abs().max() < bound
        assert self.state[:, :, self.live :].isnan().all() and self.target_logits[self.live :].isnan().all()
        if self.keep:
            around = self.kept_max[: self.live].double().repeat_interleave(32, 1)[:, : self.vocab]
            exact = (z - around).exp()
            assert ((self.kept[: self.live].double() - exact).abs() <= exact * 2**-8 + 1e-37).all()
            assert (around <= m[:, None]).all() and (self.kept[: self.live].double() < 1.01).all()
        assert not self.keep or self.kept[self.live :].isnan().all()


def merged(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The groups' states as one, in float64."""
    m, s, t = state.double()
    most = m.amax(0)
    fall = (m - most).clamp(min=-1e4)
    return most, (s * fall.exp()).sum(0), ((t + s * fall) * fall.exp()).sum(0)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return compile_host(SOURCE.replace("KERNEL", "csrc/linear_logprob/sm90_kernel.h"), tmp_path_factory.mktemp("sm90"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    library = compile_host(TABLES, tmp_path_factory.mktemp("tables"))
    library.capped_logit.restype = ctypes.c_float
    return library


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
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
        ({"n": 130, "live": 129, "width": 72, "vocab": 1026}, 2, 4),  # the last group is two entries
        ({"n": 300, "live": 300, "width": 64, "vocab": 384, "group": 128}, 2, 4),  # consumer 1 has fewer groups
        ({"n": 128, "live": 100, "width": 904, "vocab": 1030}, 2, 2),  # a tile is more than two laps of the ring
        ({"n": 128, "live": 100, "width": 448, "vocab": 1300}, 1, 1),  # or just one
        ({"n": 400, "live": 390, "width": 40, "vocab": 770}, 1, 3),
        ({"n": 64, "live": 0}, 2, 2),
    ],
)
def test_shapes(host, shape, cluster, blocks):
    scan = Scan(**shape)
    for seed in range(2):
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
    assert whole.run(host, cluster=2, blocks=2, seed=1) == 0
    assert few.run(host, cluster=1, blocks=3, seed=2) == 0
    assert torch.equal(few.state, whole.state[:, :, order[:9]])
    assert torch.equal(few.target_logits, whole.target_logits[order[:9]])


def test_targets_of_another_shard(host):
    """A target before or behind the vocabulary, even inside its last tile, is nobody's: its logit stays as it was."""
    scan = Scan(vocab=1210, keep=True)
    scan.targets[:4] = torch.tensor([-3, 1210, 1279, 10**9])
    assert scan.run(host) == 0
    assert scan.target_logits[:4].isnan().all() and scan.target_logits[4 : scan.live].isfinite().all()
    m, s, _ = merged(scan.state[:, :, :4])
    assert (s / (scan.logits()[:4] - m[:, None]).exp().sum(1) - 1).abs().max() < 1e-5


def test_entries_that_a_bias_rules_out(host):
    """-inf on a whole group and on the first parts of another: neither NaN nor a trace of them."""
    scan = Scan(bias=True, vocab=1210)
    scan.bias[:300] = scan.bias[700:] = -torch.inf
    scan.targets.clamp_(300, 699)
    assert scan.run(host) == 0
    state = scan.state[:, :, : scan.live]
    assert state.isfinite().all() and (state[1:, 0] == 0).all() and (state[0, 0] == torch.tensor(LOWEST)).all()
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
        x, w, bias, targets, inverse, count, scale, softcap, temperature, group, cluster, state, logits, kept, most
    ):
        def address(t: Tensor | None) -> int | None:
            assert t is None or t.stride(-1) == 1
            return None if t is None else t.data_ptr()

        p = ScanParams(
            *map(address, (bias, targets, inverse, count, state, logits, kept, most)),
            0 if kept is None else kept.stride(0), 0 if most is None else most.stride(0), *x.shape, w.shape[0], group,
            scale, softcap, 1 / softcap if softcap else 0.0, temperature,
        )  # fmt: skip
        assert x.is_contiguous() and w.is_contiguous() and x.dtype == w.dtype == torch.bfloat16
        assert host.scan(ctypes.byref(p), pointer(x), pointer(w), cluster, 2 * cluster, 0) == 0

    name = "linear_logprob_scan_sm90"
    definition = re.search(r"m\.def\((.*?)\);", (CSRC / "sm90.cu").read_text(), re.DOTALL)
    assert definition is not None
    with torch.library._scoped_library("srppo_native", "FRAGMENT") as library:
        library.define("".join(re.findall(r'"([^"]*)"', definition[1])))
        library.impl(name, run, "CPU")
        yield
    if hasattr(torch.ops.srppo_native, name):
        delattr(torch.ops.srppo_native, name)


@needs_triton
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True, "softcap": 6.0, "logit_scale": 0.5}, {"row_temperature": True}],
    ids=lambda o: "-".join(o) or "plain",
)
def test_the_front(emulated, options):
    """Rows compacted, scanned, merged and put back, beside the Triton scan, and residuals that mean the same."""
    options = dict(options)
    per_row = options.pop("row_temperature", False)
    p = make(n=40, d=24, v=700, dtype=torch.bfloat16, mask=torch.rand(40) > 0.3, **options)
    if per_row:
        p.options["temperature"] = torch.rand(40) + 0.5
    p.hidden.requires_grad_(False)
    call, triton = Call(p, keep=True), Call(p, keep=True)
    got, other, want = outputs(call.run()), outputs(triton.run(gpu.scan)), p.double().oracle()
    for a, b, c in zip(got, other, want, strict=True):
        assert (a - c)[call.live].abs().max() < value_bound(p)
        assert (a - b)[call.live].abs().max() < 2 * value_bound(p)
    whole = [
        c.residual.kept[: int(c.live.sum())].double()
        * c.residual.group_max.double().exp().repeat_interleave(gpu.PART, 1)[: int(c.live.sum()), : p.weight.shape[0]]
        for c in (call, triton)
    ]
    assert torch.allclose(whole[0], whole[1], rtol=2**-6, atol=0)
    assert torch.equal(Call(p).run(group=256, cluster=1)[3], call.run()[3])  # z_y has one way to be computed
    assert sm90.obstacle(p.hidden, p.weight).startswith("it is for CUDA devices")


MUTANTS = {
    "a slot released before it is read": ("    hopper::wgmma_wait<1>();", "    //"),
    "accumulators used before they are there": ("  hopper::wgmma_wait<0>();\n", ""),
    "a producer that never waits": ("ring.phase ^ 1", "ring.phase"),
    "half of the releases": ("4 * kCluster);", "4);"),
    "the other consumer's slots": ("ring.skip((place - at) * steps);", ""),
    "no turns": ("if (!my_turn) {", "if (false) {"),
    "a wrong half of X": ("rank * kShare * kDepth * 2;", "(1 - rank) * kShare * kDepth * 2;"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_emulator_sees(mutant, tmp_path):
    """What a broken kernel does: it hangs, breaks the protocol or gives wrong numbers."""
    before, after = MUTANTS[mutant]
    source = (CSRC / "sm90_kernel.h").read_text()
    assert source.count(before) == 1
    source = source.replace(before, after).replace('#include "sm90_', '#include "csrc/linear_logprob/sm90_')
    (tmp_path / "kernel.h").write_text(source)
    broken = compile_host("#define PLAIN_ONLY\n" + SOURCE.replace("KERNEL", str(tmp_path / "kernel.h")), tmp_path)
    scan = Scan(n=128, live=128, width=520, vocab=1030)
    if scan.run(broken) == 0:
        with pytest.raises(AssertionError):
            scan.check()


@pytest.mark.parametrize("cluster", [1, 2])
def test_every_tile_once(tables, cluster):
    """Over all shapes: each (row block, column tile) that holds a live row and an entry, once, in order, and by one
    consumer a group; blocks of a cluster take the same turns."""
    out = (ctypes.c_int * 2_000_000)()
    shapes = product(
        (0, 1, 128, 129, 2100, 5000), (1, 127, 128, 129, 1000, 4097, 20000), (128, 1024, 2048), (2, 12, 132)
    )
    for live, vocab, group, grid in shapes:
        n = tables.turns(live, vocab, group, cluster, grid, out)
        assert n >= 0
        rows = torch.tensor(out[: 5 * n]).view(n, 5)
        block, row_block, number, tile, consumer = rows.T
        column = number * group + tile * 128
        inside = (column < vocab) & (tile * 128 < group)
        assert inside.all() or cluster == 2
        seen = row_block[inside] * 10**6 + column[inside] // 128
        blocks, columns = -(-live // 128), -(-vocab // 128)
        want = torch.arange(blocks)[:, None] * 10**6 + torch.arange(columns)
        assert torch.equal(seen.sort().values, want.flatten())
        owner = (row_block * 10**6 + number) * 10**4 + block * 2 + consumer
        assert len(owner.unique()) == len((row_block * 10**6 + number).unique())
        if cluster == 2:
            for first in range(0, grid, 2):
                left, right = (rows[block == b][:, [1, 3, 4]] for b in (first, first + 1))
                assert torch.equal(left, right)  # rows, tile, consumer: what is loaded for both


def test_computed_in_vain(tables):
    """Llama's and Qwen's vocabulary, 8192 rows, clusters of two: tiles beyond the vocabulary are under 1.5 %."""
    out = (ctypes.c_int * 2_000_000)()
    for vocab in (128256, 151936):
        n = tables.turns(8192, vocab, 1024, 2, 132, out)
        assert n <= 1.015 * 64 * -(-vocab // 128)


def test_ring(tables):
    tables.skips.restype = ctypes.c_bool
    assert all(tables.skips(a, b) for a, b in product(range(30), range(300)))


def test_shared_memory_is_read_where_it_was_written(tables):
    """Every element of a tile: WGMMA's address through the descriptor is TMA's, and no two elements share one."""
    tma, wgmma = torch.zeros(128, 64, dtype=torch.int32), torch.zeros(128, 64, dtype=torch.int32)
    tables.shared_bytes(pointer(tma), pointer(wgmma))
    assert torch.equal(tma, wgmma)
    assert torch.equal(tma.flatten().sort().values, torch.arange(0, 16384, 2, dtype=torch.int32))


TRITON_LAYOUTS = """
import json
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language._layouts import NVMMADistributedLayout, NVMMASharedLayout
context = ir.context()
ir.load_dialects(context)
builder = gluon_ir.GluonOpBuilder(context)
def linear(layout, shape):
    return builder.to_linear_layout(layout._to_ir(builder), shape)
d = linear(NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]), [128, 128])
s = linear(NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2), [128, 64])
print(json.dumps([d.reg_bases, d.lane_bases + d.warp_bases, s.offset_bases]))
"""


@needs_triton
def test_layouts_are_tritons(tables):
    """The accumulator's fragments and the 128-byte swizzle, against the linear layouts that Triton compiles from."""
    done = subprocess.run([sys.executable, "-c", TRITON_LAYOUTS], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this Triton does not show its layouts: {done.stderr.strip().splitlines()[-1]}")
    registers, threads, offsets = json.loads(done.stdout)

    def place(bases: list[list[int]], number: Tensor) -> Tensor:
        """A linear layout over bits: the XOR of the bases of the bits that are set."""
        at = torch.zeros(*number.shape, 2, dtype=torch.int64)
        for bit, base in enumerate(bases):
            at ^= torch.tensor(base) * (number >> bit & 1)[..., None]
        return at

    row, column = torch.zeros(128, 128, dtype=torch.int32), torch.zeros(128, 128, dtype=torch.int32)
    tables.fragment(pointer(row), pointer(column))
    want = place(threads, torch.arange(128))[:, None] ^ place(registers, torch.arange(128))
    assert torch.equal(torch.stack([row, column], -1).long(), want)

    tma, wgmma = torch.zeros(128, 64, dtype=torch.int32), torch.zeros(128, 64, dtype=torch.int32)
    tables.shared_bytes(pointer(tma), pointer(wgmma))
    element = place(offsets, torch.arange(128 * 64))
    assert torch.equal(tma[element[:, 0], element[:, 1]].long(), 2 * torch.arange(128 * 64))


def rows_of_logits() -> dict[str, tuple[Tensor, int]]:
    z = torch.randn(3000) * 4
    rows = {"random": (z, 17), "no target here": (z, -1)}
    for p in (0.5, 0.99, 1 - 1e-6):
        peaked = z / 8
        others = torch.logsumexp(torch.cat([peaked[:2000], peaked[2001:]]).double(), 0)
        peaked[2000] = float(others + torch.log(torch.tensor(p / (1 - p), dtype=torch.float64)))
        rows[f"p = {p}"] = (peaked, 2000)
    for offset in (1e4, -1e4, 300.0, -300.0):
        rows[f"offset {offset}"] = (z + offset, 2999)
    rows["rising"] = (torch.linspace(-300, 300, 3000), 1)
    rows["falling"] = (torch.linspace(300, -300, 3000), 1)
    ruled_out = z.clone()
    ruled_out[:200] = ruled_out[2500:] = LOWEST
    rows["first parts ruled out"] = (ruled_out, 1000)
    return rows


@pytest.mark.parametrize("kind", rows_of_logits())
def test_absorbed_in_the_kernels_order(tables, kind):
    """(m, s, t) of 3000 logits through four threads: s keeps the digits of 1 - p_y, t those of the entropy."""
    z, target = rows_of_logits()[kind]
    out = torch.zeros(3)
    tables.absorb_row(pointer(z), len(z), target, pointer(out))
    exact = z.double()
    others = torch.cat([exact[:target], exact[target + 1 :]]) if target >= 0 else exact
    m = exact.max()
    e = (others - m).exp()
    assert out[0] == z.max()
    assert abs(out[1] / e.sum() - 1) < 1e-6
    assert abs(out[2] - (e * (others - m).clamp(min=-1e5)).sum()) < 1e-6 * (e * (others - m).abs()).sum()


def test_a_row_with_nothing_in_it(tables):
    z, out = torch.full((500,), LOWEST), torch.ones(3)
    tables.absorb_row(pointer(z), 500, -1, pointer(out))
    assert out.tolist() == [torch.tensor(LOWEST).item(), 0, 0]


def test_softcap(tables):
    for z in torch.cat(
        [torch.linspace(-200, 200, 801), torch.logspace(-6, 2, 50), torch.tensor([3e38, -3e38])]
    ).tolist():
        want = 30 * torch.tanh(torch.tensor(z, dtype=torch.float64) / 30).item()
        assert abs(tables.capped_logit(ctypes.c_float(z), ctypes.c_float(30.0)) - want) < 4e-7 * abs(want) + 1e-9
    assert torch.tensor(tables.capped_logit(ctypes.c_float(float("nan")), ctypes.c_float(30.0))).isnan()
