// The conversions of half.h, without F16C: they run when an operator is created.
#include "common/half.h"

#include <cstring>

namespace lit_binq {

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  uint32_t word;
  if (exponent == 0) {
    // Zero or subnormal: mantissa * 2^-24, which is a normal float32 (or zero), so the product is exact.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&word, &magnitude, sizeof word);
    word |= sign;
  } else if (exponent == 31) {
    word = sign | 0x7f800000u | (mantissa << 13);
  } else {
    word = sign | ((exponent + (127 - 15)) << 23) | (mantissa << 13);
  }
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

int64_t first_non_finite(const uint16_t* scales, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if ((scales[i] & 0x7c00u) == 0x7c00u) return i;
  }
  return -1;
}

}  // namespace lit_binq
