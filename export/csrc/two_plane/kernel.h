// The interface that every instruction set implements for two-plane weights, and the layouts it shares with the driver
// (two_plane/multiply.cpp). Knows nothing of ONNX Runtime, allocates nothing, starts no threads.
//
// Legend: N rows of weights, K columns in stored order; A, B bits of a weight, s = 2 bit - 1 their signs; L numbers a
// row and group of columns; x one row of activations; q_k its binary planes (activation_bits 4 and 8).
//
//     L = 4   w = level[A + 2B]
//     L = 3   w = m + s_A a1 + s_B a2, stored (m, a1, a2)
//     L = 2   w = s_A a1 + s_B a2, stored (a1, a2)
//
// A block is at most 160 columns of one group, and a product is a sum over blocks. Inside one, w is linear in its bits,
// so what is needed of the activations are the sums X = sum x_j, S_A = sum s_A x_j, S_B = sum s_B x_j and, for L = 4
// only, one with both bits:
//
//     w = m0 + m1 s_A + m2 s_B - m3 s_C,  C = A xor B                 m0 = (l0 + l3 + l1 + l2) / 4
//                                                                     m1 = (l3 - l0 + l1 - l2) / 4
//                                                                     m2 = (l3 - l0 - l1 + l2) / 4
//                                                                     m3 = (l0 + l3 - l1 - l2) / 4
//
// Three kinds of activations, each with tables or words of its own ("prepared"), made once for all rows of weights:
//
//     lut     4 activations have 16 signed sums; a nibble of the weights picks one. Bytes, one scale a block:
//             round(127 s_i / max|s|). Error about 6e-3 relative.
//     exact   the same in float32
//     planes  counts, exact integers: of q_k, A & q_k, B & q_k and (L = 4) A & B & q_k over the block. With
//             x_j = sum_k a_k q_jk + z:  S_A = 2 sum_k a_k count(A & q_k) - T,  T = sum_k a_k count(q_k), and z times
//             the sum of a row's weights is added by the driver.
//
// Weights. Rows come in tiles of 64, padded with zeros. A tile is one stream of memory, block after block:
//
//     codes   [chunk][A, B][row of the tile][lane bytes]     a chunk is 8 * lane bytes columns
//     levels  [L][row of the tile] float16
//
// or, in LUT mode, for L = 4 and kernels that round levels, in three quarters of the space and without arithmetic:
//
//     rounded [m1 and m2, -m3 and m0][row of the tile][3 bytes]      12 bits each, the first one lowest, in units of a
//             row: largest |m| / 2047. A product of a block is then one of integers, X rounded to one as well.
//
// lane bytes: how many bytes of a row lie together. It is what the instruction set likes best; columns that fill up the
// last chunk of a block have clear bits and activations of zero.
#pragma once

#include <cstdint>

namespace lit_binq {

// 64 rows are two AVX2 registers of bytes or four AVX-512 registers of words, so that the accumulators of two planes
// and their tables fit the registers of either.
constexpr int64_t kTwoPlaneRows = 64;

// Columns of a block: groups of 144, which divide the widths of small models, are one. 160 bits count to 160 at most,
// so AVX2 counts them in bytes; 40 table lookups of at most 255 each stay below 2^15 in 16 bits.
constexpr int64_t kTwoPlaneBlock = 160;

constexpr int64_t kMaxPlanes = 8;      // binary planes of activations: 4 or 8
constexpr int64_t kWeightPlanes = 3;   // A, B, A & B: in `counts`
constexpr float kTwoPlaneLimit = 127.0f;
constexpr int64_t kQuadBytes = 16;     // of the lut table of 4 columns
constexpr int64_t kPairBytes = 3;      // of two rounded levels
constexpr int kRoundedLimit = 2047;

// Blocks whose largest sum is below this count as zero, see kTiniestSum in binary/kernel.h.
constexpr float kTiniestQuad = 0x1p-100f;

// One block of one tile.
struct TwoPlaneBlock {
  const uint8_t* codes;
  const uint8_t* levels;
  int64_t chunks;
  int repeats;  // how often one row of activations prefetches them (cpu.h); 0: they are in a cache

  const uint16_t* halves() const { return reinterpret_cast<const uint16_t*>(levels); }
};

// One block of one row of activations.
struct TwoPlaneActivations {
  const uint8_t* prepared;  // 64-byte aligned
  float unit;               // lut: what one table unit stands for
  float total;              // lut, exact: X; planes: T
  const float* twice;       // planes: 2 a_k
};

// Kernels of one instruction set. Every function is safe to call from many threads. `levels` is L, 2 to 4; `sums` are
// 64 floats, to which the products are added.
struct TwoPlaneKernels {
  int64_t lane_bytes;
  int64_t exact_bytes;  // prepared bytes of 8 columns, exact
  int64_t plane_bytes;  // prepared bytes of 8 columns and one plane of activations
  bool rounds_levels;   // L = 4, lut: levels are `rounded`, and sums are in units of their rows

  // x: chunks * 8 * lane_bytes floats, zero beyond the block's end. 32 prepared bytes for 8 columns.
  void (*build_lut)(const float* x, int64_t chunks, uint8_t* prepared, float* unit);
  void (*build_exact)(const float* x, int64_t chunks, uint8_t* prepared);
  // q: a byte for each column, bit k is plane k, zero beyond the block's end. ones takes count(q_k), `planes` of them.
  void (*build_planes)(const uint8_t* q, int64_t planes, int64_t chunks, uint8_t* prepared, int32_t* ones);

  void (*add_lut)(const TwoPlaneBlock& block, int64_t levels, const TwoPlaneActivations& x, float* sums);
  void (*add_exact)(const TwoPlaneBlock& block, int64_t levels, const TwoPlaneActivations& x, float* sums);
  // planes is 4 or 8. Where `counts` is not null it takes the integers: [A, B, A & B][planes][64]; the third only where
  // L = 4.
  void (*add_planes)(const TwoPlaneBlock& block, int64_t levels, int64_t planes, const TwoPlaneActivations& x,
                     float* sums, int32_t* counts);
};

}  // namespace lit_binq
