// Repacking. Runs once for each layer, when its operator is created.
#include "binary/matrix.h"

#include <algorithm>
#include <cstring>

#include "common/cpu.h"

namespace lit_binq {

PackedMatrix::PackedMatrix(int64_t N, int64_t K, int64_t group, Layout layout)
    : layout_(layout), N_(N), K_(K), row_scale_(N, 1.0f) {
  group = std::min(group, K);  // any that is larger means the same
  groups_ = divide_up(K, group);
  if (N == 0) return;  // no tensor of the file says that K is a number of columns that fits a memory
  col_scale_.assign(K, 1.0f);
  for (int64_t g = 0; g < groups_; ++g) {
    const int64_t end = std::min(K, (g + 1) * group);
    for (int64_t column = g * group; column < end; column += kBlock) {
      const int64_t count = std::min(kBlock, end - column), bytes = block_bytes(count);
      blocks_.push_back({column, count, bytes_, bytes, g});
      bytes_ += bytes;
    }
  }
}

PackedMatrix PackedMatrix::row_column(const uint8_t* codes, const uint16_t* row_scale, const uint16_t* col_scale,
                                      int64_t N, int64_t K, Layout layout) {
  PackedMatrix w(N, K, K, layout);
  if (N == 0) return w;
  w.codes_ = w.transpose(codes);
  std::transform(row_scale, row_scale + N, w.row_scale_.begin(), half_to_float);
  std::transform(col_scale, col_scale + K, w.col_scale_.begin(), half_to_float);
  w.dead_columns_ = std::find(w.col_scale_.begin(), w.col_scale_.end(), 0.0f) != w.col_scale_.end();
  return w;
}

PackedMatrix PackedMatrix::grouped(const uint8_t* codes, const uint16_t* scales, int64_t N, int64_t K, int64_t group,
                                   Layout layout) {
  PackedMatrix w(N, K, group, layout);
  if (N == 0) return w;
  w.codes_ = w.transpose(codes);
  w.factors_.assign(static_cast<size_t>(w.padded_rows() * w.groups_), 0.0f);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t g = 0; g < w.groups_; ++g) w.factor(n, g) = half_to_float(scales[n * w.groups_ + g]);
  }
  return w;
}

// Byte of 8 columns from `column` on. Bits beyond the row's end are whatever is there: their activations count as 0.
static uint8_t byte_at(const uint8_t* row, int64_t row_bytes, int64_t column) {
  const int64_t byte = column / 8, shift = column % 8;
  const unsigned next = shift != 0 && byte + 1 < row_bytes ? row[byte + 1] : 0u;
  return static_cast<uint8_t>((row[byte] | next << 8) >> shift);
}

LayerBytes PackedMatrix::transpose(const uint8_t* codes) const {
  const int64_t row_bytes = divide_up(K_, 8);
  LayerBytes result = allocate_for_layer(code_bytes());
  std::memset(result.get(), 0, code_bytes());
  for (int64_t tile = 0; tile < tiles(); ++tile) {
    const int64_t width = tile_width(tile), first = tile * kTileRows, last = std::min(N_, first + kTileRows);
    uint8_t* out = result.get() + first * bytes_;
    for (const ColumnBlock& b : blocks_) {
      for (int64_t n = first; n < last; ++n) {
        const uint8_t* row = codes + n * row_bytes;
        for (int64_t k = 0; 8 * k < b.count; ++k) {
          const int64_t quad = k / kQuad * kQuad;
          const int64_t place = layout_ == Layout::kBytes ? k * width + (n - first)
                                                          : quad * width + (n - first) * kQuad + (k - quad);
          out[b.byte * width + place] = byte_at(row, row_bytes, b.column + 8 * k);
        }
      }
    }
  }
  return result;
}

float& PackedMatrix::factor(int64_t row, int64_t group) {
  const int64_t tile = row / kTileRows, first = tile * kTileRows;
  return factors_[first * groups_ + group * tile_width(tile) + (row - first)];
}

const float* PackedMatrix::factors(int64_t tile, int64_t block) const {
  if (factors_.empty()) return nullptr;
  return factors_.data() + tile * kTileRows * groups_ + blocks_[block].group * tile_width(tile);
}

int64_t PackedMatrix::tile_width(int64_t tile) const {
  const int64_t rows = std::min(kTileRows, N_ - tile * kTileRows);
  return (rows + kVectorRows - 1) / kVectorRows * kVectorRows;
}

TileBlock PackedMatrix::tile_block(int64_t tile, int64_t block) const {
  const ColumnBlock& b = blocks_[block];
  const int64_t width = tile_width(tile);
  // Every tile before this one is full, so it starts at kTileRows * bytes a tile.
  return {codes_.get() + tile * kTileRows * bytes_ + b.byte * width, width, b.bytes, prefetch_repeats()};
}

}  // namespace lit_binq
