// CPU kernels of srppo_kernels/ppo_loss: loss, gradient and statistics of the policy and value losses in one pass.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../common/blocks.h"
#include "../common/tensors.h"
#include "moments.h"

namespace srppo {
namespace {

struct PolicyArgs {
  const float* logprobs;
  const float* old_logprobs;
  const float* advantages;
  const bool* mask;
  const float* entropy;  // null: none
  float low, high, dual, entropy_coef;
  float* d_logprobs;
  float* d_entropy;
};

struct PolicySums {
  double loss = 0, k3 = 0, log_ratio = 0, deviation = 0, deviation_square = 0, entropy = 0, ratio_max = 0;
  std::int64_t low = 0, high = 0, dual = 0, valid = 0;
};

struct ValueArgs {
  const float* values;
  const float* old_values;
  const float* returns;
  const bool* mask;
  float clip;
  float* d_values;
};

struct ValueSums {
  double loss = 0, error = 0, error_square = 0, value = 0, target = 0, target_square = 0;
  std::int64_t clipped = 0, valid = 0;
};

}  // namespace
}  // namespace srppo

#define SRPPO_KERNELS "../ppo_loss/cpu_kernels.h"
#include "../common/each_level.h"

namespace srppo {
namespace {

// The order of REDUCTIONS in reference.py.
enum class Reduction : std::int64_t { token_mean, sequence_mean, sum, constant_length };

std::int64_t row_length(const Tensor& x) { return x.size(x.dim() - 1); }

// What a row's token losses are multiplied by.
struct Weights {
  float total;
  bool by_row;
  const Blocks& blocks;

  Weights(const Blocks& all, Reduction reduction, std::int64_t tokens, std::optional<double> divisor,
          const std::optional<Tensor>& divisor_tensor)
      : by_row(reduction == Reduction::sequence_mean), blocks(all) {
    float by = 1.0f;
    if (divisor_tensor) by = *floats(*divisor_tensor, 1, "normalizer");
    else if (divisor) by = static_cast<float>(*divisor);
    else if (reduction == Reduction::token_mean) by = static_cast<float>(all.valid);
    else if (reduction == Reduction::sequence_mean) by = static_cast<float>(all.rows_with_tokens);
    else if (reduction == Reduction::constant_length) by = static_cast<float>(tokens);
    total = 1.0f / (by == 0.0f ? 1.0f : by);
  }

  float of(std::int64_t row) const {
    if (!by_row) return total;
    return total / static_cast<float>(std::max<std::int64_t>(blocks.lengths[static_cast<std::size_t>(row)], 1));
  }
};

Tensor vector_of(const Tensor& like, std::initializer_list<double> values) {
  Tensor out = torch::stable::new_empty(like, {static_cast<std::int64_t>(values.size())}, ScalarType::Float);
  std::transform(values.begin(), values.end(), mutable_floats(out), [](double x) { return static_cast<float>(x); });
  return out;
}

Tensor scalar_of(const Tensor& like, double value) {
  Tensor out = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef{}, ScalarType::Float);
  *mutable_floats(out) = static_cast<float>(value);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& mask,
    const std::optional<Tensor>& entropy, double clip_low, double clip_high, std::optional<double> dual_clip,
    double entropy_coef, std::int64_t reduction, std::optional<double> divisor,
    const std::optional<Tensor>& divisor_tensor) {
  const std::int64_t total = logprobs.numel(), steps = row_length(logprobs);
  Tensor d_logprobs = torch::stable::empty_like(logprobs);
  Tensor d_entropy = entropy ? torch::stable::empty_like(logprobs) : torch::stable::new_empty(logprobs, {0});
  PolicyArgs args{};
  args.logprobs = floats(logprobs, total, "logprobs");
  args.old_logprobs = floats(old_logprobs, total, "old_logprobs");
  args.advantages = floats(advantages, total, "advantages");
  args.mask = bools(mask, total, "mask");
  args.entropy = floats(entropy, total, "entropy");
  args.low = static_cast<float>(1.0 - clip_low);
  args.high = static_cast<float>(1.0 + clip_high);
  args.dual = dual_clip ? static_cast<float>(*dual_clip) : std::numeric_limits<float>::infinity();
  args.entropy_coef = static_cast<float>(entropy_coef);
  args.d_logprobs = mutable_floats(d_logprobs);
  args.d_entropy = mutable_floats(d_entropy);

  const Blocks blocks(args.mask, total ? total / steps : 0, steps);
  const Weights weights(blocks, static_cast<Reduction>(reduction), total, divisor, divisor_tensor);
  std::vector<PolicySums> partial(blocks.list.size());
  const auto compute = SRPPO_AT_LEVEL(ppo_block);
  blocks.each([&](const Block& block, std::size_t i) {
    clear_outside(block, args.d_logprobs);
    if (args.entropy) clear_outside(block, args.d_entropy);
    partial[i] = compute(args, block.begin, block.end, weights.of(block.row));
  });

  PolicySums all;
  for (std::size_t i = 0; i < partial.size(); ++i) {
    const PolicySums& part = partial[i];
    all.loss += part.loss * static_cast<double>(weights.of(blocks.list[i].row));
    all.k3 += part.k3;
    all.log_ratio += part.log_ratio;
    all.deviation += part.deviation;
    all.deviation_square += part.deviation_square;
    all.entropy += part.entropy;
    all.ratio_max = std::max(all.ratio_max, part.ratio_max);
    all.low += part.low;
    all.high += part.high;
    all.dual += part.dual;
    all.valid += part.valid;
  }
  const double n = static_cast<double>(std::max<std::int64_t>(all.valid, 1));
  const double mean = all.valid ? 1.0 + all.deviation / n : 0.0;
  // The maximum is taken by comparisons, which drop a NaN; the mean has it.
  const double ratio_max = std::isnan(mean) ? mean : all.ratio_max;
  Tensor stats = vector_of(
      logprobs, {all.k3 / n, -all.log_ratio / n, static_cast<double>(all.low) / n, static_cast<double>(all.high) / n,
                 static_cast<double>(all.dual) / n, mean, ratio_max, variance(all.deviation, all.deviation_square, n),
                 all.entropy / n, static_cast<double>(all.valid)});
  return {scalar_of(logprobs, all.loss), d_logprobs, d_entropy, stats};
}

std::tuple<Tensor, Tensor, Tensor> value_loss(const Tensor& values, const Tensor& old_values, const Tensor& returns,
                                              const Tensor& mask, std::optional<double> clip,
                                              std::optional<double> divisor,
                                              const std::optional<Tensor>& divisor_tensor) {
  const std::int64_t total = values.numel(), steps = row_length(values);
  Tensor d_values = torch::stable::empty_like(values);
  ValueArgs args{};
  args.values = floats(values, total, "values");
  args.old_values = floats(old_values, total, "old_values");
  args.returns = floats(returns, total, "returns");
  args.mask = bools(mask, total, "mask");
  args.clip = clip ? static_cast<float>(*clip) : std::numeric_limits<float>::infinity();
  args.d_values = mutable_floats(d_values);

  const Blocks blocks(args.mask, total ? total / steps : 0, steps);
  const Weights weights(blocks, Reduction::token_mean, total, divisor, divisor_tensor);
  std::vector<ValueSums> partial(blocks.list.size());
  const auto compute = SRPPO_AT_LEVEL(value_block);
  blocks.each([&](const Block& block, std::size_t i) {
    clear_outside(block, args.d_values);
    partial[i] = compute(args, block.begin, block.end, weights.of(block.row));
  });

  ValueSums all;
  for (const ValueSums& part : partial) {
    all.loss += part.loss * static_cast<double>(weights.total);
    all.error += part.error;
    all.error_square += part.error_square;
    all.value += part.value;
    all.target += part.target;
    all.target_square += part.target_square;
    all.clipped += part.clipped;
    all.valid += part.valid;
  }
  const double n = static_cast<double>(std::max<std::int64_t>(all.valid, 1));
  const double of_targets = variance(all.target, all.target_square, n);
  const double of_errors = variance(all.error, all.error_square, n);
  Tensor stats =
      vector_of(values, {static_cast<double>(all.clipped) / n, all.error_square / n, all.value / n, all.target / n,
                         of_targets, of_errors, explained_variance(of_targets, of_errors),
                         static_cast<double>(all.valid)});
  return {scalar_of(values, all.loss), d_values, stats};
}

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? entropy, float clip_low, "
      "float clip_high, float? dual_clip, float entropy_coef, int reduction, float? divisor, Tensor? divisor_tensor) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor mask, float? clip, float? divisor, "
      "Tensor? divisor_tensor) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CPU, m) {
  m.impl("ppo_loss", TORCH_BOX(&srppo::ppo_loss));
  m.impl("value_loss", TORCH_BOX(&srppo::value_loss));
}
