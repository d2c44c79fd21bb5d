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
  float m = kLowest, s = 0.0f, t = 0.0f;
};

template <int kCount>
SRPPO_INLINE float largest(const float (&z)[kCount]) {
  float m = z[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) m = fmaxf(m, z[i]);
  return m;
}

// Sums of e^(z - m) and e^(z - m) (z - m), of even and of odd entries: half the latency, half the rounding.
struct Sums {
  float s[2] = {0.0f, 0.0f}, t[2] = {0.0f, 0.0f};
};

// Adds entries to sums around m. `z` becomes e^(z - m).
template <int kCount>
SRPPO_INLINE void exponentials(Sums& sums, float m, float (&z)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float shifted = z[i] - m;  // before the product with log2 e: m may be 1e4 and its product has lost the digits
    z[i] = exp2_of(shifted * kLog2e);
    sums.s[i % 2] += z[i];
    sums.t[i % 2] = fmaf(z[i], shifted, sums.t[i % 2]);
  }
}

// What moving a state to an m that is not below its own does to its sums.
struct Move {
  float fall, factor;
};

SRPPO_INLINE Move move_of(float from, float to) {
  // Bounded below: from kLowest it would be -2e38, whose product with s overflows, and inf * 0 is NaN.
  const float fall = fmaxf(from - to, kVanished);
  return {fall, exp2_of(fall * kLog2e)};
}

// The state around m, with sums around m of further entries added.
SRPPO_INLINE void add(RowState& state, const Move& move, float m, const Sums& sums) {
  state.t = fmaf(move.factor, fmaf(state.s, move.fall, state.t), sums.t[0] + sums.t[1]);
  state.s = fmaf(move.factor, state.s, sums.s[0] + sums.s[1]);
  state.m = m;
}

// Takes entries into a state. `m_part` is the largest of them and of all that other threads take of the same row at this
// time, so that a row's threads have one m; each has its own s and t, and they add up to the row's. Entries that do not
// count (the target, or beyond the vocabulary) come as kLowest. `z` becomes e^(z - m).
template <int kCount>
SRPPO_INLINE void absorb(RowState& state, float m_part, float (&z)[kCount]) {
  const float m = fmaxf(state.m, m_part);
  const Move move = move_of(state.m, m);
  Sums sums;
  exponentials(sums, m, z);
  add(state, move, m, sums);
}

// Where every entry was ruled out, m is kLowest and s counts them: nothing is what they add up to. A product, so that NaN,
// which a maximum drops, stays in s.
SRPPO_INLINE RowState finished(RowState state) {
  const float any = state.m <= kLowest ? 0.0f : 1.0f;
  state.s *= any;
  state.t *= any;
  return state;
}

}  // namespace srppo::softmax
