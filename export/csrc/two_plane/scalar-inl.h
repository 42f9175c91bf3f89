// Two-plane kernels in plain C++: the reference for every other instruction set. Knows two_plane/kernel.h only.
//
// Lanes of 8 bytes: the bits of 64 columns are one word.
#pragma once

#include <cmath>
#include <cstring>

#include "common/half.h"
#include "two_plane/kernel.h"

namespace lit_binq {
namespace {
namespace two_plane_scalar {

constexpr int64_t kLane = 8, kColumns = 8 * kLane;

// The sums of one block of one row of weights: X is the caller's.
struct Sums {
  float A, B, C;
};

float combine(const uint16_t* levels, int64_t L, int64_t row, Sums s, float total) {
  const auto number = [&](int64_t i) { return half_to_float(levels[i * kTwoPlaneRows + row]); };
  if (L == 2) return number(0) * s.A + number(1) * s.B;
  if (L == 3) return number(1) * s.A + number(2) * s.B + number(0) * total;
  const float l0 = number(0), l1 = number(1), l2 = number(2), l3 = number(3);
  const float outer = l0 + l3, inner = l1 + l2, rise = l3 - l0, twist = l1 - l2;
  return 0.25f * ((rise + twist) * s.A + (rise - twist) * s.B - (outer - inner) * s.C + (outer + inner) * total);
}

uint64_t word_at(const TwoPlaneBlock& block, int64_t chunk, int64_t plane, int64_t row) {
  uint64_t word;
  std::memcpy(&word, block.codes + ((chunk * 2 + plane) * kTwoPlaneRows + row) * kLane, sizeof word);
  return word;
}

float signed_by(float value, int64_t index, int bit) { return (index >> bit) & 1 ? value : -value; }

void build_lut(const float* x, int64_t chunks, uint8_t* prepared, float* unit) {
  const int64_t quads = chunks * kColumns / 4;
  float largest = 0.0f;
  for (int64_t i = 0; i < quads; ++i) {
    const float* v = x + 4 * i;
    largest = std::fmax(largest, (std::fabs(v[0]) + std::fabs(v[1])) + (std::fabs(v[2]) + std::fabs(v[3])));
  }
  const bool zero = !(largest >= kTiniestQuad);
  const float units = zero ? 0.0f : kTwoPlaneLimit / largest;
  *unit = zero ? 0.0f : largest / kTwoPlaneLimit;
  for (int64_t q = 0; q < quads; ++q) {
    const float* v = x + 4 * q;
    for (int64_t i = 0; i < 16; ++i) {
      const float sum =
          (signed_by(v[0], i, 0) + signed_by(v[1], i, 1)) + (signed_by(v[2], i, 2) + signed_by(v[3], i, 3));
      prepared[kQuadBytes * q + i] = static_cast<uint8_t>(static_cast<int8_t>(std::lrint(sum * units)));
    }
  }
}

void build_exact(const float* x, int64_t chunks, uint8_t* prepared) {
  std::memcpy(prepared, x, static_cast<size_t>(chunks * kColumns) * sizeof(float));
}

// Words of 64 columns: [chunk][plane].
void build_planes(const uint8_t* q, int64_t planes, int64_t chunks, uint8_t* prepared, int32_t* ones) {
  for (int64_t k = 0; k < planes; ++k) ones[k] = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t k = 0; k < planes; ++k) {
      uint64_t word = 0;
      for (int64_t j = 0; j < kColumns; ++j) word |= static_cast<uint64_t>(q[c * kColumns + j] >> k & 1) << j;
      ones[k] += __builtin_popcountll(word);
      std::memcpy(prepared + (c * planes + k) * kLane, &word, sizeof word);
    }
  }
}

int32_t look_up(const int8_t* tables, uint64_t word) {
  int32_t sum = 0;
  for (int64_t i = 0; i < 16; ++i) sum += tables[kQuadBytes * i + static_cast<int64_t>(word >> (4 * i) & 15)];
  return sum;
}

void add_lut(const TwoPlaneBlock& block, int64_t levels, const TwoPlaneActivations& x, float* sums) {
  const int8_t* tables = reinterpret_cast<const int8_t*>(x.prepared);
  for (int64_t n = 0; n < kTwoPlaneRows; ++n) {
    int32_t units[3] = {0, 0, 0};
    for (int64_t c = 0; c < block.chunks; ++c) {
      const int8_t* table = tables + c * 16 * kQuadBytes;
      const uint64_t A = word_at(block, c, 0, n), B = word_at(block, c, 1, n);
      units[0] += look_up(table, A);
      units[1] += look_up(table, B);
      if (levels == 4) units[2] += look_up(table, A ^ B);
    }
    const Sums s = {x.unit * static_cast<float>(units[0]), x.unit * static_cast<float>(units[1]),
                    x.unit * static_cast<float>(units[2])};
    sums[n] += combine(block.halves(), levels, n, s, x.total);
  }
}

float signed_sum(const float* x, uint64_t word) {
  float sum = 0.0f;
  for (int64_t j = 0; j < kColumns; ++j) sum += word >> j & 1 ? x[j] : -x[j];
  return sum;
}

void add_exact(const TwoPlaneBlock& block, int64_t levels, const TwoPlaneActivations& x, float* sums) {
  const float* values = reinterpret_cast<const float*>(x.prepared);
  for (int64_t n = 0; n < kTwoPlaneRows; ++n) {
    Sums s = {0.0f, 0.0f, 0.0f};
    for (int64_t c = 0; c < block.chunks; ++c) {
      const float* v = values + c * kColumns;
      const uint64_t A = word_at(block, c, 0, n), B = word_at(block, c, 1, n);
      s.A += signed_sum(v, A);
      s.B += signed_sum(v, B);
      if (levels == 4) s.C += signed_sum(v, A ^ B);
    }
    sums[n] += combine(block.halves(), levels, n, s, x.total);
  }
}

void add_planes(const TwoPlaneBlock& block, int64_t levels, int64_t planes, const TwoPlaneActivations& x, float* sums,
                int32_t* counts) {
  const int64_t weight_planes = levels == 4 ? 3 : 2;
  for (int64_t n = 0; n < kTwoPlaneRows; ++n) {
    int32_t count[kWeightPlanes][kMaxPlanes] = {};
    for (int64_t c = 0; c < block.chunks; ++c) {
      const uint64_t A = word_at(block, c, 0, n), B = word_at(block, c, 1, n);
      for (int64_t k = 0; k < planes; ++k) {
        uint64_t q;
        std::memcpy(&q, x.prepared + (c * planes + k) * kLane, sizeof q);
        count[0][k] += __builtin_popcountll(A & q);
        count[1][k] += __builtin_popcountll(B & q);
        if (levels == 4) count[2][k] += __builtin_popcountll(A & B & q);
      }
    }
    float V[kWeightPlanes];
    for (int64_t w = 0; w < weight_planes; ++w) {
      V[w] = -x.total;
      for (int64_t k = 0; k < planes; ++k) {
        V[w] += x.twice[k] * static_cast<float>(count[w][k]);
        if (counts != nullptr) counts[(w * planes + k) * kTwoPlaneRows + n] = count[w][k];
      }
    }
    // s_A s_B = 2 s_AB - s_A - s_B + 1, and s_C = -s_A s_B
    const Sums s = {V[0], V[1], levels == 4 ? V[0] + V[1] - 2.0f * V[2] - x.total : 0.0f};
    sums[n] += combine(block.halves(), levels, n, s, x.total);
  }
}

constexpr TwoPlaneKernels kKernels = {kLane,     32,          1,            false,   build_lut,
                                      build_exact, build_planes, add_lut, add_exact, add_planes};

}  // namespace two_plane_scalar
}  // namespace
}  // namespace lit_binq
