// What a block of positions' weights is, by which a run takes the fewest instructions that will do.
#pragma once

#include <cstdint>
#include <cstring>

namespace vidfast::cpu {

// A weight that is -0 is a number like any other: it is computed with, and gives 0 as well.
enum class Content { kNothing, kFlags, kNumbers };  // all 0; each 0 or 1; any

namespace {

// The bits that any word of these bytes has.
template <int64_t Bytes>
inline uint64_t bits_of(const void* p) {
  static_assert(Bytes % 8 == 0, "whole words");
  uint64_t any = 0;
  for (int64_t i = 0; i < Bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, static_cast<const char*>(p) + i, 8);
    any |= word;
  }
  return any;
}

}  // namespace
}  // namespace vidfast::cpu
