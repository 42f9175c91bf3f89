// e^x as floats or vectors of them compute it: once for the gate of an MLP (silu.h) and for the softmax of attention.
// Nothing of the standard library may be instantiated here (sets/avx2.cpp says why).
//
// Legend: e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2.
#pragma once

#include <cstdint>

namespace lit_binq {

constexpr float kLeastExponent = -87.0f;  // 2^round(-87 / ln 2) is a normal float
constexpr float kMostExponent = 88.0f;    // e^88 is a float, its reciprocal a normal one

// For x within the limits above: returns e^r and sets `power` to 2^n. Words are uint32_t as Floats are float;
// fused(a, b, c) is a * b + c, rounded once or twice. Static: see binary/kernel.h, block_bytes.
template <typename Words, typename Floats, typename Fused>
static inline __attribute__((always_inline)) Floats exp_parts(Floats x, Fused fused, Floats* power) {
  constexpr float kRound = 0x1.8p23f;           // v + kRound has no bits behind the point, and n in its lowest bits
  constexpr float kLn2High = 0x1.63p-1f;        // 9 bits: its product with |n| < 128 is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr Floats kZero = {};
  const Floats shifted = fused(x, 1.44269504f - kZero, kRound - kZero);
  const Floats n = shifted - kRound;
  const Floats r = fused(n, -kLn2Low - kZero, fused(n, -kLn2High - kZero, x));
  // Taylor to the seventh power: the next term is below r^8 / 8! = 6e-9.
  Floats e = 1.0f / 5040.0f - kZero;
  e = fused(e, r, 1.0f / 720.0f - kZero);
  e = fused(e, r, 1.0f / 120.0f - kZero);
  e = fused(e, r, 1.0f / 24.0f - kZero);
  e = fused(e, r, 1.0f / 6.0f - kZero);
  e = fused(e, r, 0.5f - kZero);
  e = fused(e, r, 1.0f - kZero);
  e = fused(e, r, 1.0f - kZero);
  Words word;
  __builtin_memcpy(&word, &shifted, sizeof word);
  word = (word << 23) + (127u << 23);
  __builtin_memcpy(power, &word, sizeof word);
  return e;
}

}  // namespace lit_binq
