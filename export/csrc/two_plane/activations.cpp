// The preparation of two_plane/activations.h. Loops are written so that a compiler makes vectors of them on any
// machine: 8 independent partial results, no calls, no branches.
#include "two_plane/activations.h"

#include <algorithm>

#include "common/powers.h"

namespace lit_binq {
namespace {

constexpr int64_t kPartial = 8;

int64_t float_bytes(const TwoPlaneMatrix& w) { return (w.positions() * 4 + 63) / 64 * 64; }

// x at the positions of blocks, zeros where they are filled up.
void gather(const TwoPlaneMatrix& w, const float* x, float scale, float* out) {
  const int32_t* source = w.source();
  if (source == nullptr) {
    for (int64_t k = 0; k < w.cols(); ++k) out[k] = x[k] * scale;
    return;
  }
  for (int64_t p = 0; p < w.positions(); ++p) out[p] = source[p] < 0 ? 0.0f : x[source[p]] * scale;
}

float sum_of(const float* x, int64_t count) {
  float part[kPartial] = {0.0f};
  int64_t k = 0;
  for (; k + kPartial <= count; k += kPartial) {
    for (int64_t i = 0; i < kPartial; ++i) part[i] += x[k + i];
  }
  for (; k < count; ++k) part[0] += x[k];
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// lo and R of a part that has columns.
void find_range(const TwoPlaneMatrix& w, const float* x, TwoPlanePart part, TwoPlaneRow& row) {
  if (const float* fixed = w.fixed_range()) {
    row.low[part] = fixed[2 * part];
    row.range[part] = fixed[2 * part + 1];
    return;
  }
  float low[kPartial], high[kPartial];
  bool first = true;
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const TwoPlaneColumns& columns = w.block(b);
    if (columns.part != part) continue;
    const float* v = x + columns.position;
    if (first) std::fill_n(low, kPartial, v[0]), std::fill_n(high, kPartial, v[0]);
    first = false;
    int64_t k = 0;
    for (; k + kPartial <= columns.count; k += kPartial) {
      for (int64_t i = 0; i < kPartial; ++i) {
        low[i] = v[k + i] < low[i] ? v[k + i] : low[i];
        high[i] = v[k + i] > high[i] ? v[k + i] : high[i];
      }
    }
    for (; k < columns.count; ++k) {
      low[0] = std::min(low[0], v[k]);
      high[0] = std::max(high[0], v[k]);
    }
  }
  row.low[part] = *std::min_element(low, low + kPartial);
  row.range[part] = *std::max_element(high, high + kPartial) - row.low[part];
}

// Codes and results are those of lit_binq.formats.activations, which does the same operations in float32.
void four_bits(const TwoPlaneMatrix& w, const float* x, int64_t count, const TwoPlaneRow& row, uint8_t* q) {
  const float low = row.low[kFour], range = row.range[kFour];
  if (!(range > 0.0f)) {  // u = 0
    int32_t index = 0;
    for (int t = 0; t < 15; ++t) index += 0.0f > w.midpoints()[t];
    std::fill_n(q, count, w.patterns()[index]);
    return;
  }
  constexpr int64_t kAtOnce = 64;
  for (int64_t k = 0; k < count; k += kAtOnce) {
    const int64_t here = std::min(kAtOnce, count - k);
    float u[kAtOnce] = {0.0f};
    int32_t index[kAtOnce] = {0};
    for (int64_t i = 0; i < here; ++i) u[i] = (x[k + i] - low) / range;
    for (int t = 0; t < 15; ++t) {
      const float middle = w.midpoints()[t];
      for (int64_t i = 0; i < kAtOnce; ++i) index[i] += u[i] > middle;
    }
    for (int64_t i = 0; i < here; ++i) q[k + i] = w.patterns()[index[i]];
  }
}

void eight_bits(const float* x, int64_t count, const TwoPlaneRow& row, uint8_t* q) {
  const float low = row.low[kEight], step = row.range[kEight] / 255.0f;
  if (!(step > 0.0f)) {
    std::fill_n(q, count, uint8_t{0});
    return;
  }
  // Adding and subtracting 3 * 2^22 rounds to the nearest integer, halves to even; the limits are integers, so it does
  // not matter that they are applied before.
  constexpr float kRound = 12582912.0f;
  for (int64_t k = 0; k < count; ++k) {
    float v = (x[k] - low) / step;
    v = v > 0.0f ? v : 0.0f;
    v = v < 255.0f ? v : 255.0f;
    q[k] = static_cast<uint8_t>(static_cast<int32_t>((v + kRound) - kRound));
  }
}

// z and a_k of the parts that have columns, times a power of two that brings their numbers to order 1; the row's `up`
// undoes it, so that nothing leaves the range of float32 on the way.
void scale_parts(const TwoPlaneMatrix& w, TwoPlaneRow& row) {
  const float numbers[2 * kParts] = {row.low[0], row.low[1], row.range[0], row.range[1]};
  const int exponent = row_exponent(largest_magnitude(numbers, 2 * kParts));
  const float down = power_of_two(-exponent);
  row.up = power_of_two(exponent);
  for (int part = 0; part < kParts; ++part) {
    const float low = row.low[part] * down, range = row.range[part] * down;
    row.offset[part] = part == kFour ? low + range * w.zeta() : low;
    for (int k = 0; k < kMaxPlanes; ++k) {
      const float a = part == kFour ? (k < 4 ? range * w.rho()[k] : 0.0f) : range / 255.0f * static_cast<float>(1 << k);
      row.twice[part][k] = 2.0f * a;
    }
  }
}

void prepare_planes(const TwoPlaneMatrix& w, const float* x, uint8_t* q, const TwoPlanePrepared& prepared, int64_t m,
                    TwoPlaneRow& row) {
  bool found[kParts] = {false, false};
  std::memset(q, 0, static_cast<size_t>(w.positions()));
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const TwoPlaneColumns& columns = w.block(b);
    if (!found[columns.part]) find_range(w, x, columns.part, row);
    found[columns.part] = true;
    if (columns.part == kFour) {
      four_bits(w, x + columns.position, columns.count, row, q + columns.position);
    } else {
      eight_bits(x + columns.position, columns.count, row, q + columns.position);
    }
  }
  scale_parts(w, row);
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const TwoPlaneColumns& columns = w.block(b);
    int32_t ones[kMaxPlanes];
    w.kernels().build_planes(q + columns.position, columns.planes, columns.chunks, prepared.at(columns, m), ones);
    float total = 0.0f;
    const float* twice = row.twice[columns.part];
    for (int64_t k = 0; k < columns.planes; ++k) total += 0.5f * twice[k] * static_cast<float>(ones[k]);
    prepared.of(b, m)[0] = 0.0f;
    prepared.of(b, m)[1] = total;
  }
}

}  // namespace

// 64 bytes behind the codes: kernels read whole vectors.
int64_t two_plane_scratch_bytes(const TwoPlaneMatrix& w) {
  return float_bytes(w) + (w.positions() + 63) / 64 * 64 + 64;
}

const uint8_t* two_plane_codes(const TwoPlaneMatrix& w, const uint8_t* scratch) { return scratch + float_bytes(w); }

void prepare_row(const TwoPlaneMatrix& w, const float* x, const TwoPlanePrepared& prepared, int64_t m, uint8_t* scratch,
                 TwoPlaneRow& row) {
  row = {};
  const int32_t largest = largest_magnitude(x, w.cols());
  row.finite = largest < kInfinity;
  row.up = 1.0f;
  if (!row.finite) return;
  float* values = reinterpret_cast<float*>(scratch);
  if (w.input() == TwoPlaneInput::kPlanes) {
    gather(w, x, 1.0f, values);
    prepare_planes(w, values, scratch + float_bytes(w), prepared, m, row);
    return;
  }
  // A power of two that brings the largest magnitude to [1, 2), so that neither huge nor tiny activations leave the
  // range of float32 on the way.
  const int exponent = row_exponent(largest);
  row.up = power_of_two(exponent);
  gather(w, x, power_of_two(-exponent), values);
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const TwoPlaneColumns& columns = w.block(b);
    const float* v = values + columns.position;
    float* const unit_and_total = prepared.of(b, m);
    unit_and_total[0] = 1.0f;
    if (w.input() == TwoPlaneInput::kLut) {
      w.kernels().build_lut(v, columns.chunks, prepared.at(columns, m), unit_and_total);
    } else {
      w.kernels().build_exact(v, columns.chunks, prepared.at(columns, m));
    }
    unit_and_total[1] = w.levels() > 2 ? sum_of(v, columns.count) : 0.0f;
  }
}

}  // namespace lit_binq
