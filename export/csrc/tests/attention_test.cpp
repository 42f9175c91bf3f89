// Attention on the kernels of one instruction set against plain loops in double, at shapes that leave tails everywhere.
//
// Legend: as in attention.h.
#include "tests/family_tests.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "attention/attention.h"

namespace lit_binq {
namespace {

constexpr int64_t kRows = 2, kKvHeads = 2, kGroup = 3, kHeads = kKvHeads * kGroup;

struct Case {
  int64_t tokens, past, window, d;
};

std::vector<float> numbers(std::mt19937& engine, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(engine);
  return values;
}

// x (d,) rotated by the angles of a position
std::vector<double> rotated(const float* x, const AttentionArgs& a, int64_t position) {
  const int64_t half = a.d / 2;
  std::vector<double> y(static_cast<size_t>(a.d));
  for (int64_t i = 0; i < half; ++i) {
    const double cos = a.cos[position * half + i], sin = a.sin[position * half + i];
    y[static_cast<size_t>(i)] = x[i] * cos - x[half + i] * sin;
    y[static_cast<size_t>(half + i)] = x[half + i] * cos + x[i] * sin;
  }
  return y;
}

// The largest difference of a head's output from that of plain loops over the cache that `attend` has written.
double difference(const AttentionArgs& a, int64_t row, int64_t token, int64_t head) {
  const int64_t position = a.last[row] + 1 - a.tokens + token, first = std::max<int64_t>(0, position + 1 - a.window);
  const int64_t start = (row * kKvHeads + head / kGroup) * a.room;
  const auto q = rotated(a.q + (row * a.tokens + token) * a.q_stride + head * a.d, a, position);
  std::vector<double> out(static_cast<size_t>(a.d));
  double sum = 0;
  for (int64_t t = first; t <= position; ++t) {
    double score = 0;
    for (int64_t i = 0; i < a.d; ++i) score += q[static_cast<size_t>(i)] * a.key[(start + t) * a.d + i];
    const double weight = std::exp(score * a.scale);
    sum += weight;
    for (int64_t i = 0; i < a.d; ++i) out[static_cast<size_t>(i)] += weight * a.value[(start + t) * a.d + i];
  }
  double worst = 0;
  for (int64_t i = 0; i < a.d; ++i) {
    const double got = a.out[((row * a.tokens + token) * kHeads + head) * a.d + i];
    worst = std::max(worst, std::isfinite(got) ? std::abs(got - out[static_cast<size_t>(i)] / sum) : 1e9);
  }
  return worst;
}

// The largest difference over a call, whose rows differ in length by one. Present is the memory of past.
double largest(const AttentionKernels& kernels, const Case& c) {
  std::mt19937 engine{11};
  const int64_t d = c.d, room = c.past + 1 + c.tokens, width = (kHeads + 2 * kKvHeads) * d;
  const auto joined = numbers(engine, kRows * c.tokens * width);
  auto key = numbers(engine, kRows * kKvHeads * room * d), value = numbers(engine, kRows * kKvHeads * room * d);
  std::vector<float> cos, sin, out(static_cast<size_t>(kRows * c.tokens * kHeads * d), NAN);
  for (int64_t i = 0; i < room * d / 2; ++i) {
    const double angle = static_cast<double>(i / (d / 2)) / static_cast<double>(1 + i % (d / 2));
    cos.push_back(static_cast<float>(std::cos(angle)));
    sin.push_back(static_cast<float>(std::sin(angle)));
  }
  const int32_t last[kRows] = {static_cast<int32_t>(c.past + c.tokens - 1), static_cast<int32_t>(c.past + c.tokens)};
  AttentionArgs a = {};
  a.batch = kRows, a.tokens = c.tokens, a.heads = kHeads, a.kv_heads = kKvHeads, a.d = d;
  a.past_room = a.room = room, a.window = c.window, a.scale = 0.1f;
  a.q = joined.data(), a.k = a.q + kHeads * d, a.v = a.k + kKvHeads * d, a.q_stride = a.kv_stride = width;
  a.last = last, a.cos = cos.data(), a.sin = sin.data();
  a.past_key = a.key = key.data(), a.past_value = a.value = value.data(), a.out = out.data();
  SerialExecutor serial;
  attend(kernels, a, serial);
  double worst = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t token = 0; token < c.tokens; ++token) {
      for (int64_t head = 0; head < kHeads; ++head) worst = std::max(worst, difference(a, row, token, head));
      const int64_t position = last[row] + 1 - c.tokens + token;
      for (int64_t head = 0; head < kKvHeads; ++head) {
        const float* const new_key = a.k + (row * c.tokens + token) * width + head * d;
        const auto expected = rotated(new_key, a, position);
        for (int64_t i = 0; i < d; ++i) {
          const int64_t at = ((row * kKvHeads + head) * room + position) * d + i;
          worst = std::max(worst, std::abs(a.key[at] - expected[static_cast<size_t>(i)]));
          if (a.value[at] != a.v[(row * c.tokens + token) * width + head * d + i]) worst = 1e9;
        }
      }
    }
  }
  return worst;
}

}  // namespace

int attention_failures(const KernelSet& set) {
  constexpr int64_t kAll = int64_t{1} << 31;
  constexpr Case kCases[] = {{1, 0, kAll, 16},  {1, 75, kAll, 48}, {1, 300, 100, 64}, {1, 270, kAll, 128},
                             {5, 0, kAll, 16},  {5, 75, 9, 80},    {130, 0, kAll, 64}, {130, 70, 66, 48}};
  int failures = 0;
  for (const Case& c : kCases) {
    const double worst = largest(set.attention, c);
    if (worst < 5e-6) continue;
    std::printf("%s differs: attention of %d tokens after %d, d = %d, by %g\n", set.name, static_cast<int>(c.tokens),
                static_cast<int>(c.past), static_cast<int>(c.d), worst);
    ++failures;
  }
  return failures;
}

}  // namespace lit_binq
