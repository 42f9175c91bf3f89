// The kernels for 64-bit Arm, whose NEON unit is always there.
//
// LUT mode here. tbl picks 16 bytes from a table of 16, by a nibble each; a register is one weight byte of 16 rows
// (Layout::kBytes). uaddw and uaddw2 add the lower and the upper 8 picked bytes to 16-bit sums. For 128 weights that is
// 1 load and 8 operations (and, shift, 2 x tbl, 4 x uaddw): a shift of bytes needs no mask.
//
// No fused multiply-add: results must equal scalar-inl.h bit for bit.
#pragma once

#include <arm_neon.h>

#include "binary/kernel.h"
#include "common/silu.h"

namespace lit_binq {
namespace {
namespace binary_neon {

constexpr int64_t kRows = 16;  // of a register of codes

Magnitudes largest(const float* x, const float* c, int64_t K) {
  const int32x4_t magnitude = vdupq_n_s32(0x7fffffff);
  int32x4_t all = vdupq_n_s32(0), live = all;
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    const int32x4_t word = vandq_s32(vreinterpretq_s32_f32(vld1q_f32(x + k)), magnitude);
    all = vmaxq_s32(all, word);
    if (c == nullptr) continue;
    const uint32x4_t dead = vceqzq_f32(vld1q_f32(c + k));
    live = vmaxq_s32(live, vbicq_s32(word, vreinterpretq_s32_u32(dead)));
  }
  Magnitudes m = {vmaxvq_s32(all), vmaxvq_s32(live)};
  if (c == nullptr) m.live = m.all;
  return with_rest(m, x, c, k, K);
}

// z of one block into `z`, zero up to kBlock.
void scaled_activations(const float* x, const float* c, int64_t count, float pre, float* z) {
  const float32x4_t p = vdupq_n_f32(pre);
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const float32x4_t scale = vld1q_f32(c + k);
    const float32x4_t value = vmulq_f32(vmulq_f32(vld1q_f32(x + k), p), scale);
    vst1q_f32(z + k, vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), vceqzq_f32(scale))));
  }
  for (; k < count; ++k) z[k] = c[k] != 0.0f ? (x[k] * pre) * c[k] : 0.0f;
  for (; k < kBlock; ++k) z[k] = 0.0f;
}

// Four sums of 4 groups as bytes: lane g holds a, b, c, d of group g, from the lowest byte on. Sums are at most 127.
inline int8x16_t four_bytes(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d, float32x4_t units) {
  const int16x8_t ab = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(vmulq_f32(a, units))),
                                    vmovn_s32(vcvtnq_s32_f32(vmulq_f32(b, units))));
  const int16x8_t cd = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(vmulq_f32(c, units))),
                                    vmovn_s32(vcvtnq_s32_f32(vmulq_f32(d, units))));
  // 4 groups of a, then of b, of c, of d. The table is their transpose.
  static const uint8_t kTranspose[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return vqtbl1q_s8(vcombine_s8(vmovn_s16(ab), vmovn_s16(cd)), vld1q_u8(kTranspose));
}

// The bytes of a lane reversed and negated: the sums of the inverted indices.
inline int8x16_t mirrored(int8x16_t bytes) { return vnegq_s8(vrev32q_s8(bytes)); }

// The tables of 4 groups. Only 8 of a group's 16 sums are computed: the sum of an inverted index is the negative one,
// and rounding is symmetric.
inline void store_tables(const float* z, float32x4_t units, uint8_t* table) {
  const float32x4x4_t g = vld4q_f32(z);  // g.val[j]: the j-th activation of each group
  const float32x4_t same01 = vaddq_f32(g.val[0], g.val[1]), differ01 = vsubq_f32(g.val[0], g.val[1]);
  const float32x4_t same23 = vaddq_f32(g.val[2], g.val[3]), differ23 = vsubq_f32(g.val[3], g.val[2]);
  // Index: bits of z0, z1, z2, z3 from the lowest on; 8 to 15 have + z3.
  const int8x16_t i8 = four_bytes(vsubq_f32(differ23, same01), vaddq_f32(differ23, differ01),
                                  vsubq_f32(differ23, differ01), vaddq_f32(differ23, same01), units);
  const int8x16_t i12 = four_bytes(vsubq_f32(same23, same01), vaddq_f32(same23, differ01),
                                   vsubq_f32(same23, differ01), vaddq_f32(same23, same01), units);
  const uint8x16_t bias = vdupq_n_u8(kTableBias);
  uint32x4x4_t lanes;
  lanes.val[0] = vreinterpretq_u32_u8(veorq_u8(vreinterpretq_u8_s8(mirrored(i12)), bias));
  lanes.val[1] = vreinterpretq_u32_u8(veorq_u8(vreinterpretq_u8_s8(mirrored(i8)), bias));
  lanes.val[2] = vreinterpretq_u32_u8(veorq_u8(vreinterpretq_u8_s8(i8), bias));
  lanes.val[3] = vreinterpretq_u32_u8(veorq_u8(vreinterpretq_u8_s8(i12), bias));
  uint32_t tables[16];
  vst4q_u32(tables, lanes);  // group after group
  __builtin_memcpy(table, tables, sizeof tables);
}

void build_lut(const float* x, const float* c, int64_t count, float pre, bool, uint8_t* table, float* scale) {
  alignas(16) float z[kBlock];
  scaled_activations(x, c, count, pre, z);
  float32x4_t sums = vdupq_n_f32(0.0f);
  for (int64_t k = 0; k < count; k += 16) {
    const float32x4x4_t g = vld4q_f32(z + k);
    sums = vmaxq_f32(sums, vaddq_f32(vaddq_f32(vabsq_f32(g.val[0]), vabsq_f32(g.val[1])),
                                     vaddq_f32(vabsq_f32(g.val[2]), vabsq_f32(g.val[3]))));
  }
  const float most = vmaxvq_f32(sums);
  const bool zero = !(most >= kTiniestSum);
  const float32x4_t units = vdupq_n_f32(zero ? 0.0f : kTableLimit / most);
  *scale = zero ? 0.0f : most / kTableLimit;
  const int64_t bytes = block_bytes(count);
  for (int64_t k = 0; k < bytes; k += 2) store_tables(z + 8 * k, units, table + kLutEntries * k);
}

inline float signed_by(float value, int64_t index, int bit) { return (index >> bit) & 1 ? value : -value; }

void build_exact(const float* x, const float* c, int64_t count, float pre, float* table) {
  alignas(16) float z[kBlock];
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

// sum[0..3] += scale * units[0..3], times factors[0..3] where there are any
inline void add_scaled(int16x4_t units, float32x4_t scale, const float* factors, float* sum) {
  float32x4_t value = vmulq_f32(scale, vcvtq_f32_s32(vmovl_s16(units)));
  if (factors != nullptr) value = vmulq_f32(value, vld1q_f32(factors));
  vst1q_f32(sum, vaddq_f32(vld1q_f32(sum), value));
}

inline void add_scaled(uint16x8_t sums, int16x8_t bias, float32x4_t scale, const float* factors, float* sum) {
  const int16x8_t units = vsubq_s16(vreinterpretq_s16_u16(sums), bias);
  add_scaled(vget_low_s16(units), scale, factors, sum);
  add_scaled(vget_high_s16(units), scale, factors != nullptr ? factors + 4 : nullptr, sum + 4);
}

// One block for `Tokens` rows of activations and `Vectors` * 16 rows of weights, from row `first` of the tile on.
template <int Vectors, int Tokens>
inline void add_lut_part(const TileBlock& block, int64_t first, const Rows& r, const float* factors) {
  uint16x8_t low[Tokens][Vectors], high[Tokens][Vectors];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) low[t][i] = high[t][i] = vdupq_n_u16(0);
  }
  const uint8x16_t nibble = vdupq_n_u8(15);
  const uint8_t* codes = block.codes + first;
  const uint8_t* tables = r.tables;
  for (int64_t k = 0; k < block.bytes; ++k) {
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
      const uint8x16_t byte = vld1q_u8(codes + i * kRows);
      const uint8x16_t index0 = vandq_u8(byte, nibble), index1 = vshrq_n_u8(byte, 4);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        const uint8x16_t a = vqtbl1q_u8(vld1q_u8(tables + t * r.stride), index0);
        const uint8x16_t b = vqtbl1q_u8(vld1q_u8(tables + t * r.stride + 16), index1);
        low[t][i] = vaddw_u8(vaddw_u8(low[t][i], vget_low_u8(a)), vget_low_u8(b));
        high[t][i] = vaddw_high_u8(vaddw_high_u8(high[t][i], a), b);
      }
    }
    codes += block.width;
    tables += kLutEntries;
  }
  const int16x8_t bias = vdupq_n_s16(static_cast<int16_t>(2 * block.bytes * kTableBias));
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    const float32x4_t scale = vdupq_n_f32(r.scales[t * r.scale_stride]);
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
      const int64_t row = first + i * kRows;
      const float* f = factors != nullptr ? factors + row : nullptr;
      float* sum = r.sums + t * kTileRows + row;
      add_scaled(low[t][i], bias, scale, f, sum);
      add_scaled(high[t][i], bias, scale, f != nullptr ? f + 8 : nullptr, sum + 8);
    }
  }
}

// One row of activations: 8 registers of codes, so that tables are loaded once for a full tile; 16 sums, 2 tables, a
// constant and a few temporaries of the 32 registers. Several: 2 registers of codes for 4 of them, 16 sums again.
void add_lut(const TileBlock& block, const uint8_t* tables, bool, int64_t stride, const float* scales,
             int64_t scale_stride, const float* factors, int64_t rows, float* sums) {
  Rows r{tables, stride, scales, scale_stride, sums};
  const auto skip = [&](int64_t done) {
    r.tables += done * stride;
    r.scales += done * scale_stride;
    r.sums += done * kTileRows;
    rows -= done;
  };
  while (rows >= 4) {
    for (int64_t n = 0; n < block.width; n += 2 * kRows) add_lut_part<2, 4>(block, n, r, factors);
    skip(4);
  }
  while (rows >= 2) {
    for (int64_t n = 0; n < block.width; n += 2 * kRows) add_lut_part<2, 2>(block, n, r, factors);
    skip(2);
  }
  if (rows == 0) return;
  if (block.width == kTileRows) return add_lut_part<8, 1>(block, 0, r, factors);
  for (int64_t n = 0; n < block.width; n += 2 * kRows) add_lut_part<2, 1>(block, n, r, factors);
}

// Exact mode picks single floats: there is no instruction for it, and no need of speed here.
void add_exact(const TileBlock& block, const float* tables, int64_t stride, const float* factors, int64_t rows,
               double* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    float part[kTileRows] = {0.0f};
    for (int64_t k = 0; k < block.bytes; ++k) {
      const float* t = tables + m * stride + kExactEntries * k;
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

}  // namespace binary_neon
}  // namespace
}  // namespace lit_binq
