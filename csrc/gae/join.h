// Count, mean and squared deviations of some numbers, and those of two sets together: Chan's merge, in float64.
#pragma once

#include "../common/either.h"

namespace srppo {

struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;
};

// A part without numbers changes nothing.
SRPPO_EITHER Moments join(Moments all, Moments part) {
  const double both = all.count + part.count > 0.0 ? all.count + part.count : 1.0;
  const double shift = part.count > 0.0 ? part.mean - all.mean : 0.0;
  return {all.count + part.count, all.mean + shift * (part.count / both),
          all.squares + (part.squares + shift * shift * (all.count * part.count / both))};
}

}  // namespace srppo
