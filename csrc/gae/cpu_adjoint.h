// GAE's gradient at one instruction level; included by cpu_kernels.h, after step.h.
//
// The adjoint of the recursion is the same recursion from left to right (see srppo_kernels/gae/reference.py). With g the sum
// of the gradients of advantage and return, G_t = g_t + gamma lambda G', and
//
//     dreward_t = G_t      dvalue_t = gamma (1 - lambda) G' - dA_t      dbootstrap = gamma G at the last valid token
//
// so it is gae_step with g for the reward and no values. Up to W rows ride in the lanes, each from its first valid token.
template <bool carry>
static void gae_adjoint_group(const GaeAdjointArgs& args, std::int64_t first_row, int rows) {
  std::int64_t begin[W], end[W];  // the row's first valid token, one past its last
  float through[W] = {}, decay[W] = {}, gamma[W] = {};
  std::int64_t longest = 0;
  for (int i = 0; i < rows; ++i) {
    const std::int64_t row = first_row + i, row_begin = args.row_begin(row), row_end = args.row_begin(row + 1);
    begin[i] = begin_of_valid(args.mask, row_begin, row_end);
    end[i] = end_of_valid(args.mask, begin[i], row_end);
    for (float* out : {args.d_rewards, args.d_values}) {
      std::fill(out + row_begin, out + begin[i], 0.0f);
      std::fill(out + end[i], out + row_end, 0.0f);
    }
    longest = end[i] - begin[i] > longest ? end[i] - begin[i] : longest;
    const double g = args.gamma_rows ? static_cast<double>(args.gamma_rows[row]) : args.gamma;
    const double lam = args.lam_rows ? static_cast<double>(args.lam_rows[row]) : args.lam;
    gamma[i] = static_cast<float>(g);
    through[i] = static_cast<float>(g * (1.0 - lam));
    decay[i] = static_cast<float>(g * lam);
  }

  const Vf zero = set(0.0f), vthrough = load(through, W);
  const GaeCoefficients coefficients{zero, load(decay, W)};
  GaeState state{zero, zero, zero};
  Vf last = zero;
  for (std::int64_t done = 0; done < longest; done += W) {
    Vf d_advantage[W], d_return[W], valid[W];
    for (int i = 0; i < W; ++i) {
      d_advantage[i] = d_return[i] = valid[i] = zero;
      const std::int64_t left = i < rows ? end[i] - begin[i] - done : 0;
      if (left <= 0) continue;
      const std::int64_t at = begin[i] + done;
      const int lanes = lanes_left(left);
      const Mask mask = load_mask(args.mask + at, lanes);
      d_advantage[i] = select(mask, load(args.d_advantages + at, lanes), zero);
      d_return[i] = select(mask, load(args.d_returns + at, lanes), zero);
      valid[i] = select(mask, set(1.0f), zero);
    }
    transpose(d_advantage);
    transpose(d_return);
    transpose(valid);
    for (int s = 0; s < W; ++s) {
      const Mask mask = greater(valid[s], zero);
      const Vf before = gae_return(state), of_advantage = d_advantage[s];
      state = gae_step<carry>(state, of_advantage + d_return[s], zero, mask, coefficients);
      const Vf now = gae_return(state);
      last = select(mask, now, last);
      d_advantage[s] = select(mask, now, zero);  // the tile now holds dreward and dvalue
      d_return[s] = select(mask, fma(vthrough, before, -of_advantage), zero);
    }
    transpose(d_advantage);
    transpose(d_return);
    for (int i = 0; i < rows; ++i) {
      const std::int64_t left = end[i] - begin[i] - done;
      if (left <= 0) continue;
      store(args.d_rewards + begin[i] + done, d_advantage[i], lanes_left(left));
      store(args.d_values + begin[i] + done, d_return[i], lanes_left(left));
    }
  }
  float bootstrap[W];
  store(bootstrap, load(gamma, W) * last, W);
  std::copy(bootstrap, bootstrap + rows, args.d_bootstrap + first_row);
}

static void gae_adjoint_groups(const GaeAdjointArgs& args, int rows_per_group, std::int64_t first, std::int64_t last) {
  for (std::int64_t group = first; group < last; ++group) {
    const std::int64_t row = group * rows_per_group;
    const int rows = static_cast<int>(args.rows - row < rows_per_group ? args.rows - row : rows_per_group);
    if (args.carry) gae_adjoint_group<true>(args, row, rows);
    else gae_adjoint_group<false>(args, row, rows);
  }
}
