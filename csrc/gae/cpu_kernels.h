// GAE and whitening kernels of one instruction level; included by each_level.h.
#include "step.h"

// Up to W rows ride in the lanes of a vector. Every lane starts at its own row's last valid token and walks left, so a row
// has the same bits alone, in a batch, padded and packed. Tiles of W steps are read row by row and transposed.
template <bool carry>
static void gae_group(const GaeArgs& args, std::int64_t first_row, int rows) {
  std::int64_t begin[W], end[W];  // the row's first token, one past its last valid one
  float through[W] = {}, decay[W] = {}, bootstrap[W] = {};
  std::int64_t longest = 0;
  for (int i = 0; i < rows; ++i) {
    const std::int64_t row = first_row + i;
    begin[i] = args.row_begin(row);
    const std::int64_t row_end = args.row_begin(row + 1);
    end[i] = end_of_valid(args.mask, begin[i], row_end);
    std::memset(args.advantages + end[i], 0, sizeof(float) * static_cast<std::size_t>(row_end - end[i]));
    std::memset(args.returns + end[i], 0, sizeof(float) * static_cast<std::size_t>(row_end - end[i]));
    longest = end[i] - begin[i] > longest ? end[i] - begin[i] : longest;
    const double gamma = args.gamma_rows ? static_cast<double>(args.gamma_rows[row]) : args.gamma;
    const double lam = args.lam_rows ? static_cast<double>(args.lam_rows[row]) : args.lam;
    through[i] = static_cast<float>(gamma * (1.0 - lam));
    decay[i] = static_cast<float>(gamma * lam);
    bootstrap[i] = args.bootstrap ? args.bootstrap[row] : 0.0f;
  }

  const GaeCoefficients coefficients{load(through, W), load(decay, W)};
  const Vf zero = set(0.0f), start = load(bootstrap, W);
  GaeState state{start, zero, start};
  for (std::int64_t done = 0; done < longest; done += W) {
    Vf reward[W], value[W], valid[W];
    bool gaps = false;  // any place of the tile without a valid token
    for (int i = 0; i < W; ++i) {
      reward[i] = value[i] = valid[i] = zero;
      const std::int64_t left = i < rows ? end[i] - begin[i] - done : 0;  // tokens of the row not yet walked
      if (left <= 0) {
        gaps = true;
        continue;
      }
      const std::int64_t at = end[i] - done - W;
      Mask mask;
      if (left >= W) {
        mask = load_mask(args.mask + at, W);
        reward[i] = select(mask, load(args.rewards + at, W), zero);
        value[i] = select(mask, load(args.values + at, W), zero);
      } else {  // the row's beginning: shift what is left to the tile's right end
        float r[W] = {}, v[W] = {};
        bool m[W] = {};
        const std::size_t n = static_cast<std::size_t>(left);
        std::memcpy(r + W - left, args.rewards + begin[i], sizeof(float) * n);
        std::memcpy(v + W - left, args.values + begin[i], sizeof(float) * n);
        std::memcpy(m + W - left, args.mask + begin[i], n);
        mask = load_mask(m, W);
        reward[i] = select(mask, load(r, W), zero);
        value[i] = select(mask, load(v, W), zero);
      }
      valid[i] = select(mask, set(1.0f), zero);
      gaps |= count(mask) != W;
    }
    transpose(reward);
    transpose(value);
    if (gaps) transpose(valid);  // else all ones, which is its own transpose
    for (int s = W - 1; s >= 0; --s) {
      const Mask mask = greater(valid[s], zero);
      state = gae_step<carry>(state, reward[s], value[s], mask, coefficients);
      reward[s] = select(mask, gae_advantage(state, value[s]), zero);  // the tile now holds the outputs
      value[s] = select(mask, gae_return(state), zero);
    }
    transpose(reward);
    transpose(value);
    for (int i = 0; i < rows; ++i) {
      const std::int64_t left = end[i] - begin[i] - done;
      if (left <= 0) continue;
      const std::int64_t at = end[i] - done - W;
      if (left >= W) {
        store(args.advantages + at, reward[i], W);
        store(args.returns + at, value[i], W);
      } else {
        float a[W], r[W];
        store(a, reward[i], W);
        store(r, value[i], W);
        std::memcpy(args.advantages + begin[i], a + W - left, sizeof(float) * static_cast<std::size_t>(left));
        std::memcpy(args.returns + begin[i], r + W - left, sizeof(float) * static_cast<std::size_t>(left));
      }
    }
  }
}

#include "cpu_adjoint.h"

static int gae_width() { return W; }

static void gae_groups(const GaeArgs& args, int rows_per_group, std::int64_t first_group, std::int64_t last_group) {
  for (std::int64_t group = first_group; group < last_group; ++group) {
    const std::int64_t row = group * rows_per_group;
    const int rows = static_cast<int>(args.rows - row < rows_per_group ? args.rows - row : rows_per_group);
    if (args.carry) gae_group<true>(args, row, rows);
    else gae_group<false>(args, row, rows);
  }
}

// Count, mean and squared deviations of a block, which is read twice, the second time out of L1.
static Moments whiten_block(const float* x, const bool* mask, std::int64_t n) {
  const Vf zero = set(0.0f);
  Sum sum, squares;
  std::int64_t valid = 0;
  for (std::int64_t t = 0; t < n; t += W) {
    const int left = lanes_left(n - t);
    const Mask m = load_mask(mask + t, left);
    sum.add(select(m, load(x + t, left), zero));
    valid += count(m);
  }
  if (valid == 0) return {0, 0, 0};
  // The mean in two floats: x minus the first is exact where x is near it, so a constant x deviates by 0.
  const double mean = sum.total() / static_cast<double>(valid);
  const float head = static_cast<float>(mean);
  const Vf vhead = set(head), vrest = set(static_cast<float>(mean - static_cast<double>(head)));
  for (std::int64_t t = 0; t < n; t += W) {
    const int left = lanes_left(n - t);
    squares.add_square(select(load_mask(mask + t, left), (load(x + t, left) - vhead) - vrest, zero));
  }
  return {static_cast<double>(valid), mean, squares.total()};
}

static void whiten_range(const float* x, const bool* mask, float* out, std::int64_t n, WhitenScale scale) {
  const Vf zero = set(0.0f);
  for (std::int64_t t = 0; t < n; t += W) {
    const int left = lanes_left(n - t);
    const Vf whitened = affine(load(x + t, left), scale.mean, scale.factor, scale.shift);
    store(out + t, select(load_mask(mask + t, left), whitened, zero), left);
  }
}
