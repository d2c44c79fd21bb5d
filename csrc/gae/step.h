// GAE as a recursion for the return R = A + V, and its two ways to treat a masked token.
// Included inside a namespace that has Vf and Mask; no include guard.
//
// A_t = r_t + gamma V' - V_t + gamma lambda A' with A' = R' - V' is
//
//     R_t = r_t + gamma (1 - lambda) V' + gamma lambda R',      A_t = R_t - V_t
//
// which does not add and subtract every value on its way: with lambda = 1 the values are gone. R' = V' = bootstrap at
// the row's last valid token (A' = 0).

struct GaeCoefficients {
  Vf through;  // gamma (1 - lambda)
  Vf decay;    // gamma lambda
};

// R is kept in two floats: with gamma = lambda = 1 a row of 10^5 tokens is a plain sum, and one float loses 1e-5 of it.
struct GaeState {
  Vf ret, ret_low;  // R of the step to the right
  Vf next_value;    // V of the step to the right
};

// `reward` and `value` are 0 where not `valid`. Carry: a masked token leaves the state alone. Zero: it is a step of reward
// and value 0. Until the row's last valid token the caller leaves the state alone in both.
template <bool carry>
SRPPO_INLINE GaeState gae_step(GaeState state, Vf reward, Vf value, Mask valid, GaeCoefficients k) {
  const Vf input = fma(k.through, state.next_value, reward);
  const Vf product = k.decay * state.ret;
  const Vf product_low = fma(k.decay, state.ret, -product);  // 0 where fma rounds twice: one error term less
  const Vf sum = input + product;
  const Vf part = sum - input;  // Knuth's two-sum: sum + sum_low is exactly input + product
  const Vf sum_low = (input - (sum - part)) + (product - part);
  const Vf low = fma(k.decay, state.ret_low, sum_low + product_low);
  if (!carry) return {sum, low, value};
  return {select(valid, sum, state.ret), select(valid, low, state.ret_low), select(valid, value, state.next_value)};
}

SRPPO_INLINE Vf gae_return(GaeState state) { return state.ret + state.ret_low; }

SRPPO_INLINE Vf gae_advantage(GaeState state, Vf value) { return (state.ret - value) + state.ret_low; }
