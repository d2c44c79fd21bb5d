// The vector vocabulary of simd_*.h for one float: with it the maths headers compile as CUDA device code, and as plain
// host code for the tests (tests/gae/test_scan.py), so that what only the GPU runs is tested without one.
#pragma once

#include <math.h>
#include <string.h>

#if defined(__CUDACC__)
#define SRPPO_INLINE static __device__ __forceinline__
#else
#define SRPPO_INLINE static inline
#endif

namespace srppo::scalar {

using Vf = float;
using Mask = bool;

SRPPO_INLINE Vf set(float x) { return x; }
SRPPO_INLINE Vf fma(Vf a, Vf b, Vf c) { return fmaf(a, b, c); }
SRPPO_INLINE Mask greater(Vf a, Vf b) { return a > b; }
SRPPO_INLINE Mask less(Vf a, Vf b) { return a < b; }
SRPPO_INLINE Mask equal(Vf a, Vf b) { return a == b; }
SRPPO_INLINE Mask both(Mask a, Mask b) { return a && b; }
SRPPO_INLINE Mask either(Mask a, Mask b) { return a || b; }
SRPPO_INLINE Mask but_not(Mask a, Mask b) { return a && !b; }
SRPPO_INLINE Vf select(Mask m, Vf a, Vf b) { return m ? a : b; }
SRPPO_INLINE Vf nearest(Vf x) { return rintf(x); }
SRPPO_INLINE Vf power_of_two(Vf n) {
  const int bits = (static_cast<int>(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof(power));
  return power;
}

#include "scalar_math.h"

}  // namespace srppo::scalar
