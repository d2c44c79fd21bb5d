// One step of GAE from right to left, and of its two ways to treat a masked token (see srppo_kernels/gae/reference.py).
// Included inside a namespace that has Vf and Mask; no include guard.

struct GaeState {
  Vf advantage;   // running advantage of the step to the right
  Vf next_value;  // its value
};

// `reward` and `value` are 0 where not `valid`. Carry: a masked token leaves the state alone. Zero: it is a step of reward
// and value 0. Until the row's last valid token the caller leaves the state alone in both.
template <bool carry>
SRPPO_INLINE GaeState gae_step(GaeState state, Vf reward, Vf value, Mask valid, Vf gamma, Vf decay) {
  const Vf delta = fma(gamma, state.next_value, reward) - value;
  const Vf advantage = fma(decay, state.advantage, delta);
  if (!carry) return {advantage, value};
  return {select(valid, advantage, state.advantage), select(valid, value, state.next_value)};
}
