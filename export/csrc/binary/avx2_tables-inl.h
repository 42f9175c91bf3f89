// The kernels for x86-64 with AVX2: making tables, and the magnitudes that their scale is chosen by. No
// standard library (sets/avx2.cpp says why), no fused multiply-add.
#pragma once

#include <immintrin.h>

#include "binary/kernel.h"

namespace lit_binq {
namespace {
namespace binary_avx2 {

// Entries of halved tables for a weight byte: the sums of either nibble whose highest bit is set, the low nibble's
// first. The other sums are their negatives.
constexpr int64_t kHalfEntries = 16;

inline int32_t largest_lane(__m256i v) {
  const __m128i half = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i quarter = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1)));
}

// z of one block into `z` (32-byte aligned), zero up to kBlock.
void scaled_activations(const float* x, const float* c, int64_t count, float pre, float* z) {
  const __m256 p = _mm256_set1_ps(pre);
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    const __m256 scale = _mm256_loadu_ps(c + k);
    const __m256 live = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_NEQ_OQ);
    _mm256_store_ps(z + k, _mm256_and_ps(live, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + k), p), scale)));
  }
  for (; k < count; ++k) z[k] = c[k] != 0.0f ? (x[k] * pre) * c[k] : 0.0f;
  for (; k < kBlock; ++k) z[k] = 0.0f;
}

// 8 groups of 4 activations, that is 4 weight bytes, taken apart: z[j] holds the j-th activation of the groups
// 0, 2, 4, 6 in its low half and of 1, 3, 5, 7 in its high half.
struct Groups {
  __m256 z[4];
};

inline Groups load_groups(const float* z) {
  const __m256 a = _mm256_load_ps(z), b = _mm256_load_ps(z + 8), c = _mm256_load_ps(z + 16), d = _mm256_load_ps(z + 24);
  const __m256 ab01 = _mm256_unpacklo_ps(a, b), ab23 = _mm256_unpackhi_ps(a, b);
  const __m256 cd01 = _mm256_unpacklo_ps(c, d), cd23 = _mm256_unpackhi_ps(c, d);
  return {{_mm256_shuffle_ps(ab01, cd01, 0x44), _mm256_shuffle_ps(ab01, cd01, 0xee),
           _mm256_shuffle_ps(ab23, cd23, 0x44), _mm256_shuffle_ps(ab23, cd23, 0xee)}};
}

inline __m256 magnitude(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }

// Largest |z0| + |z1| + |z2| + |z3| over `count` activations; z is zero beyond.
float largest_sum(const float* z, int64_t count) {
  __m256 sums = _mm256_setzero_ps();
  for (int64_t k = 0; k < count; k += 32) {
    const Groups g = load_groups(z + k);
    sums = _mm256_max_ps(sums, _mm256_add_ps(_mm256_add_ps(magnitude(g.z[0]), magnitude(g.z[1])),
                                             _mm256_add_ps(magnitude(g.z[2]), magnitude(g.z[3]))));
  }
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

// Four sums of all groups as bytes: lane g holds a, b, c, d of group g, from the lowest byte on.
inline __m256i four_bytes(__m256 a, __m256 b, __m256 c, __m256 d, __m256 units) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(a, units)),
                                        _mm256_cvtps_epi32(_mm256_mul_ps(b, units)));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(c, units)),
                                        _mm256_cvtps_epi32(_mm256_mul_ps(d, units)));
  // In each half: 4 groups of a, then of b, of c, of d. The shuffle is their transpose.
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm256_shuffle_epi8(_mm256_packs_epi16(ab, cd), order);
}

// The bytes of a lane reversed and negated: the sums of the inverted indices.
inline __m256i mirrored(__m256i bytes) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
  return _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_shuffle_epi8(bytes, order));
}

// The sums of all groups with + z3: indices 8 to 11 and 12 to 15, whose bits 0, 1, 2 are the signs of z0, z1, z2.
struct UpperSums {
  __m256i i8, i12;
};

inline UpperSums upper_sums(const Groups& g, __m256 units) {
  const __m256 same01 = _mm256_add_ps(g.z[0], g.z[1]), differ01 = _mm256_sub_ps(g.z[0], g.z[1]);  // + z0 and +- z1
  const __m256 same23 = _mm256_add_ps(g.z[2], g.z[3]), differ23 = _mm256_sub_ps(g.z[3], g.z[2]);  // + z3 and +- z2
  return {four_bytes(_mm256_sub_ps(differ23, same01), _mm256_add_ps(differ23, differ01),
                     _mm256_sub_ps(differ23, differ01), _mm256_add_ps(differ23, same01), units),
          four_bytes(_mm256_sub_ps(same23, same01), _mm256_add_ps(same23, differ01), _mm256_sub_ps(same23, differ01),
                     _mm256_add_ps(same23, same01), units)};
}

// The tables of 4 weight bytes. Only 8 of a group's 16 sums are computed: the sum of an inverted index is the negative
// one, and rounding is symmetric.
inline void store_tables(const Groups& g, __m256 units, uint8_t* table) {
  const UpperSums upper = upper_sums(g, units);
  const __m256i i0 = mirrored(upper.i12), i4 = mirrored(upper.i8);
  // Lane g of i0, i4, i8, i12 are the 16 bytes of group g: a transpose of 4 x 4 within each half.
  const __m256i low = _mm256_unpacklo_epi32(i0, i4), high = _mm256_unpackhi_epi32(i0, i4);
  const __m256i low8 = _mm256_unpacklo_epi32(upper.i8, upper.i12), high8 = _mm256_unpackhi_epi32(upper.i8, upper.i12);
  const __m256i bias = _mm256_set1_epi8(static_cast<char>(kTableBias));
  const __m256i tables[4] = {_mm256_unpacklo_epi64(low, low8), _mm256_unpackhi_epi64(low, low8),
                             _mm256_unpacklo_epi64(high, high8), _mm256_unpackhi_epi64(high, high8)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + kLutEntries * i), _mm256_xor_si256(tables[i], bias));
  }
}

// Of the same tables the upper 8 entries only: for each weight byte those of its low nibble, then of its high nibble.
inline void store_halves(const Groups& g, __m256 units, uint8_t* table) {
  const UpperSums upper = upper_sums(g, units);
  const __m256i bias = _mm256_set1_epi8(static_cast<char>(kTableBias));
  // 8 bytes for each group: 0 and 2 | 1 and 3, then 4 and 6 | 5 and 7
  const __m256i first = _mm256_xor_si256(_mm256_unpacklo_epi32(upper.i8, upper.i12), bias);
  const __m256i second = _mm256_xor_si256(_mm256_unpackhi_epi32(upper.i8, upper.i12), bias);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(table), _mm256_permute4x64_epi64(first, 0xd8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + 32), _mm256_permute4x64_epi64(second, 0xd8));
}

// Sign masks by the bit of the lane's number: set bit keeps the sign, clear bit flips it.
inline __m256 flip_bit0() { return _mm256_setr_ps(-0.f, 0.f, -0.f, 0.f, -0.f, 0.f, -0.f, 0.f); }
inline __m256 flip_bit1() { return _mm256_setr_ps(-0.f, -0.f, 0.f, 0.f, -0.f, -0.f, 0.f, 0.f); }
inline __m256 flip_bit2() { return _mm256_setr_ps(-0.f, -0.f, -0.f, -0.f, 0.f, 0.f, 0.f, 0.f); }

inline __m256 pair_sums(const float* z) {
  return _mm256_add_ps(_mm256_xor_ps(_mm256_broadcast_ss(z), flip_bit0()),
                       _mm256_xor_ps(_mm256_broadcast_ss(z + 1), flip_bit1()));
}

inline __m256 triple_sums(const float* z) {
  return _mm256_add_ps(pair_sums(z), _mm256_xor_ps(_mm256_broadcast_ss(z + 2), flip_bit2()));
}

Magnitudes largest(const float* x, const float* c, int64_t K) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  // Two of each, so that one maximum need not wait for the one before.
  __m256i all[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, live[2] = {all[0], all[0]};
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    for (int i = 0; i < 2; ++i) {
      const __m256i word = _mm256_and_si256(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k + 8 * i)), magnitude);
      all[i] = _mm256_max_epi32(all[i], word);
      if (c == nullptr) continue;
      const __m256 counts = _mm256_cmp_ps(_mm256_loadu_ps(c + k + 8 * i), _mm256_setzero_ps(), _CMP_NEQ_OQ);
      live[i] = _mm256_max_epi32(live[i], _mm256_and_si256(word, _mm256_castps_si256(counts)));
    }
  }
  Magnitudes m = {largest_lane(_mm256_max_epi32(all[0], all[1])), largest_lane(_mm256_max_epi32(live[0], live[1]))};
  if (c == nullptr) m.live = m.all;
  return with_rest(m, x, c, k, K);
}

void build_lut(const float* x, const float* c, int64_t count, float pre, bool dense, uint8_t* table, float* scale) {
  alignas(32) float z[kBlock];
  scaled_activations(x, c, count, pre, z);
  const float largest = largest_sum(z, count);
  const bool zero = !(largest >= kTiniestSum);
  const __m256 units = _mm256_set1_ps(zero ? 0.0f : kTableLimit / largest);
  *scale = zero ? 0.0f : largest / kTableLimit;
  const int64_t bytes = block_bytes(count);
  if (dense) {
    for (int64_t k = 0; k < bytes; k += kQuad) store_halves(load_groups(z + 8 * k), units, table + kHalfEntries * k);
  } else {
    for (int64_t k = 0; k < bytes; k += kQuad) store_tables(load_groups(z + 8 * k), units, table + kLutEntries * k);
  }
}

void build_exact(const float* x, const float* c, int64_t count, float pre, float* table) {
  alignas(32) float z[kBlock];
  scaled_activations(x, c, count, pre, z);
  const int64_t bytes = block_bytes(count);
  for (int64_t k = 0; k < bytes; ++k) {
    _mm256_storeu_ps(table + kExactEntries * k, triple_sums(z + 8 * k));
    _mm256_storeu_ps(table + kExactEntries * k + 8, triple_sums(z + 8 * k + 3));
    _mm256_storeu_ps(table + kExactEntries * k + 16, pair_sums(z + 8 * k + 6));
  }
}

}  // namespace binary_avx2
}  // namespace
}  // namespace lit_binq
