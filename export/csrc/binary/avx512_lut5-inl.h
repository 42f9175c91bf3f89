// LUT mode of AVX-512 for several rows of activations: five weights for each lookup (kernel.h, lut5). No
// standard library (sets/avx2.cpp says why).
//
// A register of indices is 16 rows of 4 weight bytes, as in avx512-inl.h, and beside it lies a register of signs,
// +1 and -1. Of 256 columns 13 registers are looked up for 16: as vpermb and vpdpbusd are all that a core has to do for
// them, a product takes four fifths of the time. Signs come with the indices: they are made once for all rows.
#pragma once

#include "binary/avx512_pieces-inl.h"
#include "common/prefetch.h"

namespace lit_binq {
namespace {
namespace binary_avx512 {

constexpr int64_t kMaxQuads = kBlockBytes / kQuad;
constexpr int kPerChunk = 4;  // registers of indices of 64 columns

// Where in four registers a lookup of one half is: its lanes' element half % 4, of the chunk half / 4.
template <int Element>
inline __m512 side_by_side(const Groups& g) {
  constexpr int kAll = Element * 0x55;
  __m512 v = _mm512_permute_ps(g.z[0], kAll);
  v = _mm512_mask_permute_ps(v, 0x2222, g.z[1], kAll);
  v = _mm512_mask_permute_ps(v, 0x4444, g.z[2], kAll);
  return _mm512_mask_permute_ps(v, 0x8888, g.z[3], kAll);
}

// The fifth activations of a chunk's groups: the four of each group of a half of signs, one for each of 4 lookups.
inline __m512 fifths_of(const Groups* chunks, int half) {
  const Groups& g = chunks[half / kPerChunk];
  switch (half % kPerChunk) {
    case 0: return side_by_side<0>(g);
    case 1: return side_by_side<1>(g);
    case 2: return side_by_side<2>(g);
    default: return side_by_side<3>(g);
  }
}

// The tables of up to 8 lookups from 16-bit integers, `count` of them. z[0..3] and the fifth: lane b holds those of
// byte b, first the 4 lookups of a chunk, then those of the next one.
inline void store_lut5(const __m512i* z, __m512i fifth, int count, uint8_t* table) {
  const __m512i same01 = _mm512_add_epi16(z[0], z[1]), differ01 = _mm512_sub_epi16(z[0], z[1]);
  const __m512i same23 = _mm512_add_epi16(z[2], z[3]), differ23 = _mm512_sub_epi16(z[3], z[2]);
  // Of four activations, indices 8 to 15, which have + z3. The others are their negatives.
  const __m512i upper[8] = {_mm512_sub_epi16(differ23, same01), _mm512_add_epi16(differ23, differ01),
                            _mm512_sub_epi16(differ23, differ01), _mm512_add_epi16(differ23, same01),
                            _mm512_sub_epi16(same23, same01), _mm512_add_epi16(same23, differ01),
                            _mm512_sub_epi16(same23, differ01), _mm512_add_epi16(same23, same01)};
  // vpmulhrsw: (v * factor + 2^14) >> 15
  const __m512i factor = _mm512_set1_epi16(1 << (15 - kLut5Fraction));
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(kTableBias));
  __m512i pair[8];  // [i]: of each group the bytes of indices 2 i and 2 i + 1
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i even = i < 4 ? _mm512_sub_epi16(fifth, upper[7 - 2 * i]) : _mm512_add_epi16(fifth, upper[2 * i - 8]);
    const __m512i odd = i < 4 ? _mm512_sub_epi16(fifth, upper[6 - 2 * i]) : _mm512_add_epi16(fifth, upper[2 * i - 7]);
    const __m512i high = _mm512_slli_epi16(_mm512_mulhrs_epi16(odd, factor), 8);
    constexpr __mmask64 kOdd = 0xaaaaaaaaaaaaaaaa;
    pair[i] = _mm512_xor_si512(_mm512_mask_blend_epi8(kOdd, _mm512_mulhrs_epi16(even, factor), high), bias);
  }
  // A transpose of 8 x 8 pairs in each lane.
#pragma GCC unroll 2
  for (int chunk = 0; chunk < 2; ++chunk) {
    __m512i four[4];  // [i]: of the 4 groups of a chunk the bytes of indices 4 i to 4 i + 3
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      four[i] = chunk == 0 ? _mm512_unpacklo_epi16(pair[2 * i], pair[2 * i + 1])
                           : _mm512_unpackhi_epi16(pair[2 * i], pair[2 * i + 1]);
    }
    const __m512i low = _mm512_unpacklo_epi32(four[0], four[1]), low8 = _mm512_unpacklo_epi32(four[2], four[3]);
    const __m512i high = _mm512_unpackhi_epi32(four[0], four[1]), high8 = _mm512_unpackhi_epi32(four[2], four[3]);
    const int rest = count - kPerChunk * chunk;
    uint8_t* const out = table + kPerChunk * chunk * kHalf;
    if (rest > 0) _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low, low8));
    if (rest > 1) _mm512_storeu_si512(out + kHalf, _mm512_unpackhi_epi64(low, low8));
    if (rest > 2) _mm512_storeu_si512(out + 2 * kHalf, _mm512_unpacklo_epi64(high, high8));
    if (rest > 3) _mm512_storeu_si512(out + 3 * kHalf, _mm512_unpackhi_epi64(high, high8));
  }
}

template <int Quads>
void build(const float* x, const float* c, int64_t count, float pre, uint8_t* table, float* scale) {
  constexpr int kChunks = (Quads + 1) / 2, kLookups = lookups(Quads), kSigns = sign_halves(Quads);
  const __m512 p = _mm512_set1_ps(pre);
  Groups chunks[kChunks];
#pragma GCC unroll 4
  for (int i = 0; i < kChunks; ++i) {
    const int64_t k = 64 * i;
    chunks[i] = groups_of(scaled(x, c, k, count, p), scaled(x, c, k + 16, count, p), scaled(x, c, k + 32, count, p),
                          scaled(x, c, k + 48, count, p));
  }
  // The a-th chunk has the fifth activations of the a-th half of signs.
  __m512 fifths[kChunks], sums = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < kChunks; ++i) {
    const Groups& g = chunks[i];
    fifths[i] = i < kSigns ? fifths_of(chunks, kLookups + i) : _mm512_setzero_ps();
    const __m512 four = _mm512_add_ps(_mm512_add_ps(magnitude(g.z[0]), magnitude(g.z[1])),
                                      _mm512_add_ps(magnitude(g.z[2]), magnitude(g.z[3])));
    const int used = kLookups - kPerChunk * i;  // the others are halves of signs, or there is no second quad
    const auto lanes = static_cast<__mmask16>(used >= kPerChunk ? 0xffff : used > 0 ? 0x1111 * ((1 << used) - 1) : 0);
    sums = _mm512_mask_max_ps(sums, lanes, sums, _mm512_add_ps(four, magnitude(fifths[i])));
  }
  const float largest = _mm512_reduce_max_ps(sums);
  const bool zero = !(largest >= kTiniestSum);
  const __m512 units = _mm512_set1_ps(zero ? 0.0f : kTableLimit * (1 << kLut5Fraction) / largest);
  *scale = zero ? 0.0f : largest / kTableLimit;
  const auto rounded = [&](__m512 v) { return _mm512_cvtps_epi32(_mm512_mul_ps(v, units)); };
#pragma GCC unroll 2
  for (int i = 0; i < kChunks; i += 2) {
    const int next = i + 1 < kChunks ? i + 1 : i;  // what it gives is not stored where there is no next one
    __m512i z[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) z[j] = _mm512_packs_epi32(rounded(chunks[i].z[j]), rounded(chunks[next].z[j]));
    store_lut5(z, _mm512_packs_epi32(rounded(fifths[i]), rounded(fifths[next])), kLookups - kPerChunk * i,
                table + kPerChunk * i * kHalf);
  }
}

// A block's weights, rewritten for all rows of activations: 13 KB at most, in L1 with the tables of 4 rows.
struct Lut5Block {
  __m512i index[lookups(kMaxQuads)][kVectors];
  __m512i sign[signed_lookups(kMaxQuads)][kVectors];
  __m512i start[kVectors];  // what the tables' bias adds up to, negative
};

template <int Quads>
void expand(const TileBlock& block, Lut5Block& out) {
  constexpr int kLookups = lookups(Quads), kSigned = signed_lookups(Quads);
  const __m512i nibble = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000), plus = _mm512_set1_epi8(1);
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(kTableBias));
  const int64_t vectors = block.width / kRows;
  for (int64_t i = 0; i < vectors; ++i) {
    __m512i quads[Quads];
#pragma GCC unroll 8
    for (int k = 0; k < Quads; ++k) {
      const uint8_t* const line = block.codes + (k * vectors + i) * kRows * kQuad;
      quads[k] = _mm512_loadu_si512(line);
      prefetch(line, block.bytes * block.width);  // the next block, while many rows of activations use this one
    }
    __m512i biases = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int j = 0; j < kLookups; ++j) {
      __m512i codes = j % 2 == 0 ? quads[j / 2] : _mm512_srli_epi16(quads[j / 2], 4), sign = plus;
      if (j < kSigned) {
        const int half = kLookups + j / 4, bit = 4 * (half % 2) + j % 4;
        const __m512i flip = _mm512_movm_epi8(
            _mm512_testn_epi8_mask(quads[half / 2], _mm512_set1_epi8(static_cast<char>(1 << bit))));
        sign = _mm512_or_si512(flip, plus);
        codes = _mm512_xor_si512(codes, flip);
        out.sign[j][i] = sign;
      }
      biases = _mm512_dpbusd_epi32(biases, bias, sign);
      out.index[j][i] = _mm512_ternarylogic_epi32(codes, nibble, place, 0xea);  // (codes & nibble) | place
    }
    out.start[i] = _mm512_sub_epi32(_mm512_setzero_si512(), biases);
  }
}

// 2 x (vpermb, vpdpbusd) as one piece: GCC copies accumulators of vpdpbusd forth and back and runs out of registers
// where they are 16 (a fifth of the time).
inline void add_two(const __m512i* index, const __m512i* sign, __m512i table, __m512i* sums) {
  __m512i first, second;
  asm("vpermb %[table], %[index0], %[first]\n\t"
      "vpermb %[table], %[index1], %[second]\n\t"
      "vpdpbusd %[sign0], %[first], %[sum0]\n\t"
      "vpdpbusd %[sign1], %[second], %[sum1]"
      : [sum0] "+v"(sums[0]), [sum1] "+v"(sums[1]), [first] "=&v"(first), [second] "=&v"(second)
      : [table] "v"(table), [index0] "v"(index[0]), [index1] "v"(index[1]), [sign0] "v"(sign[0]), [sign1] "v"(sign[1]));
}

// `Tokens` rows of activations and `Vectors` * 16 rows of weights. 4 x 4 sums, so that an index and its sign serve 4
// tables and a table 4 registers of indices: with 4 indices, 4 signs, a table and 2 lookups 27 of the 32 registers.
template <int Quads, int Vectors, int Tokens>
inline void add_part(const Lut5Block& weights, int64_t place, const Rows& r, const float* factors) {
  __m512i sums[Tokens][Vectors];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) sums[t][i] = weights.start[place + i];
  }
  const auto look_up = [&](int j, const __m512i* sign) __attribute__((always_inline)) {
    __m512i index[Vectors];
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) index[i] = weights.index[j][place + i];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      const __m512i table = _mm512_loadu_si512(r.tables + t * r.stride + j * kHalf);
#pragma GCC unroll 2
      for (int i = 0; i < Vectors; i += 2) add_two(index + i, sign + i, table, sums[t] + i);
    }
  };
  __m512i sign[Vectors];
  for (int j = 0; j < signed_lookups(Quads); ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) sign[i] = weights.sign[j][place + i];
    look_up(j, sign);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Vectors; ++i) sign[i] = _mm512_set1_epi8(1);
  for (int j = signed_lookups(Quads); j < lookups(Quads); ++j) look_up(j, sign);
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
    const __m512 scale = _mm512_set1_ps(r.scales[t * r.scale_stride]);
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) {
      const int64_t row = (place + i) * kRows;
      add_units(sums[t][i], scale, factors != nullptr ? factors + row : nullptr, r.sums + t * kTileRows + row);
    }
  }
}

template <int Quads, int Tokens>
inline void add_tokens(const Lut5Block& weights, int64_t vectors, const Rows& r, const float* factors) {
  int64_t place = 0;
  for (; place + 4 <= vectors; place += 4) add_part<Quads, 4, Tokens>(weights, place, r, factors);
  if (place < vectors) add_part<Quads, 2, Tokens>(weights, place, r, factors);
}

template <int Quads>
void add(const TileBlock& block, Rows r, const float* factors, int64_t rows) {
  Lut5Block weights;
  expand<Quads>(block, weights);
  const int64_t vectors = block.width / kRows;
  for (; rows >= 4; rows -= 4) {
    add_tokens<Quads, 4>(weights, vectors, r, factors);
    r.tables += 4 * r.stride;
    r.scales += 4 * r.scale_stride;
    r.sums += 4 * kTileRows;
  }
  if (rows == 3) add_tokens<Quads, 3>(weights, vectors, r, factors);
  if (rows == 2) add_tokens<Quads, 2>(weights, vectors, r, factors);
  if (rows == 1) add_tokens<Quads, 1>(weights, vectors, r, factors);
}

void build_lut5(const float* x, const float* c, int64_t count, float pre, uint8_t* table, float* scale) {
  static_assert(kMaxQuads == 8, "as many as there are cases");
  switch (block_bytes(count) / kQuad) {
    case 1: return build<1>(x, c, count, pre, table, scale);
    case 2: return build<2>(x, c, count, pre, table, scale);
    case 3: return build<3>(x, c, count, pre, table, scale);
    case 4: return build<4>(x, c, count, pre, table, scale);
    case 5: return build<5>(x, c, count, pre, table, scale);
    case 6: return build<6>(x, c, count, pre, table, scale);
    case 7: return build<7>(x, c, count, pre, table, scale);
    default: return build<8>(x, c, count, pre, table, scale);
  }
}

void add_lut5(const TileBlock& block, Rows r, const float* factors, int64_t rows) {
  switch (block.bytes / kQuad) {
    case 1: return add<1>(block, r, factors, rows);
    case 2: return add<2>(block, r, factors, rows);
    case 3: return add<3>(block, r, factors, rows);
    case 4: return add<4>(block, r, factors, rows);
    case 5: return add<5>(block, r, factors, rows);
    case 6: return add<6>(block, r, factors, rows);
    case 7: return add<7>(block, r, factors, rows);
    default: return add<8>(block, r, factors, rows);
  }
}

}  // namespace binary_avx512
}  // namespace
}  // namespace lit_binq
