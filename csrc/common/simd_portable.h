// Vectors of 4 floats in the compiler's own vector type: SSE2, NEON or scalar code, whatever the target has.
// Included per level, see each_level.h.
constexpr int W = 4;
typedef float Vf __attribute__((vector_size(16)));
typedef std::int32_t Vi __attribute__((vector_size(16)));
struct Mask {
  Vi lanes;  // -1 or 0
};

SRPPO_INLINE Vf set(float x) { return Vf{x, x, x, x}; }
SRPPO_INLINE Vf load(const float* p, int n) {
  Vf x = {0, 0, 0, 0};
  std::memcpy(&x, p, sizeof(float) * static_cast<unsigned>(n >= W ? W : n > 0 ? n : 0));
  return x;
}
SRPPO_INLINE void store(float* p, Vf x, int n) {
  std::memcpy(p, &x, sizeof(float) * static_cast<unsigned>(n >= W ? W : n > 0 ? n : 0));
}
SRPPO_INLINE Mask load_mask(const bool* p, int n) {
  const auto* const bytes = reinterpret_cast<const unsigned char*>(p);  // a bool's is taken to be 0 or 1: see blocks.h
  Vi lanes = {0, 0, 0, 0};
  for (int i = 0; i < W; ++i) lanes[i] = i < n && bytes[i] != 0 ? -1 : 0;
  return {lanes};
}

// Two roundings: a fused multiply-add without hardware for it is a library call.
SRPPO_INLINE Vf fma(Vf a, Vf b, Vf c) { return a * b + c; }
SRPPO_INLINE Mask greater(Vf a, Vf b) { return {a > b}; }
SRPPO_INLINE Mask less(Vf a, Vf b) { return {a < b}; }
SRPPO_INLINE Mask equal(Vf a, Vf b) { return {a == b}; }
SRPPO_INLINE Mask both(Mask a, Mask b) { return {a.lanes & b.lanes}; }
SRPPO_INLINE Mask either(Mask a, Mask b) { return {a.lanes | b.lanes}; }
SRPPO_INLINE Mask but_not(Mask a, Mask b) { return {a.lanes & ~b.lanes}; }
SRPPO_INLINE Vf select(Mask m, Vf a, Vf b) { return (Vf)((m.lanes & (Vi)a) | (~m.lanes & (Vi)b)); }
SRPPO_INLINE int count(Mask m) { return -(m.lanes[0] + m.lanes[1] + m.lanes[2] + m.lanes[3]); }
SRPPO_INLINE Vf nearest(Vf x) {
  // Adding 1.5 * 2^23 leaves no fraction bits: round to nearest even for |x| below 2^22.
  const Vf magic = set(12582912.0f);
  return (x + magic) - magic;
}
SRPPO_INLINE Vf power_of_two(Vf n) {
  // The sum with 1.5 * 2^23 holds the integer n in its low bits.
  const Vi whole = (Vi)(n + set(12582912.0f)) - 0x4b400000;
  return (Vf)((whole + 127) << 23);
}
// a, or b where a is not larger or one of them is NaN.
SRPPO_INLINE Vf larger(Vf a, Vf b) { return select(greater(a, b), a, b); }
SRPPO_INLINE Vf times_power_of_two(Vf x, Vf n) { return select(less(n, set(-126.0f)), set(0.0f), x * power_of_two(n)); }
SRPPO_INLINE float largest(Vf x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// Sums in float64, a fixed lane for each place.
struct Sum {
  double lanes[W] = {0, 0, 0, 0};
  __attribute__((always_inline)) void add(Vf x) {
    for (int i = 0; i < W; ++i) lanes[i] += static_cast<double>(x[i]);
  }
  __attribute__((always_inline)) void add_square(Vf x) {
    for (int i = 0; i < W; ++i) {
      const double d = static_cast<double>(x[i]);
      lanes[i] += d * d;
    }
  }
  __attribute__((always_inline)) double total() const { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }
};

// (x - centre) * scale + shift in float64.
SRPPO_INLINE Vf affine(Vf x, double centre, double scale, double shift) {
  Vf y = {0, 0, 0, 0};
  for (int i = 0; i < W; ++i) y[i] = static_cast<float>((static_cast<double>(x[i]) - centre) * scale + shift);
  return y;
}

SRPPO_INLINE void transpose(Vf (&x)[W]) {
  Vf y[W];
  for (int i = 0; i < W; ++i) y[i] = Vf{x[0][i], x[1][i], x[2][i], x[3][i]};
  for (int i = 0; i < W; ++i) x[i] = y[i];
}
