// The weights of one two-plane layer, repacked from the file to the tiles of two_plane/kernel.h, and how its
// activations are quantized. Knows two_plane/kernel.h and workspace.h; nothing of ONNX Runtime.
//
// Legend: as in two_plane/kernel.h; P outlier columns. Columns are in stored order (outliers first, ascending, then the
// others, ascending) unless said.
#pragma once

#include <cstdint>
#include <vector>

#include "common/workspace.h"
#include "two_plane/kernel.h"

namespace lit_binq {

// As in the file; nothing of it is kept.
struct TwoPlaneTensors {
  const uint8_t* codes;         // (N, ceil(K / 8)), bits A
  const uint8_t* selector;      // (N, ceil(K / 8)), bits B
  const uint16_t* levels;       // (N, ceil(K / group), L) float16
  const uint8_t* outlier_bits;  // (ceil(K / 8),) bitmap over the columns of x; not read where P = 0
  const uint16_t* input_scales; // (5,) float16 zeta, rho_0..rho_3; not read unless activation_bits = 4
  const float* input_range;     // (4,) lo, R of the 4-bit part, lo, R of the 8-bit part; nullptr: of each row of x
  int64_t N, K, group, L;
  int64_t activation_bits;      // 0, 4, 8
  int64_t P;                    // as many bits of outlier_bits as are set
};

enum class TwoPlaneInput { kLut, kExact, kPlanes };

// Columns that are quantized alike. Without quantization there is kFour only.
enum TwoPlanePart { kFour = 0, kEight = 1, kParts = 2 };

// At most kTwoPlaneBlock columns of one group and one part.
struct TwoPlaneColumns {
  int64_t column, count;
  int64_t position;   // where it starts in a row of activations whose blocks are filled up to whole chunks
  int64_t chunks;
  int64_t planes;     // of activations: 4 or 8; 0 without quantization
  TwoPlanePart part;
  int64_t weights;    // where it starts in a tile, in bytes
  int64_t prepared;   // where it starts in the prepared activations of one row, in bytes
  int64_t size;       // of them, a multiple of 64
};

class TwoPlaneMatrix {
 public:
  // `exact` matters where activation_bits = 0. N from 0, K and group from 1, whatever their size as long as the tensors
  // are there; a matrix without rows has no blocks either. Throws std::bad_alloc.
  TwoPlaneMatrix(const TwoPlaneKernels& kernels, const TwoPlaneTensors& tensors, bool exact);

  const TwoPlaneKernels& kernels() const { return kernels_; }
  TwoPlaneInput input() const { return input_; }
  int64_t rows() const { return N_; }
  int64_t cols() const { return K_; }
  int64_t levels() const { return L_; }
  int64_t tiles() const { return (N_ + kTwoPlaneRows - 1) / kTwoPlaneRows; }
  int64_t blocks() const { return static_cast<int64_t>(blocks_.size()); }
  const TwoPlaneColumns& block(int64_t i) const { return blocks_[i]; }
  int64_t positions() const { return positions_; }            // of all blocks, filled up
  int64_t prepared_bytes() const { return prepared_bytes_; }  // of a row, a multiple of 64

  // The column of x at each position, -1 where a block is filled up; nullptr where position and column agree.
  const int32_t* source() const { return source_.empty() ? nullptr : source_.data(); }

  TwoPlaneBlock tile_block(int64_t tile, int64_t block) const;
  // Sums of the weights of a part, of the rows of a tile: what the offset z of the activations is multiplied by.
  const float* row_sums(TwoPlanePart part, int64_t tile) const;
  // Units of the rounded levels of the rows of a tile; nullptr where levels are not rounded.
  const float* row_units(int64_t tile) const {
    return row_units_.empty() ? nullptr : row_units_.data() + tile * kTwoPlaneRows;
  }

  const float* fixed_range() const { return fixed_range_ ? input_range_ : nullptr; }  // (4,)
  float zeta() const { return zeta_; }
  const float* rho() const { return rho_; }                    // (4,)
  const float* midpoints() const { return midpoints_; }        // (15,) between the 16 sorted levels
  const uint8_t* patterns() const { return patterns_; }        // (16,) of the sorted levels

 private:
  void cut(const TwoPlaneTensors& t);
  void order_columns(const TwoPlaneTensors& t);
  void pack(const TwoPlaneTensors& t);
  void find_units(const TwoPlaneTensors& t);
  int64_t level_bytes() const;  // of a row and block
  void read_scales(const uint16_t* input_scales);

  const TwoPlaneKernels& kernels_;
  TwoPlaneInput input_;
  int64_t N_, K_, L_, group_, groups_, positions_ = 0, prepared_bytes_ = 0, tile_bytes_ = 0;
  std::vector<TwoPlaneColumns> blocks_;
  std::vector<int32_t> source_;
  LayerBytes weights_;
  std::vector<float> row_sums_;  // part after part, tile after tile
  std::vector<float> row_units_;
  bool fixed_range_ = false;
  float input_range_[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  float zeta_ = 0.0f, rho_[4] = {0.0f, 0.0f, 0.0f, 0.0f}, midpoints_[15] = {0.0f};
  uint8_t patterns_[16] = {0};
};

}  // namespace lit_binq
