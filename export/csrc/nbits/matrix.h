// The weights of one layer of 4 or 8 bits, repacked from the file to the tiles of nbits/kernel.h. Knows nbits/kernel.h
// and workspace.h; nothing of ONNX Runtime.
#pragma once

#include <cstdint>
#include <vector>

#include "common/workspace.h"
#include "nbits/kernel.h"

namespace lit_binq {

// As in the file, which is as com.microsoft.MatMulNBits has it; nothing of it is kept.
struct NBitsTensors {
  const uint8_t* codes;  // (N, G, g bits / 8); of two 4-bit codes in a byte the first is in the low half
  const float* scales;   // (N, G), finite
  const uint8_t* zeros;  // (N, ceil(G bits / 8)), packed likewise, or nullptr: 2^(bits - 1)
  int64_t N, K;
  int64_t bits;   // 4, 8
  int64_t block;  // g: a power of two, kNBitsSmallestBlock to kNBitsLargestBlock
};

class NBitsMatrix {
 public:
  explicit NBitsMatrix(const NBitsTensors& tensors);  // throws std::bad_alloc

  int64_t rows() const { return N_; }
  int64_t cols() const { return K_; }
  int64_t bits() const { return bits_; }
  int64_t block() const { return block_; }
  int64_t blocks() const { return blocks_; }
  int64_t positions() const { return blocks_ * block_; }  // columns, the last block filled up
  int64_t tiles() const { return (N_ + kNBitsRows - 1) / kNBitsRows; }
  bool halves() const { return halves_; }

  NBitsTile tile(int64_t i) const;
  int exponent(int64_t tile) const { return exponents_[static_cast<size_t>(tile)]; }  // of its power of two

 private:
  void choose_exponents(const float* scales);
  void pack(const NBitsTensors& t);
  void put_word(const uint8_t* from, uint8_t* to) const;

  int64_t N_, K_, bits_, block_, blocks_;
  int64_t code_bytes_, block_bytes_ = 0;  // of a tile's block
  bool halves_ = true, has_zeros_;
  std::vector<int> exponents_;
  LayerBytes weights_;
};

}  // namespace lit_binq
