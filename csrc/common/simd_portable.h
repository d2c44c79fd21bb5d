// Vectors of 4 floats in the compiler's own vector type: SSE2, NEON or scalar code, whatever the target has.
// Included per level, see each_level.h.
constexpr int W = 4;
typedef float Vf __attribute__((vector_size(16)));
typedef std::int32_t Vi __attribute__((vector_size(16)));
struct Mask {
  Vi lanes;  // -1 or 0
};

SRPPO_INLINE Vf set(float x) { return Vf{x, x, x, x}; }
// A copy whose size is known is an instruction, any other a call: that is for the last vector of a row.
template <class Vector, class T>
SRPPO_INLINE Vector load_first(const T* p, int n) {
  if (n >= W) {
    Vector x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  Vector part = {0, 0, 0, 0};
  if (n > 0) std::memcpy(&part, p, sizeof(T) * static_cast<unsigned>(n));
  return part;
}
SRPPO_INLINE Vf load(const float* p, int n) { return load_first<Vf>(p, n); }
SRPPO_INLINE void store(float* p, Vf x, int n) {
  if (n >= W) std::memcpy(p, &x, sizeof x);
  else if (n > 0) std::memcpy(p, &x, sizeof(float) * static_cast<unsigned>(n));
}
SRPPO_INLINE Mask load_mask(const bool* p, int n) {
  // A byte may be any number but 0: see blocks.h.
  typedef signed char Bytes __attribute__((vector_size(4)));
  return {__builtin_convertvector(load_first<Bytes>(p, n), Vi) != 0};
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

// Four doubles in two vectors: one of 32 bytes GCC 16 fills by way of the stack where SSE2 or NEON is all there is.
typedef double Vd __attribute__((vector_size(16)));
struct Doubles {
  Vd low, high;
};
SRPPO_INLINE Doubles widen(Vf x) {
  typedef float Half __attribute__((vector_size(8)));
  return {__builtin_convertvector((Half{x[0], x[1]}), Vd), __builtin_convertvector((Half{x[2], x[3]}), Vd)};
}

// Sums in float64, a fixed lane for each place.
struct Sum {
  Doubles lanes = {{0, 0}, {0, 0}};
  __attribute__((always_inline)) void add(Vf x) {
    const Doubles d = widen(x);
    lanes = {lanes.low + d.low, lanes.high + d.high};
  }
  __attribute__((always_inline)) void add_square(Vf x) {
    const Doubles d = widen(x);
    lanes = {lanes.low + d.low * d.low, lanes.high + d.high * d.high};
  }
  __attribute__((always_inline)) double total() const {
    const Vd pairs = lanes.low + lanes.high;
    return pairs[0] + pairs[1];
  }
};

// (x - centre) * scale + shift in float64.
SRPPO_INLINE Vf affine(Vf x, double centre, double scale, double shift) {
  const Vd c = {centre, centre}, factor = {scale, scale}, by = {shift, shift};
  const Doubles d = widen(x);
  const Vd low = (d.low - c) * factor + by, high = (d.high - c) * factor + by;
  return Vf{static_cast<float>(low[0]), static_cast<float>(low[1]), static_cast<float>(high[0]), static_cast<float>(high[1])};
}

SRPPO_INLINE void transpose(Vf (&x)[W]) {
  Vf y[W];
  for (int i = 0; i < W; ++i) y[i] = Vf{x[0][i], x[1][i], x[2][i], x[3][i]};
  for (int i = 0; i < W; ++i) x[i] = y[i];
}
