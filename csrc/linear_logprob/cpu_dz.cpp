// dL/dz from kept exponentials, in one pass: what GEMMs 2 and 3 of srppo_kernels/linear_logprob read.
//
// A task is one vocabulary group of all rows, rows in ascending order. So `out` may be the kept exponentials' own memory
// even where rows are dropped: row i is read at kept_rows[i] >= i, after everything above it has been read. Of exponentials
// in bf16 dz may be in fp32, elsewhere, for GEMMs that read that.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/tensors.h"

namespace srppo {
namespace {

constexpr std::int64_t kDzBlock = 512;  // two such blocks of floats stay in L1

// dz_j = p_j (b - h lp_j) slope_j with p_j = kept_j scale, lp_j = log kept_j + shift, z_j = lp_j + lse.
struct DzRow {
  float b, h, shift, scale, lse, temperature, softcap;  // softcap 0: none
  bool has_h;
};

}  // namespace
}  // namespace srppo

#define SRPPO_KERNELS "../linear_logprob/cpu_dz_kernels.h"
#include "../common/each_level.h"

namespace srppo {
namespace {

void check_matrix(const Tensor& tensor, std::int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.size(1) == columns &&
                      (tensor.stride(1) == 1 || columns <= 1),
                  "srppo_native: ", name, " must be a CPU matrix of ", columns, " contiguous columns");
}

void linear_logprob_form_dz(const Tensor& kept, const Tensor& group_max, const std::optional<Tensor>& kept_rows,
                            const Tensor& targets, const Tensor& b, const std::optional<Tensor>& h, const Tensor& at_target,
                            const Tensor& row_max, const Tensor& log_sum, const std::optional<Tensor>& row_temperature,
                            double temperature, double softcap, std::int64_t group, Tensor out) {
  const std::int64_t n = targets.numel(), vocab = kept.size(1), groups = (vocab + group - 1) / group;
  check_matrix(kept, vocab, "kept");
  check_matrix(out, vocab, "out");
  check_matrix(group_max, groups, "group_max");
  check(targets, ScalarType::Long, n, "targets");
  const bool from_bf16 = kept.scalar_type() == ScalarType::BFloat16, to_bf16 = out.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((from_bf16 || kept.scalar_type() == ScalarType::Float) &&
                      (out.scalar_type() == ScalarType::Float || (from_bf16 && to_bf16)) &&
                      group_max.scalar_type() == ScalarType::Float && out.size(0) == n,
                  "srppo_native: kept must be bfloat16 or float32, out of n rows of its dtype or float32, group_max float32");
  const std::int64_t* row_of = nullptr;
  if (kept_rows) {
    check(*kept_rows, ScalarType::Long, n, "kept_rows");
    row_of = static_cast<const std::int64_t*>(kept_rows->const_data_ptr());
  }
  const auto* target = static_cast<const std::int64_t*>(targets.const_data_ptr());
  const float *bs = floats(b, n, "b"), *hs = floats(h, n, "h"), *ys = floats(at_target, n, "at_target");
  const float *maxima = floats(row_max, n, "row_max"), *logs = floats(log_sum, n, "log_sum");
  const float* temperatures = floats(row_temperature, n, "row_temperature");
  const auto* group_maxima = static_cast<const float*>(group_max.const_data_ptr());
  const char* source = static_cast<const char*>(kept.const_data_ptr());
  char* destination = static_cast<char*>(out.mutable_data_ptr());
  const std::int64_t from_item = from_bf16 ? 2 : 4, to_item = to_bf16 ? 2 : 4;
  const std::int64_t from_stride = kept.stride(0) * from_item, to_stride = out.stride(0) * to_item;
  const std::int64_t max_stride = group_max.stride(0);
  const auto block = SRPPO_AT_LEVEL(dz_block);

  torch::stable::parallel_for(0, groups, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t g = begin; g < end; ++g) {
      const std::int64_t v0 = g * group, size = std::min(group, vocab - v0);
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t at = row_of ? row_of[i] : i, column = target[i] - v0;
        DzRow row{};
        row.b = bs[i];
        row.has_h = hs != nullptr;
        row.h = hs ? hs[i] : 0.0f;
        row.shift = (group_maxima[at * max_stride + g] - maxima[i]) - logs[i];
        row.scale = std::exp(row.shift);
        row.lse = logs[i] + maxima[i];
        row.temperature = temperatures ? temperatures[i] : static_cast<float>(temperature);
        row.softcap = static_cast<float>(softcap);
        const char* from = source + at * from_stride + v0 * from_item;
        char* to = destination + i * to_stride + v0 * to_item;
        // The next row's group is a few KB elsewhere, too short for the hardware to run ahead: twice as fast.
        const char* next = i + 1 < n ? source + (row_of ? row_of[i + 1] : i + 1) * from_stride + v0 * from_item : from;
        for (std::int64_t j = 0; j < size; j += kDzBlock) {
          const std::int64_t here = std::min(kDzBlock, size - j);
          for (std::int64_t byte = 0; byte < here * from_item; byte += 64)
            __builtin_prefetch(next + j * from_item + byte, 1, 2);
          block(row, from + j * from_item, from_bf16, here, to + j * to_item, to_bf16);
        }
        if (column < 0 || column >= size) continue;
        const float dz_y = ys[i];
        if (to_bf16) {
          std::uint32_t bits;
          std::memcpy(&bits, &dz_y, 4);
          const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
          const auto half = static_cast<std::uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
          std::memcpy(to + column * 2, &half, 2);
        } else {
          std::memcpy(to + column * 4, &dz_y, 4);
        }
      }
    }
  });
}

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "linear_logprob_form_dz(Tensor kept, Tensor group_max, Tensor? kept_rows, Tensor targets, Tensor b, Tensor? h, "
      "Tensor at_target, Tensor row_max, Tensor log_sum, Tensor? row_temperature, float temperature, float softcap, "
      "int group, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CPU, m) { m.impl("linear_logprob_form_dz", TORCH_BOX(&srppo::linear_logprob_form_dz)); }
