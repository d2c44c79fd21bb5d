// GAE as a parallel scan: gae_step's effect on the state (R, V) is a map that composes with its neighbours' in any bracketing.
// Included after step.h inside the same namespace; no include guard.
//
// A stretch of tokens maps the state on its right to that on its left:
//
//     R  <-  b + a R + c V          V  <-  v + s V
//
// One valid token is a = gamma lambda, b = r, c = gamma (1 - lambda), v = its value, s = 0. A masked token is the identity
// (carry) or the same with r = v = 0 (zero). s is 0 or 1, and costs less than a mask that is shuffled and selected by.

struct GaeMap {
  Vf a, b, c, v, s;
};

SRPPO_INLINE GaeMap gae_identity() { return {set(1.0f), set(0.0f), set(0.0f), set(0.0f), set(1.0f)}; }

template <bool carry>
SRPPO_INLINE GaeMap gae_map(Vf reward, Vf value, Mask valid, GaeCoefficients k) {
  const Vf zero = set(0.0f), one = set(1.0f);
  if (!carry) return {k.decay, reward, k.through, value, zero};
  return {select(valid, k.decay, one), reward, select(valid, k.through, zero), value, select(valid, zero, one)};
}

// First `right`, then `left`, as time runs backwards.
SRPPO_INLINE GaeMap gae_compose(GaeMap left, GaeMap right) {
  return {left.a * right.a, fma(left.a, right.b, fma(left.c, right.v, left.b)), fma(left.a, right.c, left.c * right.s),
          fma(left.s, right.v, left.v), left.s * right.s};
}

// The stretch as one step of the recursion, with the recursion's two floats.
SRPPO_INLINE GaeState gae_apply(GaeMap map, GaeState state) {
  const GaeState next = gae_step<false>(state, map.b, map.v, greater(set(1.0f), set(0.0f)), {map.c, map.a});
  return {next.ret, next.ret_low, fma(map.s, state.next_value, map.v)};
}
