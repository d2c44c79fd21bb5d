// out (+)= A B in fp32 on the tiles of the scan: GEMMs 2 and 3 of srppo_kernels/linear_logprob for fp32 inputs.
//
// A comes as [M, K] (dZ of dX = dZ W) or as [K, M] (dZ of dW = dZ^T X), B as [K, N]. A task is a block of rows of the
// result and a block of its columns, over all of K in order, kSteps of it at a time: bits do not depend on how the
// result is cut, and so not on the number of threads.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#include "../common/ahead.h"
#include "../common/cpu_level.h"
#include "../common/cut.h"
#include "../common/scratch.h"
#include "../common/tensors.h"
#include "../common/workers.h"
#include "bf16_tile.h"

#define SRPPO_KERNELS "../linear_logprob/fp32_product_kernels.h"
#include "../common/each_level.h"

namespace srppo {
namespace {

constexpr std::int64_t kSteps = 512;     // of K at a time: a panel of B is then 64 KB
constexpr std::int64_t kRows = 336;      // of a task at most: a block of A is 690 KB, which stays in L2
constexpr std::int64_t kColumns = 1024;  // of a task at most: packing A is a percent or two

static_assert(kSteps % kDepth == 0, "a sum's blocks of K must not depend on kSteps");

struct Fp32Matrix {
  const float* data;
  std::int64_t rows, columns, stride;

  Fp32Matrix(const Tensor& tensor, const char* name)
      : data(static_cast<const float*>(tensor.const_data_ptr())), rows(tensor.size(0)), columns(tensor.size(1)),
        stride(tensor.stride(0)) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float &&
                        (tensor.stride(1) == 1 || columns <= 1),
                    "srppo_native: ", name, " must be a float32 CPU matrix with contiguous rows");
  }
};

std::int64_t blocks_of(std::int64_t extent, std::int64_t size) { return (extent + size - 1) / size; }

// Steps [at, end) of columns of B, packed as a panel a share at a time between the multiplications of another panel: as
// in bf16_product.h, where it says why.
struct PanelPacker {
  const Fp32Matrix& b;
  void (*pack)(const float*, std::int64_t, std::int64_t, std::int64_t, float*);
  std::int64_t at, end, column, width, panel, share;
  float* out;

  void pack_share() {
    const std::int64_t steps = std::min(end - at, share);
    if (steps <= 0) return;
    pack(b.data + at * b.stride + column, b.stride, width, steps, out);
    at += steps;
    out += steps * panel;
  }

  void pack_rest() {
    while (at < end) pack_share();
  }

  // Of the share that is packed next, during `steps` of a multiplication.
  Ahead lines(std::int64_t steps) const {
    const std::int64_t rows = std::min(end - at, share);
    if (rows <= 0) return {};
    return {b.data + at * b.stride + column, 4 * b.stride, rows, steps};
  }
};

void linear_logprob_product_fp32(const Tensor& left, const Tensor& right, bool transposed, bool add, Tensor result,
                                 std::optional<std::int64_t> bound) {
  const Fp32Matrix a(left, "a"), b(right, "b");
  const std::int64_t m = transposed ? a.columns : a.rows, n = b.columns, depth = b.rows;
  STD_TORCH_CHECK((transposed ? a.rows : a.columns) == depth, "srppo_native: a and b have different depths");
  STD_TORCH_CHECK(result.is_cpu() && result.dim() == 2 && result.size(0) == m && result.size(1) == n &&
                      result.scalar_type() == ScalarType::Float && (result.stride(1) == 1 || n <= 1),
                  "srppo_native: out must be a float32 CPU matrix of ", m, " rows of ", n, " contiguous columns");
  if (m == 0 || n == 0) return;
  float* out = static_cast<float*>(result.mutable_data_ptr());
  const std::int64_t ldo = result.stride(0);
  const auto tile_height = SRPPO_AT_LEVEL(tile_height);
  const auto multiply = SRPPO_AT_LEVEL(multiply_or_add);
  const auto pack_a = transposed ? SRPPO_AT_LEVEL(pack_columns) : SRPPO_AT_LEVEL(pack_rows);
  const auto pack_b = SRPPO_AT_LEVEL(pack_panel_rows);
  const auto write_edge = SRPPO_AT_LEVEL(write_edge);
  const std::int64_t panel = SRPPO_AT_LEVEL(panel_width)(), tile = tile_height(kRows);

  // Room for a thread's block in a bounded workspace, by cutting rows; and then fewer threads work.
  const std::int64_t threads = threads_there(), workspace = workspace_of(bound), least = 2 * panel;
  const Side down{m, kRows, tile, 8}, across{n, kColumns, panel, 32};  // packing as in cpu_product.cpp
  const Block cut = cut_for(down, across, threads);
  std::int64_t rows = cut.rows;
  const auto bytes = [&](std::int64_t rows) { return 4 * (kSteps * (rows + 2 * panel) + tile * panel); };
  while (threads > workspace / bytes(rows) && rows > least) rows = down.size_of(down.blocks(rows - tile));
  const std::int64_t each = bytes(rows), row_blocks = down.blocks(rows), column_blocks = across.blocks(cut.columns);
  parallel_within(workspace, each, row_blocks * column_blocks, [&](std::int64_t begin, std::int64_t end) {
    Scratch<float> packed(rows * kSteps), panels(2 * panel * kSteps), edge(tile * panel);
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t r0 = task / column_blocks * rows, c0 = task % column_blocks * cut.columns;
      const std::int64_t count = std::min(rows, m - r0), width = std::min(cut.columns, n - c0);
      float *now = panels.data(), *other = now + panel * kSteps;
      const auto packer = [&](std::int64_t k, std::int64_t c, std::int64_t shares, float* to) {
        return PanelPacker{b,     pack_b,       k, std::min(depth, k + kSteps), c0 + c, std::min(width - c, panel),
                           panel, blocks_of(kSteps, shares), to};
      };
      packer(0, 0, 1, now).pack_rest();
      std::int64_t k0 = 0;
      do {  // once for no step at all, which leaves zeros
        const std::int64_t steps = std::min(depth - k0, kSteps);
        const bool sum = add || k0 > 0;
        pack_a(a.data + (transposed ? k0 * a.stride + r0 : r0 * a.stride + k0), a.stride, count, steps, packed.data());
        for (std::int64_t c = 0; c < width; c += panel) {
          const bool whole = c + panel <= width, last = c + panel >= width;
          PanelPacker next = packer(last ? k0 + kSteps : k0, last ? 0 : c + panel, blocks_of(count, tile), other);
          for (std::int64_t r = 0; r < count;) {
            const int height = tile_height(count - r);
            float* z = out + (r0 + r) * ldo + c0 + c;
            next.pack_share();
            multiply(height, packed.data() + r * steps, now, steps, whole ? z : edge.data(), whole ? ldo : panel,
                     whole && sum, next.lines(steps));
            if (!whole) write_edge(edge.data(), height, width - c, sum, z, ldo);
            r += height;
          }
          next.pack_rest();
          std::swap(now, other);
        }
        k0 += steps;
      } while (k0 < depth);
    }
  });
}

// Whether this product was measured to be faster than torch's, which is MKL's: on AMD's Zen 4 and Zen 5 it was, with
// tiles of AVX-512 as with those of AVX2. On Intel nobody measured it, and MKL is at home there.
bool linear_logprob_product_fp32_is_faster() { return cpu_level() >= CpuLevel::avx2 && is_amd(); }

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "linear_logprob_product_fp32(Tensor a, Tensor b, bool transposed, bool add, Tensor(a!) out, "
      "int? workspace=None) -> ()");
  m.def("linear_logprob_product_fp32_is_faster() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CPU, m) {
  m.impl("linear_logprob_product_fp32", TORCH_BOX(&srppo::linear_logprob_product_fp32));
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CompositeExplicitAutograd, m) {
  m.impl("linear_logprob_product_fp32_is_faster", TORCH_BOX(&srppo::linear_logprob_product_fp32_is_faster));
}
