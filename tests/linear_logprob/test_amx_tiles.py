"""AMX tiles without a CPU that has them: csrc/linear_logprob/amx_tile.h as it is, on an emulator of the instructions.

amx_emulator.h executes TILELOADD, TILESTORED and TDPBF16PS bit by bit and notes every breach of the rules that the
hardware enforces; here the multiplication is held to float64, its rows to the same bits at every place and height, and
the library's check of itself to what it must find. test_amx_level.py has the kernels around it.
"""

import ctypes
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from backends import compile_host, pointer
from torch import Tensor

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
pytestmark = [
    pytest.mark.skipif(not {"fma", "avx2"} <= set(FLAGS.split()), reason="the emulator takes AVX2 and FMA"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine"),
]
TILE, PANEL, BLOCK = 16, 32, 640

SOURCE = """
#define SRPPO_TILES "tests/linear_logprob/amx_emulator.h"
#include "csrc/common/cpu_level.cpp"
#include "csrc/linear_logprob/amx_logits.h"

using namespace srppo;
using namespace srppo::tiles;

void pack(const float* const* sources, std::int64_t pairs, float* panel) {
  for (std::int64_t k = 0; k < (pairs + 15) / 16 * 16; ++k)
    for (int i = 0; i < 32; ++i) panel[panel_word(k, i)] = k < pairs ? sources[i][k] : 0.0f;
}
struct Rows {
  const std::uint16_t* data;
  std::int64_t width;
  const std::uint16_t* row(std::int64_t i) const { return data + i * width; }
};

extern "C" {
void multiply(std::int64_t rows, std::int64_t columns, const std::uint16_t* x, std::int64_t stride,
              const std::uint32_t* panel, std::int64_t depth, float* z, std::int64_t ldz, bool add) {
  const InUse in_use;
  tile_multiply(rows, columns, x, stride, panel, depth, z, ldz, add);
}
// z [size][count], by blocks.
void logits(std::int64_t count, const std::uint16_t* x, std::int64_t width, const std::uint16_t* w, std::int64_t stride,
            std::int64_t vocab, std::int64_t v0, std::int64_t size, float* z) {
  TileRows rows(width, count);
  const std::int64_t panels = (count + kTilePanel - 1) / kTilePanel;
  for (std::int64_t p = 0; p < panels; ++p)
    rows.set_panel(p, Rows{x, width}, count, [](std::int64_t r) { return r; }, pack);
  TileHead head(w, stride, width, vocab);
  TileBlocks blocks(head.parts(), panels);
  const InUse in_use;
  head.copy_next(v0, v0 + size, 0, 1);
  each_block(head, rows.panel(0), rows.panel_words(), panels, v0, size, vocab, vocab, blocks,
             [&](TileSteps& beside, float* part, const float* sums, std::int64_t p, std::int64_t c,
                 std::int64_t entries) {
               if (sums) add_beside(beside, part, sums);
               for (std::int64_t j = 0; j < entries; ++j)
                 for (std::int64_t i = 0; i < kTilePanel && p * kTilePanel + i < count; ++i)
                   z[(c + j) * count + p * kTilePanel + i] = part[i / 16 * kTileHalf + j * 16 + i % 16];
             });
}
std::int64_t stride_of(std::int64_t depth) { return tile_stride(depth); }
const char* check(int fault) {
  emulated::fault = fault;
  const char* found = tile_fault();
  emulated::fault = 0;
  return found ? found : "";
}
// The first breach of a rule since the last call.
const char* breach() {
  static thread_local std::string text;
  text = emulated::first_breach;
  emulated::first_breach.clear();
  return text.c_str();
}
int configured() { return emulated::configured_threads; }
int products() { return emulated::products.exchange(0); }
void leave_foreign() { emulated::leave_foreign(); }
void set_fault(int fault) { emulated::fault = fault; }
int level() { return static_cast<int>(detected_cpu_level()); }
const char* why() { return amx_obstacle() ? amx_obstacle() : ""; }
// One product of whole registers, c += a b: the emulator's vector code, or its plain one.
void dot(float* c, const std::uint32_t* a, const std::uint32_t* b, int plain) {
  emulated::fault = plain ? -1 : 0;
  const InUse in_use;
  load<0>(c, 64), load<1>(a, 64), load<2>(b, 64);
  dot_bf16<0, 1, 2>();
  store<0>(c, 64);
  emulated::fault = 0;
}
// Code that the hardware would stop, case by case.
void offend(int number) {
  static float memory[16 * 16];
  Configuration c = kWhole;
  switch (number) {
    case 0: zero<0>(); return;
    case 1: c.palette = 2; break;
    case 2: c.rows[3] = 17; break;
    case 3: c.row_bytes[3] = 68; break;
    case 4: c.rows[3] = 0; break;
    case 5: c.rows[8] = 1, c.row_bytes[8] = 4; break;
    case 6: c.reserved[0] = 1; break;
    case 7: configure(kWhole), release(), load<0>(memory, 64); return;
    case 8: configure(kWhole), configure(kWhole), release(); return;
    case 9: c.rows[0] = 8, configure(c), zero<0>(), zero<1>(), zero<2>(), dot_bf16<0, 1, 2>(), release(); return;
    case 10: c.row_bytes[1] = 32, configure(c), zero<0>(), zero<1>(), zero<2>(), dot_bf16<0, 1, 2>(), release(); return;
    case 11: c.rows[2] = c.row_bytes[2] = 0, configure(c), load<2>(memory, 64), release(); return;
    case 12: c.start_row = 1, configure(c), load<2>(memory, 64), release(); return;
    case 13: c.row_bytes[1] = 62, configure(c), zero<0>(), zero<1>(), zero<2>(), dot_bf16<0, 1, 2>(), release(); return;
    case 14: leave_foreign(), store<0>(memory, 64), release(); return;
    case 15: configure(kWhole), zero<0>(), zero<1>(), dot_bf16<0, 1, 1>(), release(); return;
  }
  configure(c);
  release();
}
}
"""
OFFENCES = [
    "not configured", "unknown palette", "more than 16 rows", "more than 64 bytes", "bytes without rows",
    "register that there is not", "reserved bytes", "not configured", "not released", "do not match", "do not match",
    "without a shape", "start_row", "whole pairs", "not its own", "one register twice",
]  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    host = compile_host(SOURCE, tmp_path_factory.mktemp("amx"))
    host.check.restype = host.breach.restype = host.why.restype = ctypes.c_char_p
    host.stride_of.restype = ctypes.c_int64
    host.stride_of.argtypes = [ctypes.c_int64]
    size, address = ctypes.c_int64, ctypes.c_void_p
    host.logits.argtypes = [size, address, size, address, size, size, size, size, address]
    host.multiply.argtypes = [size, size, address, size, address, size, address, size, ctypes.c_bool]
    return host


def whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def multiply(host: ctypes.CDLL, x: Tensor, w: Tensor, onto: Tensor | None = None) -> Tensor:
    """``x @ w.T`` on the tiles, or ``onto`` and that: bf16 rows, up to 32 columns, padded as the kernels pad them."""
    (rows, depth), columns = x.shape, w.shape[0]
    all_depth, stride = whole(depth, 32), host.stride_of(depth)
    padded = torch.full((whole(rows, TILE), stride), torch.nan, dtype=torch.bfloat16)  # NaN: what is not to be read
    padded[:, :all_depth] = 0
    padded[:rows, :depth] = x
    panel = torch.zeros(PANEL, all_depth, dtype=torch.bfloat16)
    panel[:columns, :depth] = w
    panel = panel.view(2, 16, -1, 16, 2).permute(2, 0, 3, 1, 4).contiguous()  # [steps][halves][pairs][columns][2]
    z = torch.full((rows + 32, PANEL + 16), torch.nan)
    if onto is not None:
        z[:rows, :columns] = onto
    host.multiply(
        rows, columns, pointer(padded), stride, pointer(panel), all_depth, pointer(z), z.stride(0), onto is not None
    )
    assert z[:, columns:].isnan().all(), "columns beyond the result were written"
    assert z[rows:].isnan().all(), "rows beyond the result were written"
    return z[:rows, :columns]


def clean(host: ctypes.CDLL) -> bool:
    """No rule was broken, and no thread has kept its tiles."""
    return host.breach() == b"" and host.configured() == 0


SHAPES = [
    (1, 1, 1),
    (16, 32, 32),
    (17, 33, 5),
    (32, 512, 32),
    (33, 513, 31),
    (50, 1100, 32),
    (96, 544, 32),
    (7, 2048, 32),
]


@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_against_float64(host, rows, depth, columns):
    x, w = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16()
    host.products()
    z = multiply(host, x, w)
    assert host.products() == whole(rows, TILE) // TILE * 2 * (whole(depth, 32) // 32)
    assert clean(host)
    exact = x.double() @ w.double().T
    scale = x.double().abs() @ w.double().abs().T  # what the sums are made of
    assert ((z.double() - exact).abs() <= 2**-23 * math.log2(2 * depth) * scale).all()
    onto = torch.randn(rows, columns)
    assert torch.equal(multiply(host, x, w, onto), onto + z) or depth > BLOCK  # there, block by block
    assert (multiply(host, x, w, onto) - (onto + z)).abs().max() < 1e-4


def test_no_further_from_float64_than_the_code_without_tiles(host):
    """N(0, 1) rows of 2048, and rows along a column, against bf16_tile.h's sums of 128 pairs."""
    w = torch.randn(PANEL, 2048).bfloat16()
    for x in (torch.randn(64, 2048).bfloat16(), (w[:16] * 0.1).bfloat16()):
        exact = x.double() @ w.double().T
        terms = x.float()[:, None] * w.float()[None]  # exact products
        chain = torch.zeros(*exact.shape, 8)
        for step in range(256):  # bf16_tile.h: eight sums of 128 pairs, added up in order
            chain = chain + terms.view(*exact.shape, 8, 256)[..., step]
        without = torch.zeros(exact.shape)
        for part in range(8):
            without = without + chain[..., part]
        error, before = ((z.double() - exact).square().mean().sqrt() for z in (multiply(host, x, w), without))
        assert 0 < error < before


def test_a_rows_bits_at_every_place_and_height(host):
    x, w = torch.randn(83, 1000).bfloat16(), torch.randn(PANEL, 1000).bfloat16()
    want = multiply(host, x, w)
    for rows in (1, 2, 15, 16, 17, 31, 32, 33, 64):
        for first in (0, 5, 83 - rows):
            assert torch.equal(multiply(host, x[first : first + rows], w), want[first : first + rows])
    order = torch.randperm(83)
    assert torch.equal(multiply(host, x[order], w), want[order])
    assert torch.equal(multiply(host, x, w[:9]), want[:, :9])
    onto = torch.randn(83, PANEL)
    added = multiply(host, x, w, onto)
    assert torch.equal(multiply(host, x[40:57], w, onto[40:57]), added[40:57])
    assert clean(host)


@pytest.mark.parametrize("width", [0, 1, 31, 64, 511, 512, 640, 641, 1100, 2000])
def test_logits_of_a_part_of_the_vocabulary(host, width):
    """A head whose rows lie apart, odd widths among them; the bits are those of a panel, part of K by part."""
    count, vocab = 50, 700
    x, w = torch.randn(count, width).bfloat16(), torch.randn(vocab, width + 3).bfloat16()
    w[:, width:] = torch.nan
    exact = x.double() @ w[:, :width].double().T
    for v0, size in ((0, 700), (300, 1), (44, 613)):
        z = torch.full((size, count), torch.nan)
        arguments = (width, pointer(w), w.stride(0), vocab, v0, size)
        host.logits(count, pointer(x), *arguments, pointer(z))
        assert (z.double().T - exact[:, v0 : v0 + size]).abs().max() < 1e-4
        alone = torch.full((size, 1), torch.nan)
        host.logits(1, pointer(x[7]), *arguments, pointer(alone))
        want = z[:, 7]
        assert torch.equal(alone[:, 0], want)
        if width:
            columns = min(size, PANEL)
            part = whole(-(-width // -(-width // BLOCK)), 32)
            sums = None
            for k in range(0, width, part):
                sums = multiply(host, x[7:8, k : k + part], w[v0 : v0 + columns, k : min(k + part, width)], sums)
            assert torch.equal(sums[0], want[:columns])
    assert clean(host)


def test_subnormal_numbers_are_zero_and_others_pass_through(host):
    x, w = torch.zeros(3, 40), torch.zeros(2, 40)
    x[0, 3], w[0, 3] = 2.0**-127, 1.0  # a subnormal input
    x[1, 3], w[1, 3] = 2.0**-100, 2.0**-30  # its product would be one
    x[1, 4], w[1, 4] = 2.0**-63, 2.0**-63
    x[2, 39] = torch.inf
    w[1, 39] = 1.0
    z = multiply(host, x.bfloat16(), w.bfloat16())
    assert z[0].tolist() == [0.0, 0.0]
    assert z[1, 1] == 2.0**-126
    assert z[2, 1] == torch.inf
    assert z[2, 0].isnan()
    assert clean(host)


def test_strides_are_odd_numbers_of_cache_lines(host):
    for depth in (1, 32, 48, 64, 576, 896, 2048, 4096):
        stride = host.stride_of(depth)
        assert 2 * stride % 64 == 0
        assert 2 * stride // 64 % 2 == 1
        assert whole(depth, 32) <= stride <= whole(depth, 32) + 32


def bf16_pairs(values: Tensor) -> Tensor:
    """bf16 ``[m, 2 n]`` as the 32-bit words of a register."""
    return values.contiguous().view(torch.int32)


def test_emulated_product_is_the_one_of_the_manual(host):
    """Vector code and plain code agree bit by bit, and both with the manual's pseudocode, written once more here."""
    for kind in ("random", "small", "special"):
        a, b, c = (torch.randn(16, 32).bfloat16() for _ in range(3))
        if kind == "small":
            a, b = a * 2.0**-70, b * 2.0**-62
        if kind == "special":
            a[2, 5], b[3, 7], a[9, :] = torch.inf, torch.nan, 2.0**-130
        c = torch.randn(16, 16) * (2.0**-126 if kind == "small" else 1.0)
        results = []
        for plain in (0, 1):
            out = c.clone()
            host.dot(pointer(out), pointer(bf16_pairs(a)), pointer(bf16_pairs(b)), plain)
            results.append(out)
        assert torch.equal(results[0].view(torch.int32), results[1].view(torch.int32)) or kind == "special"
        assert torch.equal(results[0].nan_to_num(7.0), results[1].nan_to_num(7.0))
        if kind != "random":
            continue
        pairs_b = b.view(16, 16, 2).double()  # [k][n][even, odd]
        sums = torch.zeros(16, 16, 2)
        for k in range(16):  # an fp64 product of bf16s is exact, and so is its sum with an fp32 here but for a tie
            product = a.view(16, 16, 2)[:, k].double()[:, None] * pairs_b[k][None]
            sums = (sums.double() + product).float()
        assert torch.equal(results[0], c + (sums[..., 0] + sums[..., 1]))
    assert clean(host)


@pytest.mark.parametrize("number", range(len(OFFENCES)))
def test_rules_of_the_hardware_are_enforced(host, number):
    host.breach()
    host.offend(number)
    assert OFFENCES[number] in host.breach().decode()
    assert host.configured() == 0


def test_another_librarys_configuration_is_replaced(host):
    host.leave_foreign()
    x, w = torch.randn(20, 64).bfloat16(), torch.randn(PANEL, 64).bfloat16()
    assert multiply(host, x, w).isfinite().all()
    assert clean(host)


def test_the_library_checks_itself(host):
    assert host.check(0) == b""
    assert clean(host)
    for fault in range(1, 6):
        assert b"wrong" in host.check(fault), fault


@pytest.mark.skipif("avx512_bf16" not in FLAGS.split(), reason="level amx takes AVX-512 BF16")
def test_a_machine_with_wrong_tiles_goes_on_without(host, tmp_path):
    assert (host.level(), host.why()) == (4, b"")
    assert clean(host)
    broken = ctypes.CDLL(shutil.copy(host._name, tmp_path / "broken.so"))  # another library, that has not looked yet
    broken.why.restype = ctypes.c_char_p
    broken.set_fault(1)
    assert (broken.level(), broken.why()) == (3, b"a product on this machine's tiles is wrong")


MUTANTS = {  # name: (file, what, by what)
    "no configuration": ("common/amx.h", "InUse() { configure(kWhole); }", "InUse() {}"),
    "no release": ("common/amx.h", "~InUse() { release(); }", "~InUse() {}"),
    "half rows": ("common/amx.h", "all.row_bytes[i] = kRowBytes;", "all.row_bytes[i] = i == 6 ? 32 : kRowBytes;"),
    "fewer rows": ("common/amx.h", "all.rows[i] = kRows;", "all.rows[i] = i == 5 ? 8 : kRows;"),
    "stride in elements": ("linear_logprob/amx_tile.h", "x_bytes = 2 * stride", "x_bytes = stride"),
    "second columns": ("linear_logprob/amx_tile.h", "load<B1>(panel + panel_word(0, 16),", "load<B1>(panel + 15,"),
    "operands exchanged": ("linear_logprob/amx_tile.h", "dot_bf16<C10, A1, B0>", "dot_bf16<C10, B0, A1>"),
    "later blocks of K start anew": ("linear_logprob/amx_tile.h", "on = add || k > 0;", "on = add;"),
    "a block of 16 rows is left out": ("linear_logprob/amx_tile.h", "else tile_block<", "else if (false) tile_block<"),
    "sums not cleared": ("linear_logprob/amx_tile.h", "tiles::zero<C11>();", ""),
}  # fmt: skip


def test_mutants_are_caught(tmp_path):
    """Each of these errors in the sources breaks a rule or fails the library's check of itself."""
    emulator = "linear_logprob/amx_emulator.h"
    texts = {
        each: (CSRC / each).read_text()
        for each in ("common/amx.h", "common/scratch.h", "linear_logprob/amx_tile.h", "linear_logprob/amx_check.h")
    }
    texts[emulator] = (ROOT / "tests" / emulator).read_text()
    # One translation unit, a namespace a mutant: what they include is included before.
    parts = sorted({line for text in texts.values() for line in re.findall("#include <.*>", text)})
    for number, (file, what, by) in enumerate([("common/amx.h", "", ""), *MUTANTS.values()]):
        folder = tmp_path / f"mutant{number}"
        for each, text in texts.items():
            assert each != file or text.count(what) >= 1, what
            (folder / each).parent.mkdir(parents=True, exist_ok=True)
            text = text.replace(what, by) if each == file and what else text
            (folder / each).write_text(f"{text}// {number}\n")  # #pragma once knows equal files
        parts.append(f'''
#undef SRPPO_TILES
#define SRPPO_TILES "{folder / emulator}"
namespace mutant{number} {{
#include "{folder}/linear_logprob/amx_check.h"
extern "C" const char* mutant{number}() {{
  static std::string found;
  const char* wrong = srppo::tile_fault();
  const auto& breach = srppo::tiles::emulated::first_breach;
  found = !breach.empty() ? breach : wrong ? wrong : srppo::tiles::emulated::configured_threads ? "not released" : "";
  return found.c_str();
}}
}}''')
    host = compile_host("\n".join(parts), tmp_path, "-O0")
    verdicts = []
    for number in range(1 + len(MUTANTS)):
        verdict = host[f"mutant{number}"]
        verdict.restype = ctypes.c_char_p
        verdicts.append(verdict().decode())
    assert verdicts[0] == ""
    for name, verdict in zip(MUTANTS, verdicts[1:], strict=True):
        assert verdict, f"{name}: not caught"
    assert "not configured" in verdicts[1]
    assert verdicts[2] == "not released"
    assert "do not match" in verdicts[3]
    assert "do not match" in verdicts[4]
    assert all("wrong" in verdict for verdict in verdicts[5:])
