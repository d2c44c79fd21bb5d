// TMA descriptors, made on the host. The driver's encoder is asked for by name at run time, so that the extension links
// against no libcuda and loads on machines that have none.
#pragma once

#include <cstdint>

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <torch/headeronly/util/Exception.h>

namespace srppo {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
                    "srppo_native: the driver has no cuTensorMapEncodeTiled; CUDA 12 drivers have it");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encoder;
}

// A row-major bf16 matrix that is read or written in boxes of `box_rows` x `box_columns`, 32 or 64 columns, swizzled in shared
// memory by the bytes of a box's row; elements beyond the matrix arrive as zeros and are not written. TMA wants the base and
// the row stride at multiples of 16 bytes.
inline CUtensorMap bf16_boxes(const void* data, std::int64_t rows, std::int64_t columns, std::int64_t row_stride, int box_rows,
                              int box_columns) {
  STD_TORCH_CHECK(box_columns == 32 || box_columns == 64, "srppo_native: a box has 32 or 64 columns");
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride) * 2};  // bytes, of all dimensions but the first
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[] = {1, 1};
  alignas(64) CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // "none" is zeros
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "srppo_native: cuTensorMapEncodeTiled refuses a matrix of ", rows, " x ", columns,
                  " with row stride ", row_stride, ": CUresult ", static_cast<int>(result));
  return map;
}

}  // namespace srppo
