// Vectors of 8 floats. Included per level, see each_level.h. The operators + - * / of the vector type are the compiler's.
constexpr int W = 8;
using Vf = __m256;
struct Mask {
  __m256 lanes;  // all bits set or none
};

SRPPO_INLINE Vf set(float x) { return _mm256_set1_ps(x); }
SRPPO_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SRPPO_INLINE Vf load(const float* p, int n) { return n >= W ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first_lanes(n)); }
SRPPO_INLINE void store(float* p, Vf x, int n) {
  if (n >= W) _mm256_storeu_ps(p, x);
  else _mm256_maskstore_ps(p, first_lanes(n), x);
}
SRPPO_INLINE Mask load_mask(const bool* p, int n) {
  std::int64_t bytes = 0;
  if (n >= W) std::memcpy(&bytes, p, 8);
  else std::memcpy(&bytes, p, static_cast<unsigned>(n > 0 ? n : 0));
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}

SRPPO_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
SRPPO_INLINE Mask greater(Vf a, Vf b) { return {_mm256_cmp_ps(a, b, _CMP_GT_OQ)}; }
SRPPO_INLINE Mask less(Vf a, Vf b) { return {_mm256_cmp_ps(a, b, _CMP_LT_OQ)}; }
SRPPO_INLINE Mask equal(Vf a, Vf b) { return {_mm256_cmp_ps(a, b, _CMP_EQ_OQ)}; }
SRPPO_INLINE Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.lanes, b.lanes)}; }
SRPPO_INLINE Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.lanes, b.lanes)}; }
SRPPO_INLINE Mask but_not(Mask a, Mask b) { return {_mm256_andnot_ps(b.lanes, a.lanes)}; }
SRPPO_INLINE Vf select(Mask m, Vf a, Vf b) { return _mm256_blendv_ps(b, a, m.lanes); }
SRPPO_INLINE int count(Mask m) { return __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m.lanes))); }
SRPPO_INLINE Vf nearest(Vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SRPPO_INLINE Vf power_of_two(Vf n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// a, or b where a is not larger or one of them is NaN.
SRPPO_INLINE Vf larger(Vf a, Vf b) { return _mm256_max_ps(a, b); }
SRPPO_INLINE Vf times_power_of_two(Vf x, Vf n) { return select(less(n, set(-126.0f)), set(0.0f), x * power_of_two(n)); }
SRPPO_INLINE float largest(Vf x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// Sums in float64, a fixed lane for each place.
struct Sum {
  __m256d low, high;
  // Written out: an implicit constructor is outside of the target region.
  __attribute__((always_inline)) Sum() : low(_mm256_setzero_pd()), high(_mm256_setzero_pd()) {}
  __attribute__((always_inline)) void add(Vf x) {
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
  }
  __attribute__((always_inline)) void add_square(Vf x) {
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), b = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    low = _mm256_fmadd_pd(a, a, low);
    high = _mm256_fmadd_pd(b, b, high);
  }
  __attribute__((always_inline)) double total() const {
    const __m256d x = _mm256_add_pd(low, high);
    const __m128d y = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(y, _mm_unpackhi_pd(y, y)));
  }
};

// (x - centre) * scale + shift in float64.
SRPPO_INLINE Vf affine(Vf x, double centre, double scale, double shift) {
  const __m256d c = _mm256_set1_pd(centre), s = _mm256_set1_pd(scale), t = _mm256_set1_pd(shift);
  const __m256d a = _mm256_fmadd_pd(_mm256_sub_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), c), s, t);
  const __m256d b = _mm256_fmadd_pd(_mm256_sub_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)), c), s, t);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(a)), _mm256_cvtpd_ps(b), 1);
}

SRPPO_INLINE void transpose(Vf (&x)[W]) {
  Vf y[W];
  for (int i = 0; i < W; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < W; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
  }
  for (int i = 0; i < W; ++i) x[i] = y[i];
}
