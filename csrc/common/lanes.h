// Vector helpers that need only W. Included per level, see each_level.h.
SRPPO_INLINE int lanes_left(std::int64_t n) { return n < W ? static_cast<int>(n > 0 ? n : 0) : W; }

// Rounds to nearest even, as torch does; the first n lanes. A NaN stays one.
typedef std::uint32_t VBits __attribute__((vector_size(4 * W)));
typedef std::uint16_t VBf16 __attribute__((vector_size(2 * W)));
SRPPO_INLINE void store_bf16(std::uint16_t* p, Vf x, int n) {
  const VBits bits = (VBits)x, rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, nan = rounded * 0u + 0x7fc0u;
  const VBf16 halves = __builtin_convertvector(x == x ? rounded : nan, VBf16);
  if (n >= W) std::memcpy(p, &halves, sizeof(halves));
  else std::memcpy(p, &halves, 2 * static_cast<unsigned>(n > 0 ? n : 0));
}
