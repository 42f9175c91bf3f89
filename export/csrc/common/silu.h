// silu(g) * u, the gate of an MLP, in plain C++ that a compiler vectorizes. Every instruction set compiles it for itself:
// the same float operations in the same order, so that results are equal bit for bit.
// Nothing of the standard library may be instantiated here (sets/avx2.cpp says why).
//
// Legend: silu(g) = g / (1 + e^t), t = -g.
#pragma once

#include <cstdint>

#include "common/exp.h"

namespace lit_binq {

// Relative error below 4e-7, but -0 from g = -88 on, where silu is above -6e-37. Infinities and NaN give what the
// formula gives: silu(-inf) is NaN. Static: see binary/kernel.h, block_bytes.
static inline float silu(float g) {
  const float t = -g;
  const float inside = t < kLeastExponent ? kLeastExponent : (t > kMostExponent ? kMostExponent : t);
  float power;
  const float e = exp_parts<uint32_t>(inside, [](float a, float b, float c) { return a * b + c; }, &power);
  return g / (1.0f + (t > kMostExponent ? __builtin_inff() : e * power));
}

// gate_i = silu(gate_i) * up_i; the two do not overlap.
static inline void apply_gate(float* __restrict gate, const float* __restrict up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gate[i] = silu(gate[i]) * up[i];
}

}  // namespace lit_binq
