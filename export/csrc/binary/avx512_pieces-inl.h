// What the files of the AVX-512 kernels share: avx512-inl.h, and avx512_lut5-inl.h for several rows of
// activations.
#pragma once

#include <immintrin.h>

#include "binary/kernel.h"

namespace lit_binq {
namespace {
namespace binary_avx512 {

constexpr int64_t kRows = 16;               // of a register of codes: one cache line
constexpr int64_t kVectors = kTileRows / kRows;
constexpr int64_t kHalf = 16 * kQuad;       // entries of the low (or the high) nibbles of a quad
constexpr int64_t kTable = 2 * kHalf;       // entries of a quad

static inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << (count > 0 ? count : 0)) - 1u);
}

// z of 16 columns from k on, zero from `count` on.
static inline __m512 scaled(const float* x, const float* c, int64_t k, int64_t count, __m512 pre) {
  const __mmask16 inside = first_lanes(count - k);
  const __m512 scale = _mm512_maskz_loadu_ps(inside, c + k);
  const __mmask16 live = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  return _mm512_maskz_mul_ps(live, _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, x + k), pre), scale);
}

// 16 groups of 4 activations, taken apart: z[j] holds the j-th activation of every group. Lane l of its 4 lanes holds
// groups 2 l, 2 l + 1, 2 l + 8 and 2 l + 9, so that store_tables finds its results in their places.
struct Groups {
  __m512 z[4];
};

// Of 64 columns: a to d are 16 each.
static inline Groups groups_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512i first = _mm512_setr_epi32(0, 4, 16, 20, 8, 12, 24, 28, 1, 5, 17, 21, 9, 13, 25, 29);  // z[0] and z[1]
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  const __m512 ac01 = _mm512_permutex2var_ps(a, first, c), bd01 = _mm512_permutex2var_ps(b, first, d);
  const __m512 ac23 = _mm512_permutex2var_ps(a, second, c), bd23 = _mm512_permutex2var_ps(b, second, d);
  return {{_mm512_shuffle_f32x4(ac01, bd01, 0x44), _mm512_shuffle_f32x4(ac01, bd01, 0xee),
           _mm512_shuffle_f32x4(ac23, bd23, 0x44), _mm512_shuffle_f32x4(ac23, bd23, 0xee)}};
}

static inline __m512 magnitude(__m512 v) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}

// Adds the integers of 16 rows of weights to their sums.
static inline void add_units(__m512i units, __m512 scale, const float* factors, float* sums) {
  __m512 value = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(units));
  if (factors != nullptr) value = _mm512_mul_ps(value, _mm512_loadu_ps(factors));
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), value));
}

}  // namespace binary_avx512
}  // namespace
}  // namespace lit_binq
