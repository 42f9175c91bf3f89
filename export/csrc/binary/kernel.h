// The interface that every instruction set implements, and the layouts it shares with the driver (multiply.cpp).
// Knows nothing of ONNX Runtime, allocates nothing, starts no threads.
//
// Legend: y = ((x * c) B^T) * r + bias; x (M, K) activations, B (N, K) signs, c (K,) and r (N,) scales. Formats whose
// scales differ between groups of columns are sums of such products, one for each block of columns (binary/matrix.h).
// z = x * 2^-e * c: one row of activations, scaled so that nothing overflows (multiply.cpp chooses e per row).
//
// Weights (binary/matrix.h). Rows come in tiles of up to 128. A byte of weights is 8 columns of a row: bit b of byte k
// is column 8k + b; set is +1, clear is -1. Within a tile the bytes of the row-major file are transposed, as the
// instruction set wants them (Layout).
//
// LUT mode. For 4 activations z0..z3 there are only 16 signed sums; a nibble of the weights picks one of them. The
// sums of a block of 256 activations are rounded to bytes with one common scale:
//     table[i] = 128 + round(127 * s_i / max|s|),  s_i = (+-z0 +- z1) + (+-z2 +- z3),  bit j of i set: + z_j
// The bytes are biased by 128, hence unsigned: an AVX2 kernel adds them up in 16-bit lanes that hold two bytes each,
// and splitting such a lane into its even and odd byte is right for unsigned bytes only.
//
// Five-input LUT, lut5 (AVX-512, for several rows of activations). A fifth activation costs no lookup where the product
// that adds up bytes takes signed ones beside them, as VPDPBUSD does: the 16 sums that have + z4 are stored, and
//     +-z0 +-z1 +-z2 +-z3 +- z4 = s4 * table[i],  s4 the fifth sign, bit j of i set: z_j has the sign s4
// A block of Q quads has 2 Q halves (of a quad, the low nibbles of its 4 bytes or the high ones). The last 2 Q / 5 of
// them hold fifth signs: bit e of the 4 nibbles of the a-th of them belongs to the 4 nibbles of half 4 a + e. Halves
// that are left over have no fifth sign, and z4 = 0. So 256 columns take 52 lookups for 64. In integers, the last 128
// being half a unit:
//     table[i] = 128 + ((+-q0 +-q1 +-q2 +-q3 + q4 + 128) >> 8),  q_j = round(256 * 127 * z_j / max|s|)
//
// Exact mode. The same idea in float32: a byte of weights picks from three tables of 8 floats, for its bits 0-2, 3-5
// and 6-7 (8 floats fill one 256-bit register, which a lane permutation indexes by 3 bits).
//
// All sets compute the same integers and round the same float operations in the same order: their results are equal
// bit for bit to those in plain C++ (scalar-inl.h; lut5: tests/scalar_lut5.cpp), in both modes.
// tests/native/test_native_kernels.py holds them to it.
#pragma once

#include <cstdint>

namespace lit_binq {

// Rows of one vector register: 32 bytes of AVX2. Tiles are whole vectors: N is padded to a multiple of 32.
constexpr int64_t kVectorRows = 32;

// Rows of a tile. 128 rows are 4 vectors, so that the two table registers of a weight byte are loaded once for 4
// vectors, and their 8 accumulators (even and odd bytes) with 2 tables, 2 constants and 3 temporaries fit the 16
// registers of AVX2. A tile's block is 128 * 32 bytes = 4 KB and stays in L1 while all rows of a panel pass over it.
constexpr int64_t kTileRows = 128;

// Activations that share one table scale. Smaller is more accurate and costs one flush to float more; 256 gives 7e-3
// relative error on Gaussian data and flushes once in 32 weight bytes. Its 64 groups of 4 add bytes of at most 255:
// 64 * 255 = 16320 < 65536 for the unsigned 16-bit sum, and 64 * 127 = 8128 < 32768 once the bias 64 * 128 is off.
constexpr int64_t kBlock = 256;
constexpr int64_t kBlockBytes = kBlock / 8;

// How the bytes of a tile's block of columns are laid out; the tables of LUT mode follow, 32 entries for each byte.
enum class Layout {
  // [bytes][width]: a register holds one byte of many rows. Tables: byte after byte, its low nibble's, its high's.
  kBytes,
  // [bytes / 4][width][4]: a register holds 4 bytes of a quarter as many rows. Tables: for each 4 bytes the 4 of the
  // low nibbles, then the 4 of the high nibbles: 64 entries each, which one permutation of 64 bytes picks from.
  kQuads
};

// Bytes of a block of columns in memory: whole quads in either layout. Columns beyond `count` have z = 0. Static: files
// compiled for different instruction sets must not share one copy.
constexpr int64_t kQuad = 4;
static constexpr int64_t block_bytes(int64_t count) { return (count + 8 * kQuad - 1) / (8 * kQuad) * kQuad; }

constexpr int64_t kNeverDense = INT64_MAX;  // of BinaryKernels::rows_for_dense

// Lut5 of a block of so many quads: halves that hold signs, halves that are looked up, and of these the signed ones.
static constexpr int sign_halves(int64_t quads) { return static_cast<int>(2 * quads / 5); }
static constexpr int lookups(int64_t quads) { return static_cast<int>(2 * quads) - sign_halves(quads); }
static constexpr int signed_lookups(int64_t quads) { return 4 * sign_halves(quads); }
constexpr int64_t kLut5From = 2;      // rows of activations: one alone waits for the memory, and signs take time
constexpr int kLut5Fraction = 8;      // bits of q behind the point

constexpr int kTableBias = 128;
constexpr float kTableLimit = 127.0f;
constexpr int64_t kLutEntries = 32;    // bytes of table for one byte of weights: two nibbles with 16 sums each
constexpr int64_t kExactEntries = 24;  // floats of table for one byte of weights: three parts with 8 sums each

// Blocks whose largest sum is below this count as zero. z is scaled so that the row's largest live activation is at
// least 2^-23 and the smallest float16 column scale is 2^-24: 2^-100 is 2^-53 of the least a row can hold, and
// 127 / 2^-100 still is a float.
constexpr float kTiniestSum = 0x1p-100f;

// Part of one tile that a kernel works on: the bytes of one block of columns.
struct TileBlock {
  const uint8_t* codes;  // see Layout
  int64_t width;         // rows: 32, 64, 96 or 128
  int64_t bytes;         // 4 to kBlockBytes, whole quads
  int repeats;           // how often one row of activations prefetches these codes (cpu.h); 0: they are in a cache
};

// Where the tables and sums of the rows of activations are (BinaryKernels::add_lut).
struct Rows {
  const uint8_t* tables;
  int64_t stride;
  const float* scales;
  int64_t scale_stride;
  float* sums;
};

struct Magnitudes {
  int32_t all, live;
};

// Those of columns k to K as well: what is left behind whole registers. Static: see block_bytes.
static inline Magnitudes with_rest(Magnitudes m, const float* x, const float* c, int64_t k, int64_t K) {
  for (; k < K; ++k) {
    int32_t word;
    __builtin_memcpy(&word, x + k, sizeof word);
    word &= 0x7fffffff;
    if (word > m.all) m.all = word;
    if (word > m.live && (c == nullptr || c[k] != 0.0f)) m.live = word;
  }
  return m;
}

// Kernels of one instruction set. Every function is safe to call from many threads.
struct BinaryKernels {
  Layout layout;

  // Largest magnitudes of K activations as the bits of a float, which order as integers do, infinities and NaN on top:
  // of all, and of those whose `c` is not zero (of all, where c is nullptr).
  Magnitudes (*largest)(const float* x, const float* c, int64_t K);

  // From so many rows of activations in a panel on, tables are dense: a form of the set's own that takes less of their
  // place (AVX2: half of each table; AVX-512: lut5). Only kernels that say a number here are asked for them.
  int64_t rows_for_dense;

  // Tables of one block. `x` and `c` have `count` (1 to kBlock) elements; z = (x * pre) * c, zero beyond `count` and
  // where c is zero: `pre` is chosen for the columns that count, so it may send x of the others to infinity.
  // `table` takes block_bytes(count) * kLutEntries bytes; `scale` takes the float that one table unit stands for.
  void (*build_lut)(const float* x, const float* c, int64_t count, float pre, bool dense, uint8_t* table,
                    float* scale);
  // `table` takes block_bytes(count) * kExactEntries floats, byte after byte in either layout.
  void (*build_exact)(const float* x, const float* c, int64_t count, float pre, float* table);

  // Adds the products of one block for `rows` rows of activations: row m has its tables at `tables` + m * stride and
  // its sums at `sums` + m * kTileRows; in LUT mode its scale is scales[m * scale_stride]. Where `factors` is not
  // null, the block's products are multiplied by it on the way, row n of the weights by factors[n] (block.width of
  // them): that is what a scale for each group of columns costs.
  void (*add_lut)(const TileBlock& block, const uint8_t* tables, bool dense, int64_t stride, const float* scales,
                  int64_t scale_stride, const float* factors, int64_t rows, float* sums);
  // float32 inside a block (at most 36 roundings on the way of a product: 2 + 2 in and between tables, 32 bytes),
  // float64 across blocks: the error is at most 36 * 2^-24 = 2.2e-6 of sum |z|, whatever K.
  void (*add_exact)(const TileBlock& block, const float* tables, int64_t stride, const float* factors, int64_t rows,
                    double* sums);

  // gate_i = silu(gate_i) * up_i (silu.h).
  void (*apply_gate)(float* gate, const float* up, int64_t count);
};

}  // namespace lit_binq
