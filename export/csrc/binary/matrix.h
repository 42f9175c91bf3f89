// The weights of one linear layer, repacked from the file's row-major bits to the tiles of kernel.h.
// Knows kernel.h and workspace.h; nothing of ONNX Runtime.
//
// Both formats are here a sum over blocks b of columns:
//     y_n = r_n sum_b f[n, group(b)] sum_{j in b} z_j B_nj + bias_n,   z_j = x_j c_j,  B (N, K) signs
//
//     row x column   no factors f
//     grouped        f[n, g] = s_ng; r = 1, c = 1; blocks end where groups end
#pragma once

#include <cstdint>
#include <vector>

#include "binary/kernel.h"
#include "common/half.h"
#include "common/workspace.h"

namespace lit_binq {

// At most kBlock columns that share tables and factors.
struct ColumnBlock {
  int64_t column, count;  // columns of x
  int64_t byte, bytes;    // of a row of codes, bytes = block_bytes(count)
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

  int64_t rows() const { return N_; }
  int64_t cols() const { return K_; }
  int64_t row_bytes() const { return bytes_; }                                     // of codes, of all blocks
  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  const ColumnBlock& block(int64_t i) const { return blocks_[i]; }
  int64_t tiles() const { return (N_ + kTileRows - 1) / kTileRows; }               // the last may be narrow
  const float* row_scale() const { return row_scale_.data(); }                     // r (N,)
  const float* col_scale() const { return col_scale_.data(); }                     // c (K,)
  // c (K,) where some of it is zero, so that these activations do not count at all; else nullptr.
  const float* live_scale() const { return dead_columns_ ? col_scale_.data() : nullptr; }

  TileBlock tile_block(int64_t tile, int64_t block) const;
  // Factors of the rows of a tile, as many as the tile is wide; nullptr where the format has none.
  const float* factors(int64_t tile, int64_t block) const;

 private:
  PackedMatrix(int64_t N, int64_t K, int64_t group, Layout layout);
  LayerBytes transpose(const uint8_t* codes) const;  // tile after tile, block after block, as layout_ says
  int64_t tile_width(int64_t tile) const;
  int64_t padded_rows() const { return (N_ + kVectorRows - 1) / kVectorRows * kVectorRows; }
  size_t code_bytes() const { return static_cast<size_t>(padded_rows() * bytes_); }
  float& factor(int64_t row, int64_t group);

  Layout layout_;
  bool dead_columns_ = false;
  int64_t N_, K_, groups_ = 0, bytes_ = 0;
  std::vector<ColumnBlock> blocks_;
  LayerBytes codes_;
  std::vector<float> row_scale_, col_scale_;
  std::vector<float> factors_;  // tile after tile, each [groups][width]
};

}  // namespace lit_binq
