// KL estimates of one token (see srppo_kernels/log_ratio/reference.py).
// Included inside a namespace that has Vf and Mask; no include guard.

// `d` is log pi - log pi_ref, 0 where masked; `estimator` is 1, 2 or 3.
SRPPO_INLINE Vf kl_estimate(Vf d, int estimator) {
  if (estimator == 1) return d;
  if (estimator == 2) return set(0.5f) * d * d;
  const Vf bound = set(20.0f), clamped = clamp(-d, -bound, bound);
  // e^c - 1 + d with c = -d: the remainder e^c - 1 - c where nothing was clamped.
  return exp_parts(clamped).remainder + (clamped + d);
}
