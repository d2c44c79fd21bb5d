// CUDA launches of masked moments and whitening. Compiled here, not run on a device: none was at hand; backend="native" takes
// them.
#include <algorithm>

#include "../common/cuda_launch.h"
#include "whiten_kernels.h"

namespace srppo::whitening {

unsigned blocks_for(int64_t total) { return static_cast<unsigned>(std::max<int64_t>(1, (total + kTokens - 1) / kTokens)); }

Tensor whiten_moments(const Tensor& x, const Tensor& mask) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t total = x.numel();
  const unsigned blocks = blocks_for(total);  // one at least, to write the zeros of an empty batch
  Tensor moments = torch::stable::new_empty(x, {3}, ScalarType::Double);
  Tensor partials = torch::stable::new_empty(x, {3 * static_cast<int64_t>(blocks)}, ScalarType::Double);
  Tensor finished = torch::stable::new_zeros(x, {1}, ScalarType::Int);
  moments_kernel<<<blocks, kThreads, 0, current_stream(x)>>>(
      device_data<float>(x, ScalarType::Float, total, "x"), device_data<bool>(mask, ScalarType::Bool, total, "mask"), total,
      static_cast<double*>(partials.mutable_data_ptr()), static_cast<unsigned*>(finished.mutable_data_ptr()),
      static_cast<double*>(moments.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return moments;
}

Tensor whiten_apply(const Tensor& x, const Tensor& mask, const Tensor& moments, bool shift_mean, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t total = x.numel();
  Tensor out = torch::stable::empty_like(x);
  if (total > 0) {
    whiten_kernel<<<blocks_for(total), kThreads, 0, current_stream(x)>>>(
        device_data<float>(x, ScalarType::Float, total, "x"), device_data<bool>(mask, ScalarType::Bool, total, "mask"),
        device_data<double>(moments, ScalarType::Double, 3, "moments"), total, shift_mean, eps,
        static_cast<float*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

}  // namespace srppo::whitening

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) {
  m.impl("whiten_moments", TORCH_BOX(&srppo::whitening::whiten_moments));
  m.impl("whiten_apply", TORCH_BOX(&srppo::whitening::whiten_apply));
}
