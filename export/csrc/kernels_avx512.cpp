// The kernels for x86-64 with AVX-512: F, BW, VL, VBMI and VNNI (Ice Lake, Zen 4 and later). Knows kernel.h,
// prefetch.h, silu.h and the intrinsics only.
//
// LUT mode here. vpermb picks 64 bytes from a table of 64, by 6 bits each. A register of codes (Layout::kQuads) is 16
// rows of 4 weight bytes; byte j of a row looks into the j-th 16 entries of the table, so its index is a nibble and the
// constant 16 j. The 4 picked bytes of a row lie beside each other: vpdpbusd adds all 4 to the row's 32-bit sum. For
// 512 weights that is 1 load and 7 operations (2 x index, 1 shift, 2 x vpermb, 2 x vpdpbusd).
//
// As in kernels_avx2.cpp: nothing of the standard library may be instantiated here, and there is no fused
// multiply-add: results must equal kernels_scalar.cpp bit for bit.
#include <immintrin.h>

#include "kernel.h"
#include "prefetch.h"
#include "silu.h"

namespace lit_binq {
namespace {

constexpr int64_t kRows = 16;               // of a register of codes: one cache line
constexpr int64_t kVectors = kTileRows / kRows;
constexpr int64_t kHalf = 16 * kQuad;       // entries of the low (or the high) nibbles of a quad
constexpr int64_t kTable = 2 * kHalf;       // entries of a quad

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << (count > 0 ? count : 0)) - 1u);
}

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

// z of 16 columns from k on, zero from `count` on.
inline __m512 scaled(const float* x, const float* c, int64_t k, int64_t count, __m512 pre) {
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
inline Groups groups_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512i first = _mm512_setr_epi32(0, 4, 16, 20, 8, 12, 24, 28, 1, 5, 17, 21, 9, 13, 25, 29);  // z[0] and z[1]
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  const __m512 ac01 = _mm512_permutex2var_ps(a, first, c), bd01 = _mm512_permutex2var_ps(b, first, d);
  const __m512 ac23 = _mm512_permutex2var_ps(a, second, c), bd23 = _mm512_permutex2var_ps(b, second, d);
  return {{_mm512_shuffle_f32x4(ac01, bd01, 0x44), _mm512_shuffle_f32x4(ac01, bd01, 0xee),
           _mm512_shuffle_f32x4(ac23, bd23, 0x44), _mm512_shuffle_f32x4(ac23, bd23, 0xee)}};
}

inline __m512 magnitude(__m512 v) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}

// Four sums of all groups as bytes: lane g holds a, b, c, d of group g, from the lowest byte on.
inline __m512i four_bytes(__m512 a, __m512 b, __m512 c, __m512 d, __m512 units) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(a, units)),
                                        _mm512_cvtps_epi32(_mm512_mul_ps(b, units)));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(c, units)),
                                        _mm512_cvtps_epi32(_mm512_mul_ps(d, units)));
  // In each 128-bit lane: 4 groups of a, then of b, of c, of d. The shuffle is their transpose.
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(_mm512_packs_epi16(ab, cd), turn);
}

// The bytes in a lane turned round and negated, with their bias: the sums of the inverted indices.
inline __m512i mirrored(__m512i bytes, __m512i bias) {
  const __m512i turn = _mm512_broadcast_i32x4(_mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
  return _mm512_sub_epi8(bias, _mm512_shuffle_epi8(bytes, turn));
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

void build_lut(const float* x, const float* c, int64_t count, float pre, bool, uint8_t* table, float* scale) {
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

// Where the tables and sums of the rows of activations are (kernel.h, add_lut).
struct Rows {
  const uint8_t* tables;
  int64_t stride;
  const float* scales;
  int64_t scale_stride;
  float* sums;
};

// The nibbles of a block as indices, once for all rows of activations: 8 KB at most, in L1 with the tables of 4 rows.
struct Indices {
  __m512i low[kBlockBytes / kQuad * kVectors];  // [quads][vectors]
  __m512i high[kBlockBytes / kQuad * kVectors];
};

inline __m512i index_of(__m512i nibbles) {
  const __m512i nibble = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000);
  return _mm512_ternarylogic_epi32(nibbles, nibble, place, 0xea);  // (nibbles & nibble) | place
}

void expand(const TileBlock& block, Indices& out) {
  const int64_t vectors = block.width / kRows;
  for (int64_t k = 0; k < block.bytes / kQuad; ++k) {
    for (int64_t i = 0; i < vectors; ++i) {
      const uint8_t* const line = block.codes + (k * vectors + i) * kRows * kQuad;
      const __m512i quads = _mm512_loadu_si512(line);
      prefetch(line, block.bytes * block.width);  // the next block, while many rows of activations use this one
      out.low[k * kVectors + i] = index_of(quads);
      out.high[k * kVectors + i] = index_of(_mm512_srli_epi16(quads, 4));
    }
  }
}

// A lookup whose result nobody reads, so that a loop does not outrun the memory: lines that are asked for faster than
// they come are dropped, and a dropped line costs its whole latency. 4096 x 11008 signs for one row of activations on a
// Zen 4: 0.230 ms without asking ahead, more with it, 0.205 ms with every lookup done twice beside it.
inline void keep_busy(__m512i index, __m512i table, __m512i ones) {
  asm volatile("" : "+v"(index));  // else the compiler finds the lookup that it equals
  const __m512i sum = _mm512_dpbusd_epi32(ones, _mm512_permutexvar_epi8(index, table), ones);
  asm volatile("" : : "v"(sum));
}

// One block for `Tokens` rows of activations and `Vectors` * 16 rows of weights, from row `first` of the tile on. Where
// not `Expanded`, `indices` may be nullptr: they are made on the way. `Paced` is for codes that come from memory.
template <int Vectors, int Tokens, bool Expanded, bool Paced = false>
inline void add_lut_part(const TileBlock& block, const Indices* indices, int64_t first, const Rows& r,
                         const float* factors) {
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i start = _mm512_set1_epi32(static_cast<int>(-2 * block.bytes * kTableBias));
  __m512i sums[Tokens][Vectors];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) sums[t][i] = start;
  }
  const auto add = [&](const __m512i* index, const uint8_t* tables) {
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const __m512i table = _mm512_loadu_si512(tables + t * r.stride);
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) {
        sums[t][i] = _mm512_dpbusd_epi32(sums[t][i], _mm512_permutexvar_epi8(index[i], table), ones);
        if (Paced) keep_busy(index[i], table, ones);
      }
    }
  };
  const uint8_t* codes = block.codes + first * kQuad;
  const uint8_t* tables = r.tables;
  int64_t place = first / kRows;
  for (int64_t k = 0; k < block.bytes; k += kQuad) {
    __m512i index[Vectors];
    if (Expanded) {
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) index[i] = indices->low[place + i];
      add(index, tables);
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) index[i] = indices->high[place + i];
      add(index, tables + kHalf);
    } else {
      __m512i quads[Vectors];
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) {
        quads[i] = _mm512_loadu_si512(codes + i * kRows * kQuad);
        if (Paced) prefetch(codes + i * kRows * kQuad, kAhead);
        index[i] = index_of(quads[i]);
      }
      add(index, tables);
#pragma GCC unroll 8
      for (int i = 0; i < Vectors; ++i) index[i] = index_of(_mm512_srli_epi16(quads[i], 4));
      add(index, tables + kHalf);
    }
    codes += block.width * kQuad;
    place += kVectors;
    tables += kTable;
  }
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    const __m512 scale = _mm512_set1_ps(r.scales[t * r.scale_stride]);
    float* sum = r.sums + t * kTileRows + first;
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
      __m512 value = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sums[t][i]));
      if (factors != nullptr) value = _mm512_mul_ps(value, _mm512_loadu_ps(factors + first + i * kRows));
      _mm512_storeu_ps(sum + i * kRows, _mm512_add_ps(_mm512_loadu_ps(sum + i * kRows), value));
    }
  }
}

// All rows of the tile. One row of activations: 8 registers of sums over the whole tile, tables loaded once. Several:
// 4 x 4 sums, so that an index serves 4 tables and a table 4 registers of codes; with 4 of codes, 4 indices and a few
// constants that is 29 of the 32 registers.
template <int Tokens, bool Expanded>
inline void add_lut_tokens(const TileBlock& block, const Indices* indices, const Rows& r, const float* factors) {
  if (Tokens == 1 && block.width == kTileRows) {
    return add_lut_part<kVectors, Tokens, Expanded>(block, indices, 0, r, factors);
  }
  int64_t first = 0;
  for (; first + 4 * kRows <= block.width; first += 4 * kRows) {
    add_lut_part<4, Tokens, Expanded>(block, indices, first, r, factors);
  }
  if (first < block.width) add_lut_part<2, Tokens, Expanded>(block, indices, first, r, factors);
}

template <bool Expanded>
inline void add_lut_rows(const TileBlock& block, const Indices* indices, Rows r, const float* factors, int64_t rows) {
  for (; rows >= 4; rows -= 4) {
    add_lut_tokens<4, Expanded>(block, indices, r, factors);
    r.tables += 4 * r.stride;
    r.scales += 4 * r.scale_stride;
    r.sums += 4 * kTileRows;
  }
  if (rows == 3) add_lut_tokens<3, Expanded>(block, indices, r, factors);
  if (rows == 2) add_lut_tokens<2, Expanded>(block, indices, r, factors);
  if (rows == 1) add_lut_tokens<1, Expanded>(block, indices, r, factors);
}

// Expanding costs what it saves on about 10 rows of activations.
void add_lut(const TileBlock& block, const uint8_t* tables, bool, int64_t stride, const float* scales,
             int64_t scale_stride, const float* factors, int64_t rows, float* sums) {
  const Rows r{tables, stride, scales, scale_stride, sums};
  constexpr int64_t kFewestRows = 16;
  // The last row of several finds the codes in a cache: only one alone is paced.
  if (rows == 1 && block.streamed && block.width == kTileRows) {
    return add_lut_part<kVectors, 1, false, true>(block, nullptr, 0, r, factors);
  }
  if (rows < kFewestRows) return add_lut_rows<false>(block, nullptr, r, factors, rows);
  Indices indices;
  expand(block, indices);
  add_lut_rows<true>(block, &indices, r, factors, rows);
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

}  // namespace

const Kernels kAvx512Kernels = {
    "avx512", Layout::kQuads, largest, kNoHalves, build_lut, build_exact, add_lut, add_exact, apply_gate};

}  // namespace lit_binq
