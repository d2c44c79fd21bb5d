// A tile of z = x y^T in fp32 of one instruction level, W lanes wide; included by way of each_level.h.
//
// A panel of 2 W columns is packed as [K][2 W] and multiplied with a block of rows, packed as [K][rows] a tile at a
// time. A sum is an accumulator that runs over kDepth steps of K, added up block by block in order: its bits depend on
// neither the tile's height nor the row's place in it, and blocks keep the error of a long sum down.

constexpr int kPanel = 2 * W;            // vocabulary entries a panel
constexpr int kTile = W >= 16 ? 14 : 6;  // rows a tile: 2 kTile accumulators and two vectors fill the registers

static int panel_width() { return kPanel; }

static int tile_height(std::int64_t rows) { return tile_rows(rows, kTile); }

// z[rows][2 W], written or (a later block of K) added to. x is [steps][rows], panel [steps][2 W].
SRPPO_INLINE void tile(const int rows, const float* x, const float* panel, std::int64_t steps, float* z,
                       std::int64_t ldz, bool add, const char*& line, std::int64_t& left, const Ahead& lines) {
  Vf low[kTile], high[kTile];
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) low[i] = high[i] = set(0.0f);
  for (std::int64_t k = 0; k < steps;) {
    if (left-- > 0) {
      __builtin_prefetch(line, 0, 2);  // a step of a panel, which with AVX-512 is two of them
      if (W >= 16) __builtin_prefetch(line + 64, 0, 2);
      line += lines.step;
    }
    for (const std::int64_t to = steps - k < lines.every ? steps : k + lines.every; k < to; ++k) {
      const Vf a = load(panel + k * kPanel, W), b = load(panel + k * kPanel + W, W);
#pragma GCC unroll 14
      for (int i = 0; i < rows; ++i) {
        const Vf value = set(x[k * rows + i]);
        low[i] = fma(value, a, low[i]);
        high[i] = fma(value, b, high[i]);
      }
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < rows; ++i) {
    float* out = z + i * ldz;
    if (add) {
      low[i] = load(out, W) + low[i];
      high[i] = load(out + W, W) + high[i];
    }
    store(out, low[i], W);
    store(out + W, high[i], W);
  }
}

// z[rows][2 W] of `steps` steps, for a height that tile_height gives; added to what is there if `add`.
static void multiply_or_add(int rows, const float* x, const float* panel, std::int64_t steps, float* z,
                            std::int64_t ldz, bool add, const Ahead& lines) {
  const char* line = lines.at;
  std::int64_t k = 0, left = lines.count;
  do {
    const std::int64_t depth = steps - k < kDepth ? steps - k : kDepth;
    const float *a = x + k * rows, *b = panel + k * kPanel;
    const bool sum = add || k > 0;
#define SRPPO_TILE_OF(height) \
  case height:                \
    if (height <= kTile) tile(height, a, b, depth, z, ldz, sum, line, left, lines); \
    break
    switch (rows) {
      SRPPO_TILE_OF(1);
      SRPPO_TILE_OF(2);
      SRPPO_TILE_OF(3);
      SRPPO_TILE_OF(4);
      SRPPO_TILE_OF(5);
      SRPPO_TILE_OF(6);
      SRPPO_TILE_OF(7);
      SRPPO_TILE_OF(8);
      SRPPO_TILE_OF(9);
      SRPPO_TILE_OF(10);
      SRPPO_TILE_OF(11);
      SRPPO_TILE_OF(12);
      SRPPO_TILE_OF(13);
      SRPPO_TILE_OF(14);
    }
#undef SRPPO_TILE_OF
    k += depth;
  } while (k < steps);
}
