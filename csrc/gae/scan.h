// GAE as a parallel scan: gae_step's effect on the state (R, V) is a map that composes with its neighbours' in any bracketing.
// Included after step.h inside the same namespace; no include guard.
//
// A stretch of tokens maps the state on its right to that on its left:
//
//     R  <-  b + a R + c V          V  <-  v if the stretch sets a value, else V
//
// One valid token is a = gamma lambda, b = r, c = gamma (1 - lambda), v = its value. A masked token is the identity (carry)
// or the same with r = v = 0 (zero).

struct GaeMap {
  Vf a, b, c, v;
  Mask sets;
};

SRPPO_INLINE GaeMap gae_identity() { return {set(1.0f), set(0.0f), set(0.0f), set(0.0f), greater(set(0.0f), set(0.0f))}; }

template <bool carry>
SRPPO_INLINE GaeMap gae_map(Vf reward, Vf value, Mask valid, GaeCoefficients k) {
  const Mask yes = greater(set(1.0f), set(0.0f));
  if (!carry) return {k.decay, reward, k.through, value, yes};
  return {select(valid, k.decay, set(1.0f)), reward, select(valid, k.through, set(0.0f)), value, valid};
}

// First `right`, then `left`, as time runs backwards.
SRPPO_INLINE GaeMap gae_compose(GaeMap left, GaeMap right) {
  const Vf zero = set(0.0f);
  GaeMap both_maps;
  both_maps.a = left.a * right.a;
  both_maps.b = fma(left.a, right.b, fma(left.c, select(right.sets, right.v, zero), left.b));
  both_maps.c = fma(left.a, right.c, select(right.sets, zero, left.c));
  both_maps.v = select(left.sets, left.v, right.v);
  both_maps.sets = either(left.sets, right.sets);
  return both_maps;
}

SRPPO_INLINE GaeState gae_apply(GaeMap map, GaeState state) {
  const Vf low = map.a * state.ret_low;
  return {fma(map.a, state.ret, fma(map.c, state.next_value, map.b)), low, select(map.sets, map.v, state.next_value)};
}
