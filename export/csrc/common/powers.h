// How every family scales its rows of activations and writes those that are not finite: powers of two and magnitudes of
// floats through their bits. For files compiled for the baseline of the processor (sets/avx2.cpp says why).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

namespace lit_binq {

constexpr int32_t kInfinity = 0x7f800000;  // bits; NaN is above

// 2^exponent, -126 to 127.
inline float power_of_two(int exponent) {
  const uint32_t word = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Bits of the largest magnitude. As integers they are ordered rightly, infinities and NaN on top.
inline int32_t largest_magnitude(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    int32_t word;
    std::memcpy(&word, x + k, sizeof word);
    word &= 0x7fffffff;
    largest = word > largest ? word : largest;
  }
  return largest;
}

// Exponent of the power of two that a row is divided by, of the bits of its largest magnitude: it lands in [1, 2), or in
// [2^-23, 1) where it is subnormal, so neither huge nor tiny activations leave the range of float32 on the way.
inline int row_exponent(int32_t largest) { return largest == 0 ? 0 : std::clamp((largest >> 23) - 127, -126, 126); }

// Results of a row that holds an infinity or a NaN.
inline void write_nan(float* y, int64_t count) { std::fill_n(y, count, std::numeric_limits<float>::quiet_NaN()); }

}  // namespace lit_binq
