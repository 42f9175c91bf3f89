// Products with weights of 4 and 8 bits on the kernels of one instruction set: against plain C++ bit for bit, and
// against plain loops in double, at shapes that leave tails everywhere.
//
// Legend: as in nbits/kernel.h.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "nbits/multiply.h"
#include "tests/family_tests.h"

namespace lit_binq {
namespace {

struct Case {
  int64_t M, N, K, bits, block;
  bool zeros, halves;  // zero points; scales that float16 holds
};

struct Layer {
  std::vector<uint8_t> codes, zeros;
  std::vector<float> scales, x;
  int64_t G;
};

Layer make(const Case& c) {
  std::mt19937 engine(static_cast<unsigned>(c.M * 31 + c.K * c.bits));
  std::normal_distribution<float> normal;
  Layer layer;
  layer.G = divide_up(c.K, c.block);
  layer.codes.resize(static_cast<size_t>(c.N * layer.G * c.block * c.bits / 8));
  for (auto& code : layer.codes) code = static_cast<uint8_t>(engine());
  layer.scales.resize(static_cast<size_t>(c.N * layer.G));
  for (float& s : layer.scales) {
    s = engine() % 16 == 0 ? 0.0f : normal(engine);
    if (c.halves) s = std::round(s * 64.0f) / 64.0f;
  }
  if (c.zeros) layer.zeros.resize(static_cast<size_t>(c.N * divide_up(layer.G * c.bits, 8)));
  for (auto& z : layer.zeros) z = static_cast<uint8_t>(engine());
  layer.x.resize(static_cast<size_t>(c.M * c.K));
  for (float& v : layer.x) v = normal(engine);
  return layer;
}

int64_t digit(const uint8_t* row, int64_t i, int64_t bits) {
  return bits == 8 ? row[i] : row[i / 2] >> (4 * (i % 2)) & 15;
}

// W x^T, and the sum of the magnitudes, of one row and column.
void reference(const Case& c, const Layer& layer, int64_t m, int64_t n, double* sum, double* magnitude) {
  *sum = *magnitude = 0.0;
  for (int64_t k = 0; k < c.K; ++k) {
    const int64_t g = k / c.block, width = c.block * c.bits / 8;
    const int64_t q = digit(layer.codes.data() + (n * layer.G + g) * width, k % c.block, c.bits);
    const int64_t z = layer.zeros.empty() ? int64_t{1} << (c.bits - 1)
                                          : digit(layer.zeros.data() + n * divide_up(layer.G * c.bits, 8), g, c.bits);
    const double s = layer.scales[static_cast<size_t>(n * layer.G + g)];
    const double product = s * static_cast<double>(q - z) * layer.x[static_cast<size_t>(m * c.K + k)];
    *sum += product;
    *magnitude += std::abs(product);
  }
}

int compare(const KernelSet& set, const Case& c) {
  const Layer layer = make(c);
  const NBitsTensors tensors = {layer.codes.data(),
                                layer.scales.data(),
                                layer.zeros.empty() ? nullptr : layer.zeros.data(),
                                c.N,
                                c.K,
                                c.bits,
                                c.block};
  const NBitsMatrix weights(tensors);
  SerialExecutor serial;
  int failures = 0;
  for (const Mode mode : {Mode::kLut, Mode::kExact}) {
    std::vector<float> got(static_cast<size_t>(c.M * c.N), 12345.0f), want(got);
    nbits_multiply(set.nbits, weights, mode, layer.x.data(), c.M, got.data(), serial);
    nbits_multiply(kScalarSet.nbits, weights, mode, layer.x.data(), c.M, want.data(), serial);
    bool equal = std::memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0, close = true;
    for (int64_t i = 0; i < c.M * c.N; ++i) {
      double sum, magnitude;
      reference(c, layer, i / c.N, i % c.N, &sum, &magnitude);
      // rounded: an activation by 1/254 of the largest one of its block, 4 times the average or so
      const double bound = (mode == Mode::kExact ? 1e-5 : 0.05) * magnitude + 1e-30;
      close = close && std::abs(static_cast<double>(got[static_cast<size_t>(i)]) - sum) <= bound;
    }
    if (equal && close && weights.halves() == c.halves) continue;
    std::printf("%s differs%s: %d bits in blocks of %d, %s, %d x %d x %d\n", set.name, equal ? "" : " from plain C++",
                static_cast<int>(c.bits), static_cast<int>(c.block), mode == Mode::kExact ? "exact" : "rounded",
                static_cast<int>(c.M), static_cast<int>(c.K), static_cast<int>(c.N));
    ++failures;
  }
  return failures;
}

}  // namespace

int nbits_failures(const KernelSet& set) {
  int failures = 0;
  const int64_t shapes[][3] = {{1, 1, 1}, {1, 17, 70}, {3, 40, 300}, {4, 16, 256}, {5, 33, 129}, {34, 20, 530}};
  for (const auto& shape : shapes) {
    for (const int64_t bits : {4, 8}) {
      for (const int64_t block : {16, 32, 64, 128, 256}) {
        for (int i = 0; i < 4; ++i) {
          failures += compare(set, {shape[0], shape[1], shape[2], bits, block, i % 2 == 1, i / 2 == 1});
        }
      }
    }
  }
  return failures;
}

}  // namespace lit_binq
