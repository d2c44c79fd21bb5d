// What the CUDA hosts share: torch's stream, and the device of the inputs.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>

namespace srppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class T>
const T* device_data(const Tensor& tensor, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous() && tensor.scalar_type() == type &&
                      (numel < 0 || tensor.numel() == numel),
                  "srppo_native: ", name, " must be a contiguous CUDA tensor of the kernel's dtype and size");
  return static_cast<const T*>(tensor.const_data_ptr());
}

// What the last block of a launch counts with (cuda_reduce.h); _triton.finish_counter keeps one a stream.
inline unsigned* counter(const Tensor& finished) {
  STD_TORCH_CHECK(finished.is_cuda() && finished.scalar_type() == ScalarType::Int && finished.numel() == 1,
                  "srppo_native: finished must be an int32 on the device");
  return static_cast<unsigned*>(finished.mutable_data_ptr());
}

template <class T>
const T* device_data(const std::optional<Tensor>& tensor, ScalarType type, int64_t numel, const char* name) {
  return tensor ? device_data<T>(*tensor, type, numel, name) : nullptr;
}

}  // namespace srppo
