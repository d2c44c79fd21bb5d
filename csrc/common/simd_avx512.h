// Vectors of 16 floats. Included per level, see each_level.h. The operators + - * / of the vector type are the compiler's.
constexpr int W = 16;
using Vf = __m512;
using Mask = __mmask16;

SRPPO_INLINE Vf set(float x) { return _mm512_set1_ps(x); }
SRPPO_INLINE Mask first_lanes(int n) { return static_cast<Mask>(n >= 16 ? 0xffffu : (1u << n) - 1u); }
SRPPO_INLINE Vf load(const float* p, int n) { return n >= W ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(first_lanes(n), p); }
SRPPO_INLINE void store(float* p, Vf x, int n) {
  if (n >= W) _mm512_storeu_ps(p, x);
  else _mm512_mask_storeu_ps(p, first_lanes(n), x);
}
SRPPO_INLINE Mask load_mask(const bool* p, int n) {
  const __m128i bytes = n >= W ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi8(first_lanes(n), p);
  return _mm_test_epi8_mask(bytes, bytes);
}

SRPPO_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
SRPPO_INLINE Mask greater(Vf a, Vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
SRPPO_INLINE Mask less(Vf a, Vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
SRPPO_INLINE Mask equal(Vf a, Vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
SRPPO_INLINE Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
SRPPO_INLINE Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
SRPPO_INLINE Mask but_not(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
SRPPO_INLINE Vf select(Mask m, Vf a, Vf b) { return _mm512_mask_blend_ps(m, b, a); }
SRPPO_INLINE int count(Mask m) { return __builtin_popcount(m); }
SRPPO_INLINE Vf nearest(Vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SRPPO_INLINE Vf power_of_two(Vf n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// a, or b where a is not larger or one of them is NaN.
SRPPO_INLINE Vf larger(Vf a, Vf b) { return _mm512_max_ps(a, b); }
SRPPO_INLINE Vf times_power_of_two(Vf x, Vf n) { return _mm512_scalef_ps(x, n); }
SRPPO_INLINE float largest(Vf x) { return _mm512_reduce_max_ps(x); }

// Sums in float64, a fixed lane for each place.
struct Sum {
  __m512d low, high;
  // Written out: an implicit constructor is outside of the target region.
  __attribute__((always_inline)) Sum() : low(_mm512_setzero_pd()), high(_mm512_setzero_pd()) {}
  __attribute__((always_inline)) void add(Vf x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  }
  __attribute__((always_inline)) void add_square(Vf x) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  }
  __attribute__((always_inline)) double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

// (x - centre) * scale + shift in float64.
SRPPO_INLINE Vf affine(Vf x, double centre, double scale, double shift) {
  const __m512d c = _mm512_set1_pd(centre), s = _mm512_set1_pd(scale), t = _mm512_set1_pd(shift);
  const __m512d a = _mm512_fmadd_pd(_mm512_sub_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), c), s, t);
  const __m512d b = _mm512_fmadd_pd(_mm512_sub_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)), c), s, t);
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
}

SRPPO_INLINE void transpose(Vf (&x)[W]) {
  Vf y[W];
  for (int i = 0; i < W; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < W; i += 4) {
    x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(y[i], y[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_f32x4(y[i + 4], y[i + 12], 0xdd);
  }
}
