// One row of activations, made ready for the kernels: put in stored order, scaled or quantized, made into tables or
// words. Knows two_plane/matrix.h.
#pragma once

#include <cstdint>

#include "two_plane/matrix.h"

namespace lit_binq {

// What a row is apart from its prepared bytes.
struct TwoPlaneRow {
  bool finite;                           // false: the row holds an infinity or a NaN, and so does its result
  float up;                              // what sums are multiplied by in the end
  float low[kParts], range[kParts];      // quantized: lo and R of each part
  float offset[kParts];                  // quantized: z / up
  float twice[kParts][kMaxPlanes];       // quantized: 2 a_k / up
};

// Memory that preparing a row takes, beside its result: floats, then bytes.
int64_t two_plane_scratch_bytes(const TwoPlaneMatrix& weights);

// The prepared activations of some rows: block after block, in a block row after row, so that a pass of all rows over a
// block of weights reads one stream. (Row after row would put the rows at distances that are large powers of two, where
// caches have few places.)
struct TwoPlanePrepared {
  uint8_t* bytes;    // rows * weights.prepared_bytes(), 64-byte aligned
  float* per_block;  // 2 a block and row: unit and total
  int64_t rows;

  uint8_t* at(const TwoPlaneColumns& block, int64_t m) const { return bytes + block.prepared * rows + m * block.size; }
  float* of(int64_t block, int64_t m) const { return per_block + 2 * (block * rows + m); }
};

// Prepares row m of them. x (K,) in its own order. scratch: 64-byte aligned; after a quantized row its codes (a byte a
// position) lie at `two_plane_codes(weights, scratch)`.
void prepare_row(const TwoPlaneMatrix& weights, const float* x, const TwoPlanePrepared& prepared, int64_t m,
                 uint8_t* scratch, TwoPlaneRow& row);
const uint8_t* two_plane_codes(const TwoPlaneMatrix& weights, const uint8_t* scratch);

}  // namespace lit_binq
