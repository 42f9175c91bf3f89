// Every instruction set of this machine against its plain one (`reference`): tables, products, gates and whole
// multiplications must be equal bit for bit, at shapes that leave tails everywhere, and close to float64; products that
// share x must equal those made one by one. The other families of kernels have files of their own (family_tests.h).
// Needs no ONNX Runtime and no Python, so that it also runs cross-compiled, under an emulator. Prints the sets it
// compared; status 1 and a line for each difference.
//
// Legend: as in binary/kernel.h.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "binary/matrix.h"
#include "binary/multiply.h"
#include "sets/kernel_sets.h"
#include "tests/family_tests.h"

using namespace lit_binq;

namespace {

int failures = 0;

void expect(bool equal, const char* set, const std::string& what) {
  if (equal) return;
  std::printf("%s differs: %s\n", set, what.c_str());
  ++failures;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

struct Random {
  std::mt19937 engine{7};
  std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> values(static_cast<size_t>(count));
    for (auto& v : values) v = static_cast<uint8_t>(engine());
    return values;
  }
  std::vector<float> normal(int64_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(static_cast<size_t>(count));
    for (auto& v : values) v = distribution(engine);
    return values;
  }
  // float16 bits: 0.5 to 2, of both signs; some are zero, some subnormal
  std::vector<uint16_t> halves(int64_t count) {
    std::vector<uint16_t> values(static_cast<size_t>(count));
    for (auto& v : values) {
      const unsigned kind = engine() % 16;
      v = kind == 0 ? 0 : static_cast<uint16_t>((engine() & 0x83ffu) | (kind == 1 ? 0u : kind < 8 ? 0x3800u : 0x3c00u));
    }
    return values;
  }
};

std::vector<float> product(const BinaryKernels& kernels, const PackedMatrix& w, Mode mode, const std::vector<float>& x,
                           int64_t M, const std::vector<float>& bias) {
  std::vector<float> y(static_cast<size_t>(M * w.rows()), 12345.0f);
  SerialExecutor serial;
  multiply(kernels, w, mode, x.data(), M, bias.empty() ? nullptr : bias.data(), y.data(), serial);
  return y;
}

// The set in plain C++ whose results these equal.
const BinaryKernels& reference(const KernelSet& set) {
  return set.binary.rows_for_dense == kLut5From ? kScalarLut5Set.binary : kScalarSet.binary;
}

void compare_tables(const KernelSet& set, Random& random) {
  const BinaryKernels& kernels = set.binary;
  for (int64_t count = 1; count <= kBlock; ++count) {
    std::vector<float> x = random.normal(count), c = random.normal(count);
    for (int64_t k = 0; k < count; k += 5) c[static_cast<size_t>(k)] = 0.0f;
    if (count % 7 == 0) x.assign(x.size(), 1.0f), c.assign(c.size(), 1.0f);
    if (count % 11 == 0) x.assign(x.size(), 0.0f);
    const size_t bytes = static_cast<size_t>(block_bytes(count));
    std::vector<uint8_t> want(bytes * kLutEntries, 1), got(bytes * kLutEntries, 2);
    float want_scale = 0.0f, got_scale = 1.0f;
    reference(set).build_lut(x.data(), c.data(), count, 0.5f, false, want.data(), &want_scale);
    kernels.build_lut(x.data(), c.data(), count, 0.5f, false, got.data(), &got_scale);
    if (kernels.layout == Layout::kQuads) {
      std::vector<uint8_t> transposed(got.size());
      for (size_t g = 0; g < 2 * bytes; ++g) {
        const size_t place = g / 8 * 8 + 4 * (g % 2) + g % 8 / 2;
        std::memcpy(&transposed[16 * g], &got[16 * place], 16);
      }
      got = transposed;
    }
    const std::string what = std::to_string(count) + " columns";
    expect(same_bits(want, got) && want_scale == got_scale, set.name, "byte tables of " + what);
    if (&reference(set) == &kScalarLut5Set.binary) {  // in one layout for all
      reference(set).build_lut(x.data(), c.data(), count, 0.5f, true, want.data(), &want_scale);
      kernels.build_lut(x.data(), c.data(), count, 0.5f, true, got.data(), &got_scale);
      const size_t size = static_cast<size_t>(lookups(static_cast<int64_t>(bytes) / kQuad)) * 16 * kQuad;
      want.resize(size), got.resize(size);
      expect(same_bits(want, got) && want_scale == got_scale, set.name, "lut5 tables of " + what);
    }
    // Sums of zeros have either sign: compare values.
    std::vector<float> want_exact(bytes * kExactEntries, 1.0f), got_exact(bytes * kExactEntries, 2.0f);
    kScalarSet.binary.build_exact(x.data(), c.data(), count, 0.5f, want_exact.data());
    kernels.build_exact(x.data(), c.data(), count, 0.5f, got_exact.data());
    expect(want_exact == got_exact, set.name, "float tables of " + what);
    for (const float* scales : {static_cast<const float*>(c.data()), static_cast<const float*>(nullptr)}) {
      const Magnitudes a = kScalarSet.binary.largest(x.data(), scales, count);
      const Magnitudes b = kernels.largest(x.data(), scales, count);
      expect(a.all == b.all && a.live == b.live, set.name, "magnitudes of " + what);
    }
  }
}

void compare_products(const KernelSet& set, Random& random) {
  const BinaryKernels& kernels = set.binary;
  const int64_t shapes[][3] = {{1, 1, 1},     {1, 128, 256}, {1, 40, 13},    {1, 500, 1100}, {2, 33, 31},  {3, 95, 257},
                               {4, 129, 300}, {5, 64, 512},  {7, 200, 520},  {8, 300, 700},  {13, 70, 290},
                               {15, 31, 100}, {18, 129, 70}, {19, 97, 300},  {42, 97, 264},  {129, 33, 40},
                               {1, 1057, 8200}};  // a megabyte of codes
  for (const auto& shape : shapes) {
    const int64_t M = shape[0], N = shape[1], K = shape[2], width = (K + 7) / 8;
    const std::string size = std::to_string(M) + " x " + std::to_string(K) + " x " + std::to_string(N);
    const std::vector<uint8_t> codes = random.bytes(N * width);
    const std::vector<uint16_t> r = random.halves(N), c = random.halves(K);
    const int64_t group = 24, groups = (K + group - 1) / group;
    const std::vector<uint16_t> scales = random.halves(N * groups);
    const std::vector<float> x = random.normal(M * K), bias = M % 2 ? random.normal(N) : std::vector<float>{};
    const auto matrices = [&](Layout layout) {
      std::vector<PackedMatrix> all;
      all.push_back(PackedMatrix::row_column(codes.data(), r.data(), c.data(), N, K, layout));
      all.push_back(PackedMatrix::grouped(codes.data(), scales.data(), N, K, group, layout));
      // A group of any size is one of all columns.
      all.push_back(PackedMatrix::grouped(codes.data(), scales.data(), N, K, INT64_MAX, layout));
      return all;
    };
    const std::vector<PackedMatrix> plain = matrices(Layout::kBytes), own = matrices(kernels.layout);
    const char* const names[] = {"row x column", "grouped", "one group"};
    for (size_t i = 0; i < own.size(); ++i) {
      for (const Mode mode : {Mode::kLut, Mode::kExact}) {
        const std::vector<float> want = product(reference(set), plain[i], mode, x, M, bias);
        const std::vector<float> got = product(kernels, own[i], mode, x, M, bias);
        expect(same_bits(want, got), set.name,
               std::string(names[i]) + (mode == Mode::kLut ? ", LUT, " : ", exact, ") + size);
      }
    }
    // And the reference itself, exact mode of row x column, against the definition.
    const std::vector<float> y = product(kScalarSet.binary, plain[0], Mode::kExact, x, M, bias);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0.0, magnitude = 0.0;
        for (int64_t k = 0; k < K; ++k) {
          const double z = static_cast<double>(x[static_cast<size_t>(m * K + k)]) *
                           static_cast<double>(half_to_float(c[static_cast<size_t>(k)]));
          sum += codes[static_cast<size_t>(n * width + k / 8)] >> (k % 8) & 1 ? z : -z;
          magnitude += std::fabs(z);
        }
        const double scale = half_to_float(r[static_cast<size_t>(n)]);
        const double b = bias.empty() ? 0.0 : static_cast<double>(bias[static_cast<size_t>(n)]);
        const double error = std::fabs(static_cast<double>(y[static_cast<size_t>(m * N + n)]) - (sum * scale + b));
        expect(error <= 3e-6 * (magnitude * std::fabs(scale) + std::fabs(b)) + 3e-45, "scalar", "float64, " + size);
      }
    }
  }
}

// silu of floats of all magnitudes and both signs, at lengths that leave tails.
void compare_gates(const KernelSet& set, Random& random) {
  const BinaryKernels& kernels = set.binary;
  for (int64_t count = 0; count < 300; count += 7) {
    std::vector<float> gate = random.normal(count);
    const std::vector<float> up = random.normal(count);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] *= std::ldexp(1.0f, static_cast<int>(i * 37 % 240) - 120);
    std::vector<float> want = gate, got = gate;
    kScalarSet.binary.apply_gate(want.data(), up.data(), count);
    kernels.apply_gate(got.data(), up.data(), count);
    expect(same_bits(want, got), set.name, "gate of " + std::to_string(count));
    for (size_t i = 0; i < gate.size(); ++i) {
      const double g = gate[i], silu = g / (1.0 + std::exp(-g)) * static_cast<double>(up[i]);
      expect(std::fabs(static_cast<double>(want[i]) - silu) <= 5e-7 * std::fabs(silu) + 1e-35, "scalar", "silu");
    }
  }
}

// Several matrices at once against one after the other, of rows as they are and of rows that a norm makes on the way.
void compare_fused(const KernelSet& set, Random& random) {
  const BinaryKernels& kernels = set.binary;
  const int64_t shapes[][3] = {{1, 300, 130}, {3, 31, 1}, {135, 257, 260}};  // M, K, H
  for (const auto& shape : shapes) {
    const int64_t M = shape[0], K = shape[1], H = shape[2], N = 40;
    const auto matrix = [&](int64_t rows, int64_t columns) {
      const std::vector<uint8_t> codes = random.bytes(rows * ((columns + 7) / 8));
      const std::vector<uint16_t> r = random.halves(rows), c = random.halves(columns);
      return PackedMatrix::row_column(codes.data(), r.data(), c.data(), rows, columns, kernels.layout);
    };
    const PackedMatrix a = matrix(H, K), b = matrix(H, K), c = matrix(N, K), down = matrix(N, H);
    const std::vector<float> hidden = random.normal(M * K), skip = random.normal(M * K), gamma = random.normal(K);
    const std::vector<float> bias = random.normal(H);
    std::vector<float> x(hidden.size()), sum(hidden.size());
    const Norm norm = {skip.data(), K, gamma.data(), 1e-5f, sum.data()};
    for (int64_t m = 0; m < M; ++m) norm.apply(hidden.data() + m * K, m, K, x.data() + m * K);
    SerialExecutor serial;
    for (int i = 0; i < 4; ++i) {
      const Mode mode = i % 2 == 0 ? Mode::kLut : Mode::kExact;
      const Norm* const on_the_way = i / 2 == 0 ? nullptr : &norm;
      const float* const rows = on_the_way == nullptr ? x.data() : hidden.data();
      const std::vector<float> ya = product(kernels, a, mode, x, M, {}), yb = product(kernels, b, mode, x, M, bias);
      const std::vector<float> yc = product(kernels, c, mode, x, M, {});
      const int64_t stride = 2 * H + N;
      std::vector<float> got(static_cast<size_t>(M * stride), 12345.0f), want(got);
      const Product products[] = {{&a, nullptr, got.data(), stride},
                                  {&b, bias.data(), got.data() + H, stride},
                                  {&c, nullptr, got.data() + 2 * H, stride}};
      multiply_all(kernels, products, 3, mode, on_the_way, rows, M, serial);
      for (int64_t m = 0; m < M; ++m) {
        std::memcpy(&want[static_cast<size_t>(m * stride)], &ya[static_cast<size_t>(m * H)], sizeof(float) * H);
        std::memcpy(&want[static_cast<size_t>(m * stride + H)], &yb[static_cast<size_t>(m * H)], sizeof(float) * H);
        std::memcpy(&want[static_cast<size_t>(m * stride + 2 * H)], &yc[static_cast<size_t>(m * N)], sizeof(float) * N);
      }
      const std::string size = std::to_string(M) + " x " + std::to_string(K) + " x " + std::to_string(H);
      expect(same_bits(want, got), set.name, "three products at once, " + size);
      std::vector<float> h = ya, gated(static_cast<size_t>(M * N));
      const std::vector<float> up = product(kernels, b, mode, x, M, {});
      kernels.apply_gate(h.data(), up.data(), M * H);
      multiply_gated(kernels, a, b, down, mode, on_the_way, rows, M, gated.data(), serial);
      expect(same_bits(product(kernels, down, mode, h, M, {}), gated), set.name, "gated products, " + size);
    }
  }
}

}  // namespace

int main() {
  for (int i = 0; const KernelSet* set = kernel_set(i); ++i) {
    if (!runs_here(*set)) continue;
    Random random;
    compare_tables(*set, random);
    compare_products(*set, random);
    compare_gates(*set, random);
    compare_fused(*set, random);
    for (const auto family_failures : {attention_failures, nbits_failures, two_plane_failures}) {
      failures += family_failures(*set);
    }
    std::printf("%s\n", set->name);
  }
  return failures != 0;
}
