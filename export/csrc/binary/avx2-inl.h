// The kernels for x86-64 with AVX2: multiplying; avx2_tables-inl.h makes the tables. No
// standard library (sets/avx2.cpp says why). No fused multiply-add: results must equal scalar-inl.h bit for bit.
#pragma once

#include <immintrin.h>

#include "binary/avx2_tables-inl.h"
#include "common/prefetch.h"
#include "common/silu.h"

namespace lit_binq {
namespace {
namespace binary_avx2 {

// sum[0..7] += scale * units[0..7], times factors[0..7] where there are any
template <bool Factors>
inline void add_scaled(__m128i units, __m256 scale, const float* factors, float* sum) {
  __m256 value = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(units)));
  if (Factors) value = _mm256_mul_ps(value, _mm256_loadu_ps(factors));
  _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), value));
}

// Sums of 32 rows of weights. A 16-bit lane stands for an even and an odd row: `both` adds the picked bytes as whole
// lanes, so it is even + 256 * odd modulo 2^16; `odd` adds the upper bytes alone.
struct Sums {
  __m256i both, odd;
};

// vpmaddubsw multiplies the even byte by 0 and the odd one by 1. A shift does the same, but on many processors it
// takes the unit that shuffles, which is the busiest here.
inline __m256i odd_bytes(__m256i bytes) { return _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0100)); }

inline void pick(const uint8_t* entries, __m256i index, __m256i& both, __m256i& odd) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  const __m256i bytes = _mm256_shuffle_epi8(table, index);
  both = _mm256_add_epi16(both, bytes);
  odd = _mm256_add_epi16(odd, odd_bytes(bytes));
  // Says that the sums are needed here. Without it the compiler first adds up what is picked for several sums, runs
  // out of registers and keeps sums in memory, which takes a third longer.
  __asm__("" : "+x"(both), "+x"(odd));
}

// `factors` are read only where there are any; else they may be any pointer.
template <bool Factors>
inline void flush(const Sums& s, int64_t bytes, float scale_value, const float* factors, float* sum) {
  const __m256i bias = _mm256_set1_epi16(static_cast<short>(2 * bytes * kTableBias));
  const __m256 scale = _mm256_set1_ps(scale_value);
  const __m256i e = _mm256_sub_epi16(_mm256_sub_epi16(s.both, _mm256_slli_epi16(s.odd, 8)), bias);
  const __m256i o = _mm256_sub_epi16(s.odd, bias);
  const __m256i first = _mm256_unpacklo_epi16(e, o);   // rows 0-7 and 16-23
  const __m256i second = _mm256_unpackhi_epi16(e, o);  // rows 8-15 and 24-31
  add_scaled<Factors>(_mm256_castsi256_si128(first), scale, factors, sum);
  add_scaled<Factors>(_mm256_castsi256_si128(second), scale, factors + 8, sum + 8);
  add_scaled<Factors>(_mm256_extracti128_si256(first, 1), scale, factors + 16, sum + 16);
  add_scaled<Factors>(_mm256_extracti128_si256(second, 1), scale, factors + 24, sum + 24);
}

// The sums of one block for `Tokens` rows of activations and `Vectors` * 32 rows of weights, from row `first` of the
// tile on. A function of its own, with its results in memory: GCC keeps the sums in registers only where the loop over
// the bytes is all there is.
template <int Vectors, int Tokens>
__attribute__((noinline)) void add_bytes(const TileBlock& block, int64_t first, const uint8_t* tables, int64_t stride,
                                         Sums* result) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i both[Tokens][Vectors], odd[Tokens][Vectors];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) both[t][i] = odd[t][i] = _mm256_setzero_si256();
  }
  const uint8_t* codes = block.codes + first;
  const uint8_t* const end = codes + block.bytes * block.width;
  do {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) {
      const __m256i byte = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * kVectorRows));
      const __m256i low = _mm256_and_si256(byte, nibble);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) pick(tables + t * stride, low, both[t][i], odd[t][i]);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(byte, 4), nibble);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) pick(tables + t * stride + 16, high, both[t][i], odd[t][i]);
    }
    // One row of activations reads the weights once and from memory; several find them in the cache.
    if (Tokens == 1) {
      for (int64_t i = 0; i < Vectors; i += 2) prefetch(codes + i * kVectorRows, kAhead);
    }
    codes += block.width;
    tables += kLutEntries;
  } while (codes != end);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) result[t * Vectors + i] = {both[t][i], odd[t][i]};
  }
}

template <int Vectors, int Tokens>
inline void add_lut_part(const TileBlock& block, int64_t first, const Rows& r, const float* factors) {
  Sums sums[Tokens * Vectors];
  add_bytes<Vectors, Tokens>(block, first, r.tables, r.stride, sums);
  for (int t = 0; t < Tokens; ++t) {
    const float scale = r.scales[t * r.scale_stride];
    for (int i = 0; i < Vectors; ++i) {
      const int64_t row = first + i * kVectorRows;
      float* sum = r.sums + t * kTileRows + row;
      if (factors != nullptr) {
        flush<true>(sums[t * Vectors + i], block.bytes, scale, factors + row, sum);
      } else {
        flush<false>(sums[t * Vectors + i], block.bytes, scale, sum, sum);
      }
    }
  }
}

// --- Many rows of activations
//
// Then it pays to rewrite a block of weights first. A sum of 4 activations is +- (z3 +- z0 +- z1 +- z2): a sign and one
// of 8 sums, so 16 entries hold the tables of both nibbles of a byte. A register of indices is 16 rows with both
// nibbles of each beside each other, and vpmaddubsw multiplies the two picked bytes by their signs and adds them. That
// is 3 operations for 128 weights, where `add_bytes` needs 4 and the making of indices. The bias of the bytes comes out
// as 128 times the sum of a row's signs, which does not depend on the activations: it is where the sums start.

constexpr int64_t kPairRows = 16;    // rows of a register of indices
constexpr int64_t kPairs = kTileRows / kPairRows;
constexpr int64_t kFewestRows = 12;  // rewriting costs what it saves on about 9 rows

// A block of up to 128 rows rewritten: 16 KB, which with the tables of 4 rows of activations stay in a 32 KB L1.
struct SignedBlock {
  __m256i index[kBlockBytes * kPairs];  // [bytes][pairs]
  __m256i sign[kBlockBytes * kPairs];   // -1 or 1
  __m256i start[kPairs];                // - 128 * sum of the signs of a row, 16 bits
};

// Registers 2i and 2i + 1 are rows 32i to 32i + 31; the low one has 0-7 and 16-23, the high one 8-15 and 24-31.
void rewrite(const TileBlock& block, SignedBlock& out) {
  const __m256i nibble = _mm256_set1_epi8(15), bias = _mm256_set1_epi8(static_cast<char>(kTableBias));
  // Of a nibble: bit 3 is the sign; where it is clear, the other bits are inverted.
  const __m256i index = _mm256_broadcastsi128_si256(_mm_setr_epi8(7, 6, 5, 4, 3, 2, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i sign = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0101010101010101, -1));
  const __m256i second = _mm256_set1_epi16(0x0800);  // the high nibble's entries are the last 8
  const int64_t pairs = block.width / kPairRows;
  for (int64_t i = 0; i < pairs; ++i) out.start[i] = _mm256_setzero_si256();
  for (int64_t k = 0; k < block.bytes; ++k) {
    const uint8_t* codes = block.codes + k * block.width;
    for (int64_t i = 0; i < pairs; i += 2) {
      const __m256i byte = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * kPairRows));
      const __m256i low = _mm256_and_si256(byte, nibble);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(byte, 4), nibble);
      const __m256i both[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m256i signs = _mm256_shuffle_epi8(sign, both[j]);
        out.index[k * kPairs + i + j] = _mm256_or_si256(_mm256_shuffle_epi8(index, both[j]), second);
        out.sign[k * kPairs + i + j] = signs;
        out.start[i + j] = _mm256_sub_epi16(out.start[i + j], _mm256_maddubs_epi16(bias, signs));
      }
    }
  }
}

// The sums of 2 registers of indices for `Tokens` rows of activations, whose halved tables are `stride` bytes apart.
template <int Tokens>
__attribute__((noinline)) void add_signed(const SignedBlock& block, int64_t bytes, int64_t pair, const uint8_t* tables,
                                          int64_t stride, __m256i* result) {
  __m256i sums[Tokens][2];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) sums[t][i] = block.start[pair + i];
  }
  const __m256i* index = block.index + pair;
  const __m256i* sign = block.sign + pair;
  const __m256i* const end = index + bytes * kPairs;
  do {
    const __m256i index0 = index[0], index1 = index[1], sign0 = sign[0], sign1 = sign[1];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const __m256i table = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(tables + t * stride)));
      sums[t][0] = _mm256_add_epi16(sums[t][0], _mm256_maddubs_epi16(_mm256_shuffle_epi8(table, index0), sign0));
      sums[t][1] = _mm256_add_epi16(sums[t][1], _mm256_maddubs_epi16(_mm256_shuffle_epi8(table, index1), sign1));
      __asm__("" : "+x"(sums[t][0]), "+x"(sums[t][1]));  // as in `pick`
    }
    index += kPairs;
    sign += kPairs;
    tables += kHalfEntries;
  } while (index != end);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) result[2 * t + i] = sums[t][i];
  }
}

template <bool Factors>
inline void flush_pair(const __m256i* units, float scale_value, const float* factors, float* sum) {
  const __m256 scale = _mm256_set1_ps(scale_value);
  add_scaled<Factors>(_mm256_castsi256_si128(units[0]), scale, factors, sum);
  add_scaled<Factors>(_mm256_castsi256_si128(units[1]), scale, factors + 8, sum + 8);
  add_scaled<Factors>(_mm256_extracti128_si256(units[0], 1), scale, factors + 16, sum + 16);
  add_scaled<Factors>(_mm256_extracti128_si256(units[1], 1), scale, factors + 24, sum + 24);
}

template <int Tokens>
void add_signed_rows(const SignedBlock& block, int64_t bytes, int64_t width, const Rows& r, const float* factors) {
  for (int64_t row = 0; row < width; row += kVectorRows) {
    __m256i units[2 * Tokens];
    add_signed<Tokens>(block, bytes, row / kPairRows, r.tables, r.stride, units);
    for (int t = 0; t < Tokens; ++t) {
      const float scale = r.scales[t * r.scale_stride];
      float* sum = r.sums + t * kTileRows + row;
      if (factors != nullptr) {
        flush_pair<true>(units + 2 * t, scale, factors + row, sum);
      } else {
        flush_pair<false>(units + 2 * t, scale, sum, sum);
      }
    }
  }
}

// One row of activations: 4 vectors of weights, so that a table is loaded once for all of them; 8 sums, 2 tables, 2
// constants and 3 temporaries are 15 of the 16 registers. Two rows: 2 vectors of weights, 8 sums again. From 12 rows on
// the weights are rewritten; 4 rows at a time, so that an index and a sign serve 4 tables: 8 sums, 2 of each, a table
// and a temporary.
void add_lut(const TileBlock& block, const uint8_t* tables, bool dense, int64_t stride, const float* scales,
             int64_t scale_stride, const float* factors, int64_t rows, float* sums) {
  Rows r{tables, stride, scales, scale_stride, sums};
  const auto skip = [&](int64_t done) {
    r.tables += done * stride;
    r.scales += done * scale_stride;
    r.sums += done * kTileRows;
    rows -= done;
  };
  if (dense) {
    SignedBlock rewritten;
    rewrite(block, rewritten);
    for (; rows >= 4; skip(4)) add_signed_rows<4>(rewritten, block.bytes, block.width, r, factors);
    if (rows == 3) add_signed_rows<3>(rewritten, block.bytes, block.width, r, factors);
    if (rows == 2) add_signed_rows<2>(rewritten, block.bytes, block.width, r, factors);
    if (rows == 1) add_signed_rows<1>(rewritten, block.bytes, block.width, r, factors);
    return;
  }
  for (; rows >= 2; skip(2)) {
    int64_t n = 0;
    for (; n + 2 * kVectorRows <= block.width; n += 2 * kVectorRows) add_lut_part<2, 2>(block, n, r, factors);
    if (n < block.width) add_lut_part<1, 2>(block, n, r, factors);
  }
  if (rows == 0) return;
  switch (block.width / kVectorRows) {
    case 4: return add_lut_part<4, 1>(block, 0, r, factors);
    case 3: return add_lut_part<3, 1>(block, 0, r, factors);
    case 2: return add_lut_part<2, 1>(block, 0, r, factors);
    default: return add_lut_part<1, 1>(block, 0, r, factors);
  }
}

// 32 rows of weights as 4 registers of 8 floats: 4 sums, 3 tables and temporaries fit the 16 registers.
inline void add_exact_vector(const uint8_t* codes, int64_t width, int64_t bytes, const float* table,
                             const float* factors, double* sum) {
  __m256 part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < bytes; ++k) {
    const float* t = table + kExactEntries * k;
    const __m256 t0 = _mm256_loadu_ps(t), t1 = _mm256_loadu_ps(t + 8), t2 = _mm256_loadu_ps(t + 16);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      // The permutation reads the low 3 bits of each lane and ignores the others: no masks.
      const __m256i byte =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + k * width + 8 * i)));
      const __m256 a = _mm256_permutevar8x32_ps(t0, byte);
      const __m256 b = _mm256_permutevar8x32_ps(t1, _mm256_srli_epi32(byte, 3));
      const __m256 d = _mm256_permutevar8x32_ps(t2, _mm256_srli_epi32(byte, 6));
      part[i] = _mm256_add_ps(part[i], _mm256_add_ps(_mm256_add_ps(a, b), d));
    }
  }
  for (int i = 0; i < 4; ++i) {
    double* s = sum + 8 * i;
    __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(part[i]));
    __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(part[i], 1));
    if (factors != nullptr) {
      low = _mm256_mul_pd(low, _mm256_cvtps_pd(_mm_loadu_ps(factors + 8 * i)));
      high = _mm256_mul_pd(high, _mm256_cvtps_pd(_mm_loadu_ps(factors + 8 * i + 4)));
    }
    _mm256_storeu_pd(s, _mm256_add_pd(_mm256_loadu_pd(s), low));
    _mm256_storeu_pd(s + 4, _mm256_add_pd(_mm256_loadu_pd(s + 4), high));
  }
}

void add_exact(const TileBlock& block, const float* tables, int64_t stride, const float* factors, int64_t rows,
               double* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < block.width; n += kVectorRows) {
      add_exact_vector(block.codes + n, block.width, block.bytes, tables + m * stride,
                       factors != nullptr ? factors + n : nullptr, sums + m * kTileRows + n);
    }
  }
}

constexpr BinaryKernels kKernels = {
    Layout::kBytes, largest, kFewestRows, build_lut, build_exact, add_lut, add_exact, apply_gate};

}  // namespace binary_avx2
}  // namespace
}  // namespace lit_binq
