// Kernels for 4 and 8 bits on x86-64 with AVX2 and F16C. Knows nbits/kernel.h, prefetch.h and the intrinsics only.
// Compiled with the flags of these sets; no standard library, see sets/avx2.cpp.
//
// A register is half a line: 8 rows. VPMADDUBSW adds two products of an unsigned and a signed byte in 16 bits, which
// must not overflow, for it would saturate:
//
//     4 bits   codes up to 15: 2 * 15 * 127 = 3810, and 8 of them, 32 columns, are 30480
//     8 bits   codes less 128, their magnitude as the unsigned factor and their sign given to the activation:
//              2 * 128 * 127 = 32512; the zero point is less 128 too
#pragma once

#include <immintrin.h>

#include "common/prefetch.h"
#include "nbits/kernel.h"

namespace lit_binq {
namespace {
namespace nbits_avx2 {

constexpr int64_t kVector = 8;  // rows of a register
constexpr int64_t kBytes = 32;

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// 4 activations, for all rows.
inline __m256i four(const int8_t* a) {
  int32_t word;
  __builtin_memcpy(&word, a, sizeof word);
  return _mm256_set1_epi32(word);
}

// Of 8 rows from `row` on; p is where those of the tile are.
inline __m256 scales(const uint8_t* p, int64_t row, bool halves) {
  return halves ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * row)))
                : _mm256_loadu_ps(reinterpret_cast<const float*>(p + 4 * row));
}

template <int Bits>
inline __m256i zeros(const uint8_t* p, int64_t row, bool stored) {
  if (!stored) return _mm256_set1_epi32(1 << (Bits - 1));
  if constexpr (Bits == 8) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + row)));
  } else {
    int64_t words;
    __builtin_memcpy(&words, p, sizeof words);
    const __m256i digits = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12),
                                            _mm256_set1_epi32(static_cast<int>(2 * row)));
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi64x(words), digits), _mm256_set1_epi32(15));
  }
}

// `Vectors` registers of rows from `row` on.
template <int Bits, int Rows, int Vectors>
void rounded(const NBitsTile& t, const NBitsActivations* x, int64_t row, float* sums) {
  constexpr int64_t kColumns = 32 / Bits;  // of a line
  constexpr int64_t kSafe = Bits == 8 ? 1 : 4;  // lines whose sums fit 16 bits
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const __m256i middle = _mm256_set1_epi8(static_cast<char>(0x80));
  const uint8_t* codes = t.data;
  const int64_t code_bytes = t.lines * kNBitsLine, scale_bytes = nbits_scale_bytes(t.halves);
  const int64_t zero_bytes = nbits_zero_bytes(t.zeros, Bits);
  const int64_t safe = t.lines < kSafe ? t.lines : kSafe;
  int64_t column = 0;
  __m256 sum[Rows][Vectors];
  for (auto& of_row : sum) {
    for (__m256& s : of_row) s = _mm256_setzero_ps();
  }
  for (int64_t b = 0; b < t.blocks; ++b) {
    __m256i total[Rows][Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      __m256i z = zeros<Bits>(codes + code_bytes + scale_bytes, row + v * kVector, t.zeros);
      if (Bits == 8) z = _mm256_sub_epi32(z, _mm256_set1_epi32(128));
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
        total[m][v] = _mm256_mullo_epi32(z, _mm256_set1_epi32(x[m].minus_total[b]));
      }
    }
    for (int64_t l = 0; l < t.lines; l += safe) {
      __m256i part[Rows][Vectors];
      for (auto& of_row : part) {
        for (__m256i& p : of_row) p = _mm256_setzero_si256();
      }
      for (int64_t i = 0; i < safe; ++i, codes += kNBitsLine, column += kColumns) {
        if (Rows == 1) prefetch(codes, t.ahead);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
          const __m256i line = load(codes + 4 * row + v * kBytes);
          if constexpr (Bits == 8) {
            const __m256i q = _mm256_xor_si256(line, middle), magnitude = _mm256_abs_epi8(q);
#pragma GCC unroll 4
            for (int m = 0; m < Rows; ++m) {
              part[m][v] = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four(x[m].a + column), q));
            }
          } else {
            const __m256i one = _mm256_and_si256(line, low);
            const __m256i two = _mm256_and_si256(_mm256_srli_epi16(line, 4), low);
#pragma GCC unroll 4
            for (int m = 0; m < Rows; ++m) {
              const __m256i pair = _mm256_add_epi16(_mm256_maddubs_epi16(one, four(x[m].a + column)),
                                                    _mm256_maddubs_epi16(two, four(x[m].a + column + 4)));
              part[m][v] = _mm256_add_epi16(part[m][v], pair);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
          total[m][v] = _mm256_add_epi32(total[m][v], _mm256_madd_epi16(part[m][v], ones));
        }
      }
    }
    if (Rows == 1) prefetch(codes, t.ahead);
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const __m256 s = scales(codes, row + v * kVector, t.halves);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) {
        const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(total[m][v]), _mm256_set1_ps(x[m].unit[b]));
        sum[m][v] = _mm256_add_ps(sum[m][v], _mm256_mul_ps(value, s));
      }
    }
    codes += scale_bytes + zero_bytes;
  }
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < Vectors; ++v) _mm256_storeu_ps(sums + m * kNBitsRows + row + v * kVector, sum[m][v]);
  }
}

// 8 rows from `row` on.
template <int Bits, int Rows>
void exact(const NBitsTile& t, const NBitsActivations* x, int64_t row, double* sums) {
  constexpr int kColumns = 32 / Bits;
  const __m256i mask = _mm256_set1_epi32((1 << Bits) - 1);
  const uint8_t* codes = t.data;
  const int64_t code_bytes = t.lines * kNBitsLine, scale_bytes = nbits_scale_bytes(t.halves);
  const int64_t zero_bytes = nbits_zero_bytes(t.zeros, Bits);
  int64_t column = 0;
  __m256d sum[Rows][2];
  for (auto& s : sum) s[0] = s[1] = _mm256_setzero_pd();
  for (int64_t b = 0; b < t.blocks; ++b) {
    const __m256i z = zeros<Bits>(codes + code_bytes + scale_bytes, row, t.zeros);
    __m256 part[Rows][4];
    for (auto& p : part) p[0] = p[1] = p[2] = p[3] = _mm256_setzero_ps();
    for (int64_t l = 0; l < t.lines; ++l, codes += kNBitsLine, column += kColumns) {
      const __m256i line = load(codes + 4 * row);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const __m256i q = _mm256_and_si256(_mm256_srli_epi32(line, 8 * (j & 3) + 4 * (j >> 2)), mask);
        const __m256 w = _mm256_cvtepi32_ps(_mm256_sub_epi32(q, z));
#pragma GCC unroll 2
        for (int m = 0; m < Rows; ++m) {
          part[m][j & 3] = _mm256_add_ps(part[m][j & 3], _mm256_mul_ps(w, _mm256_set1_ps(x[m].x[column + j])));
        }
      }
    }
    const __m256 s = scales(codes, row, t.halves);
    const __m256d s0 = _mm256_cvtps_pd(_mm256_castps256_ps128(s)), s1 = _mm256_cvtps_pd(_mm256_extractf128_ps(s, 1));
    for (int m = 0; m < Rows; ++m) {
      const __m256 total = _mm256_add_ps(_mm256_add_ps(part[m][0], part[m][1]), _mm256_add_ps(part[m][2], part[m][3]));
      const __m256d t0 = _mm256_cvtps_pd(_mm256_castps256_ps128(total));
      const __m256d t1 = _mm256_cvtps_pd(_mm256_extractf128_ps(total, 1));
      sum[m][0] = _mm256_add_pd(sum[m][0], _mm256_mul_pd(t0, s0));
      sum[m][1] = _mm256_add_pd(sum[m][1], _mm256_mul_pd(t1, s1));
    }
    codes += scale_bytes + zero_bytes;
  }
  for (int m = 0; m < Rows; ++m) {
    _mm256_storeu_pd(sums + m * kNBitsRows + row, sum[m][0]);
    _mm256_storeu_pd(sums + m * kNBitsRows + row + 4, sum[m][1]);
  }
}

// One row of activations reads a line once; several go over the tile, which is in a cache, 8 rows of weights at a time:
// so many sums fit the 16 registers.
template <int Bits>
void rounded_rows(const NBitsTile& t, const NBitsActivations* x, int64_t rows, float* sums) {
  if (rows == 1) return rounded<Bits, 1, 2>(t, x, 0, sums);
  for (int64_t row = 0; row < kNBitsRows; row += kVector) {
    switch (rows) {
      case 2: rounded<Bits, 2, 1>(t, x, row, sums); break;
      case 3: rounded<Bits, 3, 1>(t, x, row, sums); break;
      default: rounded<Bits, 4, 1>(t, x, row, sums); break;
    }
  }
}

template <int Bits>
void exact_rows(const NBitsTile& t, const NBitsActivations* x, int64_t rows, double* sums) {
  for (int64_t row = 0; row < kNBitsRows; row += kVector) {
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) exact<Bits, 2>(t, x + m, row, sums + m * kNBitsRows);
    if (m < rows) exact<Bits, 1>(t, x + m, row, sums + m * kNBitsRows);
  }
}

constexpr NBitsKernels kKernels = {rounded_rows<4>, rounded_rows<8>, exact_rows<4>, exact_rows<8>};

}  // namespace nbits_avx2
}  // namespace
}  // namespace lit_binq
