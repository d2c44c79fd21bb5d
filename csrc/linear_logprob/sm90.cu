// Launch and registration of the scan for sm_90a (sm90_kernel.h), as torch.ops.srppo_native.linear_logprob_scan_sm90.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "for sm_90a alone, as setup.py compiles it"
#endif

#include <cuda_bf16.h>

#include "../common/cuda_launch.h"
#include "../common/hopper.h"
#include "../common/tensor_map.h"
#include "sm90_kernel.h"

namespace srppo::sm90 {

template <bool kPlain, bool kKeep, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    scan_gemm_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                     const __grid_constant__ CUtensorMap kept, const __grid_constant__ ScanParams p) {
  extern __shared__ std::uint8_t memory[];
  scan_block<kPlain, kKeep, kCluster>(x, w, kept, p, memory);
}

struct Maps {
  CUtensorMap x, w, kept;  // kept: x's again where nothing is
};

template <bool kPlain, bool kKeep, int kCluster>
void launch(const Maps& maps, const ScanParams& p, int blocks, cudaStream_t stream) {
  const auto kernel = scan_gemm_kernel<kPlain, kKeep, kCluster>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, maps.x, maps.w, maps.kept, p));
}

template <int kCluster>
void choose(const Maps& maps, const ScanParams& p, int blocks, cudaStream_t stream) {
  const bool plain = !p.bias && !p.inverse_temperatures && p.softcap == 0.0f;
  if (plain && p.kept_max) launch<true, true, kCluster>(maps, p, blocks, stream);
  else if (plain) launch<true, false, kCluster>(maps, p, blocks, stream);
  else if (p.kept_max) launch<false, true, kCluster>(maps, p, blocks, stream);
  else launch<false, false, kCluster>(maps, p, blocks, stream);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

CUtensorMap boxes(const Tensor& matrix, int box_rows, int box_columns, const char* name) {
  STD_TORCH_CHECK(matrix.is_cuda() && matrix.dim() == 2 && matrix.stride(1) == 1 &&
                      matrix.scalar_type() == ScalarType::BFloat16 && matrix.size(1) > 0 &&
                      reinterpret_cast<std::uintptr_t>(matrix.const_data_ptr()) % 16 == 0 && matrix.stride(0) % 8 == 0,
                  "srppo_native: ", name, " must be a bf16 CUDA matrix with contiguous rows at multiples of 16 bytes");
  return bf16_boxes(matrix.const_data_ptr(), matrix.size(0), matrix.size(1), matrix.stride(0), box_rows, box_columns);
}

// Fills state and target_logits of the first *count rows, and kept and kept_max if given. Where a row's target is in no group
// (a shard of the vocabulary), its target_logits entry is left as it was.
void scan(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets,
          const std::optional<Tensor>& inverse_temperatures, const Tensor& reference, const Tensor& count,
          double scale, double softcap, double inverse_temperature, std::int64_t group, std::int64_t cluster,
          const Tensor& state, const Tensor& target_logits, const std::optional<Tensor>& kept,
          const std::optional<Tensor>& kept_max) {
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const std::int64_t n = x.size(0), vocab = weight.size(0);
  STD_TORCH_CHECK(attribute(cudaDevAttrComputeCapabilityMajor, device) == 9, "srppo_native: this scan is for sm_90 alone");
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "srppo_native: x and weight have different widths");
  STD_TORCH_CHECK(group > 0 && group % kColumns == 0 && (cluster == 1 || cluster == 2),
                  "srppo_native: group must be a multiple of ", kColumns, ", and cluster 1 or 2");
  STD_TORCH_CHECK(n <= (1LL << 31) - 4 * kRows && vocab <= (1LL << 31) - 8 * group,
                  "srppo_native: rows and vocabulary entries are counted in 32 bits");
  STD_TORCH_CHECK(kept.has_value() == kept_max.has_value(), "srppo_native: kept and kept_max come together");
  if (n == 0 || vocab == 0) return;
  const std::int64_t groups = (vocab + group - 1) / group;
  ScanParams p{};
  p.bias = device_data<float>(bias, ScalarType::Float, vocab, "bias");
  p.targets = device_data<std::int64_t>(targets, ScalarType::Long, n, "targets");
  p.inverse_temperatures = device_data<float>(inverse_temperatures, ScalarType::Float, n, "inverse_temperatures");
  const std::int64_t padded = (n + cluster * kRows - 1) / (cluster * kRows) * cluster * kRows;
  p.reference = device_data<float>(reference, ScalarType::Float, padded, "reference");
  p.count = device_data<int>(count, ScalarType::Int, 1, "count");
  p.state = const_cast<float*>(device_data<float>(state, ScalarType::Float, 3 * groups * n, "state"));
  p.target_logits = const_cast<float*>(device_data<float>(target_logits, ScalarType::Float, n, "target_logits"));
  if (kept) {
    const std::int64_t tiles = (vocab + kColumns - 1) / kColumns;
    STD_TORCH_CHECK(kept->dim() == 2 && kept->size(0) == n && kept->size(1) == vocab,
                    "srppo_native: kept must be a matrix [n, V]");
    STD_TORCH_CHECK(kept_max->is_cuda() && kept_max->scalar_type() == ScalarType::Float && kept_max->dim() == 2 &&
                        kept_max->size(0) >= n && kept_max->size(1) >= tiles && kept_max->stride(1) == 1,
                    "srppo_native: kept_max must be a float32 CUDA matrix with ", tiles, " columns or more");
    p.kept_max = static_cast<float*>(kept_max->mutable_data_ptr());
    p.stride_max = kept_max->stride(0);
  }
  p.n = static_cast<int>(n);
  p.width = static_cast<int>(x.size(1));
  p.vocab = static_cast<int>(vocab);
  p.group = static_cast<int>(group);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.inverse_softcap = softcap == 0.0 ? 0.0f : static_cast<float>(1.0 / softcap);
  p.inverse_temperature = static_cast<float>(inverse_temperature);

  const int wide = static_cast<int>(cluster);
  Maps maps{boxes(x, kRows, kDepth, "x"), boxes(weight, kColumns / wide, kDepth, "weight"), {}};
  maps.kept = kept ? boxes(*kept, kWarpRows, kPart, "kept") : maps.x;
  const Schedule most{static_cast<int>((n + kRows - 1) / kRows), p.vocab, p.group, wide};
  const int clusters = attribute(cudaDevAttrMultiProcessorCount, device) / wide;
  const int blocks = wide * (clusters < most.units() ? clusters : most.units());
  (wide == 1 ? choose<1> : choose<2>)(maps, p, blocks, current_stream(x));
}

}  // namespace srppo::sm90

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "linear_logprob_scan_sm90(Tensor x, Tensor weight, Tensor? bias, Tensor targets, Tensor? inverse_temperatures, "
      "Tensor reference, Tensor count, float scale, float softcap, float inverse_temperature, int group, int cluster, "
      "Tensor(a!) state, Tensor(b!) target_logits, Tensor(c!)? kept, Tensor(d!)? kept_max) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) { m.impl("linear_logprob_scan_sm90", TORCH_BOX(&srppo::sm90::scan)); }
