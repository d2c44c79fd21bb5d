// The self-reward of one row at one instruction level; included by each_level.h.
#include "terms.h"

static void reward_row(const RewardArgs& args, std::int64_t row) {
  const Vf zero = set(0.0f);
  const std::int64_t row_begin = row * args.steps, row_end = row_begin + args.steps;
  const std::int64_t begin = begin_of_valid(args.mask, row_begin, row_end);
  const std::int64_t end = end_of_valid(args.mask, begin, row_end);
  std::fill(args.reward + row_begin, args.reward + begin, 0.0f);
  std::fill(args.reward + end, args.reward + row_end, 0.0f);
  const bool parts = args.score != nullptr;
  if (parts) {
    std::fill(args.penalty + row_begin, args.penalty + begin, 0.0f);
    std::fill(args.penalty + end, args.penalty + row_end, 0.0f);
    args.score[row] = args.shaped[row] = 0.0f;
  }
  if (begin == end) return;

  // Lanes are counted from the first valid token: padding does not change the order of the sum.
  Sum sum, shaped;
  std::int64_t length = 0;
  if (!args.per_token || args.by_length || parts) {
    for (std::int64_t t = begin; t < end; t += W) {
      const int left = lanes_left(end - t);
      const Mask m = load_mask(args.mask + t, left);
      sum.add(select(m, load(args.sft + t, left) - load(args.base + t, left), zero));
      length += count(m);
    }
  }
  const float divisor = args.by_length ? static_cast<float>(length) : args.std;
  const Vf vdivisor = set(divisor), scale = set(args.scale), bound = set(args.clip), kl_coef = set(args.kl_coef);
  for (std::int64_t t = begin; t < end; t += W) {
    const int left = lanes_left(end - t);
    const Mask m = load_mask(args.mask + t, left);
    Vf reward = zero;
    if (args.per_token) {
      reward = clamp((load(args.sft + t, left) - load(args.base + t, left)) / vdivisor * scale, -bound, bound);
      if (parts) shaped.add(select(m, reward, zero));
    }
    Vf penalty = zero;
    if (args.kl_coef != 0.0f) {
      const Vf d = select(m, load(args.policy + t, left) - load(args.ref + t, left), zero);
      penalty = -(kl_coef * kl_estimate(d, args.estimator));
      reward = reward + penalty;
    }
    if (parts) store(args.penalty + t, select(m, penalty, zero), left);
    store(args.reward + t, select(m, reward, zero), left);
  }
  float& last = args.reward[end - 1];
  double before_kl = shaped.total();
  // A lone score goes through a vector as well, so that its arithmetic is that of every other.
  if (!args.per_token) {
    float score[W];
    store(score, clamp(set(static_cast<float>(sum.total())) / vdivisor * scale, -bound, bound), W);
    last += score[0];
    before_kl = static_cast<double>(score[0]);
  }
  if (args.truncated && args.truncated[row]) {
    last -= args.missing_eos;
    before_kl -= static_cast<double>(args.missing_eos);
  }
  if (parts) {
    args.score[row] = static_cast<float>(sum.total());
    args.shaped[row] = static_cast<float>(before_kl);
  }
}

static void reward_rows(const RewardArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) reward_row(args, row);
}
