"""What the scan for sm_90a computes with: schedule, ring, layouts and the softmax's state, on their own, on the host.

The device's headers, compiled as plain C++. The layouts are compared with those that Triton compiles from, which run on
devices; test_sm90_host.py runs the kernel with them.
"""

import ctypes
import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from backends import compile_host, needs_triton, pointer
from torch import Tensor

from srppo_kernels.linear_logprob import sm90

LOWEST = -2e38

TABLES = """
#include <initializer_list>

#include "csrc/linear_logprob/sm90_tiles.h"
#include "csrc/linear_logprob/softmax_state.h"

using namespace srppo::sm90;
using namespace srppo::softmax;

// For every block of the grid, its tiles in order: row block, group, tile. Returns how many there are.
extern "C" int turns(int live, int vocab, int group, int cluster, int grid, int* out) {
  const Schedule s{(live + kRows - 1) / kRows, vocab, group, cluster};
  int n = 0;
  for (int block = 0; block < grid; ++block)
    for (int i = block / cluster; i < s.units(); i += grid / cluster) {
      const Unit unit = s.unit(i);
      for (int tile = 0; tile < s.tiles(unit); ++tile)
        for (int value : {block, unit.block + block % cluster, unit.group, tile}) out[n++] = value;
    }
  return n / 4;
}

extern "C" bool laps(int by) {
  Ring ring;
  for (int i = 0; i < by; ++i) ring.next();
  return ring.stage == by % kStages && static_cast<int>(ring.phase) == by / kStages % 2;
}

extern "C" void shared_bytes(int* tma, int* wgmma) {
  const std::uint32_t base = 5 * 1024;
  for (int row = 0; row < kColumns; ++row)
    for (int k = 0; k < kDepth; ++k) {
      tma[row * kDepth + k] = tma_byte(row, k);
      const auto operand = descriptor(base) + advance(row / kHalf * kHalf, k / kStep * kStep);
      wgmma[row * kDepth + k] = static_cast<int>(wgmma_byte(operand, row % kHalf, k % kStep) - base);
    }
}

extern "C" void fragment(int* row, int* column) {  // [thread][register]
  for (int thread = 0; thread < 128; ++thread)
    for (int slot = 0; slot < kThreadRows; ++slot)
      for (int i = 0; i < kRowLogits; ++i) {
        const int at = thread * kLogits + register_of(slot, i);
        row[at] = first_row(thread) + row_offset(slot);
        column[at] = column_of(thread, i);
      }
}

extern "C" float capped_logit(float z, float softcap) { return capped(z, softcap, 1.0f / softcap); }

// One row of logits through a quad of threads, in the kernel's order, around m, then for half of the tiles `then`.
extern "C" void absorb_row(const float* z, int vocab, int target, float m, float then, float* out) {
  RowState state[4];
  for (RowState& s : state) s.m = m;
  for (int v0 = 0; v0 < vocab; v0 += kColumns)
    for (int lane = 0; lane < 4; ++lane) {
      if (v0 >= vocab / 2 && then > state[lane].m) raise(state[lane], then);
      Sums sums;
      for (int i = 0; i < kRowLogits; i += 2) {
        float e[2];
        for (int j = 0; j < 2; ++j) {
          const int v = v0 + column_of(lane, i + j);
          e[j] = v < vocab && v != target ? z[v] - state[lane].m : kLowest;
        }
        exponentials(sums, e);
      }
      state[lane].s += sums.s[0] + sums.s[1];
      state[lane].t += sums.t[0] + sums.t[1];
    }
  out[0] = state[0].m;
  out[1] = (state[0].s + state[1].s) + (state[2].s + state[3].s);
  out[2] = (state[0].t + state[1].t) + (state[2].t + state[3].t);
}
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    library = compile_host(TABLES, tmp_path_factory.mktemp("tables"))
    library.capped_logit.restype = ctypes.c_float
    return library


@pytest.mark.parametrize("cluster", [1, 2])
def test_every_tile_once(tables, cluster):
    """Over all shapes: each (row block, column tile) that holds a live row and an entry, once, in order, and by one
    block a group; blocks of a cluster take the same tiles of W."""
    out = (ctypes.c_int * 2_000_000)()
    shapes = product(
        (0, 1, 128, 129, 2100, 5000), (1, 191, 192, 193, 1000, 4097, 20000), (192, 960, 1536), (2, 12, 132)
    )
    for live, vocab, group, grid in shapes:
        n = tables.turns(live, vocab, group, cluster, grid, out)
        rows = torch.tensor(out[: 4 * n]).view(n, 4)
        block, row_block, number, tile = rows.T
        column = number * group + tile * 192
        assert ((column < vocab) & (tile * 192 < group)).all()
        blocks, columns = -(-live // 128), -(-vocab // 192)
        padded = -(-blocks // cluster) * cluster  # the last cluster's second block may have no live row
        want = torch.arange(padded)[:, None] * 10**6 + torch.arange(columns)
        assert torch.equal((row_block * 10**6 + column // 192).sort().values, want.flatten())
        owner = (row_block * 10**6 + number) * 10**4 + block
        assert len(owner.unique()) == len((row_block * 10**6 + number).unique())
        if cluster == 2:
            for first in range(0, grid, 2):
                left, right = (rows[block == b][:, [2, 3]] for b in (first, first + 1))
                assert torch.equal(left, right)  # what is loaded for both


def test_no_cluster_waits_for_the_others(tables):
    """Llama's and Qwen's vocabulary, 8192 rows, 66 clusters of two: the busiest has 2 % more than its share at most."""
    out = (ctypes.c_int * 2_000_000)()
    for vocab in (128256, 151936):
        n = tables.turns(8192, vocab, sm90.GROUP, 2, 132, out)
        block = torch.tensor(out[: 4 * n]).view(n, 4)[:, 0]
        assert block.bincount().max() <= 1.02 * n / 132


def test_ring(tables):
    tables.laps.restype = ctypes.c_bool
    assert all(map(tables.laps, range(300)))


def test_shared_memory_is_read_where_it_was_written(tables):
    """Every element of a tile: WGMMA's address through the descriptor is TMA's, and no two elements share one."""
    tma, wgmma = torch.zeros(192, 64, dtype=torch.int32), torch.zeros(192, 64, dtype=torch.int32)
    tables.shared_bytes(pointer(tma), pointer(wgmma))
    assert torch.equal(tma, wgmma)
    assert torch.equal(tma.flatten().sort().values, torch.arange(0, 192 * 128, 2, dtype=torch.int32))


TRITON_LAYOUTS = """
import json
from triton._C.libtriton import gluon_ir, ir
from triton.experimental.gluon.language._layouts import NVMMADistributedLayout, NVMMASharedLayout
context = ir.context()
ir.load_dialects(context)
builder = gluon_ir.GluonOpBuilder(context)
def linear(layout, shape):
    return builder.to_linear_layout(layout._to_ir(builder), shape)
d = linear(NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]), [64, 64])
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

    row, column = torch.zeros(128, 96, dtype=torch.int32), torch.zeros(128, 96, dtype=torch.int32)
    tables.fragment(pointer(row), pointer(column))
    want = place(threads, torch.arange(128))[:, None] ^ place(registers, torch.arange(32))  # of 64 columns
    for third in range(3):
        got = torch.stack([row, column - 64 * third], -1)[:, 32 * third : 32 * (third + 1)]
        assert torch.equal(got.long(), want)

    tma, wgmma = torch.zeros(192, 64, dtype=torch.int32), torch.zeros(192, 64, dtype=torch.int32)
    tables.shared_bytes(pointer(tma), pointer(wgmma))
    element = place(offsets, torch.arange(128 * 64))  # a power of two of rows
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
    ruled_out = z.clone()
    ruled_out[:200] = ruled_out[2500:] = LOWEST
    rows["first ones ruled out"] = (ruled_out, 1000)
    return rows


@pytest.mark.parametrize("kind", rows_of_logits())
@pytest.mark.parametrize(("around", "then"), [(0, -1e4), (25, -1e4), (-25, 0), (-300, 0)])
def test_absorbed_in_the_kernels_order(tables, kind, around, then):
    """(m, s, t) of 3000 logits through four threads, around what is off by ``around`` from the maximum, from the middle
    on by ``then``: s keeps the digits of 1 - p_y, t those of the entropy."""
    z, target = rows_of_logits()[kind]
    start, end = float(z.max()) + around, float(z.max()) + then
    if around == -300:
        z = torch.cat([z[:1536].clamp(max=start + 20), z[1536:]])
    out = torch.zeros(3)
    tables.absorb_row(pointer(z), len(z), target, ctypes.c_float(start), ctypes.c_float(end), pointer(out))
    exact = z.double()
    others = torch.cat([exact[:target], exact[target + 1 :]]) if target >= 0 else exact
    m = out[0].double()
    e = (others - m).exp()
    assert abs(m - max(start, end)) < 1e-3
    bound = 1e-6 if then < around else 4e-6  # 25 times log2 e is off by 2e-6
    assert abs(out[1] / e.sum() - 1) < bound
    assert abs(out[2] - (e * (others - m).clamp(min=-1e5)).sum()) < bound * (e * (others - m).abs()).sum()


def test_softcap(tables):
    for z in torch.cat(
        [torch.linspace(-200, 200, 801), torch.logspace(-6, 2, 50), torch.tensor([3e38, -3e38])]
    ).tolist():
        want = 30 * torch.tanh(torch.tensor(z, dtype=torch.float64) / 30).item()
        assert abs(tables.capped_logit(ctypes.c_float(z), ctypes.c_float(30.0)) - want) < 4e-7 * abs(want) + 1e-9
    assert torch.tensor(tables.capped_logit(ctypes.c_float(float("nan")), ctypes.c_float(30.0))).isnan()
