// The kernels for x86-64 with AVX2. Knows kernel.h and the intrinsics only.
//
// This file is compiled with -mavx2. It must not instantiate anything from the standard library: such a template
// would be emitted here as AVX2 code under a shared name, and the linker could pick it for a machine without AVX2.
// No fused multiply-add: results must equal kernels_scalar.cpp bit for bit.
#include <immintrin.h>

#include "kernel.h"

namespace lit_binq {
namespace {

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

// Sign masks by the bit of the lane's number: set bit keeps the sign, clear bit flips it.
inline __m256 flip_bit0() { return _mm256_setr_ps(-0.f, 0.f, -0.f, 0.f, -0.f, 0.f, -0.f, 0.f); }
inline __m256 flip_bit1() { return _mm256_setr_ps(-0.f, -0.f, 0.f, 0.f, -0.f, -0.f, 0.f, 0.f); }
inline __m256 flip_bit2() { return _mm256_setr_ps(-0.f, -0.f, -0.f, -0.f, 0.f, 0.f, 0.f, 0.f); }

// Largest |z0| + |z1| + |z2| + |z3| over the groups of z; `bytes` weight bytes are 8 * bytes activations.
float largest_sum(const float* z, int64_t bytes) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 largest = _mm256_setzero_ps();
  for (int64_t k = 0; k < 8 * bytes; k += 32) {  // z is zero beyond its end: whole 32s may be read
    const __m256 a = _mm256_and_ps(_mm256_load_ps(z + k), magnitude);
    const __m256 b = _mm256_and_ps(_mm256_load_ps(z + k + 8), magnitude);
    const __m256 d = _mm256_and_ps(_mm256_load_ps(z + k + 16), magnitude);
    const __m256 e = _mm256_and_ps(_mm256_load_ps(z + k + 24), magnitude);
    largest = _mm256_max_ps(largest, _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(d, e)));
  }
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, largest);
  float result = lanes[0];
  for (int i = 1; i < 8; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// The 16 rounded sums of one group as 16-bit lanes: sums 0-3, 8-11 in the low half, 4-7, 12-15 in the high half.
inline __m256i group_sums(const float* z, __m256 units) {
  const __m256 pair = _mm256_add_ps(_mm256_xor_ps(_mm256_broadcast_ss(z), flip_bit0()),
                                    _mm256_xor_ps(_mm256_broadcast_ss(z + 1), flip_bit1()));
  const __m256 third = _mm256_xor_ps(_mm256_broadcast_ss(z + 2), flip_bit2());
  const __m256 fourth = _mm256_broadcast_ss(z + 3);
  const __m256 low = _mm256_add_ps(pair, _mm256_sub_ps(third, fourth));   // sums 0 to 7: bit 3 clear
  const __m256 high = _mm256_add_ps(pair, _mm256_add_ps(third, fourth));  // sums 8 to 15: bit 3 set
  return _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(low, units)),
                            _mm256_cvtps_epi32(_mm256_mul_ps(high, units)));
}

void build_lut(const float* x, const float* c, int64_t count, float pre, uint8_t* table, float* scale) {
  alignas(32) float z[kBlock];
  scaled_activations(x, c, count, pre, z);
  const int64_t bytes = (count + 7) / 8;
  const float largest = largest_sum(z, bytes);
  const bool zero = !(largest >= kTiniestSum);
  const __m256 units = _mm256_set1_ps(zero ? 0.0f : kTableLimit / largest);
  *scale = zero ? 0.0f : largest / kTableLimit;
  const __m256i bias = _mm256_set1_epi8(static_cast<char>(kTableBias));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the halves of the two packs
  for (int64_t k = 0; k < bytes; ++k) {
    const __m256i sums = _mm256_packs_epi16(group_sums(z + 8 * k, units), group_sums(z + 8 * k + 4, units));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(table + kLutEntries * k),
                        _mm256_add_epi8(_mm256_permutevar8x32_epi32(sums, order), bias));
  }
}

inline __m256 pair_sums(const float* z) {
  return _mm256_add_ps(_mm256_xor_ps(_mm256_broadcast_ss(z), flip_bit0()),
                       _mm256_xor_ps(_mm256_broadcast_ss(z + 1), flip_bit1()));
}

inline __m256 triple_sums(const float* z) {
  return _mm256_add_ps(pair_sums(z), _mm256_xor_ps(_mm256_broadcast_ss(z + 2), flip_bit2()));
}

void build_exact(const float* x, const float* c, int64_t count, float pre, float* table) {
  alignas(32) float z[kBlock];
  scaled_activations(x, c, count, pre, z);
  const int64_t bytes = (count + 7) / 8;
  for (int64_t k = 0; k < bytes; ++k) {
    _mm256_storeu_ps(table + kExactEntries * k, triple_sums(z + 8 * k));
    _mm256_storeu_ps(table + kExactEntries * k + 8, triple_sums(z + 8 * k + 3));
    _mm256_storeu_ps(table + kExactEntries * k + 16, pair_sums(z + 8 * k + 6));
  }
}

// sum[0..7] += scale * units[0..7], times factors[0..7] where there are any
template <bool Factors>
inline void add_scaled(__m128i units, __m256 scale, const float* factors, float* sum) {
  __m256 value = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(units)));
  if (Factors) value = _mm256_mul_ps(value, _mm256_loadu_ps(factors));
  _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), value));
}

// One block, one row of activations, `Vectors` * 32 rows of weights.
template <int Vectors, bool Factors>
inline void add_lut_row(const TileBlock& block, const uint8_t* table, float scale_value, const float* factors,
                        float* sum) {
  const __m256i nibble = _mm256_set1_epi8(15);
  // A 16-bit lane holds the bytes of an even and an odd row. `both` adds whole lanes, so it is even + 256 * odd
  // modulo 2^16; `odd` adds the upper bytes alone.
  __m256i both[Vectors], odd[Vectors];
  for (int i = 0; i < Vectors; ++i) both[i] = odd[i] = _mm256_setzero_si256();
  for (int64_t k = 0; k < block.bytes; ++k) {
    const __m128i* entries = reinterpret_cast<const __m128i*>(table + kLutEntries * k);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128(entries));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128(entries + 1));
    const uint8_t* codes = block.codes + k * (Vectors * kVectorRows);
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) {
      const __m256i byte = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * kVectorRows));
      const __m256i a = _mm256_shuffle_epi8(low, _mm256_and_si256(byte, nibble));
      const __m256i b = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(byte, 4), nibble));
      both[i] = _mm256_add_epi16(both[i], a);
      odd[i] = _mm256_add_epi16(odd[i], _mm256_srli_epi16(a, 8));
      both[i] = _mm256_add_epi16(both[i], b);
      odd[i] = _mm256_add_epi16(odd[i], _mm256_srli_epi16(b, 8));
    }
  }
  const __m256i bias = _mm256_set1_epi16(static_cast<short>(2 * block.bytes * kTableBias));
  const __m256 scale = _mm256_set1_ps(scale_value);
  for (int i = 0; i < Vectors; ++i) {
    const __m256i e = _mm256_sub_epi16(_mm256_sub_epi16(both[i], _mm256_slli_epi16(odd[i], 8)), bias);
    const __m256i o = _mm256_sub_epi16(odd[i], bias);
    const __m256i first = _mm256_unpacklo_epi16(e, o);   // rows 0-7 and 16-23
    const __m256i second = _mm256_unpackhi_epi16(e, o);  // rows 8-15 and 24-31
    float* s = sum + i * kVectorRows;
    const float* f = Factors ? factors + i * kVectorRows : s;  // s: never read, only so that f + 8 points somewhere
    add_scaled<Factors>(_mm256_castsi256_si128(first), scale, f, s);
    add_scaled<Factors>(_mm256_castsi256_si128(second), scale, f + 8, s + 8);
    add_scaled<Factors>(_mm256_extracti128_si256(first, 1), scale, f + 16, s + 16);
    add_scaled<Factors>(_mm256_extracti128_si256(second, 1), scale, f + 24, s + 24);
  }
}

template <int Vectors>
void add_lut_rows(const TileBlock& block, const uint8_t* tables, int64_t stride, const float* scales,
                  int64_t scale_stride, const float* factors, int64_t rows, float* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    const uint8_t* table = tables + m * stride;
    const float scale = scales[m * scale_stride];
    float* sum = sums + m * kTileRows;
    if (factors != nullptr) {
      add_lut_row<Vectors, true>(block, table, scale, factors, sum);
    } else {
      add_lut_row<Vectors, false>(block, table, scale, nullptr, sum);
    }
  }
}

void add_lut(const TileBlock& block, const uint8_t* tables, int64_t stride, const float* scales, int64_t scale_stride,
             const float* factors, int64_t rows, float* sums) {
  switch (block.width / kVectorRows) {
    case 4: return add_lut_rows<4>(block, tables, stride, scales, scale_stride, factors, rows, sums);
    case 3: return add_lut_rows<3>(block, tables, stride, scales, scale_stride, factors, rows, sums);
    case 2: return add_lut_rows<2>(block, tables, stride, scales, scale_stride, factors, rows, sums);
    default: return add_lut_rows<1>(block, tables, stride, scales, scale_stride, factors, rows, sums);
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

}  // namespace

const Kernels kAvx2Kernels = {"avx2", build_lut, build_exact, add_lut, add_exact};

}  // namespace lit_binq
