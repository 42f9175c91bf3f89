// Powers of two and magnitudes of floats through their bits: how rows of activations are scaled. For files
// compiled without instruction sets of their own (see binary/kernels_avx2.cpp). Touches nothing.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace lit_binq
