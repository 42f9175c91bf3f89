// The kernels for x86-64 with AVX-512: F, BW, VL, VBMI and VNNI (Ice Lake, Zen 4 and later).//
// LUT mode here. vpermb picks 64 bytes from a table of 64, by 6 bits each. A register of codes (Layout::kQuads) is 16
// rows of 4 weight bytes; byte j of a row looks into the j-th 16 entries of the table, so its index is a nibble and the
// constant 16 j. The 4 picked bytes of a row lie beside each other: vpdpbusd adds all 4 to the row's 32-bit sum. For
// 512 weights that is 1 load and 7 operations (2 x index, 1 shift, 2 x vpermb, 2 x vpdpbusd). Several rows of
// activations are multiplied in avx512_lut5-inl.h.
//
// No standard library (sets/avx2.cpp says why). No fused multiply-add: results must equal scalar-inl.h bit for bit.
#pragma once

#include <immintrin.h>

#include "binary/avx512_lut5-inl.h"
#include "common/prefetch.h"
#include "common/silu.h"

namespace lit_binq {
namespace {
namespace binary_avx512 {

Magnitudes largest(const float* x, const float* c, int64_t K) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i all = _mm512_setzero_si512(), live = all;
  for (int64_t k = 0; k < K; k += 16) {
    const __mmask16 inside = first_lanes(K - k);
    const __m512i word = _mm512_and_si512(_mm512_maskz_loadu_epi32(inside, x + k), magnitude);
    all = _mm512_max_epi32(all, word);
    if (c == nullptr) continue;
    const __mmask16 counts = _mm512_cmp_ps_mask(_mm512_maskz_loadu_ps(inside, c + k), _mm512_setzero_ps(), _CMP_NEQ_OQ);
    live = _mm512_mask_max_epi32(live, counts, live, word);
  }
  const int32_t most = _mm512_reduce_max_epi32(all);
  return {most, c == nullptr ? most : _mm512_reduce_max_epi32(live)};
}

// Four sums of all groups as bytes: lane g holds a, b, c, d of group g, from the lowest byte on.
inline __m512i four_bytes(__m512 a, __m512 b, __m512 c, __m512 d, __m512 units) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(a, units)),
                                        _mm512_cvtps_epi32(_mm512_mul_ps(b, units)));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(c, units)),
                                        _mm512_cvtps_epi32(_mm512_mul_ps(d, units)));
  // In each 128-bit lane: 4 groups of a, then of b, of c, of d. The shuffle is their transpose.
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_packs_epi16(ab, cd), order);
}

// The bytes in a lane reversed and negated, with their bias: the sums of the inverted indices.
inline __m512i mirrored(__m512i bytes, __m512i bias) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
  return _mm512_sub_epi8(bias, _mm512_shuffle_epi8(bytes, order));
}

// The tables of 16 groups, that is of two quads, or of the first only. Of a group's 16 sums only 8 are computed: the sum
// of an inverted index is the negative one, and rounding is symmetric.
inline void store_tables(const Groups& g, __m512 units, int64_t quads, uint8_t* table) {
  const __m512 same01 = _mm512_add_ps(g.z[0], g.z[1]), differ01 = _mm512_sub_ps(g.z[0], g.z[1]);  // + z0 and +- z1
  const __m512 same23 = _mm512_add_ps(g.z[2], g.z[3]), differ23 = _mm512_sub_ps(g.z[3], g.z[2]);  // + z3 and +- z2
  // Index i = bits of z0, z1, z2, z3 from the lowest on; 8 to 15 have + z3.
  const __m512i s8 = four_bytes(_mm512_sub_ps(differ23, same01), _mm512_add_ps(differ23, differ01),
                                _mm512_sub_ps(differ23, differ01), _mm512_add_ps(differ23, same01), units);
  const __m512i s12 = four_bytes(_mm512_sub_ps(same23, same01), _mm512_add_ps(same23, differ01),
                                 _mm512_sub_ps(same23, differ01), _mm512_add_ps(same23, same01), units);
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(kTableBias));
  const __m512i i0 = mirrored(s12, bias), i4 = mirrored(s8, bias);
  const __m512i i8 = _mm512_xor_si512(s8, bias), i12 = _mm512_xor_si512(s12, bias);
  // The 4 bytes at place p of lane l in i0, i4, i8 and i12 are the 16 of one group: a transpose of 4 x 4 in each lane.
  const __m512i low = _mm512_unpacklo_epi32(i0, i4), high = _mm512_unpackhi_epi32(i0, i4);
  const __m512i low8 = _mm512_unpacklo_epi32(i8, i12), high8 = _mm512_unpackhi_epi32(i8, i12);
  // A quad's low nibbles are its groups 0, 2, 4, 6; the high ones 1, 3, 5, 7.
  _mm512_storeu_si512(table, _mm512_unpacklo_epi64(low, low8));
  _mm512_storeu_si512(table + kHalf, _mm512_unpackhi_epi64(low, low8));
  if (quads == 1) return;
  _mm512_storeu_si512(table + kTable, _mm512_unpacklo_epi64(high, high8));
  _mm512_storeu_si512(table + kTable + kHalf, _mm512_unpackhi_epi64(high, high8));
}

// Up to `Chunks` times 64 columns, all of them in registers from their loads to their tables.
template <int Chunks>
void build_lut_chunks(const float* x, const float* c, int64_t count, float pre, uint8_t* table, float* scale) {
  const __m512 p = _mm512_set1_ps(pre);
  Groups groups[Chunks];
  __m512 sums = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < Chunks; ++i) {
    const int64_t k = 64 * i;
    const Groups g = groups_of(scaled(x, c, k, count, p), scaled(x, c, k + 16, count, p),
                               scaled(x, c, k + 32, count, p), scaled(x, c, k + 48, count, p));
    sums = _mm512_max_ps(sums, _mm512_add_ps(_mm512_add_ps(magnitude(g.z[0]), magnitude(g.z[1])),
                                             _mm512_add_ps(magnitude(g.z[2]), magnitude(g.z[3]))));
    groups[i] = g;
  }
  const float largest = _mm512_reduce_max_ps(sums);
  const bool zero = !(largest >= kTiniestSum);
  const __m512 units = _mm512_set1_ps(zero ? 0.0f : kTableLimit / largest);
  *scale = zero ? 0.0f : largest / kTableLimit;
  const int64_t quads = block_bytes(count) / kQuad;
#pragma GCC unroll 4
  for (int i = 0; i < Chunks; ++i) store_tables(groups[i], units, quads - 2 * i, table + 2 * kTable * i);
}

void build_lut(const float* x, const float* c, int64_t count, float pre, bool lut5, uint8_t* table, float* scale) {
  if (lut5) return build_lut5(x, c, count, pre, table, scale);
  static_assert(kBlock == 4 * 64, "as many chunks as there are cases");
  switch ((count + 63) / 64) {
    case 1: return build_lut_chunks<1>(x, c, count, pre, table, scale);
    case 2: return build_lut_chunks<2>(x, c, count, pre, table, scale);
    case 3: return build_lut_chunks<3>(x, c, count, pre, table, scale);
    default: return build_lut_chunks<4>(x, c, count, pre, table, scale);
  }
}

// + z where the bit of the lane's number is set, - z where it is clear.
inline __m256 signed_by(float z, __m256 flip) { return _mm256_xor_ps(_mm256_set1_ps(z), flip); }

void build_exact(const float* x, const float* c, int64_t count, float pre, float* table) {
  alignas(64) float z[kBlock];
  for (int64_t k = 0; k < kBlock; k += 16) _mm512_store_ps(z + k, scaled(x, c, k, count, _mm512_set1_ps(pre)));
  const __m256 flip0 = _mm256_setr_ps(-0.f, 0.f, -0.f, 0.f, -0.f, 0.f, -0.f, 0.f);
  const __m256 flip1 = _mm256_setr_ps(-0.f, -0.f, 0.f, 0.f, -0.f, -0.f, 0.f, 0.f);
  const __m256 flip2 = _mm256_setr_ps(-0.f, -0.f, -0.f, -0.f, 0.f, 0.f, 0.f, 0.f);
  const int64_t bytes = block_bytes(count);
  for (int64_t k = 0; k < bytes; ++k) {
    const float* v = z + 8 * k;
    float* t = table + kExactEntries * k;
    _mm256_storeu_ps(t, _mm256_add_ps(_mm256_add_ps(signed_by(v[0], flip0), signed_by(v[1], flip1)),
                                      signed_by(v[2], flip2)));
    _mm256_storeu_ps(t + 8, _mm256_add_ps(_mm256_add_ps(signed_by(v[3], flip0), signed_by(v[4], flip1)),
                                          signed_by(v[5], flip2)));
    _mm256_storeu_ps(t + 16, _mm256_add_ps(signed_by(v[6], flip0), signed_by(v[7], flip1)));
  }
}

inline __m512i index_of(__m512i nibbles) {
  const __m512i nibble = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000);
  return _mm512_ternarylogic_epi32(nibbles, nibble, place, 0xea);  // (nibbles & nibble) | place
}

// One block for one row of activations and `Vectors` * 16 rows of weights, from row `first` of the tile on: 8 registers
// of sums where it is the whole tile, so that tables are loaded once. `Repeats`: see TileBlock.
template <int Vectors, int Repeats>
inline void add_lut_part(const TileBlock& block, int64_t first, const uint8_t* tables, float scale,
                         const float* factors, float* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i start = _mm512_set1_epi32(static_cast<int>(-2 * block.bytes * kTableBias));
  __m512i units[Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Vectors; ++i) units[i] = start;
  const auto add = [&](const __m512i* index, const uint8_t* entries) {
    const __m512i table = _mm512_loadu_si512(entries);
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
      units[i] = _mm512_dpbusd_epi32(units[i], _mm512_permutexvar_epi8(index[i], table), ones);
    }
  };
  const uint8_t* codes = block.codes + first * kQuad;
  for (int64_t k = 0; k < block.bytes; k += kQuad, codes += block.width * kQuad, tables += kTable) {
    __m512i quads[Vectors], index[Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
      quads[i] = _mm512_loadu_si512(codes + i * kRows * kQuad);
      prefetch_repeatedly(codes + i * kRows * kQuad, Repeats);
      index[i] = index_of(quads[i]);
    }
    add(index, tables);
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) index[i] = index_of(_mm512_srli_epi16(quads[i], 4));
    add(index, tables + kHalf);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Vectors; ++i) {
    const int64_t row = first + i * kRows;
    add_units(units[i], _mm512_set1_ps(scale), factors != nullptr ? factors + row : nullptr, sums + row);
  }
}

void add_lut(const TileBlock& block, const uint8_t* tables, bool lut5, int64_t stride, const float* scales,
             int64_t scale_stride, const float* factors, int64_t rows, float* sums) {
  if (lut5) return add_lut5(block, {tables, stride, scales, scale_stride, sums}, factors, rows);
  for (int64_t m = 0; m < rows; ++m) {
    const uint8_t* const table = tables + m * stride;
    const float scale = scales[m * scale_stride];
    float* const sum = sums + m * kTileRows;
    if (block.width < kTileRows) {
      for (int64_t n = 0; n < block.width; n += 2 * kRows) add_lut_part<2, 0>(block, n, table, scale, factors, sum);
    } else if (block.repeats > 1) {
      add_lut_part<kVectors, 4>(block, 0, table, scale, factors, sum);
    } else if (block.repeats == 1) {
      add_lut_part<kVectors, 1>(block, 0, table, scale, factors, sum);
    } else {
      add_lut_part<kVectors, 0>(block, 0, table, scale, factors, sum);
    }
  }
}

// The three parts of byte J of 16 rows. vpermps reads 4 bits of an index: with the table in both halves of the register
// the highest of them does not count, and no mask is needed.
template <int J>
inline __m512 exact_byte(__m512i quads, const float* t) {
  const __m512 t0 = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(t))));
  const __m512 t1 = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(t + 8))));
  const __m512 t2 = _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(t + 16))));
  const __m512 a = _mm512_permutexvar_ps(_mm512_srli_epi32(quads, 8 * J), t0);
  const __m512 b = _mm512_permutexvar_ps(_mm512_srli_epi32(quads, 8 * J + 3), t1);
  // the last part is 2 bits wide, and of the third bit both values have the same entry (build_exact)
  const __m512 d = _mm512_permutexvar_ps(_mm512_srli_epi32(quads, 8 * J + 6), t2);
  return _mm512_add_ps(_mm512_add_ps(a, b), d);
}

inline void add_exact_sums(__m256 part, const float* factors, double* sum) {
  __m512d value = _mm512_cvtps_pd(part);
  if (factors != nullptr) value = _mm512_mul_pd(value, _mm512_cvtps_pd(_mm256_loadu_ps(factors)));
  _mm512_storeu_pd(sum, _mm512_add_pd(_mm512_loadu_pd(sum), value));
}

void add_exact(const TileBlock& block, const float* tables, int64_t stride, const float* factors, int64_t rows,
               double* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < block.width; n += 2 * kRows) {
      __m512 part[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t k = 0; k < block.bytes; k += kQuad) {
        const float* t = tables + m * stride + kExactEntries * k;
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const __m512i quads = _mm512_loadu_si512(block.codes + k * block.width + (n + i * kRows) * kQuad);
          part[i] = _mm512_add_ps(part[i], exact_byte<0>(quads, t));
          part[i] = _mm512_add_ps(part[i], exact_byte<1>(quads, t + kExactEntries));
          part[i] = _mm512_add_ps(part[i], exact_byte<2>(quads, t + 2 * kExactEntries));
          part[i] = _mm512_add_ps(part[i], exact_byte<3>(quads, t + 3 * kExactEntries));
        }
      }
      for (int i = 0; i < 2; ++i) {
        const int64_t row = n + i * kRows;
        const float* f = factors != nullptr ? factors + row : nullptr;
        double* sum = sums + m * kTileRows + row;
        add_exact_sums(_mm512_castps512_ps256(part[i]), f, sum);
        add_exact_sums(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(part[i]), 1)),
                       f != nullptr ? f + 8 : nullptr, sum + 8);
      }
    }
  }
}

constexpr BinaryKernels kKernels = {
    Layout::kQuads, largest, kLut5From, build_lut, build_exact, add_lut, add_exact, apply_gate};

}  // namespace binary_avx512
}  // namespace
}  // namespace lit_binq
