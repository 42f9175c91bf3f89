// Repacking. Runs once for each layer, when its operator is created.
#include "nbits/matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lit_binq {
namespace {

// The largest scale of a tile is brought to [2^14, 2^15), near the top of float16.
constexpr int kTopExponent = 15;

// float16 bits of a number below 2^16; false where float16 does not hold it exactly.
bool as_half(float value, uint16_t* half) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint32_t sign = word >> 16 & 0x8000, exponent = word >> 23 & 0xff;
  constexpr uint32_t kSmallestNormal = 127 - 14;
  if (exponent >= kSmallestNormal) {
    *half = static_cast<uint16_t>(sign | (exponent - kSmallestNormal + 1) << 10 | (word >> 13 & 0x3ff));
    return (word & 0x1fff) == 0;
  }
  const float units = std::fabs(value) * 0x1p24f;
  *half = static_cast<uint16_t>(sign | static_cast<uint32_t>(units));
  return units == std::floor(units);
}

}  // namespace

NBitsMatrix::NBitsMatrix(const NBitsTensors& t)
    : N_(t.N),
      K_(t.K),
      bits_(t.bits),
      block_(t.block),
      blocks_(divide_up(t.K, t.block)),
      code_bytes_(t.block * t.bits / 8 * kNBitsRows),
      has_zeros_(t.zeros != nullptr),
      exponents_(static_cast<size_t>(tiles()), 0) {
  choose_exponents(t.scales);
  block_bytes_ = code_bytes_ + nbits_scale_bytes(halves_) + nbits_zero_bytes(has_zeros_, bits_);
  pack(t);
}

void NBitsMatrix::choose_exponents(const float* scales) {
  const int64_t size = kNBitsRows * blocks_;
  for (int64_t tile = 0; tile < tiles(); ++tile) {
    const float* s = scales + tile * size;
    const int64_t count = std::min(size, N_ * blocks_ - tile * size);
    float largest = 0.0f;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(s[i]));
    if (largest == 0.0f) continue;
    int exponent = 0;
    std::frexp(largest, &exponent);  // largest = f 2^exponent, f in [1/2, 1)
    exponents_[static_cast<size_t>(tile)] = exponent - kTopExponent;
    for (int64_t i = 0; i < count && halves_; ++i) {
      const float scaled = std::ldexp(s[i], kTopExponent - exponent);
      uint16_t half;
      // what is lost on the way down to a subnormal float does not come back
      halves_ = as_half(scaled, &half) && std::ldexp(scaled, exponent - kTopExponent) == s[i];
    }
  }
}

void NBitsMatrix::pack(const NBitsTensors& t) {
  const size_t size = static_cast<size_t>(tiles() * blocks_ * block_bytes_);
  weights_ = allocate_for_layer(size);
  std::memset(weights_.get(), 0, size);
  const int64_t width = block_ * bits_ / 8, zero_row = (blocks_ * bits_ + 7) / 8;  // bytes of a row
  for (int64_t i = 0; i < N_ * blocks_; ++i) {
    const int64_t n = i / blocks_, b = i % blocks_, tile = n / kNBitsRows, row = n % kNBitsRows;
    uint8_t* const block = weights_.get() + (tile * blocks_ + b) * block_bytes_;
    for (int64_t k = 0; k < width; k += 4) put_word(t.codes + i * width + k, block + k * kNBitsRows + 4 * row);
    uint8_t* const scales = block + code_bytes_;
    const float scale = std::ldexp(t.scales[i], -exponent(tile));
    if (halves_) {
      uint16_t half;
      as_half(scale, &half);
      std::memcpy(scales + 2 * row, &half, sizeof half);
    } else {
      std::memcpy(scales + 4 * row, &scale, sizeof scale);
    }
    if (!has_zeros_) continue;
    uint8_t* const zeros = scales + nbits_scale_bytes(halves_);
    if (bits_ == 8) {
      zeros[row] = t.zeros[n * zero_row + b];
    } else {  // bytes of two words, the lowest first
      const int z = t.zeros[n * zero_row + b / 2] >> (4 * (b % 2)) & 15;
      uint8_t& byte = zeros[4 * (row % 2) + row / 4];
      byte = static_cast<uint8_t>(byte | z << (4 * (row / 2 % 2)));
    }
  }
}

// 4 bytes of a row to their place in a line.
void NBitsMatrix::put_word(const uint8_t* from, uint8_t* to) const {
  if (bits_ == 8) {
    std::memcpy(to, from, 4);
  } else {  // columns 0-3 of 8 to the low halves, columns 4-7 to the high halves
    to[0] = static_cast<uint8_t>((from[0] & 15) | (from[2] & 15) << 4);
    to[1] = static_cast<uint8_t>((from[0] >> 4) | (from[2] & 0xf0));
    to[2] = static_cast<uint8_t>((from[1] & 15) | (from[3] & 15) << 4);
    to[3] = static_cast<uint8_t>((from[1] >> 4) | (from[3] & 0xf0));
  }
}

NBitsTile NBitsMatrix::tile(int64_t i) const {
  return {weights_.get() + i * blocks_ * block_bytes_, blocks_, block_ * bits_ / 32, halves_, has_zeros_, 0};
}

}  // namespace lit_binq
