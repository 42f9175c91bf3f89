// Repacking. Runs once for each layer, when its operator is created.
#include "common/half.h"
#include "two_plane/matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>


namespace lit_binq {
namespace {

int bit_of(const uint8_t* bits, int64_t i) { return bits[i / 8] >> (i % 8) & 1; }

// The weight of bits A and B.
float weight_of(const float* number, int64_t L, int A, int B) {
  if (L == 4) return number[A + 2 * B];
  const float mean = L == 3 ? number[0] : 0.0f;
  const float* a = number + (L - 2);
  return mean + (A ? a[0] : -a[0]) + (B ? a[1] : -a[1]);
}

// m1, m2, -m3, m0 of four levels (two_plane/kernel.h).
void rounded_order(const float* level, float* m) {
  const float outer = level[0] + level[3], inner = level[1] + level[2];
  const float rise = level[3] - level[0], twist = level[1] - level[2];
  m[0] = 0.25f * (rise + twist);
  m[1] = 0.25f * (rise - twist);
  m[2] = 0.25f * (inner - outer);
  m[3] = 0.25f * (outer + inner);
}

// Of one row; `out` are the rounded levels of a block.
void round_levels(const float* level, float unit, int64_t row, uint8_t* out) {
  float m[4];
  rounded_order(level, m);
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t bits = 0;
    for (int i = 0; i < 2; ++i) {
      const long q = unit > 0.0f ? std::lrint(m[2 * pair + i] / unit) : 0;
      bits |= (static_cast<uint32_t>(q) & 0xfffu) << (12 * i);
    }
    uint8_t* const at = out + (pair * kTwoPlaneRows + row) * kPairBytes;
    for (int i = 0; i < kPairBytes; ++i) at[i] = static_cast<uint8_t>(bits >> (8 * i));
  }
}

}  // namespace

TwoPlaneMatrix::TwoPlaneMatrix(const TwoPlaneKernels& kernels, const TwoPlaneTensors& t, bool exact)
    : kernels_(kernels),
      input_(t.activation_bits != 0 ? TwoPlaneInput::kPlanes : exact ? TwoPlaneInput::kExact : TwoPlaneInput::kLut),
      N_(t.N),
      K_(t.K),
      L_(t.L),
      group_(std::min(t.group, t.K)),  // any that is larger means the same
      groups_(divide_up(K_, group_)) {
  if (N_ == 0) return;  // no tensor of the file says that K is a number of columns that fits a memory
  if (input_ == TwoPlaneInput::kLut && L_ == 4 && kernels_.rounds_levels) find_units(t);
  cut(t);
  order_columns(t);
  pack(t);
  if (t.activation_bits == 4) read_scales(t.input_scales);
  if (t.activation_bits != 0 && t.input_range != nullptr) {
    fixed_range_ = true;
    std::copy_n(t.input_range, 4, input_range_);
  }
}

// Blocks end where a group, or the 8-bit part, ends.
void TwoPlaneMatrix::cut(const TwoPlaneTensors& t) {
  const int64_t eight = t.activation_bits == 8 ? K_ : t.activation_bits == 4 ? t.P : 0;
  const int64_t chunk = 8 * kernels_.lane_bytes;
  for (int64_t column = 0; column < K_;) {
    const bool is_eight = column < eight;
    const int64_t group_end = (column / group_ + 1) * group_;
    const int64_t end = std::min({group_end, is_eight ? eight : K_, K_, column + kTwoPlaneBlock});
    TwoPlaneColumns b = {};
    b.column = column;
    b.count = end - column;
    b.position = positions_;
    b.chunks = (b.count + chunk - 1) / chunk;
    b.planes = t.activation_bits == 0 ? 0 : is_eight ? 8 : 4;
    b.part = is_eight ? kEight : kFour;
    b.weights = tile_bytes_;
    b.prepared = prepared_bytes_;
    const int64_t filled = b.chunks * chunk;
    positions_ += filled;
    tile_bytes_ += filled / 8 * 2 * kTwoPlaneRows + level_bytes() * kTwoPlaneRows;
    const int64_t for_8_columns = input_ == TwoPlaneInput::kLut     ? 2 * kQuadBytes
                                  : input_ == TwoPlaneInput::kExact ? kernels_.exact_bytes
                                                                    : kernels_.plane_bytes * b.planes;
    b.size = (filled / 8 * for_8_columns + 63) / 64 * 64;
    prepared_bytes_ += b.size;
    blocks_.push_back(b);
    column = end;
  }
}

void TwoPlaneMatrix::find_units(const TwoPlaneTensors& t) {
  row_units_.assign(static_cast<size_t>(tiles() * kTwoPlaneRows), 0.0f);
  for (int64_t n = 0; n < N_; ++n) {
    float largest = 0.0f;
    for (int64_t g = 0; g < groups_; ++g) {
      float level[4], m[4];
      std::transform(t.levels + (n * groups_ + g) * 4, t.levels + (n * groups_ + g + 1) * 4, level, half_to_float);
      rounded_order(level, m);
      for (float value : m) largest = std::max(largest, std::fabs(value));
    }
    row_units_[static_cast<size_t>(n)] = largest / static_cast<float>(kRoundedLimit);
  }
}

int64_t TwoPlaneMatrix::level_bytes() const {
  return row_units_.empty() ? L_ * static_cast<int64_t>(sizeof(uint16_t)) : 2 * kPairBytes;
}

void TwoPlaneMatrix::order_columns(const TwoPlaneTensors& t) {
  std::vector<int32_t> order(K_);
  std::iota(order.begin(), order.end(), 0);
  if (t.P > 0) {
    std::stable_partition(order.begin(), order.end(), [&](int32_t j) { return bit_of(t.outlier_bits, j) != 0; });
  }
  if (t.P == 0 && positions_ == K_) return;
  source_.assign(positions_, -1);
  for (const TwoPlaneColumns& b : blocks_) std::copy_n(order.begin() + b.column, b.count, source_.begin() + b.position);
}

void TwoPlaneMatrix::pack(const TwoPlaneTensors& t) {
  const int64_t row_bytes = divide_up(K_, 8), lane = kernels_.lane_bytes;
  weights_ = allocate_for_layer(static_cast<size_t>(tiles() * tile_bytes_));
  std::memset(weights_.get(), 0, static_cast<size_t>(tiles() * tile_bytes_));
  std::vector<double> sums(static_cast<size_t>(kParts * tiles() * kTwoPlaneRows), 0.0);
  for (int64_t n = 0; n < N_; ++n) {
    const int64_t tile = n / kTwoPlaneRows, row = n % kTwoPlaneRows;
    const uint8_t* bits[2] = {t.codes + n * row_bytes, t.selector + n * row_bytes};
    for (const TwoPlaneColumns& b : blocks_) {
      uint8_t* out = weights_.get() + tile * tile_bytes_ + b.weights;
      const uint16_t* halves = t.levels + (n * groups_ + b.column / group_) * L_;
      float number[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      std::transform(halves, halves + L_, number, half_to_float);
      int64_t of_code[4] = {0, 0, 0, 0};
      for (int64_t j = 0; j < b.count; ++j) {
        const int A = bit_of(bits[0], b.column + j), B = bit_of(bits[1], b.column + j);
        ++of_code[A + 2 * B];
        const int64_t byte = j / 8, chunk = byte / lane, bit = j % 8;
        uint8_t* at = out + (chunk * 2 * kTwoPlaneRows + row) * lane + byte % lane;
        at[0] = static_cast<uint8_t>(at[0] | A << bit);
        at[kTwoPlaneRows * lane] = static_cast<uint8_t>(at[kTwoPlaneRows * lane] | B << bit);
      }
      double& sum = sums[static_cast<size_t>(b.part * tiles() * kTwoPlaneRows + n)];
      for (int c = 0; c < 4; ++c) {
        sum += static_cast<double>(of_code[c]) * static_cast<double>(weight_of(number, L_, c & 1, c >> 1));
      }
      uint8_t* const behind = out + b.chunks * 2 * kTwoPlaneRows * lane;
      if (const float* units = row_units(tile)) {
        round_levels(number, units[row], row, behind);
        continue;
      }
      uint16_t* levels = reinterpret_cast<uint16_t*>(behind);
      for (int64_t i = 0; i < L_; ++i) levels[i * kTwoPlaneRows + row] = halves[i];
    }
  }
  row_sums_.resize(sums.size());
  std::transform(sums.begin(), sums.end(), row_sums_.begin(), [](double s) { return static_cast<float>(s); });
}

// As lit_binq.formats.activations has it, operation by operation in float32: codes agree bit for bit.
void TwoPlaneMatrix::read_scales(const uint16_t* input_scales) {
  zeta_ = half_to_float(input_scales[0]);
  std::transform(input_scales + 1, input_scales + 5, rho_, half_to_float);
  float level[16];
  for (int b = 0; b < 16; ++b) {
    level[b] = zeta_;
    for (int k = 0; k < 4; ++k) level[b] = b >> k & 1 ? level[b] + rho_[k] : level[b];
  }
  std::iota(patterns_, patterns_ + 16, uint8_t{0});
  std::stable_sort(patterns_, patterns_ + 16, [&](uint8_t a, uint8_t b) { return level[a] < level[b]; });
  for (int i = 0; i < 15; ++i) midpoints_[i] = (level[patterns_[i + 1]] + level[patterns_[i]]) * 0.5f;
}

TwoPlaneBlock TwoPlaneMatrix::tile_block(int64_t tile, int64_t block) const {
  const TwoPlaneColumns& b = blocks_[block];
  const uint8_t* codes = weights_.get() + tile * tile_bytes_ + b.weights;
  return {codes, codes + b.chunks * 2 * kTwoPlaneRows * kernels_.lane_bytes, b.chunks, 0};
}

const float* TwoPlaneMatrix::row_sums(TwoPlanePart part, int64_t tile) const {
  return row_sums_.data() + (part * tiles() + tile) * kTwoPlaneRows;
}

}  // namespace lit_binq
