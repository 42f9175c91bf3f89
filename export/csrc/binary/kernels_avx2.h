// What the two files of the AVX2 kernels share: kernels_avx2_tables.cpp makes the tables, kernels_avx2.cpp multiplies.
// Knows kernel.h only.
#pragma once

#include "binary/kernel.h"

namespace lit_binq::avx2 {

// Entries of halved tables for a weight byte: the sums of either nibble whose highest bit is set, the low nibble's
// first. The other sums are their negatives.
constexpr int64_t kHalfEntries = 16;

// As in kernel.h.
Magnitudes largest(const float* x, const float* c, int64_t K);
void build_lut(const float* x, const float* c, int64_t count, float pre, bool dense, uint8_t* table, float* scale);
void build_exact(const float* x, const float* c, int64_t count, float pre, float* table);

}  // namespace lit_binq::avx2
