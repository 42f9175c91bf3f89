// The kernels in plain C++: the references for every other instruction set, and what runs where there is none.
// Knows kernel.h only.
#pragma once

#include <algorithm>
#include <cmath>

#include "binary/kernel.h"
#include "common/silu.h"

namespace lit_binq {
namespace {
namespace binary_scalar {

Magnitudes largest(const float* x, const float* c, int64_t K) {
  return with_rest({0, 0}, x, c, 0, K);
}

// z of one block, zero up to whole groups.
void scaled_activations(const float* x, const float* c, int64_t count, float pre, float* z) {
  for (int64_t k = 0; k < count; ++k) z[k] = c[k] != 0.0f ? (x[k] * pre) * c[k] : 0.0f;
  for (int64_t k = count; k < kBlock; ++k) z[k] = 0.0f;
}

float signed_by(float value, int64_t index, int bit) { return (index >> bit) & 1 ? value : -value; }

void build_lut(const float* x, const float* c, int64_t count, float pre, bool, uint8_t* table, float* scale) {
  float z[kBlock];
  scaled_activations(x, c, count, pre, z);
  const int64_t groups = 2 * block_bytes(count);
  // The magnitudes are added in the order of the signed sums: rounding is monotone, so no sum exceeds `largest`.
  float largest = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    const float* v = z + 4 * g;
    largest = std::fmax(largest, (std::fabs(v[0]) + std::fabs(v[1])) + (std::fabs(v[2]) + std::fabs(v[3])));
  }
  const bool zero = !(largest >= kTiniestSum);
  const float units = zero ? 0.0f : kTableLimit / largest;
  *scale = zero ? 0.0f : largest / kTableLimit;
  for (int64_t g = 0; g < groups; ++g) {
    const float* v = z + 4 * g;
    for (int64_t i = 0; i < 16; ++i) {
      const float sum =
          (signed_by(v[0], i, 0) + signed_by(v[1], i, 1)) + (signed_by(v[2], i, 2) + signed_by(v[3], i, 3));
      table[16 * g + i] = static_cast<uint8_t>(kTableBias + std::lrint(sum * units));
    }
  }
}

void build_exact(const float* x, const float* c, int64_t count, float pre, float* table) {
  float z[kBlock];
  scaled_activations(x, c, count, pre, z);
  const int64_t bytes = block_bytes(count);
  for (int64_t k = 0; k < bytes; ++k) {
    const float* v = z + 8 * k;
    float* t = table + kExactEntries * k;
    for (int64_t i = 0; i < 8; ++i) {
      t[i] = (signed_by(v[0], i, 0) + signed_by(v[1], i, 1)) + signed_by(v[2], i, 2);
      t[8 + i] = (signed_by(v[3], i, 0) + signed_by(v[4], i, 1)) + signed_by(v[5], i, 2);
      t[16 + i] = signed_by(v[6], i, 0) + signed_by(v[7], i, 1);
    }
  }
}

void add_lut(const TileBlock& block, const uint8_t* tables, bool, int64_t stride, const float* scales,
             int64_t scale_stride, const float* factors, int64_t rows, float* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    const uint8_t* table = tables + m * stride;
    int32_t units[kTileRows] = {0};
    for (int64_t k = 0; k < block.bytes; ++k) {
      const uint8_t* low = table + kLutEntries * k;
      const uint8_t* high = low + 16;
      const uint8_t* codes = block.codes + k * block.width;
      for (int64_t n = 0; n < block.width; ++n) units[n] += low[codes[n] & 15] + high[codes[n] >> 4];
    }
    const int32_t bias = static_cast<int32_t>(2 * block.bytes) * kTableBias;
    const float scale = scales[m * scale_stride];
    float* sum = sums + m * kTileRows;
    for (int64_t n = 0; n < block.width; ++n) {
      const float value = scale * static_cast<float>(units[n] - bias);
      sum[n] += factors != nullptr ? value * factors[n] : value;
    }
  }
}

void add_exact(const TileBlock& block, const float* tables, int64_t stride, const float* factors, int64_t rows,
               double* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    const float* table = tables + m * stride;
    float part[kTileRows] = {0.0f};
    for (int64_t k = 0; k < block.bytes; ++k) {
      const float* t = table + kExactEntries * k;
      const uint8_t* codes = block.codes + k * block.width;
      for (int64_t n = 0; n < block.width; ++n) {
        const uint8_t byte = codes[n];
        part[n] += (t[byte & 7] + t[8 + ((byte >> 3) & 7)]) + t[16 + (byte >> 6)];
      }
    }
    double* sum = sums + m * kTileRows;
    for (int64_t n = 0; n < block.width; ++n) {
      const double value = static_cast<double>(part[n]);
      sum[n] += factors != nullptr ? value * static_cast<double>(factors[n]) : value;
    }
  }
}

constexpr BinaryKernels kKernels = {
    Layout::kBytes, largest, kNeverDense, build_lut, build_exact, add_lut, add_exact, apply_gate};

}  // namespace binary_scalar
}  // namespace
}  // namespace lit_binq
