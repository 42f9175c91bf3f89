// The weights of one linear layer, repacked from the file's row-major bits to the tiles of kernel.h.
// Knows kernel.h and workspace.h; nothing of ONNX Runtime.
//
// Every format is here a sum over planes p and blocks b of columns:
//     y_n = r_n sum_b sum_p f_p[n, group(b)] sum_{j in b} z_j P_nj + bias_n,   z_j = x_j c_j,  P (N, K) signs
//
//     row x column   one plane, no factors f
//     grouped        one plane, f[n, g] = s_ng; r = 1, c = 1; blocks end where groups end
//     levels         the level that two bits pick is m0 + m1 a + m2 b + m3 ab with a, b = +-1: four planes of signs
//                    1, a, b, ab, with f_p[n, g] = m_p; the planes 1 and ab are not stored. With two zones every block
//                    comes twice, once for each zone, and c is 1 in the zone and 0 outside.
#pragma once

#include <cstdint>
#include <vector>

#include "binary/kernel.h"
#include "common/workspace.h"

namespace lit_binq {

// Exact value of an IEEE 754 binary16, subnormals included, without F16C.
float half_to_float(uint16_t bits);

// Index of the first scale that is infinite or not a number; -1 where all are finite.
int64_t first_non_finite(const uint16_t* scales, int64_t count);

// At most kBlock columns that share tables and factors.
struct ColumnBlock {
  int64_t column, count;  // columns of x
  int64_t byte, bytes;    // of a row of codes, bytes = block_bytes(count)
  int64_t table;          // where its tables start, in bytes of codes
  int64_t scale;          // where its column scales start
  int64_t group;          // of its factors
};

class PackedMatrix {
 public:
  // All pointers are as in the file; nothing of them is kept. `layout` is that of the kernels that will multiply. N from
  // 0, K and group from 1, whatever their size as long as the tensors are there; a matrix without rows has no blocks
  // either. Throw std::bad_alloc.
  // codes (N, ceil(K / 8)), row_scale (N,), col_scale (K,).
  static PackedMatrix row_column(const uint8_t* codes, const uint16_t* row_scale, const uint16_t* col_scale, int64_t N,
                                 int64_t K, Layout layout);
  // scales (N, ceil(K / group)); any group size.
  static PackedMatrix grouped(const uint8_t* codes, const uint16_t* scales, int64_t N, int64_t K, int64_t group,
                              Layout layout);
  // levels (N, zones * ceil(K / group), 4); column_bits (ceil(K / 8),) says which columns are of the second zone, or
  // is nullptr for one zone.
  static PackedMatrix levels(const uint8_t* codes, const uint8_t* selector, const uint16_t* levels,
                             const uint8_t* column_bits, int64_t N, int64_t K, int64_t group, Layout layout);

  int64_t rows() const { return N_; }
  int64_t cols() const { return K_; }
  int64_t table_bytes() const { return table_bytes_; }                             // of all blocks
  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  const ColumnBlock& block(int64_t i) const { return blocks_[i]; }
  int64_t planes() const { return planes_; }
  int64_t tiles() const { return (N_ + kTileRows - 1) / kTileRows; }               // the last may be narrow
  const float* row_scale() const { return row_scale_.data(); }                     // r (N,)
  const float* col_scale() const { return col_scale_.data(); }                     // c, (K,) for each zone
  // c (K,) where some of it is zero, so that these activations do not count at all; else nullptr.
  const float* live_scale() const { return dead_columns_ ? col_scale_.data() : nullptr; }

  // Codes of plane `plane` in a tile's block. `scratch` takes kTileRows * kBlockBytes bytes, in case they are made.
  TileBlock tile_block(int64_t plane, int64_t tile, int64_t block, uint8_t* scratch) const;
  // Factors of the rows of a tile, as many as the tile is wide; nullptr where the format has none.
  const float* factors(int64_t plane, int64_t tile, int64_t block) const;

 private:
  PackedMatrix(int64_t N, int64_t K, int64_t group, int64_t zones, Layout layout);
  LayerBytes transpose(const uint8_t* codes) const;  // tile after tile, block after block, as layout_ says
  int64_t tile_width(int64_t tile) const;
  int64_t padded_rows() const { return (N_ + kVectorRows - 1) / kVectorRows * kVectorRows; }
  size_t code_bytes() const { return static_cast<size_t>(padded_rows() * bytes_); }
  void allocate_factors(int64_t planes);
  float& factor(int64_t plane, int64_t row, int64_t group);

  Layout layout_;
  bool dead_columns_ = false;
  int64_t N_, K_, groups_ = 0, bytes_ = 0, table_bytes_ = 0, planes_ = 1;
  std::vector<ColumnBlock> blocks_;
  std::vector<LayerBytes> codes_;  // of the stored planes
  std::vector<float> row_scale_, col_scale_;
  std::vector<float> factors_;       // plane after plane, tile after tile, each [groups][width]
};

}  // namespace lit_binq
