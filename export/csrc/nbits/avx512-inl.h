// Kernels for 4 and 8 bits on x86-64 with AVX-512 F, BW and VNNI. Knows nbits/kernel.h, prefetch.h and the intrinsics
// only. Compiled with the flags of these sets; no standard library, see sets/avx2.cpp.
//
// A register is a line: a word of 4 bytes for each of the 16 rows. VPDPBUSD multiplies the 4 unsigned codes of a word
// by 4 activations, the same for all rows, and adds up. High halves of bytes stay where they are: their sums are 16
// times too large, which one shift a block undoes.
#pragma once

#include <immintrin.h>

#include "common/prefetch.h"
#include "nbits/kernel.h"

namespace lit_binq {
namespace {
namespace nbits_avx512 {

inline __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }

// 4 activations, for all rows.
inline __m512i four(const int8_t* a) {
  int32_t word;
  __builtin_memcpy(&word, a, sizeof word);
  return _mm512_set1_epi32(word);
}

inline __m512 scales(const uint8_t* p, bool halves) {
  return halves ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) : _mm512_loadu_ps(p);
}

template <int Bits>
inline __m512i zeros(const uint8_t* p, bool stored) {
  if (!stored) return _mm512_set1_epi32(1 << (Bits - 1));
  if constexpr (Bits == 8) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else {
    int64_t words;
    __builtin_memcpy(&words, p, sizeof words);
    const __m512i digits = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi64(words), digits), _mm512_set1_epi32(15));
  }
}

template <int Bits, int Rows>
void rounded(const NBitsTile& t, const NBitsActivations* x, float* sums) {
  constexpr int64_t kColumns = 8;  // of a step: one line of 4 bits or two of 8
  constexpr int kLines = Bits / 4;
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  const uint8_t* codes = t.data;
  const int64_t code_bytes = t.lines * kNBitsLine, scale_bytes = nbits_scale_bytes(t.halves);
  const int64_t zero_bytes = nbits_zero_bytes(t.zeros, Bits);
  const int64_t steps = t.lines / kLines;
  int64_t column = 0;
  __m512 sum[Rows];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  for (int64_t b = 0; b < t.blocks; ++b) {
    const __m512i z = zeros<Bits>(codes + code_bytes + scale_bytes, t.zeros);
    __m512i first[Rows], second[Rows];
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      // z and the sum of activations fit 16 bits, and the upper halves of z are zero
      first[m] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), z, _mm512_set1_epi32(x[m].minus_total[b]));
      second[m] = _mm512_setzero_si512();
    }
    for (int64_t i = 0; i < steps; ++i, codes += kLines * kNBitsLine, column += kColumns) {
      if (Rows == 1) prefetch(codes, t.ahead, kLines);
      const __m512i line = load(codes);
      const __m512i one = Bits == 8 ? line : _mm512_and_si512(line, low);
      const __m512i two = Bits == 8 ? load(codes + kNBitsLine) : _mm512_and_si512(line, high);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
        first[m] = _mm512_dpbusd_epi32(first[m], one, four(x[m].a + column));
        second[m] = _mm512_dpbusd_epi32(second[m], two, four(x[m].a + column + kColumns / 2));
      }
    }
    if (Rows == 1) prefetch(codes, t.ahead);
    const __m512 s = scales(codes, t.halves);
    codes += scale_bytes + zero_bytes;
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      if (Bits == 4) second[m] = _mm512_srai_epi32(second[m], 4);
      const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(first[m], second[m]));
      sum[m] = _mm512_add_ps(sum[m], _mm512_mul_ps(_mm512_mul_ps(value, _mm512_set1_ps(x[m].unit[b])), s));
    }
  }
  for (int m = 0; m < Rows; ++m) _mm512_storeu_ps(sums + m * kNBitsRows, sum[m]);
}

inline __m512d lower(__m512 v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
inline __m512d upper(__m512 v) {
  return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
}

template <int Bits, int Rows>
void exact(const NBitsTile& t, const NBitsActivations* x, double* sums) {
  constexpr int kColumns = 32 / Bits;
  const __m512i mask = _mm512_set1_epi32((1 << Bits) - 1);
  const uint8_t* codes = t.data;
  const int64_t code_bytes = t.lines * kNBitsLine, scale_bytes = nbits_scale_bytes(t.halves);
  const int64_t zero_bytes = nbits_zero_bytes(t.zeros, Bits);
  int64_t column = 0;
  __m512d sum[Rows][2];
  for (auto& s : sum) s[0] = s[1] = _mm512_setzero_pd();
  for (int64_t b = 0; b < t.blocks; ++b) {
    const __m512i z = zeros<Bits>(codes + code_bytes + scale_bytes, t.zeros);
    __m512 part[Rows][4];
    for (auto& p : part) p[0] = p[1] = p[2] = p[3] = _mm512_setzero_ps();
    for (int64_t l = 0; l < t.lines; ++l, codes += kNBitsLine, column += kColumns) {
      const __m512i line = load(codes);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const __m512i q = _mm512_and_si512(_mm512_srli_epi32(line, 8 * (j & 3) + 4 * (j >> 2)), mask);
        const __m512 w = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, z));
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
          part[m][j & 3] = _mm512_add_ps(part[m][j & 3], _mm512_mul_ps(w, _mm512_set1_ps(x[m].x[column + j])));
        }
      }
    }
    const __m512 s = scales(codes, t.halves);
    codes += scale_bytes + zero_bytes;
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
      const __m512 total = _mm512_add_ps(_mm512_add_ps(part[m][0], part[m][1]), _mm512_add_ps(part[m][2], part[m][3]));
      sum[m][0] = _mm512_add_pd(sum[m][0], _mm512_mul_pd(lower(total), lower(s)));
      sum[m][1] = _mm512_add_pd(sum[m][1], _mm512_mul_pd(upper(total), upper(s)));
    }
  }
  for (int m = 0; m < Rows; ++m) {
    _mm512_storeu_pd(sums + m * kNBitsRows, sum[m][0]);
    _mm512_storeu_pd(sums + m * kNBitsRows + 8, sum[m][1]);
  }
}

template <int Bits>
void rounded_rows(const NBitsTile& t, const NBitsActivations* x, int64_t rows, float* sums) {
  switch (rows) {
    case 1: return rounded<Bits, 1>(t, x, sums);
    case 2: return rounded<Bits, 2>(t, x, sums);
    case 3: return rounded<Bits, 3>(t, x, sums);
    default: return rounded<Bits, 4>(t, x, sums);
  }
}

template <int Bits>
void exact_rows(const NBitsTile& t, const NBitsActivations* x, int64_t rows, double* sums) {
  switch (rows) {
    case 1: return exact<Bits, 1>(t, x, sums);
    case 2: return exact<Bits, 2>(t, x, sums);
    case 3: return exact<Bits, 3>(t, x, sums);
    default: return exact<Bits, 4>(t, x, sums);
  }
}

constexpr NBitsKernels kKernels = {rounded_rows<4>, rounded_rows<8>, exact_rows<4>, exact_rows<8>};

}  // namespace nbits_avx512
}  // namespace
}  // namespace lit_binq
