// Repacking, and the conversion of float16 scales. Runs once for each layer, when its operator is created.
#include "packed_matrix.h"

#include <algorithm>
#include <cstring>

namespace lit_binq {

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  uint32_t word;
  if (exponent == 0) {
    // Zero or subnormal: mantissa * 2^-24, which is a normal float32 (or zero), so the product is exact.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    std::memcpy(&word, &magnitude, sizeof word);
    word |= sign;
  } else if (exponent == 31) {
    word = sign | 0x7f800000u | (mantissa << 13);
  } else {
    word = sign | ((exponent + (127 - 15)) << 23) | (mantissa << 13);
  }
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

int64_t first_non_finite(const uint16_t* scales, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if ((scales[i] & 0x7c00u) == 0x7c00u) return i;
  }
  return -1;
}

PackedMatrix::PackedMatrix(const uint8_t* codes, const uint16_t* row_scale, const uint16_t* col_scale, int64_t N,
                           int64_t K)
    : N_(N), K_(K), bytes_((K + 7) / 8), row_scale_(N), col_scale_(K) {
  std::transform(row_scale, row_scale + N, row_scale_.begin(), half_to_float);
  std::transform(col_scale, col_scale + K, col_scale_.begin(), half_to_float);
  const int64_t padded_rows = (N + kVectorRows - 1) / kVectorRows * kVectorRows;
  const size_t size = static_cast<size_t>(padded_rows * bytes_);
  codes_ = allocate_aligned(std::max<size_t>(size, 1));
  std::memset(codes_.get(), 0, size);
  for (int64_t tile = 0; tile < tiles(); ++tile) {
    const int64_t width = tile_width(tile);
    const int64_t first = tile * kTileRows;
    const int64_t last = std::min(N, first + kTileRows);
    uint8_t* out = codes_.get() + first * bytes_;
    for (int64_t n = first; n < last; ++n) {
      for (int64_t k = 0; k < bytes_; ++k) out[k * width + (n - first)] = codes[n * bytes_ + k];
    }
  }
}

int64_t PackedMatrix::tile_width(int64_t tile) const {
  const int64_t rows = std::min(kTileRows, N_ - tile * kTileRows);
  return (rows + kVectorRows - 1) / kVectorRows * kVectorRows;
}

TileBlock PackedMatrix::tile_block(int64_t tile, int64_t block) const {
  const int64_t width = tile_width(tile);
  const int64_t first = block * kBlockBytes;
  // Every tile before this one is full, so it starts at kTileRows * bytes a tile.
  return {codes_.get() + tile * kTileRows * bytes_ + first * width, width, std::min(kBlockBytes, bytes_ - first)};
}

}  // namespace lit_binq
