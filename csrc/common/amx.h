// The tile registers of AMX, one function an instruction; register numbers are template arguments.
//
// Written as inline assembly and not with the compiler's intrinsics: GCC 12's _tile_loadd does not say that it reads
// memory and its _tile_loadconfig says so of 8 bytes of 64, so stores that pack an operand may be moved behind them.
// Nothing here needs a target option, and templates and lambdas can call it. Compilers know nothing of what is in a
// tile, and do not use one by themselves.
//
// A test exchanges all of it for an emulator with the same names: SRPPO_TILES names the header.
#pragma once

#include <cstdint>

namespace srppo::tiles {

constexpr int kRows = 16, kRowBytes = 64, kCount = 8;  // of palette 1, the only one there is

// LDTILECFG's operand.
struct alignas(64) Configuration {
  std::uint8_t palette = 0, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64);

// All eight registers whole. Remainders are padded in memory: another shape would be another configuration, and other
// instructions for a row that happens to be among the last.
constexpr Configuration whole_registers() {
  Configuration all;
  all.palette = 1;
  for (int i = 0; i < kCount; ++i) {
    all.row_bytes[i] = kRowBytes;
    all.rows[i] = kRows;
  }
  return all;
}
inline constexpr Configuration kWhole = whole_registers();

}  // namespace srppo::tiles

#if defined(SRPPO_TILES)
#include SRPPO_TILES
#elif defined(__x86_64__) && defined(__linux__) && defined(__has_include)
// GCC's and clang's headers of the intrinsics: a compiler that has one comes with an assembler that knows AMX.
#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define SRPPO_HAS_TILES 1

namespace srppo::tiles {

// Why this process may not use the registers; nullptr if it may. Asks for them: Linux hands them out on request only,
// to the whole process, and allocates a thread's at its first use.
inline const char* obstacle() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kBf16)) return "this CPU has no AMX with bf16";
  // Palette 1: bytes of all registers and of one, of a row, registers, rows.
  if (!__get_cpuid_count(0x1d, 1, &a, &b, &c, &d) || a != ((kCount * kRows * kRowBytes) | (kRows * kRowBytes) << 16) ||
      b != (kRowBytes | kCount << 16) || (c & 0xffff) != kRows) {
    return "this CPU's tile palette is not the one of 8 registers of 16 x 64 bytes";
  }
  unsigned enabled, high;
  asm volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
  constexpr unsigned kConfigAndData = 3u << 17;
  if ((enabled & kConfigAndData) != kConfigAndData) return "the operating system does not save tile registers (XCR0)";
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0) return "the kernel refuses tile registers to this process";
  return nullptr;
}

inline void configure(const Configuration& configuration) { asm volatile("ldtilecfg %0" : : "m"(configuration)); }
inline void release() { asm volatile("tilerelease"); }

// Rows `stride` bytes apart.
template <int kTile>
inline void load(const void* from, std::int64_t stride) {
  static_assert(kTile >= 0 && kTile < kCount);
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store(void* to, std::int64_t stride) {
  static_assert(kTile >= 0 && kTile < kCount);
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void zero() {
  static_assert(kTile >= 0 && kTile < kCount);
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// C += A B: rows of A hold pairs of bf16 along K, rows of B one pair of K for each column.
template <int kC, int kA, int kB>
inline void dot_bf16() {
  static_assert(kC != kA && kC != kB && kA != kB && kC < kCount && kA < kCount && kB < kCount);
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

}  // namespace srppo::tiles
#endif
#endif

#if !defined(SRPPO_TILES) && !defined(SRPPO_HAS_TILES)
namespace srppo::tiles {

// The same names without the registers. Nobody calls them: there is an obstacle.
inline const char* obstacle() { return "built without AMX: it takes Linux on x86-64, and GCC 11 or clang 11"; }
inline void configure(const Configuration&) {}
inline void release() {}
template <int>
inline void load(const void*, std::int64_t) {}
template <int>
inline void store(void*, std::int64_t) {}
template <int>
inline void zero() {}
template <int, int, int>
inline void dot_bf16() {}

}  // namespace srppo::tiles
#endif

namespace srppo::tiles {

// Whole registers for a block of code, on this thread. Released at its end, as other libraries configure them too; and
// never taken from before, for the same reason.
class InUse {
 public:
  InUse() { configure(kWhole); }
  ~InUse() { release(); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;
};

}  // namespace srppo::tiles
