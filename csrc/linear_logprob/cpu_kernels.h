// The scan over one vocabulary group of one instruction level; included by each_level.h.
//
// Logits come from fp32_tile.h (or bf16_tile.h); the softmax pass is row by row. No templates and no lambdas here:
// each_level.h says why.

#include "fp32_tile.h"

// What a tile fetches at a time.
static int fetched_bytes() { return W >= 16 ? 128 : 64; }

static void multiply(int rows, const float* x, const float* panel, std::int64_t steps, float* z, std::int64_t ldz,
                     const Ahead& lines) {
  multiply_or_add(rows, x, panel, steps, z, ldz, false, lines);
}

// `sources` are 2 W rows of `steps` floats (zeros where the group has ended); `panel` becomes [steps][2 W].
static void pack_panel(const float* const* sources, std::int64_t steps, float* panel) {
  for (int half = 0; half < 2; ++half) {
    const float* const* rows = sources + half * W;
    std::int64_t k = 0;
    for (; k < steps; k += W) {
      const int left = lanes_left(steps - k);
      Vf x[W];
      for (int i = 0; i < W; ++i) x[i] = load(rows[i] + k, left);
      transpose(x);
      for (int i = 0; i < left; ++i) store(panel + (k + i) * kPanel + half * W, x[i], W);
    }
  }
}

static void widen_bf16(const std::uint16_t* source, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(source[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

// Exponents are rebased by a multiplication with 2^112, which is exact and takes subnormals along.
static void widen_fp16(const std::uint16_t* source, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t half = source[i];
    const std::uint32_t magnitude = (half & 0x7fffu) << 13;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits |= (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    bits |= (half & 0x8000u) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

// e^x for x <= 0 as 2^n 2^r, |r| <= 1/2; from -104 down it is 0. A NaN stays one. The polynomial is the one of least
// relative error that is 1 at 0: 2e-9, and 8e-8 with the roundings. Half of 1/ln 2's last place is left out: 1.3e-8 |x|.
SRPPO_INLINE Vf exp_of_negative(Vf x) {
  x = larger(set(-104.0f), x);
  const Vf n = nearest(x * set(0x1.715476p+0f));
  const Vf r = fma(x, set(0x1.715476p+0f), -n);
  Vf p = set(0x1.41fbbcp-13f);
  p = fma(p, r, set(0x1.5f3e54p-10f));
  p = fma(p, r, set(0x1.3b2d4cp-7f));
  p = fma(p, r, set(0x1.c6aee8p-5f));
  p = fma(p, r, set(0x1.ebfbdcp-3f));
  p = fma(p, r, set(0x1.62e430p-1f));
  p = fma(p, r, set(1.0f));
  return times_power_of_two(p, n);
}

// 1 - 2 / (e^2|x| + 1), with x's sign, and near 0, where that would lose digits that a cap multiplies, the odd series of
// softmax_state.h.
SRPPO_INLINE Vf tanh_of(Vf x) {
  const Vf zero = set(0.0f), one = set(1.0f);
  const Mask negative = less(x, zero);
  const Vf magnitude = select(negative, zero - x, x);
  Vf twice = magnitude + magnitude;
  twice = select(greater(twice, set(40.0f)), set(40.0f), twice);
  const Vf far = one - set(2.0f) / (exp_parts(twice).exp + one);
  const Vf q = x * x;
  Vf series = set(-0.008863236f);
  series = fma(series, q, set(0.021869489f));
  series = fma(series, q, set(-0.053968254f));
  series = fma(series, q, set(0.13333333f));
  series = fma(series, q, set(-0.33333333f));
  const Vf near = fma(magnitude * q, series, magnitude);
  const Vf t = select(less(magnitude, set(0.25f)), near, far);
  return select(negative, zero - t, t);
}

SRPPO_INLINE Vf transform(Vf z, const ScanArgs& args, Vf temperature) {
  if (args.logit_scale != 1.0f) z = z * set(args.logit_scale);
  if (args.softcap != 0.0f) z = tanh_of(z / set(args.softcap)) * set(args.softcap);
  return z / temperature;
}

SRPPO_INLINE float sum_of(Vf a, Vf b, Vf c, Vf d) {
  Sum sum;  // float64: what is added up is already a sum of many
  sum.add(a);
  sum.add(b);
  sum.add(c);
  sum.add(d);
  return static_cast<float>(sum.total());
}

// Turns a row's raw logits (room for whole vectors) into its partial (m, s, t, z_y); `column` is the target's, or
// negative.
static Partial softmax_row(const ScanArgs& args, float* z, std::int64_t width, const float* bias, float temperature,
                           std::int64_t column, void* kept) {
  const Vf lowest = set(-3.402823466e38f), vtemperature = set(temperature);
  const std::int64_t whole = (width + W - 1) / W * W;
  const bool plain = args.logit_scale == 1.0f && args.softcap == 0.0f && temperature == 1.0f && bias == nullptr;
  if (!plain) {
    for (std::int64_t j = 0; j < width; j += W) {
      Vf x = load(z + j, W);
      if (bias) x = x + load(bias + j, lanes_left(width - j));
      x = transform(x, args, vtemperature);
      // A bias of -inf rules an entry out: the lowest finite number does the same, and makes no NaN of 0 * inf.
      if (bias) x = select(less(x, lowest), lowest, x);
      store(z + j, x, W);
    }
  }
  for (std::int64_t j = width; j < whole; ++j) z[j] = -3.402823466e38f;
  Vf m0 = lowest, m1 = lowest;
  std::int64_t j = 0;
  for (; j + 2 * W <= whole; j += 2 * W) {
    const Vf a = load(z + j, W), b = load(z + j + W, W);
    m0 = larger(a, m0);
    m1 = larger(b, m1);
  }
  for (; j < whole; j += W) {
    const Vf a = load(z + j, W);
    m0 = larger(a, m0);
  }
  Partial partial;
  partial.m = largest(larger(m1, m0));
  partial.zy = 0.0f;
  if (column >= 0) {
    partial.zy = z[column];
    z[column] = -3.402823466e38f;  // the target stays out of the sums (chunked.py says why)
  }
  std::uint16_t* bf16 = args.kept_is_bf16 ? static_cast<std::uint16_t*>(kept) : nullptr;
  float* fp32 = args.kept_is_bf16 ? nullptr : static_cast<float*>(kept);
  const Vf m = set(partial.m), zero = set(0.0f);
  Vf s[4] = {zero, zero, zero, zero}, t[4] = {zero, zero, zero, zero};
  const std::int64_t step = 4 * W;
  for (j = 0; j < whole; j += step) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (j + i * W >= whole) break;
      const Vf d = load(z + j + i * W, W) - m;
      const Vf e = exp_of_negative(d);
      s[i] = s[i] + e;
      if (args.entropy) t[i] = fma(e, d, t[i]);
      const int lanes = lanes_left(width - j - i * W);
      if (bf16) store_bf16(bf16 + j + i * W, e, lanes);
      else if (fp32) store(fp32 + j + i * W, e, lanes);
    }
  }
  partial.s = sum_of(s[0], s[1], s[2], s[3]);
  partial.t = args.entropy ? sum_of(t[0], t[1], t[2], t[3]) : 0.0f;
  if (kept && column >= 0) {
    const Vf e = exp_of_negative(set(partial.zy - partial.m));
    if (bf16) store_bf16(bf16 + column, e, 1);
    else store(fp32 + column, e, 1);
  }
  return partial;
}
