// bfloat16 and IEEE half as bits, with the conversions that every processor can do.
#pragma once

#include <cstdint>
#include <cstring>

namespace vidfast::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace {  // per translation unit: each instruction set compiles its own copy

inline float float_of_bits(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t bits_of_float(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

inline bf16 to_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t u = bits_of_float(f);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(f != f ? (u >> 16) | 0x40u : rounded)};
}

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Subnormals by an exact product of normal floats, so that flush-to-zero modes do not touch them.
  if (rest < 0x400u) return float_of_bits(sign | bits_of_float(static_cast<float>(rest) * 0x1p-24f));
  return float_of_bits(sign | ((rest << 13) + (112u << 23)));
}

inline f16 to_f16(float f) {  // round to nearest even
  const uint32_t u = bits_of_float(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00u | ((a >> 13) & 0x3ffu);
  } else if (a >= 0x477ff000u) {  // 65520 and above round to infinity
    h = 0x7c00u;
  } else if (a >= 0x38800000u) {  // normal in half
    h = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  } else {  // subnormal in half: adding 0.5 lets the adder round at 2^-24
    h = bits_of_float(float_of_bits(a) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | h)};
}

}  // namespace
}  // namespace vidfast::cpu
