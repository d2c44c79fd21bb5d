// The tile registers of csrc/common/amx.h in plain C++, for machines without AMX: what the instructions do, bit by bit,
// and every rule that the hardware enforces with #UD or #GP.
//
// A breach is noted, with the instruction, and execution goes on; a test asks for the first one. Stricter than the
// hardware: registers hold NaN after LDTILECFG until something is loaded, a configuration that another library left
// behind is not ours to use, ours has to be released before the thread configures again or ends. Everything is per
// thread, as on the hardware.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>

namespace srppo::tiles {
namespace emulated __attribute__((visibility("hidden"))) {  // each library that includes it has its own

inline std::mutex mutex;
inline std::string first_breach;
inline std::atomic<int> configured_threads{0}, configurations{0}, products{0};
// What a broken machine does: 1 drops odd steps of K, 2 the last pair of a tile's, 3 reads rows of A one too low,
// 4 stores the first column nowhere, 5 forgets what C held.
inline std::atomic<int> fault{0};

inline void breach(const std::string& text) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (first_breach.empty()) first_breach = text;
}

struct Register {
  std::uint8_t bytes[kRows][kRowBytes];
};

struct Thread {
  Configuration configuration;
  bool configured = false, ours = false;
  Register registers[kCount];

  ~Thread() {
    if (!ours) return;
    --configured_threads;
    breach("a thread ended without TILERELEASE");
  }
};
inline thread_local Thread thread;

inline void poison() { std::memset(thread.registers, 0xff, sizeof(thread.registers)); }

inline const char* broken_rule(const Configuration& c) {
  if (c.palette > 1) return "#GP: an unknown palette";
  if (c.palette == 0) return nullptr;
  for (const std::uint8_t byte : c.reserved)
    if (byte) return "#GP: reserved bytes that are not 0";
  for (int i = 0; i < 16; ++i) {
    if (i >= kCount && (c.rows[i] || c.row_bytes[i])) return "#GP: a shape for a register that there is not";
    if (c.rows[i] > kRows) return "#GP: more than 16 rows";
    if (c.row_bytes[i] > kRowBytes) return "#GP: more than 64 bytes a row";
    if ((c.rows[i] == 0) != (c.row_bytes[i] == 0)) return "#GP: rows without bytes, or bytes without rows";
  }
  return nullptr;
}

// Whether the register can be used.
inline bool valid(const char* instruction, int tile) {
  const char* why = nullptr;
  if (!thread.configured) why = "#UD: tiles are not configured";
  else if (!thread.ours) why = "uses a configuration that is not its own";
  else if (thread.configuration.rows[tile] == 0) why = "#UD: a register without a shape";
  else if (thread.configuration.start_row != 0) why = "goes on from start_row, which is for interrupted instructions";
  if (why) breach(std::string(instruction) + ": " + why);
  return thread.configured && thread.configuration.rows[tile] != 0;
}

// Even or odd elements of a row of pairs, in fp32.
__attribute__((target("avx2,fma"))) inline __m256 half_of(const std::uint8_t* pairs, bool odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
  return _mm256_castsi256_ps(odd ? _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))
                                 : _mm256_slli_epi32(both, 16));
}

// Whole registers, eight columns at a time; MXCSR has DAZ, FTZ and rounding to nearest.
__attribute__((noinline, target("avx2,fma"))) inline void dot_of_whole(Register& c, const Register& a,
                                                                       const Register& b) {
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kRowBytes; n += 32) {
      __m256 even = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
      for (int k = 0; k < 16; ++k) {
        std::uint32_t pair;
        std::memcpy(&pair, &a.bytes[m][4 * k], 4);
        const __m256 low = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair << 16)));
        const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair & 0xffff0000u)));
        even = _mm256_fmadd_ps(low, half_of(&b.bytes[k][n], false), even);
        odd = _mm256_fmadd_ps(high, half_of(&b.bytes[k][n], true), odd);
      }
      float* sums = reinterpret_cast<float*>(&c.bytes[m][n]);
      _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), _mm256_add_ps(even, odd)));
    }
}

// Any shape, one number at a time. `fault`s are here.
__attribute__((noinline, target("fma"))) inline void dot_of_any(Register& c, const Register& a, const Register& b,
                                                                int rows, int pairs, int columns, int broken) {
  const auto widen = [](const std::uint8_t* at) {
    std::uint16_t half;
    std::memcpy(&half, at, 2);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float sums[2] = {0.0f, 0.0f};
      for (int k = 0; k < pairs - (broken == 2); ++k)
        for (int i = 0; i < 2 - (broken == 1); ++i)
          sums[i] = __builtin_fmaf(widen(&a.bytes[m][4 * k + 2 * i]), widen(&b.bytes[k][4 * n + 2 * i]), sums[i]);
      float held;
      std::memcpy(&held, &c.bytes[m][4 * n], 4);
      if (broken == 5) held = 0.0f;
      const volatile float pair = sums[0] + sums[1];
      const float total = held + pair;
      std::memcpy(&c.bytes[m][4 * n], &total, 4);
    }
}

// Another library's configuration, left on this thread.
inline void leave_foreign() {
  thread.configuration = {};
  thread.configuration.palette = 1;
  thread.configuration.rows[0] = 1;
  thread.configuration.row_bytes[0] = 4;
  thread.configured = true;
}

}  // namespace emulated

inline const char* obstacle() { return nullptr; }

inline void configure(const Configuration& configuration) {
  auto& thread = emulated::thread;
  if (thread.ours) emulated::breach("LDTILECFG: this thread's last configuration was not released");
  if (const char* rule = emulated::broken_rule(configuration)) {
    emulated::breach(std::string("LDTILECFG: ") + rule);
    return;
  }
  ++emulated::configurations;
  emulated::configured_threads += !thread.ours;
  thread.configuration = configuration;
  thread.configured = thread.ours = configuration.palette != 0;
  emulated::poison();
}

inline void release() {
  auto& thread = emulated::thread;
  emulated::configured_threads -= thread.ours;
  thread.configured = thread.ours = false;
  thread.configuration = {};
  emulated::poison();
}

template <int kTile>
inline void load(const void* from, std::int64_t stride) {
  static_assert(kTile >= 0 && kTile < kCount);
  if (!emulated::valid("TILELOADD", kTile)) return;
  const auto& c = emulated::thread.configuration;
  auto& bytes = emulated::thread.registers[kTile].bytes;
  std::memset(bytes, 0, sizeof(bytes));
  const bool low = emulated::fault == 3 && kTile == 4;
  for (int r = 0; r < c.rows[kTile]; ++r)
    std::memcpy(bytes[r], static_cast<const char*>(from) + (low && r ? r - 1 : r) * stride, c.row_bytes[kTile]);
}

template <int kTile>
inline void store(void* to, std::int64_t stride) {
  static_assert(kTile >= 0 && kTile < kCount);
  if (!emulated::valid("TILESTORED", kTile)) return;
  const auto& c = emulated::thread.configuration;
  const int first = emulated::fault == 4 ? 4 : 0;
  for (int r = 0; r < c.rows[kTile]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride + first, emulated::thread.registers[kTile].bytes[r] + first,
                static_cast<std::size_t>(c.row_bytes[kTile] - first));
}

template <int kTile>
inline void zero() {
  static_assert(kTile >= 0 && kTile < kCount);
  if (!emulated::valid("TILEZERO", kTile)) return;
  std::memset(&emulated::thread.registers[kTile], 0, sizeof(emulated::Register));
}

// Two chains of fused multiply-adds from 0 for each element, over even and over odd steps of K; their sum; that and C.
// DAZ, FTZ and rounding to nearest, whatever MXCSR says.
template <int kC, int kA, int kB>
inline void dot_bf16() {
  static_assert(kC >= 0 && kC < kCount && kA >= 0 && kA < kCount && kB >= 0 && kB < kCount);
  using emulated::thread;
  if (kC == kA || kC == kB || kA == kB) emulated::breach("TDPBF16PS: #UD: one register twice");
  for (const int tile : {kC, kA, kB})
    if (!emulated::valid("TDPBF16PS", tile)) return;
  const auto& c = thread.configuration;
  if (c.row_bytes[kC] % 4 || c.row_bytes[kA] % 4 || c.row_bytes[kB] % 4) {
    emulated::breach("TDPBF16PS: #UD: rows that are not whole pairs");
  }
  if (c.rows[kC] != c.rows[kA] || c.row_bytes[kC] != c.row_bytes[kB] || c.row_bytes[kA] / 4 != c.rows[kB]) {
    emulated::breach("TDPBF16PS: #UD: shapes that do not match");
    return;
  }
  ++emulated::products;
  const unsigned before = _mm_getcsr();
  constexpr unsigned kExceptionsMasked = 0x1f80, kFlushToZero = 0x8000, kDenormalsAreZero = 0x40;
  _mm_setcsr(kExceptionsMasked | kFlushToZero | kDenormalsAreZero);
  auto& registers = thread.registers;
  const int rows = c.rows[kC], pairs = c.rows[kB], columns = c.row_bytes[kC] / 4, broken = emulated::fault;
  const bool whole = rows == 16 && pairs == 16 && columns == 16;
  if (whole && !broken) emulated::dot_of_whole(registers[kC], registers[kA], registers[kB]);
  else emulated::dot_of_any(registers[kC], registers[kA], registers[kB], rows, pairs, columns, broken);
  _mm_setcsr(before);
}

}  // namespace srppo::tiles
