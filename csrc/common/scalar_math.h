// Scalar maths that every op shares, written once over Vf: a CPU vector (see each_level.h) or one CUDA float (scalar.h).
// No include guard: it is included inside the namespace of each.

// By comparison, not by min and max: those drop a NaN, and a NaN on a valid token must be seen.
SRPPO_INLINE Vf clamp(Vf x, Vf low, Vf high) { return select(less(x, low), low, select(greater(x, high), high, x)); }

struct ExpParts {
  Vf exp;        // e^x
  Vf remainder;  // e^x - 1 - x, without cancellation near 0
};

// For |x| <= 87: the callers clamp. x = n ln 2 + r, e^r = 1 + r + r^2 q(r) with |r| <= 0.35; Taylor's q to r^5 leaves 5e-9
// relative. ln 2 in two parts, the first with 9 bits so that n times it is exact.
SRPPO_INLINE ExpParts exp_parts(Vf x) {
  const Vf n = nearest(x * set(1.44269504089f));
  Vf r = fma(n, set(-0.693359375f), x);
  r = fma(n, set(2.12194440e-4f), r);
  Vf q = set(1.0f / 5040);
  q = fma(q, r, set(1.0f / 720));
  q = fma(q, r, set(1.0f / 120));
  q = fma(q, r, set(1.0f / 24));
  q = fma(q, r, set(1.0f / 6));
  q = fma(q, r, set(0.5f));
  const Vf tail = (r * r) * q;
  const Vf e = (set(1.0f) + (r + tail)) * power_of_two(n);
  // Where n = 0, r is x itself and the tail is the remainder; elsewhere |x| > 0.34 and the difference is well conditioned.
  return {e, select(equal(n, set(0.0f)), tail, (e - set(1.0f)) - x)};
}
