// out (+)= A B in fp32 on the tiles of the scan: GEMMs 2 and 3 of srppo_kernels/linear_logprob for fp32 inputs.
//
// A comes as [M, K] (dZ of dX = dZ W) or as [K, M] (dZ of dW = dZ^T X), B as [K, N]. A task is a block of rows of the
// result and a block of its columns, over all of K in order, kSteps of it at a time: bits do not depend on how the
// result is cut, and so not on the number of threads.
#include <algorithm>
#include <cstdint>
#include <optional>

#include "../common/cpu_level.h"
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
  const auto pack_b = SRPPO_AT_LEVEL(pack_panels);
  const auto write_edge = SRPPO_AT_LEVEL(write_edge);
  const std::int64_t panel = SRPPO_AT_LEVEL(panel_width)(), tile = tile_height(kRows);

  // A task for every thread, and room for its blocks in a bounded workspace, by cutting the longer side; then fewer
  // threads work.
  const std::int64_t threads = threads_there(), workspace = workspace_of(bound);
  std::int64_t row_blocks = blocks_of(m, kRows), column_blocks = blocks_of(n, kColumns), rows = 0, columns = 0, each = 0;
  const auto cut = [&] {
    rows = blocks_of(blocks_of(m, row_blocks), tile) * tile;
    columns = blocks_of(blocks_of(n, column_blocks), panel) * panel;
    each = 4 * (kSteps * (rows + columns) + tile * panel);
    return row_blocks * column_blocks < threads || threads > workspace / each;
  };
  while (cut() && std::max(m / row_blocks, n / column_blocks) > 2 * panel)
    ++(m / row_blocks > n / column_blocks ? row_blocks : column_blocks);
  parallel_within(workspace, each, row_blocks * column_blocks, [&](std::int64_t begin, std::int64_t end) {
    Scratch<float> packed(rows * kSteps), panels(columns * kSteps), edge(tile * panel);
    std::int64_t panels_c0 = -1, panels_k0 = -1;  // what `panels` holds: all of B, for many tasks, where it is small
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t r0 = task / column_blocks * rows, c0 = task % column_blocks * columns;
      const std::int64_t count = std::min(rows, m - r0), width = std::min(columns, n - c0);
      if (count <= 0 || width <= 0) continue;
      std::int64_t k0 = 0;
      do {  // once for no step at all, which leaves zeros
        const std::int64_t steps = std::min(depth - k0, kSteps);
        const bool sum = add || k0 > 0;
        pack_a(a.data + (transposed ? k0 * a.stride + r0 : r0 * a.stride + k0), a.stride, count, steps, packed.data());
        if (panels_c0 != c0 || panels_k0 != k0) {
          pack_b(b.data + k0 * b.stride + c0, b.stride, width, steps, panels.data());
          panels_c0 = c0, panels_k0 = k0;
        }
        for (std::int64_t c = 0; c < width; c += panel) {
          const bool whole = c + panel <= width;
          for (std::int64_t r = 0; r < count;) {
            const int height = tile_height(count - r);
            float* z = out + (r0 + r) * ldo + c0 + c;
            multiply(height, packed.data() + r * steps, panels.data() + c * steps, steps, whole ? z : edge.data(),
                     whole ? ldo : panel, whole && sum, Ahead());
            if (!whole) write_edge(edge.data(), height, width - c, sum, z, ldo);
            r += height;
          }
        }
        k0 += steps;
      } while (k0 < depth);
    }
  });
}

// Whether this product was measured to be faster than torch's, which is MKL's: on AMD's Zen 4 and Zen 5 it was, with
// tiles of AVX-512 as with those of AVX2. On Intel nobody measured it, and MKL is at home there.
bool linear_logprob_product_fp32_is_faster() { return cpu_level() >= CpuLevel::avx2 && amd_family() > 0; }

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
