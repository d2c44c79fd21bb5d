// Packing for out (+)= A B in fp32, of one instruction level; included by each_level.h.

#include "fp32_tile.h"

// Rows [r0, r0 + count) and steps [k0, k0 + steps) of A [M, K], as tiles of [steps][height].
static void pack_rows(const float* a, std::int64_t stride, std::int64_t count, std::int64_t steps, float* out) {
  for (std::int64_t r = 0; r < count;) {
    const int height = tile_height(count - r);
    const float* from = a + r * stride;
    std::int64_t k = 0;
    // Whole vectors of K are transposed in registers, where a tile is no higher than a vector is wide.
    for (; height <= W && k + W <= steps; k += W) {
      Vf x[W];
      for (int i = 0; i < W; ++i) x[i] = i < height ? load(from + i * stride + k, W) : set(0.0f);
      transpose(x);
      for (int i = 0; i < W; ++i) store(out + (k + i) * height, x[i], height);
    }
    for (; k < steps; ++k) {
      for (int i = 0; i < height; ++i) out[k * height + i] = from[i * stride + k];
    }
    out += steps * height;
    r += height;
  }
}

// The same of A [K, M]: every row of A goes to its place in all tiles, so that memory is read along.
static void pack_columns(const float* a, std::int64_t stride, std::int64_t count, std::int64_t steps, float* out) {
  for (std::int64_t k = 0; k < steps; ++k) {
    const float* from = a + k * stride;
    for (std::int64_t r = 0; r < count;) {
      const int height = tile_height(count - r);
      float* to = out + r * steps + k * height;
      if (height <= W) {
        store(to, load(from + r, height), height);
      } else {
        for (int i = 0; i < height; ++i) to[i] = from[r + i];
      }
      r += height;
    }
  }
}

// Steps of up to a panel's columns of B [K, N] as [steps][2 W], zeros beyond `width`.
static void pack_panel_rows(const float* b, std::int64_t stride, std::int64_t width, std::int64_t steps, float* out) {
  const int low = lanes_left(width), high = lanes_left(width - W);
  for (std::int64_t k = 0; k < steps; ++k) {
    store(out + k * kPanel, load(b + k * stride, low), W);
    store(out + k * kPanel + W, load(b + k * stride + W, high), W);
  }
}

// z[rows][columns] += or = sum[rows][2 W], where a panel is wider than what is left of the result.
static void write_edge(const float* sum, int rows, std::int64_t columns, bool add, float* z, std::int64_t ldz) {
  for (int i = 0; i < rows; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const float value = sum[i * kPanel + j];
      z[i * ldz + j] = add ? z[i * ldz + j] + value : value;
    }
  }
}
