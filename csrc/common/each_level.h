// Compiles the file named by SRPPO_KERNELS once per instruction level, each in a namespace of its own.
//
// A target attribute does not reach lambdas, templates or helpers that a function calls, and GCC splits 64-byte vectors of
// a function without AVX-512 before it inlines it. So everything a kernel uses (vectors, scalar maths, the kernel) is
// included anew inside a target region; none of these files has an include guard. What they need of the standard library
// is included here, outside of the regions.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_level.h"

#define SRPPO_INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace srppo::portable {
#include "simd_portable.h"
#include "lanes.h"
#include "scalar_math.h"
#include SRPPO_KERNELS
}  // namespace srppo::portable

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace srppo::avx2 {
#include "simd_avx2.h"
#include "lanes.h"
#include "scalar_math.h"
#include SRPPO_KERNELS
}  // namespace srppo::avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
namespace srppo::avx512 {
#include "simd_avx512.h"
#include "lanes.h"
#include "scalar_math.h"
#include SRPPO_KERNELS
}  // namespace srppo::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define SRPPO_AT_LEVEL(function)                                              \
  (::srppo::cpu_level() >= ::srppo::CpuLevel::avx512 ? &::srppo::avx512::function \
   : ::srppo::cpu_level() >= ::srppo::CpuLevel::avx2 ? &::srppo::avx2::function   \
                                                     : &::srppo::portable::function)
#else
#define SRPPO_AT_LEVEL(function) (&::srppo::portable::function)
#endif
