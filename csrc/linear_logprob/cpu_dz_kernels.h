// dL/dz of one row and vocabulary group, of one instruction level; included by each_level.h.
//
// Plain loops over a block of numbers, which the compiler vectorises: they need integer operations (bf16, exponents) that
// the vector vocabulary does not have.

// log x of a normal x > 0 to 2e-7 and the rounding of the result: x = 2^k m with m in [sqrt(1/2), sqrt(2)),
// log m = 2 artanh((m - 1) / (m + 1)). Of 0 and of what is not normal it is about -88, which p = 0 may be multiplied by.
SRPPO_INLINE float log_of(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::int32_t k = (bits - 0x3f3504f3) >> 23;
  bits -= k * (1 << 23);
  float m;
  std::memcpy(&m, &bits, 4);
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  const float series = 1.0f + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9))));
  return static_cast<float>(k) * 0.693147181f + 2.0f * s * series;
}

// Reads `n` <= kDzBlock kept exponentials and writes dz; where both have one dtype `kept` may be `out`. The target's entry
// is not treated apart.
static void dz_block(const DzRow& row, const void* kept, bool from_bf16, std::int64_t n, void* out, bool to_bf16) {
  alignas(64) float p[kDzBlock], factor[kDzBlock];
  if (from_bf16) {
    const std::uint16_t* source = static_cast<const std::uint16_t*>(kept);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(source[i]) << 16;
      std::memcpy(p + i, &bits, 4);
    }
  } else {
    std::memcpy(p, kept, sizeof(float) * static_cast<std::size_t>(n));
  }
  if (row.has_h || row.softcap != 0.0f) {
    // Loops of one step each: the compiler vectorises none that has both the log and comparisons, and that took 5 times
    // as long.
    for (std::int64_t i = 0; i < n; ++i) factor[i] = log_of(p[i]) + row.shift;
    // A ruled-out entry (bias -inf): p is 0, and h * log p must not overflow to make 0 * inf.
    for (std::int64_t i = 0; i < n; ++i) factor[i] = factor[i] < -1e4f ? -1e4f : factor[i];
    const float to_cap = row.softcap != 0.0f ? row.temperature / row.softcap : 0.0f;
    for (std::int64_t i = 0; i < n; ++i) {
      const float u = (factor[i] + row.lse) * to_cap;
      const float slope = 1.0f - u * u;
      factor[i] = (row.b - row.h * factor[i]) * (slope < 0.0f ? 0.0f : slope);
    }
    for (std::int64_t i = 0; i < n; ++i) p[i] = p[i] * row.scale * factor[i];
  } else {
    // In this order: b is tiny where a loss divides by many tokens, and scale where the group is unlikely.
    for (std::int64_t i = 0; i < n; ++i) p[i] = p[i] * row.scale * row.b;
  }
  if (to_bf16) {
    std::uint16_t* to = static_cast<std::uint16_t*>(out);
    for (std::int64_t i = 0; i < n; i += W) store_bf16(to + i, load(p + i, lanes_left(n - i)), lanes_left(n - i));
  } else {
    std::memcpy(out, p, sizeof(float) * static_cast<std::size_t>(n));
  }
}
