// CUDA kernels of srppo_kernels/ppo_loss. Compiled here, not run: no device was at hand. So backend="auto" does not choose
// them; backend="native" does. The maths (terms.h) is what the CPU kernels run.
//
// One elementwise pass writes the gradient and leaves one float64 partial of every sum a block; the block that finishes last
// adds them in block order, so a result does not depend on which it was. Where the divisor is a count of the mask, a first
// launch counts it: nothing waits for the host.
#include "../common/cuda_launch.h"
#include "../common/cuda_reduce.h"
#include "../common/scalar.h"

namespace srppo::scalar {

#include "terms.h"

constexpr int kThreads = 256, kPerThread = 4, kTokens = kThreads * kPerThread;

// The order of REDUCTIONS in reference.py.
enum Reduction : int { kTokenMean, kSequenceMean, kSum, kConstantLength };

struct Divisor {
  int reduction;
  float given;            // caller's number, or 0
  const float* tensor;    // caller's tensor, or null
  const int* lengths;     // valid tokens of each row; null where no count is needed
  int64_t rows, steps, total;
};

__global__ void count_kernel(const bool* mask, int64_t steps, int* lengths) {
  int mine = 0;
  for (int64_t t = threadIdx.x; t < steps; t += blockDim.x) mine += mask[blockIdx.x * steps + t];
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, mine);  // integers: any order
  __syncthreads();
  if (threadIdx.x == 0) lengths[blockIdx.x] = sum;
}

// What a token of the batch is weighted by, before its row's length. Called by a whole block.
__device__ float block_weight(const Divisor& d) {
  __shared__ int64_t counted;
  if (threadIdx.x == 0) counted = 0;
  __syncthreads();
  if (d.lengths && !d.tensor && d.given == 0.0f) {
    int64_t mine = 0;
    for (int64_t row = threadIdx.x; row < d.rows; row += blockDim.x)
      mine += d.reduction == kSequenceMean ? d.lengths[row] > 0 : d.lengths[row];
    atomicAdd(reinterpret_cast<unsigned long long*>(&counted), static_cast<unsigned long long>(mine));
  }
  __syncthreads();
  float by = 1.0f;
  if (d.tensor) by = *d.tensor;
  else if (d.given != 0.0f) by = d.given;
  else if (d.lengths) by = static_cast<float>(counted);
  else if (d.reduction == kConstantLength) by = static_cast<float>(d.total);
  return 1.0f / (by == 0.0f ? 1.0f : by);
}

__device__ __forceinline__ float token_weight(const Divisor& d, float weight, int64_t at) {
  if (d.reduction != kSequenceMean) return weight;
  const int length = d.lengths[at / d.steps];
  return weight / static_cast<float>(length > 0 ? length : 1);
}

// Sums of a block in a fixed tree, the maximum as the last of N. Thread 0 has the result.
template <int N>
__device__ void block_total(double (&x)[N]) {
  __shared__ double warps[kThreads / 32][N];
  __syncthreads();  // the call before this one has been read
#pragma unroll
  for (int i = 0; i < N; ++i)
    for (int by = 16; by > 0; by /= 2) {
      const double other = __shfl_down_sync(0xffffffffu, x[i], by);
      x[i] = i == N - 1 ? (other > x[i] ? other : x[i]) : x[i] + other;
    }
  if ((threadIdx.x & 31) == 0)
    for (int i = 0; i < N; ++i) warps[threadIdx.x / 32][i] = x[i];
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kThreads / 32; ++w)
      for (int i = 0; i < N; ++i) x[i] = i == N - 1 ? (warps[w][i] > x[i] ? warps[w][i] : x[i]) : x[i] + warps[w][i];
}

// The grid's total of every sum, in thread 0 of the block that finishes last, which alone gets true. The maximum rides along
// as the last of N; by comparison, so that it drops a NaN.
template <int N>
__device__ bool grid_total(double (&x)[N], double* partials, unsigned* finished) {
  block_total(x);
  if (threadIdx.x == 0)
    for (int i = 0; i < N; ++i) partials[blockIdx.x * N + i] = x[i];
  if (!last_block(finished)) return false;
  for (int i = 0; i < N; ++i) x[i] = 0.0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads)
    for (int i = 0; i < N; ++i) {
      const double part = __ldcg(partials + block * N + i);
      x[i] = i == N - 1 ? (part > x[i] ? part : x[i]) : x[i] + part;
    }
  block_total(x);
  return threadIdx.x == 0;
}

__device__ double variance(double sum, double squares, double count) {
  const double mean = sum / count, result = squares / count - mean * mean;
  return result < 0.0 ? 0.0 : result;
}

struct PolicyParams {
  const float* logprobs;
  const float* old_logprobs;
  const float* advantages;
  const bool* mask;
  const float* entropy;
  PpoBounds bounds;
  float entropy_coef;
  float* d_logprobs;
  float* d_entropy;
  float* loss;
  float* stats;
  double* partials;
  unsigned* finished;
};

constexpr int kPolicySums = 11;  // loss, k3, log ratio, deviation, its square, entropy, low, high, dual, valid, largest ratio

__global__ void __launch_bounds__(kThreads) ppo_kernel(PolicyParams p, Divisor divisor) {
  const float weight = block_weight(divisor);
  double sums[kPolicySums] = {};
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokens + j * kThreads + threadIdx.x;
    if (at >= divisor.total) break;
    const bool valid = p.mask[at];
    const float w = token_weight(divisor, weight, at);
    const PpoTerms terms = ppo_terms(valid ? p.logprobs[at] : 0.0f, valid ? p.old_logprobs[at] : 0.0f,
                                     valid ? p.advantages[at] : 0.0f, valid, p.bounds);
    p.d_logprobs[at] = terms.d_logprob * w;
    const float entropy = p.entropy && valid ? p.entropy[at] : 0.0f;
    if (p.entropy) p.d_entropy[at] = valid ? -p.entropy_coef * w : 0.0f;
    if (!valid) continue;
    const double off = static_cast<double>(terms.ratio - 1.0f);
    sums[0] += (static_cast<double>(terms.loss) - static_cast<double>(p.entropy_coef) * entropy) * static_cast<double>(w);
    sums[1] += terms.k3;
    sums[2] += terms.log_ratio;
    sums[3] += off;
    sums[4] += off * off;
    sums[5] += entropy;
    sums[6] += terms.clipped_low;
    sums[7] += terms.clipped_high;
    sums[8] += terms.clipped_dual;
    sums[9] += 1.0;
    sums[10] = terms.ratio > sums[10] ? terms.ratio : sums[10];
  }
  if (!grid_total(sums, p.partials, p.finished)) return;
  const double n = sums[9] > 0 ? sums[9] : 1.0, mean = sums[9] > 0 ? 1.0 + sums[3] / n : 0.0;
  *p.loss = static_cast<float>(sums[0]);
  const double stats[] = {sums[1] / n, -sums[2] / n, sums[6] / n, sums[7] / n, sums[8] / n, mean,
                          isnan(mean) ? mean : sums[10], variance(sums[3], sums[4], n), sums[5] / n, sums[9]};
  for (int i = 0; i < 10; ++i) p.stats[i] = static_cast<float>(stats[i]);
}

struct ValueParams {
  const float* values;
  const float* old_values;
  const float* returns;
  const bool* mask;
  float clip;
  float* d_values;
  float* loss;
  float* stats;
  double* partials;
  unsigned* finished;
};

constexpr int kValueSums = 9;  // loss, error, its square, value, return, its square, clipped, valid, (no maximum)

__global__ void __launch_bounds__(kThreads) value_kernel(ValueParams p, Divisor divisor) {
  const float weight = block_weight(divisor);
  double sums[kValueSums] = {};
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTokens + j * kThreads + threadIdx.x;
    if (at >= divisor.total) break;
    const bool valid = p.mask[at];
    const float value = valid ? p.values[at] : 0.0f, target = valid ? p.returns[at] : 0.0f;
    const ValueTerms terms = value_terms(value, valid ? p.old_values[at] : 0.0f, target, valid, p.clip);
    p.d_values[at] = terms.d_value * weight;
    if (!valid) continue;
    const double error = terms.error, r = target;
    sums[0] += static_cast<double>(terms.loss) * static_cast<double>(weight);
    sums[1] += error;
    sums[2] += error * error;
    sums[3] += value;
    sums[4] += r;
    sums[5] += r * r;
    sums[6] += terms.clipped;
    sums[7] += 1.0;
  }
  if (!grid_total(sums, p.partials, p.finished)) return;
  const double n = sums[7] > 0 ? sums[7] : 1.0;
  *p.loss = static_cast<float>(sums[0]);
  const double stats[] = {sums[6] / n,  sums[2] / n, sums[3] / n, sums[4] / n, variance(sums[4], sums[5], n),
                          variance(sums[1], sums[2], n), sums[7]};
  for (int i = 0; i < 7; ++i) p.stats[i] = static_cast<float>(stats[i]);
}

// Outputs and scratch of a loss over `like`; `lengths` is counted where the divisor needs it.
struct Buffers {
  Tensor loss, stats, partials, finished;
  std::optional<Tensor> lengths;
  Divisor divisor{};
  unsigned blocks;

  Buffers(const Tensor& like, const Tensor& mask, int64_t reduction, std::optional<double> number,
          const std::optional<Tensor>& tensor, int64_t stats_count, int64_t sums, cudaStream_t stream) {
    divisor.total = like.numel();
    divisor.steps = like.size(like.dim() - 1);
    divisor.rows = divisor.total ? divisor.total / divisor.steps : 0;
    divisor.reduction = static_cast<int>(reduction);
    divisor.given = number ? static_cast<float>(*number) : 0.0f;
    divisor.tensor = device_data<float>(tensor, ScalarType::Float, 1, "normalizer");
    // An empty batch still runs one block, which writes the zeros.
    blocks = static_cast<unsigned>(divisor.total ? (divisor.total + kTokens - 1) / kTokens : 1);
    loss = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef{}, ScalarType::Float);
    stats = torch::stable::new_empty(like, {stats_count}, ScalarType::Float);
    partials = torch::stable::new_empty(like, {static_cast<int64_t>(blocks) * sums}, ScalarType::Double);
    finished = torch::stable::new_zeros(like, {1}, ScalarType::Int);
    const bool given = number || tensor;
    if (reduction == kSequenceMean || (reduction == kTokenMean && !given)) {
      lengths = torch::stable::new_empty(like, {divisor.rows}, ScalarType::Int);
      auto* counts = static_cast<int*>(lengths->mutable_data_ptr());
      if (divisor.rows > 0)
        count_kernel<<<static_cast<unsigned>(divisor.rows), kThreads, 0, stream>>>(
            device_data<bool>(mask, ScalarType::Bool, divisor.total, "mask"), divisor.steps, counts);
      divisor.lengths = counts;
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& mask,
    const std::optional<Tensor>& entropy, double clip_low, double clip_high, std::optional<double> dual_clip,
    double entropy_coef, int64_t reduction, std::optional<double> number, const std::optional<Tensor>& tensor) {
  const torch::stable::accelerator::DeviceGuard guard(logprobs.get_device_index());
  const cudaStream_t stream = current_stream(logprobs);
  const int64_t total = logprobs.numel();
  Buffers buffers(logprobs, mask, reduction, number, tensor, 10, kPolicySums, stream);
  Tensor d_logprobs = torch::stable::empty_like(logprobs);
  Tensor d_entropy = entropy ? torch::stable::empty_like(logprobs) : torch::stable::new_empty(logprobs, {0});
  PolicyParams p{};
  p.logprobs = device_data<float>(logprobs, ScalarType::Float, total, "logprobs");
  p.old_logprobs = device_data<float>(old_logprobs, ScalarType::Float, total, "old_logprobs");
  p.advantages = device_data<float>(advantages, ScalarType::Float, total, "advantages");
  p.mask = device_data<bool>(mask, ScalarType::Bool, total, "mask");
  p.entropy = device_data<float>(entropy, ScalarType::Float, total, "entropy");
  p.bounds = {static_cast<float>(1.0 - clip_low), static_cast<float>(1.0 + clip_high),
              dual_clip ? static_cast<float>(*dual_clip) : INFINITY};
  p.entropy_coef = static_cast<float>(entropy_coef);
  p.d_logprobs = static_cast<float*>(d_logprobs.mutable_data_ptr());
  p.d_entropy = static_cast<float*>(d_entropy.mutable_data_ptr());
  p.loss = static_cast<float*>(buffers.loss.mutable_data_ptr());
  p.stats = static_cast<float*>(buffers.stats.mutable_data_ptr());
  p.partials = static_cast<double*>(buffers.partials.mutable_data_ptr());
  p.finished = static_cast<unsigned*>(buffers.finished.mutable_data_ptr());
  ppo_kernel<<<buffers.blocks, kThreads, 0, stream>>>(p, buffers.divisor);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {buffers.loss, d_logprobs, d_entropy, buffers.stats};
}

std::tuple<Tensor, Tensor, Tensor> value_loss(const Tensor& values, const Tensor& old_values, const Tensor& returns,
                                              const Tensor& mask, std::optional<double> clip,
                                              std::optional<double> number, const std::optional<Tensor>& tensor) {
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const cudaStream_t stream = current_stream(values);
  const int64_t total = values.numel();
  Buffers buffers(values, mask, kTokenMean, number, tensor, 7, kValueSums, stream);
  Tensor d_values = torch::stable::empty_like(values);
  ValueParams p{};
  p.values = device_data<float>(values, ScalarType::Float, total, "values");
  p.old_values = device_data<float>(old_values, ScalarType::Float, total, "old_values");
  p.returns = device_data<float>(returns, ScalarType::Float, total, "returns");
  p.mask = device_data<bool>(mask, ScalarType::Bool, total, "mask");
  p.clip = clip ? static_cast<float>(*clip) : INFINITY;
  p.d_values = static_cast<float*>(d_values.mutable_data_ptr());
  p.loss = static_cast<float*>(buffers.loss.mutable_data_ptr());
  p.stats = static_cast<float*>(buffers.stats.mutable_data_ptr());
  p.partials = static_cast<double*>(buffers.partials.mutable_data_ptr());
  p.finished = static_cast<unsigned*>(buffers.finished.mutable_data_ptr());
  value_kernel<<<buffers.blocks, kThreads, 0, stream>>>(p, buffers.divisor);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {buffers.loss, d_values, buffers.stats};
}

}  // namespace srppo::scalar

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CUDA, m) {
  m.impl("ppo_loss", TORCH_BOX(&srppo::scalar::ppo_loss));
  m.impl("value_loss", TORCH_BOX(&srppo::scalar::value_loss));
}
