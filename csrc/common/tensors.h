// Checked access to the tensors that the Python ops hand over: contiguous CPU tensors of a known dtype.
#pragma once

#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace srppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(const Tensor& tensor, ScalarType type, std::int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type, "srppo_native: ", name,
                  " must be a contiguous CPU tensor of the kernel's dtype");
  STD_TORCH_CHECK(numel < 0 || tensor.numel() == numel, "srppo_native: ", name, " has ", tensor.numel(), " elements, not ",
                  numel);
}

inline const float* floats(const Tensor& tensor, std::int64_t numel, const char* name) {
  check(tensor, ScalarType::Float, numel, name);
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* floats(const std::optional<Tensor>& tensor, std::int64_t numel, const char* name) {
  return tensor ? floats(*tensor, numel, name) : nullptr;
}

inline const bool* bools(const Tensor& tensor, std::int64_t numel, const char* name) {
  check(tensor, ScalarType::Bool, numel, name);
  return static_cast<const bool*>(tensor.const_data_ptr());
}

inline float* mutable_floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

}  // namespace srppo
