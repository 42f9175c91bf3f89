// The arithmetic of norm.h, in loops that a compiler makes vectors of.
#include "common/norm.h"

#include <cmath>

namespace lit_binq {
namespace {

// Partial sums side by side: one alone would wait for every addition before it. 8 are 4 registers of SSE2.
constexpr int64_t kLanes = 8;

// s_k = hidden_k + skip_k; returns the sum of s_k^2.
double add(const float* __restrict hidden, const float* __restrict skip, int64_t K, float* __restrict s) {
  double part[kLanes] = {0.0};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const float value = hidden[k + i] + skip[k + i];
      s[k + i] = value;
      part[i] += static_cast<double>(value) * static_cast<double>(value);
    }
  }
  for (int64_t i = 0; k < K; ++i, ++k) {
    s[k] = hidden[k] + skip[k];
    part[i] += static_cast<double>(s[k]) * static_cast<double>(s[k]);
  }
  double total = 0.0;
  for (const double p : part) total += p;
  return total;
}

}  // namespace

void Norm::apply(const float* hidden, int64_t m, int64_t K, float* __restrict x) const {
  float* const s = sum + m * K;
  const double squares = add(hidden, skip + m * skip_stride, K, s);
  const double mean = squares / static_cast<double>(K);
  const float scale = static_cast<float>(1.0 / std::sqrt(mean + static_cast<double>(epsilon)));
  const float* __restrict const from = s;
  const float* __restrict const g = gamma;
  for (int64_t k = 0; k < K; ++k) x[k] = (from[k] * scale) * g[k];
}

}  // namespace lit_binq
