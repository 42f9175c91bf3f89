// The weights of one linear layer, repacked from the file's row-major bits to the tiles of kernel.h.
// Knows kernel.h and workspace.h; nothing of ONNX Runtime.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel.h"
#include "workspace.h"

namespace lit_binq {

// Exact value of an IEEE 754 binary16, subnormals included, without F16C.
float half_to_float(uint16_t bits);

// Index of the first scale that is infinite or not a number; -1 where all are finite.
int64_t first_non_finite(const uint16_t* scales, int64_t count);

class PackedMatrix {
 public:
  // codes (N, ceil(K / 8)), row_scale (N,) and col_scale (K,) as in the file; nothing of them is kept.
  // Throws std::bad_alloc.
  PackedMatrix(const uint8_t* codes, const uint16_t* row_scale, const uint16_t* col_scale, int64_t N, int64_t K);

  int64_t rows() const { return N_; }
  int64_t cols() const { return K_; }
  int64_t bytes() const { return bytes_; }                              // ceil(K / 8)
  int64_t blocks() const { return (K_ + kBlock - 1) / kBlock; }         // of kBlock columns; the last may be short
  int64_t tiles() const { return (N_ + kTileRows - 1) / kTileRows; }    // of kTileRows rows; the last may be narrow
  const float* row_scale() const { return row_scale_.data(); }          // r (N,)
  const float* col_scale() const { return col_scale_.data(); }          // c (K,)

  // Bytes of block `block` in tile `tile`.
  TileBlock tile_block(int64_t tile, int64_t block) const;

 private:
  int64_t tile_width(int64_t tile) const;

  int64_t N_, K_, bytes_;
  AlignedBytes codes_;  // tile after tile, each [bytes][width]
  std::vector<float> row_scale_, col_scale_;
};

}  // namespace lit_binq
