// Two-plane kernels for x86-64 with AVX-512 F, BW, VL, VBMI, VNNI and VPOPCNTDQ. Knows two_plane/kernel.h, prefetch.h
// and the intrinsics only. Compiled with the flags of these sets; no standard library, see sets/avx2.cpp.
//
// Lanes of 4 bytes: a register is one word, that is 32 columns, of 16 rows.
//
//     lut     VPERMB looks up 64 bytes in a table of 64: byte i of a word reads the i-th of 4 tables of 16 entries,
//             since two bits of its index are set to i. VPDPBUSD adds the 4 bytes of a word to its 32-bit sum. That is
//             one lookup and one addition for 16 columns of 16 rows.
//     exact   VPERMPS with a table of 16 floats for each nibble of the word
//     planes  AND with a word of q_k, VPOPCNTD, add
#pragma once

#include <immintrin.h>

#include "common/prefetch.h"
#include "two_plane/kernel.h"

namespace lit_binq {
namespace {
namespace two_plane_avx512 {

constexpr int64_t kVector = 16;  // rows of a register
constexpr int64_t kVectors = kTwoPlaneRows / kVector;
constexpr int64_t kRegister = 64;
constexpr int64_t kPlaneBytes = 4 * kTwoPlaneRows;   // of one plane of a chunk
constexpr int64_t kChunkBytes = 2 * kPlaneBytes;
constexpr int64_t kChunkColumns = 32, kQuads = 8;

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

inline __m512 halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// sum[0..15] += scale * the products of 16 rows but for the mean part, which is not scaled.
template <int L>
inline void combine(const uint16_t* levels, __m512 A, __m512 B, __m512 C, __m512 scale, __m512 total, float* sum) {
  __m512 value = _mm512_loadu_ps(sum);
  if constexpr (L == 2) {
    const __m512 signs = _mm512_fmadd_ps(halves(levels), A, _mm512_mul_ps(halves(levels + kTwoPlaneRows), B));
    value = _mm512_fmadd_ps(scale, signs, value);
  } else if constexpr (L == 3) {
    __m512 signs = _mm512_mul_ps(halves(levels + kTwoPlaneRows), A);
    signs = _mm512_fmadd_ps(halves(levels + 2 * kTwoPlaneRows), B, signs);
    value = _mm512_fmadd_ps(scale, signs, _mm512_fmadd_ps(halves(levels), total, value));
  } else {
    const __m512 l0 = halves(levels), l1 = halves(levels + kTwoPlaneRows);
    const __m512 l2 = halves(levels + 2 * kTwoPlaneRows), l3 = halves(levels + 3 * kTwoPlaneRows);
    const __m512 outer = _mm512_add_ps(l0, l3), inner = _mm512_add_ps(l1, l2);
    const __m512 rise = _mm512_sub_ps(l3, l0), twist = _mm512_sub_ps(l1, l2);
    __m512 signs = _mm512_mul_ps(_mm512_add_ps(rise, twist), A);
    signs = _mm512_fmadd_ps(_mm512_sub_ps(rise, twist), B, signs);
    signs = _mm512_fnmadd_ps(_mm512_sub_ps(outer, inner), C, signs);
    signs = _mm512_fmadd_ps(scale, signs, _mm512_mul_ps(_mm512_add_ps(outer, inner), total));
    value = _mm512_fmadd_ps(_mm512_set1_ps(0.25f), signs, value);
  }
  _mm512_storeu_ps(sum, value);
}

// Sign masks by the bit of the lane's number: set bit keeps the sign, clear bit flips it.
inline __m512 flipped(const float* x, int bit) {
  const __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i clear = _mm512_andnot_si512(number, _mm512_set1_epi32(1 << bit));
  const __m512i mask = _mm512_sllv_epi32(clear, _mm512_set1_epi32(31 - bit));
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(_mm512_set1_ps(*x)), mask));
}

inline __m512 quad_sums(const float* x) {
  return _mm512_add_ps(_mm512_add_ps(flipped(x, 0), flipped(x + 1, 1)),
                       _mm512_add_ps(flipped(x + 2, 2), flipped(x + 3, 3)));
}

// Largest |x0| + |x1| + |x2| + |x3|.
float largest_quad(const float* x, int64_t quads) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 largest = _mm256_setzero_ps();
  for (int64_t i = 0; i < quads; i += 8) {  // a chunk at a time
    const float* v = x + 4 * i;
    const __m256 a = _mm256_and_ps(_mm256_loadu_ps(v), magnitude);
    const __m256 b = _mm256_and_ps(_mm256_loadu_ps(v + 8), magnitude);
    const __m256 d = _mm256_and_ps(_mm256_loadu_ps(v + 16), magnitude);
    const __m256 e = _mm256_and_ps(_mm256_loadu_ps(v + 24), magnitude);
    largest = _mm256_max_ps(largest, _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(d, e)));
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, largest);
  float result = lanes[0];
  for (int i = 1; i < 8; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// Of each chunk first the tables of the low nibbles of its 4 bytes, then those of the high nibbles.
void build_lut(const float* x, int64_t chunks, uint8_t* prepared, float* unit) {
  const float largest = largest_quad(x, chunks * kQuads);
  const bool zero = !(largest >= kTiniestQuad);
  const __m512 units = _mm512_set1_ps(zero ? 0.0f : kTwoPlaneLimit / largest);
  *unit = zero ? 0.0f : largest / kTwoPlaneLimit;
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t q = 0; q < kQuads; ++q) {
      const __m512i sums = _mm512_cvtps_epi32(_mm512_mul_ps(quad_sums(x + (c * kQuads + q) * 4), units));
      uint8_t* out = prepared + c * 2 * kRegister + (q & 1) * kRegister + (q >> 1) * kQuadBytes;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(sums));
    }
  }
}

void build_exact(const float* x, int64_t chunks, uint8_t* prepared) {
  for (int64_t q = 0; q < chunks * kQuads; ++q) {
    _mm512_storeu_ps(reinterpret_cast<float*>(prepared) + 16 * q, quad_sums(x + 4 * q));
  }
}

// Words [chunk][plane].
void build_planes(const uint8_t* q, int64_t planes, int64_t chunks, uint8_t* prepared, int32_t* ones) {
  for (int64_t k = 0; k < planes; ++k) ones[k] = 0;
  uint32_t* words = reinterpret_cast<uint32_t*>(prepared);
  for (int64_t c = 0; c < chunks; ++c) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + c * kChunkColumns));
    for (int64_t k = 0; k < planes; ++k) {
      const uint32_t word = _mm256_test_epi8_mask(values, _mm256_set1_epi8(static_cast<char>(1 << k)));
      ones[k] += __builtin_popcount(word);
      words[c * planes + k] = word;
    }
  }
}

// Pairs of rounded levels of 16 rows as 16-bit integers, 16 times themselves. Two rows are 6 bytes: they are brought to
// 8, of which vpmultishiftqb takes the bytes that begin 4 bits before a level and 4 bits behind that.
inline __m512i rounded_pairs(const uint8_t* levels) {
  const __m512i bytes = _mm512_maskz_loadu_epi8(0xffffffffffff, levels);
  const __m512i spread = _mm512_setr_epi64(0x050403020100, 0x0b0a09080706, 0x11100f0e0d0c, 0x171615141312,
                                           0x1d1c1b1a1918, 0x232221201f1e, 0x292827262524, 0x2f2e2d2c2b2a);
  const __m512i shifts = _mm512_set1_epi64(0x28201c141008043c);  // in bits, the lowest byte's first
  const __m512i levels_and_more = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, bytes));
  return _mm512_and_si512(levels_and_more, _mm512_set1_epi16(static_cast<short>(0xfff0)));
}

// sum[0..15] += unit * the products of 16 rows, in units of their levels. |A|, |B| and |C| are at most 127 a quad, and
// so is X: pairs of 16-bit integers, whose products stay below 2^30. X is in the upper half of every lane.
inline void combine_rounded(const uint8_t* levels, int v, __m512i A, __m512i B, __m512i C, __m512i X, __m512 unit,
                            float* sum) {
  static_assert(kTwoPlaneBlock / 4 * 127 < (1 << 13) && kRoundedLimit < (1 << 11), "4 products of 2^13 and 2^15");
  constexpr __mmask32 kUpper = 0xaaaaaaaa;
  const __m512i AB = _mm512_mask_blend_epi16(kUpper, A, _mm512_slli_epi32(B, 16));
  const __m512i CX = _mm512_mask_blend_epi16(kUpper, C, X);
  const uint8_t* const first = levels + v * kVector * kPairBytes;
  const __m512i signs = _mm512_dpwssd_epi32(_mm512_setzero_si512(), AB, rounded_pairs(first));
  const __m512i all = _mm512_dpwssd_epi32(signs, CX, rounded_pairs(first + kTwoPlaneRows * kPairBytes));
  _mm512_storeu_ps(sum, _mm512_fmadd_ps(unit, _mm512_cvtepi32_ps(all), _mm512_loadu_ps(sum)));
}

template <int L, int Repeats>
void add_lut(const TwoPlaneBlock& block, const TwoPlaneActivations& x, float* sums) {
  constexpr int kPlanes = L == 4 ? 3 : 2;
  constexpr int kLevelLines = L == 4 ? 2 * kPairBytes : 2 * L;
  const __m512i nibble = _mm512_set1_epi32(0x0f0f0f0f), places = _mm512_set1_epi32(0x30201000);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i units[kPlanes][kVectors];
  for (auto& plane : units) {
    for (__m512i& u : plane) u = _mm512_setzero_si512();
  }
  const uint8_t* codes = block.codes;
  for (int64_t c = 0; c < block.chunks; ++c, codes += kChunkBytes) {
    prefetch_repeatedly(codes, Repeats, 2 * kVectors);
    const __m512i low = load(x.prepared + c * 2 * kRegister), high = load(x.prepared + c * 2 * kRegister + kRegister);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      constexpr int kAndOr = 0xea, kXor = 0x96;  // (word & nibble) | places; first ^ second ^ third
      __m512i first[3], second[3];
#pragma GCC unroll 2
      for (int w = 0; w < 2; ++w) {
        const __m512i word = load(codes + w * kPlaneBytes + v * kRegister);
        first[w] = _mm512_ternarylogic_epi32(word, nibble, places, kAndOr);
        second[w] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4), nibble, places, kAndOr);
      }
      first[2] = _mm512_ternarylogic_epi32(first[0], first[1], places, kXor);
      second[2] = _mm512_ternarylogic_epi32(second[0], second[1], places, kXor);
#pragma GCC unroll 3
      for (int w = 0; w < kPlanes; ++w) {
        units[w][v] = _mm512_dpbusd_epi32(units[w][v], ones, _mm512_permutexvar_epi8(first[w], low));
        units[w][v] = _mm512_dpbusd_epi32(units[w][v], ones, _mm512_permutexvar_epi8(second[w], high));
      }
    }
  }
  prefetch_repeatedly(block.levels, Repeats, kLevelLines);
  const __m512 unit = _mm512_set1_ps(x.unit), total = _mm512_set1_ps(x.total);
  // 16 times less, as rounded_pairs gives 16 times more. A block that counts as zero has no unit.
  const __m512 sixteenth = _mm512_set1_ps(x.unit * 0.0625f);
  const __m512i X = _mm512_slli_epi32(_mm512_cvtps_epi32(_mm512_set1_ps(x.unit > 0.0f ? x.total / x.unit : 0.0f)), 16);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    float* const sum = sums + v * kVector;
    if constexpr (L == 4) {
      combine_rounded(block.levels, v, units[0][v], units[1][v], units[kPlanes - 1][v], X, sixteenth, sum);
    } else {
      const __m512 A = _mm512_cvtepi32_ps(units[0][v]), B = _mm512_cvtepi32_ps(units[1][v]);
      combine<L>(block.halves() + v * kVector, A, B, B, unit, total, sum);
    }
  }
}

template <int L>
void add_exact(const TwoPlaneBlock& block, const TwoPlaneActivations& x, float* sums) {
  constexpr int kPlanes = L == 4 ? 3 : 2;
  __m512 S[3][kVectors];
  for (auto& plane : S) {
    for (__m512& s : plane) s = _mm512_setzero_ps();
  }
  const float* tables = reinterpret_cast<const float*>(x.prepared);
  const uint8_t* codes = block.codes;
  for (int64_t c = 0; c < block.chunks; ++c, codes += kChunkBytes) {
    __m512i word[3][kVectors];
    for (int v = 0; v < kVectors; ++v) {
      word[0][v] = load(codes + v * kRegister);
      word[1][v] = load(codes + kPlaneBytes + v * kRegister);
      word[2][v] = _mm512_xor_si512(word[0][v], word[1][v]);
    }
    for (int64_t q = 0; q < kQuads; ++q, tables += 16) {
      const __m512 t = _mm512_loadu_ps(tables);
#pragma GCC unroll 3
      for (int w = 0; w < kPlanes; ++w) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          // The permutation reads the low 4 bits of each lane and ignores the others: no masks.
          S[w][v] = _mm512_add_ps(S[w][v], _mm512_permutexvar_ps(word[w][v], t));
          word[w][v] = _mm512_srli_epi32(word[w][v], 4);
        }
      }
    }
  }
  const __m512 one = _mm512_set1_ps(1.0f), total = _mm512_set1_ps(x.total);
  for (int v = 0; v < kVectors; ++v) {
    combine<L>(block.halves() + v * kVector, S[0][v], S[1][v], S[2][v], one, total, sums + v * kVector);
  }
}

// `Vectors` registers of rows at a time: as many accumulators as fit.
template <int L, int Planes, int Vectors>
void add_planes(const TwoPlaneBlock& block, const TwoPlaneActivations& x, float* sums, int32_t* counts) {
  constexpr int kWeights = L == 4 ? 3 : 2;
  const __m512 total = _mm512_set1_ps(x.total), none = _mm512_set1_ps(-x.total), one = _mm512_set1_ps(1.0f);
  for (int64_t n = 0; n < kTwoPlaneRows; n += Vectors * kVector) {
    __m512i count[kWeights][Planes][Vectors];
    for (auto& weights : count) {
      for (auto& plane : weights) {
        for (__m512i& c : plane) c = _mm512_setzero_si512();
      }
    }
    if (n == 0 && block.repeats > 0) prefetch(block.levels, kAhead, 2 * L);
    const uint8_t* codes = block.codes + 4 * n;
    const uint8_t* q = x.prepared;
    for (int64_t c = 0; c < block.chunks; ++c, codes += kChunkBytes, q += 4 * Planes) {
      if (block.repeats > 0) prefetch(codes, kAhead, Vectors), prefetch(codes + kPlaneBytes, kAhead, Vectors);
      __m512i word[3][Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        word[0][v] = load(codes + v * kRegister);
        word[1][v] = load(codes + kPlaneBytes + v * kRegister);
        if (L == 4) word[2][v] = _mm512_and_si512(word[0][v], word[1][v]);
      }
#pragma GCC unroll 8
      for (int k = 0; k < Planes; ++k) {
        const __m512i bits = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(q)[k]);
#pragma GCC unroll 3
        for (int w = 0; w < kWeights; ++w) {
#pragma GCC unroll 2
          for (int v = 0; v < Vectors; ++v) {
            count[w][k][v] =
                _mm512_add_epi32(count[w][k][v], _mm512_popcnt_epi32(_mm512_and_si512(word[w][v], bits)));
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const int64_t row = n + v * kVector;
      __m512 V[3];
      for (int w = 0; w < kWeights; ++w) {
        V[w] = none;
        for (int k = 0; k < Planes; ++k) {
          V[w] = _mm512_fmadd_ps(_mm512_set1_ps(x.twice[k]), _mm512_cvtepi32_ps(count[w][k][v]), V[w]);
          if (counts != nullptr) _mm512_storeu_si512(counts + (w * Planes + k) * kTwoPlaneRows + row, count[w][k][v]);
        }
      }
      if constexpr (L == 4) {  // s_A s_B = 2 s_AB - s_A - s_B + 1, and s_C = -s_A s_B
        const __m512 singles = _mm512_sub_ps(_mm512_add_ps(V[0], V[1]), total);
        V[2] = _mm512_fnmadd_ps(_mm512_set1_ps(2.0f), V[2], singles);
      } else {
        V[2] = total;  // not read
      }
      combine<L>(block.halves() + row, V[0], V[1], V[2], one, total, sums + row);
    }
  }
}

template <int L>
void add_lut_asking(const TwoPlaneBlock& block, const TwoPlaneActivations& x, float* sums) {
  constexpr int kMany = L == 4 ? 3 : 4;  // two words outrun the memory by more than three
  if (block.repeats > 1) return add_lut<L, kMany>(block, x, sums);
  if (block.repeats == 1) return add_lut<L, 1>(block, x, sums);
  add_lut<L, 0>(block, x, sums);
}

void add_lut_any(const TwoPlaneBlock& block, int64_t levels, const TwoPlaneActivations& x, float* sums) {
  switch (levels) {
    case 2: return add_lut_asking<2>(block, x, sums);
    case 3: return add_lut_asking<3>(block, x, sums);
    default: return add_lut_asking<4>(block, x, sums);
  }
}

void add_exact_any(const TwoPlaneBlock& block, int64_t levels, const TwoPlaneActivations& x, float* sums) {
  switch (levels) {
    case 2: return add_exact<2>(block, x, sums);
    case 3: return add_exact<3>(block, x, sums);
    default: return add_exact<4>(block, x, sums);
  }
}

void add_planes_any(const TwoPlaneBlock& block, int64_t levels, int64_t planes, const TwoPlaneActivations& x,
                    float* sums, int32_t* counts) {
  if (planes == 4) {
    switch (levels) {
      case 2: return add_planes<2, 4, 2>(block, x, sums, counts);
      case 3: return add_planes<3, 4, 2>(block, x, sums, counts);
      default: return add_planes<4, 4, 1>(block, x, sums, counts);
    }
  }
  switch (levels) {
    case 2: return add_planes<2, 8, 1>(block, x, sums, counts);
    case 3: return add_planes<3, 8, 1>(block, x, sums, counts);
    default: return add_planes<4, 8, 1>(block, x, sums, counts);
  }
}

constexpr TwoPlaneKernels kKernels = {4,         128,          1,           true,          build_lut,
                                      build_exact, build_planes, add_lut_any, add_exact_any, add_planes_any};

}  // namespace two_plane_avx512
}  // namespace
}  // namespace lit_binq
