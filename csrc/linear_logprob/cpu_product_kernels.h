// Packing of one instruction level for cpu_product.cpp; included by each_level.h.

// out[columns][16] = source[16][columns] transposed, 32-bit words whatever they are; rows `lds` and `ldo` words apart.
static void transpose_words(const float* source, std::int64_t lds, std::int64_t columns, float* out, std::int64_t ldo) {
  for (std::int64_t c = 0; c < columns; c += W) {
    const int here = lanes_left(columns - c);
    for (std::int64_t k = 0; k < 16; k += W) {
      Vf x[W];
      for (int i = 0; i < W; ++i) x[i] = load(source + (k + i) * lds + c, here);
      transpose(x);
      for (int i = 0; i < here; ++i) store(out + (c + i) * ldo + k, x[i], W);
    }
  }
}

// out[rows][columns] = source, in bf16.
static void round_rows(const float* source, std::int64_t lds, std::int64_t rows, std::int64_t columns,
                       std::uint16_t* out, std::int64_t ldo) {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; c += W) {
      const int here = lanes_left(columns - c);
      store_bf16(out + r * ldo + c, load(source + r * lds + c, here), here);
    }
  }
}
