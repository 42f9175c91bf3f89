// Two-plane products on the kernels of one instruction set against plain loops in double, at shapes that leave tails
// everywhere and for all kinds of activations.
//
// Legend: as in two_plane/matrix.h; x^ quantized activations.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "common/half.h"
#include "tests/family_tests.h"
#include "two_plane/multiply.h"

namespace lit_binq {
namespace {

struct Case {
  int64_t M, N, K, group, L, activation_bits, P;
  bool exact, fixed_range;
};

struct Layer {
  std::vector<uint8_t> codes, selector, outlier_bits;
  std::vector<uint16_t> levels, input_scales;
  std::vector<float> input_range, x, bias;
  std::vector<int64_t> order;  // column of x of each stored column
  int64_t G;
};

std::vector<float> normal(std::mt19937& engine, int64_t count) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = distribution(engine);
  return values;
}

int bit(const std::vector<uint8_t>& bytes, int64_t i) { return bytes[static_cast<size_t>(i / 8)] >> (i % 8) & 1; }

Layer make(const Case& c) {
  std::mt19937 engine(static_cast<unsigned>(c.K * 7 + c.L));
  Layer layer;
  const int64_t width = divide_up(c.K, 8);
  layer.G = divide_up(c.K, c.group);
  layer.codes.resize(static_cast<size_t>(c.N * width));
  layer.selector.resize(layer.codes.size());
  for (auto* bytes : {&layer.codes, &layer.selector}) {
    for (auto& byte : *bytes) byte = static_cast<uint8_t>(engine());
  }
  layer.levels.resize(static_cast<size_t>(c.N * layer.G * c.L));
  for (auto& half : layer.levels) half = static_cast<uint16_t>((engine() & 0x83ffu) | 0x3800u);  // 0.5 to 1, both signs
  if (c.P > 0) layer.outlier_bits.resize(static_cast<size_t>(width));
  for (int64_t i = 0; i < c.P; ++i) {
    const int64_t column = i * c.K / c.P;
    uint8_t& byte = layer.outlier_bits[static_cast<size_t>(column / 8)];
    byte = static_cast<uint8_t>(byte | 1u << (column % 8));
  }
  for (const int wanted : {1, 0}) {
    for (int64_t k = 0; k < c.K; ++k) {
      if ((c.P > 0 && bit(layer.outlier_bits, k)) == (wanted == 1)) layer.order.push_back(k);
    }
  }
  if (c.activation_bits == 4)
    layer.input_scales = {0x2400, 0x2c00, 0x3000, 0x3400, 0x3800};  // 1/64, 1/16, 1/8, 1/4, 1/2
  if (c.fixed_range) layer.input_range = {-2.0f, 4.0f, -3.0f, 6.0f};
  layer.x = normal(engine, c.M * c.K);
  layer.bias = normal(engine, c.N);
  return layer;
}

double weight(const Case& c, const Layer& layer, int64_t n, int64_t k) {
  const int64_t row = n * divide_up(c.K, 8) * 8;
  const int A = bit(layer.codes, row + k), B = bit(layer.selector, row + k);
  double l[4] = {0.0, 0.0, 0.0, 0.0};
  for (int64_t i = 0; i < c.L; ++i) {
    l[i] = half_to_float(layer.levels[static_cast<size_t>((n * layer.G + k / c.group) * c.L + i)]);
  }
  if (c.L == 4) return l[A + 2 * B];
  const double* const a = l + (c.L - 2);
  return (c.L == 3 ? l[0] : 0.0) + (2 * A - 1) * a[0] + (2 * B - 1) * a[1];
}

// x^ of columns `first` to `last` of one row v in stored order; quantized in float32, as the operator's definition
// says.
void quantize(const Case& c, const Layer& layer, bool eight, int64_t first, int64_t last, std::vector<double>& v) {
  if (first == last) return;
  const auto begin = v.begin() + first, end = v.begin() + last;
  float low = static_cast<float>(*std::min_element(begin, end));
  float range = static_cast<float>(*std::max_element(begin, end)) - low;
  if (c.fixed_range) low = layer.input_range[eight ? 2 : 0], range = layer.input_range[eight ? 3 : 1];
  std::vector<float> level(16);
  for (int b = 0; b < 16 && !eight; ++b) {
    level[static_cast<size_t>(b)] = half_to_float(layer.input_scales[0]);
    for (int k = 0; k < 4; ++k) {
      if (b >> k & 1) level[static_cast<size_t>(b)] += half_to_float(layer.input_scales[static_cast<size_t>(k + 1)]);
    }
  }
  std::sort(level.begin(), level.end());
  for (auto it = begin; it != end; ++it) {
    const float from_low = static_cast<float>(*it) - low;
    if (eight) {
      const float step = range / 255.0f, q = std::nearbyint(std::clamp(from_low / step, 0.0f, 255.0f));
      *it = low + static_cast<double>(q) * range / 255.0;
    } else {
      size_t index = 0;
      while (index < 15 && from_low / range > (level[index] + level[index + 1]) * 0.5f) ++index;
      *it = low + static_cast<double>(range) * level[index];
    }
  }
}

int compare(const KernelSet& set, const Case& c) {
  const Layer layer = make(c);
  const TwoPlaneTensors tensors = {layer.codes.data(),
                                   layer.selector.data(),
                                   layer.levels.data(),
                                   layer.outlier_bits.data(),
                                   layer.input_scales.data(),
                                   layer.input_range.empty() ? nullptr : layer.input_range.data(),
                                   c.N,
                                   c.K,
                                   c.group == c.K ? std::numeric_limits<int64_t>::max() : c.group,
                                   c.L,
                                   c.activation_bits,
                                   c.P};
  const TwoPlaneMatrix weights(set.two_plane, tensors, c.exact);
  std::vector<float> y(static_cast<size_t>(c.M * c.N), 12345.0f);
  SerialExecutor serial;
  two_plane_multiply(weights, layer.x.data(), c.M, layer.bias.data(), y.data(), serial);
  double worst = 0.0;
  for (int64_t m = 0; m < c.M; ++m) {
    std::vector<double> v(static_cast<size_t>(c.K));
    for (size_t k = 0; k < v.size(); ++k) v[k] = layer.x[static_cast<size_t>(m * c.K + layer.order[k])];
    double largest = 0.0;
    for (const double value : v) largest = std::max(largest, std::abs(value));
    if (c.activation_bits != 0) {
      const int64_t eight = c.activation_bits == 8 ? c.K : c.P;
      quantize(c, layer, true, 0, eight, v);
      quantize(c, layer, false, eight, c.K, v);
    }
    for (int64_t n = 0; n < c.N; ++n) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < c.K; ++k) {
        const double w = weight(c, layer, n, k), value = v[static_cast<size_t>(k)];
        sum += w * value;
        magnitude += std::abs(w) * (c.activation_bits != 0 ? 4.0 : std::max(std::abs(value), 0.1));
      }
      const double bias = layer.bias[static_cast<size_t>(n)];
      const double error = std::abs(static_cast<double>(y[static_cast<size_t>(m * c.N + n)]) - (sum + bias));
      worst = std::max(worst, error / (magnitude + largest + std::abs(bias)));
    }
  }
  const bool rounds = c.activation_bits == 0 && !c.exact;  // tables of bytes
  if (worst < (rounds ? 0.05 : 5e-6)) return 0;
  std::printf("%s differs: two planes, L = %d, %d bits, %d outliers%s, groups of %d, %d x %d x %d, by %g\n", set.name,
              static_cast<int>(c.L), static_cast<int>(c.activation_bits), static_cast<int>(c.P),
              c.exact ? ", exact" : "", static_cast<int>(c.group), static_cast<int>(c.M), static_cast<int>(c.K),
              static_cast<int>(c.N), worst);
  return 1;
}

}  // namespace

int two_plane_failures(const KernelSet& set) {
  int failures = 0;
  const int64_t shapes[][4] = {{1, 1, 1, 1},       {1, 65, 45, 16},    {3, 20, 300, 300}, {17, 64, 161, 24},
                               {5, 130, 520, 144}, {2, 7, 1000, 1000}, {1, 64, 640, 128}};  // M, N, K, group
  for (const auto& shape : shapes) {
    for (const int64_t L : {2, 3, 4}) {
      for (const int64_t bits : {0, 4, 8}) {
        for (int i = 0; i < 4; ++i) {
          const int64_t P = i / 2 == 0 ? 0 : std::min<int64_t>(shape[2], 1 + shape[2] / 9);
          const bool second = i % 2 == 1;  // exact, or a range of its own
          failures +=
              compare(set,
                      {shape[0], shape[1], shape[2], shape[3], L, bits, P, bits == 0 && second, bits != 0 && second});
        }
      }
    }
  }
  return failures;
}

}  // namespace lit_binq
