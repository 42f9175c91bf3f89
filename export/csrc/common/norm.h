// The sum and RMS norm in front of a block's products (multiply.h). Touches nothing, allocates nothing.
#pragma once

#include <cstdint>

namespace lit_binq {

// x = s / sqrt(mean of s^2 + epsilon) * gamma,  s = hidden + skip, row by row.
struct Norm {
  const float* skip;    // of the first row
  int64_t skip_stride;  // from a row to the next: K, or 0 where all rows have the same
  const float* gamma;   // (K,)
  float epsilon;
  float* sum;  // (M, K), takes s

  // Row m: hidden (K,), x (K,), which overlap nothing. The squares are added up as float64, which they do not overflow:
  // x is within 3e-7 of what real numbers give for s, unless epsilon is 0 and s subnormal. Plain code for the baseline
  // of the processor: the same bits whatever the kernels.
  void apply(const float* hidden, int64_t m, int64_t K, float* x) const;
};

}  // namespace lit_binq
