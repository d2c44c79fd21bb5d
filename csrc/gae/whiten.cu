// CUDA launches of masked moments and whitening. First run on a device on 2026-11-26, an H100 80GB HBM3.
#include "../common/cuda_launch.h"
#include "whiten_kernels.h"

namespace srppo::whitening {

Tensor whiten_moments(const Tensor& x, const Tensor& mask, const Tensor& finished) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t total = x.numel(), steps = x.dim() ? x.size(x.dim() - 1) : 1;
  const Rows shape = total ? Rows{total / steps, steps} : Rows{1, 0};
  const unsigned blocks = blocks_of(shape, kTokens);
  Tensor moments = torch::stable::new_empty(x, {3}, ScalarType::Double);
  Tensor partials = torch::stable::new_empty(x, {3 * static_cast<int64_t>(blocks)}, ScalarType::Double);
  moments_kernel<<<blocks, kThreads, 0, current_stream(x)>>>(
      device_data<float>(x, ScalarType::Float, total, "x"), device_data<bool>(mask, ScalarType::Bool, total, "mask"), shape,
      {static_cast<double*>(partials.mutable_data_ptr()), counter(finished), static_cast<double*>(moments.mutable_data_ptr())});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return moments;
}

Tensor whiten_apply(const Tensor& x, const Tensor& mask, const Tensor& moments, bool shift_mean, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t total = x.numel();
  Tensor out = torch::stable::empty_like(x);
  if (total > 0) {
    const auto* from = device_data<float>(x, ScalarType::Float, total, "x");
    const auto* valid = device_data<bool>(mask, ScalarType::Bool, total, "mask");
    auto* to = static_cast<float*>(out.mutable_data_ptr());
    const auto place = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
    const bool vectors = (place(from) | place(to)) % sizeof(Four) == 0 && place(valid) % sizeof(FourBools) == 0;
    whiten_kernel<<<static_cast<unsigned>((total + kWhitened - 1) / kWhitened), kThreads, 0, current_stream(x)>>>(
        from, valid, device_data<double>(moments, ScalarType::Double, 3, "moments"), total, shift_mean, vectors, eps, to);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return out;
}

}  // namespace srppo::whitening

// Beside the CPU's whiten_moments: this one takes the counter of its stream.
STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def("whiten_moments_cuda(Tensor x, Tensor mask, Tensor(a!) finished) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) {
  m.impl("whiten_moments_cuda", TORCH_BOX(&srppo::whitening::whiten_moments));
  m.impl("whiten_apply", TORCH_BOX(&srppo::whitening::whiten_apply));
}
