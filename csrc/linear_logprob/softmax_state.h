// The scalar maths of the scan's epilogue (srppo_kernels/linear_logprob/chunked.py has the formulas): accumulators to
// logits, logits into a row's online state. Device code, and host code for the tests.
#pragma once

#include "../common/scalar.h"

namespace srppo::softmax {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLowest = -2e38f;    // a finite stand-in for -inf, whose product with 0 would be NaN
constexpr float kVanished = -256.0f;  // e to this is 0 in float32

SRPPO_INLINE float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // 2 ulp; results below 2^-126 are 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

SRPPO_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;  // 1 ulp
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// (1 - e^-2|u|) / (1 + e^-2|u|) with u's sign, and near 0, where that would lose digits, an odd series whose next term is
// below 1e-7 of it. No clamp, which would drop a NaN.
SRPPO_INLINE float tanh_of(float u) {
  const float q = u * u;
  const float series = fmaf(q, fmaf(q, -0.008863236f, 0.021869489f), -0.053968254f);
  const float near = u * fmaf(q, fmaf(q, fmaf(q, series, 0.13333333f), -0.33333333f), 1.0f);
  const float e = exp2_of(fabsf(u) * (-2 * kLog2e));
  const float far = copysignf((1.0f - e) * reciprocal(1.0f + e), u);
  return fabsf(u) < 0.25f ? near : far;
}

SRPPO_INLINE float capped(float z, float softcap, float inverse_softcap) { return softcap * tanh_of(z * inverse_softcap); }

// m, and sums of e^(z - m) and of e^(z - m) (z - m) over entries other than the target.
struct RowState {
  float m = 0.0f, s = 0.0f, t = 0.0f;
};

// Sums of even and of odd entries: half the latency, half the rounding.
struct Sums {
  float s[2] = {0.0f, 0.0f}, t[2] = {0.0f, 0.0f};
};

// Adds entries to sums around m, from z - m. The difference comes before the product with log2 e: m may be 1e4, and its product
// has lost the digits. Entries that do not count come as kLowest. `x` becomes e^(z - m).
SRPPO_INLINE void exponentials(Sums& sums, float (&x)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float shifted = x[i];
    x[i] = exp2_of(shifted * kLog2e);
    sums.s[i] += x[i];
    sums.t[i] = fmaf(x[i], shifted, sums.t[i]);
  }
}

// Moves the sums of a state to an m that is not below its own.
SRPPO_INLINE void raise(RowState& state, float m) {
  // Bounded below: from a number far below, such as -1e30, its product with s may overflow, and inf * 0 is NaN.
  const float fall = fmaxf(state.m - m, kVanished), factor = exp2_of(fall * kLog2e);
  state.t = factor * fmaf(state.s, fall, state.t);
  state.s = factor * state.s;
  state.m = m;
}

}  // namespace srppo::softmax
