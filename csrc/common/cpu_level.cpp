#include "cpu_level.h"

#include <algorithm>
#include <atomic>

#include "../linear_logprob/amx_check.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace srppo {
namespace {

#if defined(__x86_64__)
bool avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
#endif

struct Detected {
  CpuLevel level;
  const char* amx;  // why not; nullptr at level amx
};

Detected detect() {
#if defined(__x86_64__)
  constexpr const char* kBelow = "the code around the tiles takes AVX-512 BF16, which this CPU has not";
  __builtin_cpu_init();
  // __builtin_cpu_supports also asks whether the operating system saves these registers.
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return {CpuLevel::portable, kBelow};
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return {CpuLevel::avx2, kBelow};
  if (!avx512_bf16()) return {CpuLevel::avx512, kBelow};
  const char* obstacle = tiles::obstacle();
  if (!obstacle) obstacle = tile_fault();
  return {obstacle ? CpuLevel::avx512_bf16 : CpuLevel::amx, obstacle};
#else
  return {CpuLevel::portable, "not an x86-64 CPU"};
#endif
}

// Once, by whichever thread comes first; the others wait.
const Detected& detected() {
  static const Detected found = detect();
  return found;
}

std::atomic<int>& current() {
  static std::atomic<int> level{static_cast<int>(detected_cpu_level())};
  return level;
}

}  // namespace

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

CpuLevel detected_cpu_level() { return detected().level; }

const char* amx_obstacle() { return detected().amx; }

CpuLevel cpu_level() { return static_cast<CpuLevel>(current().load(std::memory_order_relaxed)); }

CpuLevel set_cpu_level(CpuLevel level) {
  const int cut = std::min(static_cast<int>(level), static_cast<int>(detected_cpu_level()));
  current().store(cut, std::memory_order_relaxed);
  return static_cast<CpuLevel>(cut);
}

}  // namespace srppo
