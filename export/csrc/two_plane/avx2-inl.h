// Two-plane kernels for x86-64 with AVX2, FMA and F16C. Knows two_plane/kernel.h, prefetch.h and the intrinsics only.
//
// This file is compiled with the flags of these sets. It must not instantiate anything from the standard library, see
// sets/avx2.cpp.
//
// Lanes of 1 byte: a register is one byte, that is 8 columns, of 32 rows. A byte shuffle looks up 32 nibbles in a table
// of 16 bytes, and both weight planes read the tables that are loaded once.
//
// Planes of activations are counted by table too: for a nibble of 4 columns the entry of weight bits i holds
// popcount(i & q_k) of one plane in its low half and that of the next plane in its high half.
#pragma once

#include <immintrin.h>

#include "common/prefetch.h"
#include "two_plane/kernel.h"

namespace lit_binq {
namespace {
namespace two_plane_avx2 {

constexpr int64_t kVector = 32;                    // rows of a register
constexpr int64_t kChunkBytes = 2 * kTwoPlaneRows;  // of weights
constexpr int64_t kLutChunk = 2 * kQuadBytes;      // of tables
constexpr int64_t kExactFloats = 24;               // tables of 3, 3 and 2 columns with 8 sums each

inline __m256i nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i table(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 halves(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// sum[0..7] += the products of 8 rows; `levels` points to the first of these rows.
template <int L>
inline void combine(const uint16_t* levels, __m256 A, __m256 B, __m256 C, __m256 total, float* sum) {
  const __m256 before = _mm256_loadu_ps(sum);
  __m256 value;
  if constexpr (L == 2) {
    value = _mm256_fmadd_ps(halves(levels), A, _mm256_mul_ps(halves(levels + kTwoPlaneRows), B));
  } else if constexpr (L == 3) {
    value = _mm256_mul_ps(halves(levels), total);
    value = _mm256_fmadd_ps(halves(levels + kTwoPlaneRows), A, value);
    value = _mm256_fmadd_ps(halves(levels + 2 * kTwoPlaneRows), B, value);
  } else {
    const __m256 l0 = halves(levels), l1 = halves(levels + kTwoPlaneRows);
    const __m256 l2 = halves(levels + 2 * kTwoPlaneRows), l3 = halves(levels + 3 * kTwoPlaneRows);
    const __m256 outer = _mm256_add_ps(l0, l3), inner = _mm256_add_ps(l1, l2);
    const __m256 rise = _mm256_sub_ps(l3, l0), twist = _mm256_sub_ps(l1, l2);
    value = _mm256_mul_ps(_mm256_add_ps(rise, twist), A);
    value = _mm256_fmadd_ps(_mm256_sub_ps(rise, twist), B, value);
    value = _mm256_fnmadd_ps(_mm256_sub_ps(outer, inner), C, value);
    value = _mm256_fmadd_ps(_mm256_add_ps(outer, inner), total, value);
    value = _mm256_mul_ps(_mm256_set1_ps(0.25f), value);
  }
  _mm256_storeu_ps(sum, _mm256_add_ps(before, value));
}

// Sign masks by the bit of the lane's number: set bit keeps the sign, clear bit flips it.
inline __m256 flip(int bit) {
  const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i clear = _mm256_andnot_si256(number, _mm256_set1_epi32(1 << bit));
  return _mm256_castsi256_ps(_mm256_sllv_epi32(clear, _mm256_set1_epi32(31 - bit)));
}

inline __m256 flipped(const float* x, int bit) { return _mm256_xor_ps(_mm256_broadcast_ss(x), flip(bit)); }

// Largest |x0| + |x1| + |x2| + |x3| over whole bytes of columns.
float largest_quad(const float* x, int64_t chunks) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 largest = _mm256_setzero_ps();
  for (int64_t c = 0; c < chunks; ++c) {
    const __m256 a = _mm256_and_ps(_mm256_loadu_ps(x + 8 * c), magnitude);
    const __m256 pairs = _mm256_hadd_ps(a, a);
    largest = _mm256_max_ps(largest, _mm256_hadd_ps(pairs, pairs));
  }
  const __m128 halves = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  return _mm_cvtss_f32(halves);
}

// The 16 rounded sums of 4 columns as 16-bit lanes: sums 0-3, 8-11 in the low half, 4-7, 12-15 in the high half.
inline __m256i quad_sums(const float* x, __m256 units) {
  const __m256 low = _mm256_add_ps(flipped(x, 0), flipped(x + 1, 1));
  const __m256 third = flipped(x + 2, 2), fourth = _mm256_broadcast_ss(x + 3);
  const __m256 minus = _mm256_add_ps(low, _mm256_sub_ps(third, fourth));
  const __m256 plus = _mm256_add_ps(low, _mm256_add_ps(third, fourth));
  return _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(minus, units)),
                            _mm256_cvtps_epi32(_mm256_mul_ps(plus, units)));
}

// Entries biased by 128: the kernel adds bytes up in 16-bit lanes and splits those, which takes unsigned bytes.
void build_lut(const float* x, int64_t chunks, uint8_t* prepared, float* unit) {
  const float largest = largest_quad(x, chunks);
  const bool zero = !(largest >= kTiniestQuad);
  const __m256 units = _mm256_set1_ps(zero ? 0.0f : kTwoPlaneLimit / largest);
  *unit = zero ? 0.0f : largest / kTwoPlaneLimit;
  const __m256i bias = _mm256_set1_epi8(static_cast<char>(128));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the halves of the two packs
  for (int64_t c = 0; c < chunks; ++c) {
    const __m256i sums = _mm256_packs_epi16(quad_sums(x + 8 * c, units), quad_sums(x + 8 * c + 4, units));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(prepared + kLutChunk * c),
                        _mm256_add_epi8(_mm256_permutevar8x32_epi32(sums, order), bias));
  }
}

void build_exact(const float* x, int64_t chunks, uint8_t* prepared) {
  float* out = reinterpret_cast<float*>(prepared);
  for (int64_t c = 0; c < chunks; ++c, x += 8, out += kExactFloats) {
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_add_ps(flipped(x, 0), flipped(x + 1, 1)), flipped(x + 2, 2)));
    _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_add_ps(flipped(x + 3, 0), flipped(x + 4, 1)), flipped(x + 5, 2)));
    _mm256_storeu_ps(out + 16, _mm256_add_ps(flipped(x + 6, 0), flipped(x + 7, 1)));
  }
}

// popcount(i & q) for i = 0..15 as 16 bytes, for each nibble q.
struct NibbleCounts {
  alignas(16) uint8_t of[16][16];
};
constexpr NibbleCounts nibble_counts() {
  NibbleCounts counts = {};
  for (int q = 0; q < 16; ++q) {
    for (int i = 0; i < 16; ++i) {
      const int both = q & i;
      counts.of[q][i] = static_cast<uint8_t>((both & 1) + (both >> 1 & 1) + (both >> 2 & 1) + (both >> 3 & 1));
    }
  }
  return counts;
}
constexpr NibbleCounts kNibbleCounts = nibble_counts();

inline __m128i pair_counts(unsigned first, unsigned second) {
  const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(kNibbleCounts.of[first & 15]));
  const __m128i high = _mm_load_si128(reinterpret_cast<const __m128i*>(kNibbleCounts.of[second & 15]));
  return _mm_or_si128(low, _mm_slli_epi16(high, 4));  // at most 4: no bit leaves its byte
}

// Tables [pair of planes][chunk][low nibble, high nibble].
void build_planes(const uint8_t* q, int64_t planes, int64_t chunks, uint8_t* prepared, int32_t* ones) {
  for (int64_t k = 0; k < planes; ++k) ones[k] = 0;
  for (int64_t c = 0; c < chunks; c += 4) {  // 32 columns at a time; q may be read to the next 32
    const int64_t count = chunks - c < 4 ? chunks - c : 4;
    uint32_t words[kMaxPlanes];
    const __m256i values = load(q + 8 * c);
    for (int64_t k = 0; k < planes; ++k) {
      const __m128i up = _mm_cvtsi32_si128(static_cast<int>(7 - k));
      words[k] = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_sll_epi16(values, up)));
      if (count < 4) words[k] &= (1u << (8 * count)) - 1u;
      ones[k] += __builtin_popcount(words[k]);
    }
    for (int64_t p = 0; p < planes / 2; ++p) {
      uint8_t* out = prepared + (p * chunks + c) * kLutChunk;
      for (int64_t i = 0; i < 2 * count; ++i) {
        _mm_store_si128(reinterpret_cast<__m128i*>(out + kQuadBytes * i),
                        pair_counts(words[2 * p] >> (4 * i), words[2 * p + 1] >> (4 * i)));
      }
    }
  }
}

// Sums of bytes in 16-bit lanes. A lane holds the bytes of an even and an odd row: `both` adds whole lanes, so it is
// even + 256 * odd modulo 2^16; `odd` adds the upper bytes alone.
struct Lanes {
  __m256i both, odd;

  void add(__m256i bytes) {
    both = _mm256_add_epi16(both, bytes);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
  }

  // 32 sums less `bias`, in the order of rows.
  void store(__m256i bias, int16_t* out) const {
    const __m256i e = _mm256_sub_epi16(_mm256_sub_epi16(both, _mm256_slli_epi16(odd, 8)), bias);
    const __m256i o = _mm256_sub_epi16(odd, bias);
    const __m256i first = _mm256_unpacklo_epi16(e, o);   // rows 0-7 and 16-23
    const __m256i second = _mm256_unpackhi_epi16(e, o);  // rows 8-15 and 24-31
    __m128i* const to = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(to, _mm256_castsi256_si128(first));
    _mm_storeu_si128(to + 1, _mm256_castsi256_si128(second));
    _mm_storeu_si128(to + 2, _mm256_extracti128_si256(first, 1));
    _mm_storeu_si128(to + 3, _mm256_extracti128_si256(second, 1));
  }
};

template <int L>
void add_lut(const TwoPlaneBlock& block, const TwoPlaneActivations& x, float* sums) {
  constexpr int kPlanes = L == 4 ? 3 : 2;
  constexpr int kVectors = L == 4 ? 1 : 2;  // with their accumulators the 16 registers are full
  for (int64_t n = 0; n < kTwoPlaneRows; n += kVectors * kVector) {
    Lanes lanes[kPlanes][kVectors];
    for (auto& plane : lanes) {
      for (Lanes& l : plane) l.both = l.odd = _mm256_setzero_si256();
    }
    const uint8_t* codes = block.codes + n;
    for (int64_t c = 0; c < block.chunks; ++c, codes += kChunkBytes) {
      // A chunk is two cache lines: of A and of B.
      if (n == 0 && block.repeats > 0) prefetch(codes, kAhead), prefetch(codes + kTwoPlaneRows, kAhead);
      const __m256i low = table(x.prepared + kLutChunk * c), high = table(x.prepared + kLutChunk * c + kQuadBytes);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        __m256i byte[3];
        byte[0] = load(codes + v * kVector);
        byte[1] = load(codes + kTwoPlaneRows + v * kVector);
        if (L == 4) byte[2] = _mm256_xor_si256(byte[0], byte[1]);
#pragma GCC unroll 3
        for (int w = 0; w < kPlanes; ++w) {
          lanes[w][v].add(_mm256_shuffle_epi8(low, nibbles(byte[w])));
          lanes[w][v].add(_mm256_shuffle_epi8(high, nibbles(_mm256_srli_epi16(byte[w], 4))));
        }
      }
    }
    if (n == 0 && block.repeats > 0) prefetch(block.levels, kAhead, 2 * L);
    const __m256i bias = _mm256_set1_epi16(static_cast<short>(2 * block.chunks * 128));
    const __m256 unit = _mm256_set1_ps(x.unit), total = _mm256_set1_ps(x.total);
    for (int v = 0; v < kVectors; ++v) {
      alignas(32) int16_t units[kPlanes][kVector];
      for (int w = 0; w < kPlanes; ++w) lanes[w][v].store(bias, units[w]);
      for (int64_t i = 0; i < kVector; i += 8) {
        __m256 S[3];
        for (int w = 0; w < kPlanes; ++w) {
          const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(units[w] + i));
          S[w] = _mm256_mul_ps(unit, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(part)));
        }
        if (L < 4) S[2] = total;  // not read
        const int64_t row = n + v * kVector + i;
        combine<L>(block.halves() + row, S[0], S[1], S[2], total, sums + row);
      }
    }
  }
}

template <int L>
void add_exact(const TwoPlaneBlock& block, const TwoPlaneActivations& x, float* sums) {
  constexpr int kPlanes = L == 4 ? 3 : 2;
  const __m256 total = _mm256_set1_ps(x.total);
  for (int64_t n = 0; n < kTwoPlaneRows; n += 16) {
    __m256 S[2][3];
    for (auto& part : S) part[0] = part[1] = part[2] = _mm256_setzero_ps();
    const float* t = reinterpret_cast<const float*>(x.prepared);
    const uint8_t* codes = block.codes + n;
    for (int64_t c = 0; c < block.chunks; ++c, codes += kChunkBytes, t += kExactFloats) {
      const __m256 t0 = _mm256_loadu_ps(t), t1 = _mm256_loadu_ps(t + 8), t2 = _mm256_loadu_ps(t + 16);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        __m256i byte[3];
        for (int w = 0; w < 2; ++w) {
          byte[w] = _mm256_cvtepu8_epi32(
              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + w * kTwoPlaneRows + 8 * v)));
        }
        byte[2] = _mm256_xor_si256(byte[0], byte[1]);
#pragma GCC unroll 3
        for (int w = 0; w < kPlanes; ++w) {
          // The permutation reads the low 3 bits of each lane and ignores the others: no masks.
          const __m256 a = _mm256_permutevar8x32_ps(t0, byte[w]);
          const __m256 b = _mm256_permutevar8x32_ps(t1, _mm256_srli_epi32(byte[w], 3));
          const __m256 d = _mm256_permutevar8x32_ps(t2, _mm256_srli_epi32(byte[w], 6));
          S[v][w] = _mm256_add_ps(S[v][w], _mm256_add_ps(_mm256_add_ps(a, b), d));
        }
      }
    }
    for (int v = 0; v < 2; ++v) {
      combine<L>(block.halves() + n + 8 * v, S[v][0], S[v][1], S[v][2], total, sums + n + 8 * v);
    }
  }
}

// Counts of `Planes` weight planes with `Pairs` pairs of activation planes, for 32 rows: out[w][2 * pair + half][row].
template <int Planes, int Pairs>
inline void count_rows(const uint8_t* codes, int64_t chunks, const uint8_t* tables,
                       uint8_t (*out)[kMaxPlanes][kVector]) {
  // Two counts share a byte. `both` adds such bytes modulo 2^8, `high` the upper halves alone; a count is at most 160.
  __m256i both[Planes][Pairs], high[Planes][Pairs];
  for (int w = 0; w < Planes; ++w) {
    for (int p = 0; p < Pairs; ++p) both[w][p] = high[w][p] = _mm256_setzero_si256();
  }
  for (int64_t c = 0; c < chunks; ++c, codes += kChunkBytes) {
    __m256i byte[3];
    byte[0] = load(codes);
    byte[1] = load(codes + kTwoPlaneRows);
    byte[2] = _mm256_and_si256(byte[0], byte[1]);
#pragma GCC unroll 3
    for (int w = 0; w < Planes; ++w) {
      const __m256i first = nibbles(byte[w]), second = nibbles(_mm256_srli_epi16(byte[w], 4));
#pragma GCC unroll 2
      for (int p = 0; p < Pairs; ++p) {
        const uint8_t* t = tables + (p * chunks + c) * kLutChunk;
        const __m256i counts = _mm256_add_epi8(_mm256_shuffle_epi8(table(t), first),
                                               _mm256_shuffle_epi8(table(t + kQuadBytes), second));
        both[w][p] = _mm256_add_epi8(both[w][p], counts);
        high[w][p] = _mm256_add_epi8(high[w][p], nibbles(_mm256_srli_epi16(counts, 4)));
      }
    }
  }
  for (int w = 0; w < Planes; ++w) {
    for (int p = 0; p < Pairs; ++p) {
      const __m256i up = _mm256_and_si256(_mm256_slli_epi16(high[w][p], 4), _mm256_set1_epi8(static_cast<char>(0xf0)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(out[w][2 * p]), _mm256_sub_epi8(both[w][p], up));
      _mm256_store_si256(reinterpret_cast<__m256i*>(out[w][2 * p + 1]), high[w][p]);
    }
  }
}

template <int L>
void add_planes(const TwoPlaneBlock& block, int64_t planes, const TwoPlaneActivations& x, float* sums,
                int32_t* counts) {
  constexpr int kPlanes = L == 4 ? 3 : 2;
  constexpr int kPairs = L == 4 ? 1 : 2;  // as many accumulators as registers hold
  const __m256 total = _mm256_set1_ps(x.total), none = _mm256_sub_ps(_mm256_setzero_ps(), total);
  alignas(32) uint8_t count[kPlanes][kMaxPlanes][kVector];
  for (int64_t n = 0; n < kTwoPlaneRows; n += kVector) {
    for (int64_t p = 0; p < planes / 2; p += kPairs) {
      alignas(32) uint8_t part[kPlanes][kMaxPlanes][kVector];
      count_rows<kPlanes, kPairs>(block.codes + n, block.chunks, x.prepared + p * block.chunks * kLutChunk, part);
      for (int w = 0; w < kPlanes; ++w) {
        for (int i = 0; i < 2 * kPairs; ++i) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(count[w][2 * p + i]), load(part[w][i]));
        }
      }
    }
    for (int64_t i = 0; i < kVector; i += 8) {
      __m256 V[3];
      for (int w = 0; w < kPlanes; ++w) {
        V[w] = none;
        for (int64_t k = 0; k < planes; ++k) {
          const __m256i c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(count[w][k] + i)));
          V[w] = _mm256_fmadd_ps(_mm256_broadcast_ss(x.twice + k), _mm256_cvtepi32_ps(c), V[w]);
        }
      }
      if constexpr (L == 4) {  // s_A s_B = 2 s_AB - s_A - s_B + 1, and s_C = -s_A s_B
        const __m256 singles = _mm256_sub_ps(_mm256_add_ps(V[0], V[1]), total);
        V[2] = _mm256_fnmadd_ps(_mm256_set1_ps(2.0f), V[2], singles);
      } else {
        V[2] = total;  // not read
      }
      combine<L>(block.halves() + n + i, V[0], V[1], V[2], total, sums + n + i);
    }
    if (counts == nullptr) continue;
    for (int w = 0; w < kPlanes; ++w) {
      for (int64_t k = 0; k < planes; ++k) {
        for (int64_t i = 0; i < kVector; ++i) counts[(w * planes + k) * kTwoPlaneRows + n + i] = count[w][k][i];
      }
    }
  }
}

void add_lut_any(const TwoPlaneBlock& block, int64_t levels, const TwoPlaneActivations& x, float* sums) {
  switch (levels) {
    case 2: return add_lut<2>(block, x, sums);
    case 3: return add_lut<3>(block, x, sums);
    default: return add_lut<4>(block, x, sums);
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
  switch (levels) {
    case 2: return add_planes<2>(block, planes, x, sums, counts);
    case 3: return add_planes<3>(block, planes, x, sums, counts);
    default: return add_planes<4>(block, planes, x, sums, counts);
  }
}

constexpr TwoPlaneKernels kKernels = {1,         4 * kExactFloats, kQuadBytes,   false,       build_lut,
                                      build_exact, build_planes,     add_lut_any, add_exact_any, add_planes_any};

}  // namespace two_plane_avx2
}  // namespace
}  // namespace lit_binq
