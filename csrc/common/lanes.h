// Vector helpers that need only W. Included per level, see each_level.h.
SRPPO_INLINE int lanes_left(std::int64_t n) { return n < W ? static_cast<int>(n) : W; }
