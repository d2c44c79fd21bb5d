#include "cpu_level.h"

#include <algorithm>
#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace srppo {
namespace {

#if defined(__x86_64__)
// Linux hands out the tile registers on request only (arch_prctl ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA); a CPU with
// AMX under a kernel or a sandbox that refuses is a CPU without.
bool amx_granted() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22);
#if defined(__linux__)
  return tile && bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

bool avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
#endif

CpuLevel detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // __builtin_cpu_supports also asks whether the operating system saves these registers.
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return CpuLevel::portable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return CpuLevel::avx2;
  if (!avx512_bf16()) return CpuLevel::avx512;
  return amx_granted() ? CpuLevel::amx : CpuLevel::avx512_bf16;
#else
  return CpuLevel::portable;
#endif
}

std::atomic<int>& current() {
  static std::atomic<int> level{static_cast<int>(detected_cpu_level())};
  return level;
}

}  // namespace

CpuLevel detected_cpu_level() {
  static const CpuLevel level = detect();
  return level;
}

CpuLevel cpu_level() { return static_cast<CpuLevel>(current().load(std::memory_order_relaxed)); }

CpuLevel set_cpu_level(CpuLevel level) {
  const int cut = std::min(static_cast<int>(level), static_cast<int>(detected_cpu_level()));
  current().store(cut, std::memory_order_relaxed);
  return static_cast<CpuLevel>(cut);
}

}  // namespace srppo
