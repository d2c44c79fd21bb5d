// Policy and value loss kernels of one instruction level; included by each_level.h. One pass over a block: the gradient is
// written, the loss and all statistics are summed in float64.
#include "terms.h"

static PolicySums ppo_block(const PolicyArgs& args, std::int64_t begin, std::int64_t end, float weight) {
  const Vf zero = set(0.0f), one = set(1.0f), vweight = set(weight), bonus = set(-args.entropy_coef * weight);
  const PpoBounds bounds{args.low, args.high, args.dual};
  Sum loss, k3, log_ratio, deviation, deviation_square, entropy;
  Vf ratio_max = zero;
  std::int64_t low = 0, high = 0, dual = 0, valid = 0;
  for (std::int64_t t = begin; t < end; t += W) {
    const int left = lanes_left(end - t);
    const Mask m = load_mask(args.mask + t, left);
    const PpoTerms terms =
        ppo_terms(select(m, load(args.logprobs + t, left), zero), select(m, load(args.old_logprobs + t, left), zero),
                  select(m, load(args.advantages + t, left), zero), m, bounds);
    store(args.d_logprobs + t, terms.d_logprob * vweight, left);
    loss.add(terms.loss);
    k3.add(terms.k3);
    log_ratio.add(terms.log_ratio);
    const Vf off = terms.ratio - one;  // around 1, where ratios are: their variance does not cancel
    deviation.add(off);
    deviation_square.add_square(off);
    const Vf ratio = select(m, terms.ratio, zero);
    ratio_max = select(greater(ratio, ratio_max), ratio, ratio_max);
    low += count(terms.clipped_low);
    high += count(terms.clipped_high);
    dual += count(terms.clipped_dual);
    valid += count(m);
    if (args.entropy) {
      entropy.add(select(m, load(args.entropy + t, left), zero));
      store(args.d_entropy + t, select(m, bonus, zero), left);
    }
  }
  PolicySums sums;
  sums.entropy = entropy.total();
  // The bonus is taken from the sum of the entropies: the same to float64's rounding as token by token.
  sums.loss = loss.total() - static_cast<double>(args.entropy_coef) * sums.entropy;
  sums.k3 = k3.total();
  sums.log_ratio = log_ratio.total();
  sums.deviation = deviation.total();
  sums.deviation_square = deviation_square.total();
  sums.ratio_max = static_cast<double>(largest(ratio_max));
  sums.low = low;
  sums.high = high;
  sums.dual = dual;
  sums.valid = valid;
  return sums;
}

static ValueSums value_block(const ValueArgs& args, std::int64_t begin, std::int64_t end, float weight) {
  const Vf zero = set(0.0f), vweight = set(weight);
  Sum loss, error, error_square, value, target, target_square;
  std::int64_t clipped = 0, valid = 0;
  for (std::int64_t t = begin; t < end; t += W) {
    const int left = lanes_left(end - t);
    const Mask m = load_mask(args.mask + t, left);
    const Vf v = select(m, load(args.values + t, left), zero), r = select(m, load(args.returns + t, left), zero);
    const ValueTerms terms = value_terms(v, select(m, load(args.old_values + t, left), zero), r, m, args.clip);
    store(args.d_values + t, terms.d_value * vweight, left);
    loss.add(terms.loss);
    error.add(terms.error);
    error_square.add_square(terms.error);
    value.add(v);
    target.add(r);
    target_square.add_square(r);
    clipped += count(terms.clipped);
    valid += count(m);
  }
  return {loss.total(), error.total(), error_square.total(), value.total(), target.total(), target_square.total(), clipped,
          valid};
}
