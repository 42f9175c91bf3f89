// The interface that every instruction set implements for weights of 4 and 8 bits, and the layout it shares with the
// driver (nbits/multiply.cpp). Knows nothing of ONNX Runtime, allocates nothing, starts no threads.
//
// Legend: N rows of weights, K columns in G blocks of g (the last filled up with activations of zero); W_nj =
// s_ng (q_nj - z_ng), q a code of 4 or 8 bits, z a zero point, s a scale; x one row of activations.
//
//     rounded   x_j is rounded to a_j u_g with a_j from -127 to 127 and one unit u for each block. The integers
//               I_ng = sum_j (q_nj - z_ng) a_j over a block are exact, and
//                   sum_n = sum_g (I_ng u_g) s_ng     in float32: two products, one addition, blocks in their order
//     exact     float32 inside a block, four partial sums p_b over the columns j = b modulo 4, ascending:
//                   sum_n = sum_g s_ng ((p_0 + p_1) + (p_2 + p_3)),  p_b = sum_j (q_nj - z_ng) x_j
//               with float64 across blocks. At most g / 4 + 3 roundings on the way of a product.
//
// All sets do the same operations in the same order: results are equal bit for bit.
//
// Weights. Rows come in tiles of 16, padded with zeros. A tile is one stream of memory, block after block:
//
//     codes    [line][row][4 bytes]   4 bits: a line is 8 columns, 0-3 in low and 4-7 in high halves of the bytes
//                                     8 bits: a line is 4 columns
//     scales   [row]   float16 where that loses nothing, else float32; divided by a power of two of the tile
//     zeros            absent where z = 2^(bits - 1) everywhere
//                      4 bits: 8 bytes, two words: z of row 2i is digit i (of 4 bits) of the first, of row 2i + 1 of
//                      the second; 8 bits: 16 bytes
//
// A line fills a register of 16 words, one for each row. Blocks follow each other without gaps: lines are not aligned.
#pragma once

#include <cstdint>

namespace lit_binq {

constexpr int64_t kNBitsRows = 16;
constexpr int64_t kNBitsLine = 4 * kNBitsRows;

// Rows of activations that a call may have: their sums stay in registers while a line of weights passes.
constexpr int64_t kNBitsTogether = 4;

constexpr float kNBitsLimit = 127.0f;

// Sums of (q - z) a over a block stay below 2^24, and sums of a within 16 bits.
constexpr int64_t kNBitsSmallestBlock = 16, kNBitsLargestBlock = 256;

// Blocks of activations whose largest magnitude is below this count as zero, see kTiniestSum in binary/kernel.h.
constexpr float kNBitsTiniest = 0x1p-100f;

struct NBitsTile {
  const uint8_t* data;
  int64_t blocks, lines;  // lines of a block: g / 8 or g / 4
  bool halves, zeros;     // scales are float16; there are zero points
  int64_t ahead;          // bytes from a line that is read to one to prefetch, or 0
};

// Bytes of a block's scales, and of its zero points. Static: see binary/kernel.h, block_bytes.
static constexpr int64_t nbits_scale_bytes(bool halves) { return kNBitsRows * (halves ? 2 : 4); }
static constexpr int64_t nbits_zero_bytes(bool zeros, int64_t bits) { return zeros ? kNBitsRows * bits / 8 : 0; }

// One row of activations.
struct NBitsActivations {
  const int8_t* a;             // rounded: G g
  const float* unit;           // rounded: u (G,)
  const int32_t* minus_total;  // rounded: -sum of a (G,)
  const float* x;              // exact: G g
};

// Kernels of one instruction set. Every function is safe to call from many threads. `rows` of x, 1 to kNBitsTogether;
// `sums` takes kNBitsRows for each.
struct NBitsKernels {
  void (*rounded4)(const NBitsTile& tile, const NBitsActivations* x, int64_t rows, float* sums);
  void (*rounded8)(const NBitsTile& tile, const NBitsActivations* x, int64_t rows, float* sums);
  void (*exact4)(const NBitsTile& tile, const NBitsActivations* x, int64_t rows, double* sums);
  void (*exact8)(const NBitsTile& tile, const NBitsActivations* x, int64_t rows, double* sums);
};

}  // namespace lit_binq
