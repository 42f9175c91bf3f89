// silu(g) * u, the gate of an MLP, in plain C++ that a compiler vectorizes. Every kernels_*.cpp compiles it for its own
// instruction set: the same float operations in the same order, so that results are equal bit for bit.
// Touches nothing; nothing of the standard library may be instantiated here (binary/kernels_avx2.cpp says why).
//
// Legend: silu(g) = g / (1 + e^t), t = -g; e^t = 2^n e^r, n = round(t / ln 2), |r| <= ln 2 / 2.
#pragma once

#include <cstdint>

namespace lit_binq {

// Relative error below 4e-7, but -0 from g = -88 on, where silu is above -6e-37. Infinities and NaN give what the
// formula gives: silu(-inf) is NaN. Static: see binary/kernel.h, block_bytes.
static inline float silu(float g) {
  constexpr float kMost = 88.0f;             // e^88 is a float, its reciprocal a normal one
  constexpr float kLeast = -87.0f;           // 1 + e^-87 = 1; 2^round(-87 / ln 2) is a normal float
  constexpr float kRound = 0x1.8p23f;        // t + kRound has no bits behind the point, and n in its lowest bits
  constexpr float kLn2High = 0x1.63p-1f;     // 9 bits: its product with |n| < 128 is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  const float t = -g;
  const float inside = t < kLeast ? kLeast : (t > kMost ? kMost : t);
  const float shifted = inside * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (inside - n * kLn2High) - n * kLn2Low;
  // Taylor to the seventh power: the next term is below r^8 / 8! = 6e-9.
  float e = 1.0f / 5040.0f;
  e = e * r + 1.0f / 720.0f;
  e = e * r + 1.0f / 120.0f;
  e = e * r + 1.0f / 24.0f;
  e = e * r + 1.0f / 6.0f;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  uint32_t word;
  __builtin_memcpy(&word, &shifted, sizeof word);
  word = (word << 23) + (127u << 23);
  float power;
  __builtin_memcpy(&power, &word, sizeof power);
  const float exponential = t > kMost ? __builtin_inff() : e * power;
  return g / (1.0f + exponential);
}

// gate_i = silu(gate_i) * up_i; the two do not overlap.
static inline void apply_gate(float* __restrict gate, const float* __restrict up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gate[i] = silu(gate[i]) * up[i];
}

}  // namespace lit_binq
