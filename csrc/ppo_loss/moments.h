// Variances from float64 sums, once for the CPU and the CUDA kernels.
#pragma once

#include "../common/either.h"

namespace srppo {

// Numbers that do not vary leave what their sums rounded, 1e-16 to 1e-14 of their square: that is 0, and a NaN stays one.
SRPPO_EITHER double variance(double sum, double squares, double count) {
  const double mean = sum / count, square = squares / count, result = square - mean * mean;
  return result < 1e-13 * square ? 0.0 : result;
}

// Of returns that do not vary nothing is explained.
SRPPO_EITHER double explained_variance(double of_targets, double of_errors) {
  return of_targets > 0.0 ? 1.0 - of_errors / of_targets : 0.0;
}

}  // namespace srppo
