// The clipped policy and value losses of one token (see srppo_kernels/ppo_loss/reference.py for the formulas).
// Included inside a namespace that has Vf and Mask; no include guard. Masked tokens come in as 0, with `valid` false.

// In float, as the reference compares a float32 ratio: 1 - clip_low, 1 + clip_high, and the dual clip or infinity.
struct PpoBounds {
  float low, high, dual;
};

struct PpoTerms {
  Vf loss;       // without the entropy bonus
  Vf d_logprob;  // dloss/dlogprob, before the token's weight
  Vf log_ratio;  // clamped
  Vf ratio;
  Vf k3;
  Mask clipped_low, clipped_high, clipped_dual;
};

SRPPO_INLINE PpoTerms ppo_terms(Vf logprob, Vf old_logprob, Vf advantage, Mask valid, PpoBounds bounds) {
  const Vf zero = set(0.0f), bound = set(20.0f), low = set(bounds.low), high = set(bounds.high), dual = set(bounds.dual);
  const Vf raw = logprob - old_logprob;
  const Vf d = clamp(raw, -bound, bound);
  const ExpParts parts = exp_parts(d);
  const Vf ratio = parts.exp;
  const Mask up = both(valid, greater(advantage, zero)), down = both(valid, less(advantage, zero));

  PpoTerms out;
  out.clipped_high = both(up, greater(ratio, high));
  out.clipped_low = both(down, less(ratio, low));
  out.clipped_dual = both(down, greater(ratio, dual));
  const Vf used =
      select(out.clipped_high, high, select(out.clipped_low, low, select(out.clipped_dual, dual, ratio)));
  out.loss = -(advantage * used);
  // A clamped log-ratio has no gradient; with a NaN all comparisons are false and the NaN goes on.
  const Mask flat = either(either(out.clipped_high, either(out.clipped_low, out.clipped_dual)),
                           either(greater(raw, bound), less(raw, -bound)));
  out.d_logprob = select(but_not(valid, flat), -(advantage * ratio), zero);
  out.log_ratio = d;
  out.ratio = ratio;
  out.k3 = parts.remainder;
  return out;
}

struct ValueTerms {
  Vf loss;
  Vf d_value;
  Vf error;  // value - return
  Mask clipped;
};

// `clip` is infinity where clipping is off.
SRPPO_INLINE ValueTerms value_terms(Vf value, Vf old_value, Vf target, Mask valid, float clip) {
  const Vf zero = set(0.0f), half = set(0.5f), bound = set(clip);
  const Vf error = value - target, moved = value - old_value;
  const Vf clipped_error = (old_value + clamp(moved, -bound, bound)) - target;
  const Vf square = error * error, clipped_square = clipped_error * clipped_error;
  const Mask outside = both(valid, either(greater(moved, bound), less(moved, -bound)));
  ValueTerms out;
  out.clipped = both(outside, greater(clipped_square, square));
  out.loss = half * select(out.clipped, clipped_square, square);
  out.d_value = select(but_not(valid, out.clipped), error, zero);
  out.error = error;
  return out;
}
