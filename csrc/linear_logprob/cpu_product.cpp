// out (+)= A B with bf16 factors and an fp32 result, which a CPU's BLAS rounds to bf16, and so cannot add up exactly; or
// with a bf16 result, rounded once.
//
// GEMMs 2 and 3 of srppo_kernels/linear_logprob: dhidden, also over vocabulary chunks, and dweight, also over chunks of
// rows or into a caller's buffer. A comes as [M, K] (dZ of dX = dZ W) or as [K, M] (dZ of dW = dZ^T X), B as [K, N]; K
// goes in pairs (bf16_tile.h), so packing B is interleaving two of its rows. Vectors (bf16_product.h) and AMX tiles
// (amx_tile.h) read the same panels of B.
//
// A task is a block of rows of the result and a block of its columns, over all of K in order: bits do not depend on the
// number of threads, nor on how the result is cut. In a bounded workspace it is cut smaller, and then fewer threads work.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>

#include "../common/cpu_level.h"
#include "../common/cut.h"
#include "../common/scratch.h"
#include "../common/tensors.h"
#include "../common/workers.h"
#include "amx_tile.h"
#include "bf16_product.h"

#if defined(__x86_64__)
#define SRPPO_KERNELS "../linear_logprob/cpu_product_kernels.h"
#include "../common/each_level.h"
#endif

namespace srppo {
namespace {

#if defined(__x86_64__)

// Of a task, at most. Rows: packing B is then a percent or two of its multiplications with AVX-512, and a tenth with
// AMX, which is that much faster; where K is one block, a thread with AMX does it once. A block of A is 0.7 or 1.1 MB
// and stays in L2. Columns: packing A is a few percent.
constexpr std::int64_t kRows = 336, kColumns = 1024;
constexpr std::int64_t kTileTaskRows = 512, kTileTaskColumns = 2048;
constexpr std::int64_t kSmallTask = 128;  // rows and columns: a bounded workspace does not cut smaller ones

// Rows [r0, r0 + count) of the result and steps [k0, k0 + depth) of K, row by row; K is filled up with zeros.
void pack_a_rows(const Bf16Matrix& a, bool transposed, std::int64_t r0, std::int64_t count, std::int64_t k0,
                 std::int64_t depth, std::uint16_t* out, std::int64_t stride, std::uint32_t* scratch) {
  const std::int64_t width = whole_tiles(count, 16);
  const auto transpose_words = SRPPO_AT_LEVEL(transpose_words);
  for (std::int64_t k = 0; transposed && k < depth; k += kTileDepth) {  // 16 pairs of rows of A
    for (std::int64_t i = 0; i < kTileDepth / 2; ++i) {
      const std::uint16_t *row = a.row(k0 + k + 2 * i), *next = a.row(k0 + k + 2 * i + 1);
      fetch_row(a, k0 + k + kTileDepth + 2 * i, r0, count);
      fetch_row(a, k0 + k + kTileDepth + 2 * i + 1, r0, count);
      interleave(row ? row + r0 : nullptr, next ? next + r0 : nullptr, count, width, scratch + i * width);
    }
    transpose_words(reinterpret_cast<const float*>(scratch), width, count, reinterpret_cast<float*>(out + k),
                    stride / 2);
  }
  const std::int64_t here = std::min(depth, a.columns - k0);
  for (std::int64_t r = 0; !transposed && r < count; ++r) {
    std::memcpy(out + r * stride, a.row(r0 + r) + k0, static_cast<std::size_t>(2 * here));
    std::fill(out + r * stride + here, out + r * stride + depth, std::uint16_t{0});
  }
}

// What the tasks of a thread pack into. Panels of B stay from one task to the next where all of K is one block. `sums`
// is what a bf16 result is rounded from: a panel of columns, or all of a task's where K takes several blocks.
struct TileScratch {
  Scratch<std::uint16_t> packed;
  Scratch<std::uint32_t> panels, pairs;
  Scratch<float> sums;
  bool whole;            // `panels` has room for all of a task's
  std::int64_t c0 = -1;  // and these columns' are there

  TileScratch(std::int64_t rows, std::int64_t columns, bool whole_panels, bool rounds)
      : packed(rows * tile_stride(2 * kPairs)), panels(kPairs * (whole_panels ? columns : kTilePanel)),
        pairs(kTileDepth / 2 * rows), sums(rounds ? rows * (whole_panels ? kTilePanel : columns) : 0),
        whole(whole_panels) {
    std::fill(packed.data(), packed.data() + rows * tile_stride(2 * kPairs), std::uint16_t{0});  // rows beyond the last
  }

  static std::int64_t bytes(std::int64_t rows, std::int64_t columns, bool whole_panels, bool rounds) {
    return 2 * rows * tile_stride(2 * kPairs) + 4 * kPairs * (whole_panels ? columns : kTilePanel) +
           2 * kTileDepth * rows + (rounds ? 4 * rows * (whole_panels ? kTilePanel : columns) : 0);
  }
};

// Brings the panel of B that is packed next to L2 in shares, between multiplications: a line of each of up to 1024
// rows, where the hardware does not run ahead.
struct NextPanel {
  const Bf16Matrix& b;
  std::int64_t row, end, column, share;

  void fetch() {
    const std::int64_t to = std::min(end, row + share);
    for (; row < to; ++row) __builtin_prefetch(b.row(row) + column, 0, 2);
  }
};

// `out` is float, or where it is nullptr `rounded` is bf16, which is written once.
void product_task_on_tiles(const Bf16Matrix& a, const Bf16Matrix& b, bool transposed, bool add, std::int64_t r0,
                           std::int64_t count, std::int64_t c0, std::int64_t width, float* out, std::uint16_t* rounded,
                           std::int64_t ldo, TileScratch& scratch) {
  const std::int64_t stride = tile_stride(2 * kPairs);
  const std::int64_t lds = scratch.whole ? kTilePanel : whole_tiles(width, kTilePanel);  // of `sums`
  const auto round_rows = SRPPO_AT_LEVEL(round_rows);
  for (std::int64_t k0 = 0; k0 < b.rows; k0 += 2 * kPairs) {
    const std::int64_t depth = whole_tiles(std::min(b.rows - k0, 2 * kPairs), kTileDepth);
    pack_a_rows(a, transposed, r0, count, k0, depth, scratch.packed.data(), stride, scratch.pairs.data());
    for (std::int64_t c = 0; c < width; c += kTilePanel) {
      const std::int64_t here = std::min(width - c, kTilePanel);
      const bool packed = scratch.whole && scratch.c0 == c0, last = c + kTilePanel >= width;
      std::uint32_t* panel = scratch.panels.data() + (scratch.whole ? c * kPairs : 0);
      for (std::int64_t p = 0; p < depth / 2 && !packed; ++p) {
        const std::uint16_t *row = b.row(k0 + 2 * p), *next = b.row(k0 + 2 * p + 1);
        const auto at = [&](const std::uint16_t* from) { return from ? from + c0 + c : nullptr; };
        const auto half = [](const std::uint16_t* from) { return from ? from + 16 : nullptr; };
        interleave(at(row), at(next), std::min<std::int64_t>(here, 16), 16, panel + panel_word(p, 0));
        interleave(half(at(row)), half(at(next)), here - 16, 16, panel + panel_word(p, 16));
      }
      const std::int64_t begin = last ? k0 + 2 * kPairs : k0, end = std::min(b.rows, begin + 2 * kPairs);
      const std::int64_t blocks = (depth + kTileBlock - 1) / kTileBlock;
      const std::int64_t turns = (count + 2 * kTileRows - 1) / (2 * kTileRows) * blocks;
      const std::int64_t column = c0 + (last ? 0 : c + kTilePanel);
      NextPanel ahead{b, packed ? end : begin, end, column, (end - begin + turns - 1) / turns};
      float* to = out ? out + r0 * ldo + c0 + c : scratch.sums.data() + (scratch.whole ? 0 : c);
      tile_multiply(count, out ? here : kTilePanel, scratch.packed.data(), stride, panel, depth, to, out ? ldo : lds,
                    add || k0 > 0, [&ahead] { ahead.fetch(); });
      if (!out && k0 + 2 * kPairs >= b.rows) round_rows(to, lds, count, here, rounded + r0 * ldo + c0 + c, ldo);
    }
  }
  if (scratch.whole) scratch.c0 = c0;
}

void product(const Tensor& left, const Tensor& right, bool transposed, bool add, Tensor result,
             std::optional<std::int64_t> bound) {
  const Bf16Matrix a(left, "a"), b(right, "b");
  const std::int64_t m = transposed ? a.columns : a.rows, n = b.columns;
  STD_TORCH_CHECK((transposed ? a.rows : a.columns) == b.rows, "srppo_native: a and b have different depths");
  STD_TORCH_CHECK(result.is_cpu() && result.dim() == 2 && result.size(0) == m && result.size(1) == n &&
                      (result.stride(1) == 1 || n <= 1),
                  "srppo_native: out must be a CPU matrix of ", m, " rows of ", n, " contiguous columns");
  const bool on_tiles = cpu_level() >= CpuLevel::amx, rounds = result.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(result.scalar_type() == ScalarType::Float || (rounds && !add && b.rows > 0),
                  "srppo_native: out must be float32, or bfloat16 where nothing is added to");
  float* out = rounds ? nullptr : mutable_floats(result);
  auto* rounded = rounds ? static_cast<std::uint16_t*>(result.mutable_data_ptr()) : nullptr;
  const std::int64_t ldo = result.stride(0);
  if (b.rows == 0) {
    for (std::int64_t i = 0; !add && i < m; ++i) std::fill(out + i * ldo, out + i * ldo + n, 0.0f);
    return;
  }
  if (m == 0 || n == 0) return;
  // Packing as so many rows or columns more: 3 % of 256 rows and, of 896 columns, 3 or, where A is transposed, 8 % on a Zen 4
  // [measured]; on tiles from what is said above.
  const Side down{m, on_tiles ? kTileTaskRows : kRows, on_tiles ? kTileRows : kBf16Rows, on_tiles ? 40 : 8};
  const Side across{n, on_tiles ? kTileTaskColumns : kColumns, kBf16Panel, on_tiles ? 256 : transposed ? 64 : 32};
  const std::int64_t threads = threads_there(), workspace = workspace_of(bound);
  const Block cut = cut_for(down, across, threads);
  std::int64_t rows = cut.rows, columns = cut.columns;
  const bool whole_panels = b.rows <= 2 * kPairs, keeps_sums = rounds && !whole_panels;
  const bool by_columns = on_tiles ? whole_panels || rounds : keeps_sums;
  const auto each = [&] {
    return on_tiles ? TileScratch::bytes(rows, columns, whole_panels, rounds)
                    : VectorScratch::bytes(rows, columns, keeps_sums);
  };
  while (std::min(threads, down.blocks(rows) * across.blocks(columns)) > workspace / each() &&
         std::max(rows, by_columns ? columns : 0) > kSmallTask) {
    if (by_columns && columns > rows)
      columns = across.size_of(2 * across.blocks(columns));
    else
      rows = down.size_of(2 * down.blocks(rows));
  }
  const std::int64_t row_blocks = down.blocks(rows), column_blocks = across.blocks(columns);
  const auto tasks = [&](std::int64_t begin, std::int64_t end, const auto& task) {
    for (std::int64_t i = begin; i < end; ++i) {
      // On tiles the same columns one after another, for the panels' sake; else the same rows.
      const std::int64_t r0 = (on_tiles ? i % row_blocks : i / column_blocks) * rows;
      const std::int64_t c0 = (on_tiles ? i / row_blocks : i % column_blocks) * columns;
      const std::int64_t count = std::min(rows, m - r0), width = std::min(columns, n - c0);
      task(r0, count, c0, width);
    }
  };
  parallel_within(workspace, each(), row_blocks * column_blocks, [&](std::int64_t begin, std::int64_t end) {
    if (on_tiles) {
      TileScratch scratch(rows, columns, whole_panels, rounds);
      const tiles::InUse in_use;
      tasks(begin, end, [&](std::int64_t r0, std::int64_t count, std::int64_t c0, std::int64_t width) {
        product_task_on_tiles(a, b, transposed, add, r0, count, c0, width, out, rounded, ldo, scratch);
      });
      return;
    }
    VectorScratch scratch(rows, columns, keeps_sums);
    tasks(begin, end, [&](std::int64_t r0, std::int64_t count, std::int64_t c0, std::int64_t width) {
      product_task(a, b, transposed, add, r0, count, c0, width, out, rounded, ldo, scratch);
    });
  });
}

#endif

void linear_logprob_product(const Tensor& a, const Tensor& b, bool transposed, bool add, Tensor out,
                            std::optional<std::int64_t> bound) {
#if defined(__x86_64__)
  if (cpu_level() >= CpuLevel::avx512_bf16) {
    product(a, b, transposed, add, out, bound);
    return;
  }
#endif
  STD_TORCH_CHECK(false, "srppo_native: linear_logprob_product needs AVX-512 BF16");
}

// Whether a bf16 result comes sooner from here than from torch's GEMM, which is oneDNN's: on AMX tiles, and with vectors
// where it was measured to, on AMD's Zen 4 and Zen 5.
bool linear_logprob_product_is_faster() {
  return cpu_level() >= CpuLevel::amx || (cpu_level() >= CpuLevel::avx512_bf16 && is_amd());
}

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "linear_logprob_product(Tensor a, Tensor b, bool transposed, bool add, Tensor(a!) out, "
      "int? workspace=None) -> ()");
  m.def("linear_logprob_product_is_faster() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CPU, m) {
  m.impl("linear_logprob_product", TORCH_BOX(&srppo::linear_logprob_product));
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CompositeExplicitAutograd, m) {
  m.impl("linear_logprob_product_is_faster", TORCH_BOX(&srppo::linear_logprob_product_is_faster));
}
