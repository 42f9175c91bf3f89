// The five-input LUT of AVX-512 (binary/kernel.h) in plain C++: what its kernels are compared with, bit for bit. A kernel
// set of the test programs and the test library; everything else of it is plain C++'s.
#include <algorithm>
#include <cmath>

#include "binary/scalar-inl.h"
#include "sets/kernel_sets.h"

namespace lit_binq {
namespace {
namespace binary_scalar {

// Five-input LUT. Group (j, byte) is nibble j % 2 of byte 4 (j / 2) + byte; its sign is a bit of a nibble of
// the same byte of a later quad.
struct Fifth {
  int64_t byte;
  int bit;
};

Fifth fifth_of(int64_t quads, int j, int64_t byte) {
  const int half = lookups(quads) + j / 4;
  return {kQuad * (half / 2) + byte, 4 * (half % 2) + j % 4};
}

void build_lut5(const float* x, const float* c, int64_t count, float pre, uint8_t* table, float* scale) {
  float z[kBlock], groups[2 * kBlockBytes][5];
  scaled_activations(x, c, count, pre, z);
  const int64_t quads = block_bytes(count) / kQuad;
  float largest = 0.0f;
  for (int64_t g = 0; g < kQuad * lookups(quads); ++g) {
    const int j = static_cast<int>(g / kQuad);
    const float* v = z + 32 * (j / 2) + 8 * (g % kQuad) + 4 * (j % 2);
    const Fifth sign = fifth_of(quads, j, g % kQuad);
    const float fifth = j < signed_lookups(quads) ? z[8 * sign.byte + sign.bit] : 0.0f;
    const float four = (std::fabs(v[0]) + std::fabs(v[1])) + (std::fabs(v[2]) + std::fabs(v[3]));
    largest = std::fmax(largest, four + std::fabs(fifth));
    std::copy_n(v, 4, groups[g]);
    groups[g][4] = fifth;
  }
  const bool zero = !(largest >= kTiniestSum);
  const float units = zero ? 0.0f : kTableLimit * (1 << kLut5Fraction) / largest;
  *scale = zero ? 0.0f : largest / kTableLimit;
  for (int64_t g = 0; g < kQuad * lookups(quads); ++g) {
    long q[5];
    for (int i = 0; i < 5; ++i) q[i] = std::lrint(groups[g][i] * units);
    for (int64_t i = 0; i < 16; ++i) {
      long sum = q[4] + (1 << (kLut5Fraction - 1));
      for (int bit = 0; bit < 4; ++bit) sum += i >> bit & 1 ? q[bit] : -q[bit];
      table[16 * g + i] = static_cast<uint8_t>(kTableBias + (sum >> kLut5Fraction));
    }
  }
}

void add_lut5(const TileBlock& block, const uint8_t* tables, int64_t stride, const float* scales,
               int64_t scale_stride, const float* factors, int64_t rows, float* sums) {
  const int64_t quads = block.bytes / kQuad;
  for (int64_t m = 0; m < rows; ++m) {
    const float scale = scales[m * scale_stride];
    for (int64_t n = 0; n < block.width; ++n) {
      int32_t units = 0;
      for (int64_t g = 0; g < kQuad * lookups(quads); ++g) {
        const int j = static_cast<int>(g / kQuad);
        const uint8_t* table = tables + m * stride + 16 * g;
        const int nibble = block.codes[(kQuad * (j / 2) + g % kQuad) * block.width + n] >> (4 * (j % 2)) & 15;
        const Fifth sign = fifth_of(quads, j, g % kQuad);
        const bool flip = j < signed_lookups(quads) && (block.codes[sign.byte * block.width + n] >> sign.bit & 1) == 0;
        units += flip ? kTableBias - table[15 - nibble] : table[nibble] - kTableBias;
      }
      const float value = scale * static_cast<float>(units);
      sums[m * kTileRows + n] += factors != nullptr ? value * factors[n] : value;
    }
  }
}

void build_any(const float* x, const float* c, int64_t count, float pre, bool lut5, uint8_t* table, float* scale) {
  (lut5 ? build_lut5(x, c, count, pre, table, scale) : build_lut(x, c, count, pre, false, table, scale));
}

void add_any(const TileBlock& block, const uint8_t* tables, bool lut5, int64_t stride, const float* scales,
             int64_t scale_stride, const float* factors, int64_t rows, float* sums) {
  if (lut5) return add_lut5(block, tables, stride, scales, scale_stride, factors, rows, sums);
  add_lut(block, tables, false, stride, scales, scale_stride, factors, rows, sums);
}

constexpr BinaryKernels kLut5 = {
    Layout::kBytes, largest, kLut5From, build_any, build_exact, add_any, add_exact, apply_gate};

}  // namespace binary_scalar
}  // namespace

const KernelSet kScalarLut5Set = {"scalar-lut5", 0, binary_scalar::kLut5, kScalarSet.two_plane, kScalarSet.nbits,
                                  kScalarSet.attention};

}  // namespace lit_binq
