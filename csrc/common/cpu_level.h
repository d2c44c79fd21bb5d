// Which instructions the CPU kernels may use. Decided at run time, so that one binary runs on every machine.
#pragma once

namespace srppo {

// A ladder: each level includes the ones below it. Kernels without code for a level use the next lower one.
enum class CpuLevel : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

constexpr const char* kCpuLevelNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

// The highest level that this CPU and operating system offer: amx only after its tiles have multiplied correctly here.
CpuLevel detected_cpu_level();

// One line that says why level amx is not there; nullptr if it is.
const char* amx_obstacle();

// The level in use: the detected one, or a lower one that a test has set.
CpuLevel cpu_level();

// Caps the level; a level above the detected one is cut to it. Returns the level now in use.
CpuLevel set_cpu_level(CpuLevel level);

// Whether AMD made this CPU.
bool is_amd();

}  // namespace srppo
