// Scratch of one thread: aligned to cache lines, so that no vector load crosses one, and not initialised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace srppo {

template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), kLine))) {}
  ~Scratch() { ::operator delete(data_, kLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

}  // namespace srppo
