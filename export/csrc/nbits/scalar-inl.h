// Kernels for 4 and 8 bits in plain C++: the reference for every other instruction set, and what machines without one
// run. Knows nbits/kernel.h only. The inner loops go over the 16 rows of a tile, or 8 bytes of a line, with no calls
// and no branches in them, so that a compiler makes vectors of them on any machine.
#pragma once

#include <cstring>

#include "nbits/kernel.h"

namespace lit_binq {
namespace {
namespace nbits_scalar {

constexpr int kRows = static_cast<int>(kNBitsRows), kBytes = static_cast<int>(kNBitsLine);

// Exact value of a finite float16: a float that is too small by a power of two, whatever the exponent.
float half_value(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  float value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  word |= sign;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void read_scales(const uint8_t* p, bool halves, float* s) {
  if (!halves) {
    std::memcpy(s, p, kRows * sizeof(float));
    return;
  }
  uint16_t bits[kRows];
  std::memcpy(bits, p, sizeof bits);
  for (int n = 0; n < kRows; ++n) s[n] = half_value(bits[n]);
}

template <int Bits>
void read_zeros(const uint8_t* p, bool stored, int32_t* z) {
  if (!stored) {
    for (int n = 0; n < kRows; ++n) z[n] = 1 << (Bits - 1);
  } else if (Bits == 8) {
    for (int n = 0; n < kRows; ++n) z[n] = p[n];
  } else {
    uint32_t words[2];
    std::memcpy(words, p, sizeof words);
    for (int n = 0; n < kRows; ++n) z[n] = static_cast<int32_t>(words[n & 1] >> (4 * (n >> 1)) & 15);
  }
}

// Adds the products of up to 8 lines: sums[i] is of byte i, that is of row i / 4. Products of half a byte are at most
// 15 * 127, so 16 bits hold 16 of them. Of codes of 8 bits the upper halves are added up by themselves.
template <int Bits>
void add_lines(const uint8_t* codes, int64_t lines, const int8_t* a, int32_t* sums) {
  constexpr int kUpper = Bits == 8 ? 0 : 4;  // the activation that the upper half of the first byte is for
  int16_t low[kBytes] = {0}, high[kBytes] = {0}, first[8], second[8];
  for (int64_t l = 0; l < lines; ++l, codes += kBytes, a += 32 / Bits) {
    for (int k = 0; k < 8; ++k) first[k] = a[k & 3];
    for (int k = 0; k < 8; ++k) second[k] = a[kUpper + (k & 3)];
    for (int i = 0; i < kBytes; i += 8) {
      for (int k = 0; k < 8; ++k) {
        low[i + k] = static_cast<int16_t>(low[i + k] + (codes[i + k] & 15) * first[k]);
        high[i + k] = static_cast<int16_t>(high[i + k] + (codes[i + k] >> 4) * second[k]);
      }
    }
  }
  for (int i = 0; i < kBytes; ++i) sums[i] += low[i] + high[i] * (Bits == 8 ? 16 : 1);
}

template <int Bits>
void rounded(const NBitsTile& t, const NBitsActivations* x, int64_t rows, float* sums) {
  constexpr int64_t kColumns = 32 / Bits;  // of a line
  constexpr int64_t kSafe = 8;
  const int64_t code_bytes = t.lines * kBytes, scale_bytes = nbits_scale_bytes(t.halves);
  const int64_t zero_bytes = nbits_zero_bytes(t.zeros, Bits), safe = t.lines < kSafe ? t.lines : kSafe;
  for (int64_t m = 0; m < rows; ++m, ++x, sums += kRows) {
    const uint8_t* codes = t.data;
    const int8_t* a = x->a;
    for (int n = 0; n < kRows; ++n) sums[n] = 0.0f;
    for (int64_t b = 0; b < t.blocks; ++b) {
      float s[kRows];
      int32_t z[kRows], part[kBytes] = {0}, total[kRows];
      read_scales(codes + code_bytes, t.halves, s);
      read_zeros<Bits>(codes + code_bytes + scale_bytes, t.zeros, z);
      for (int64_t l = 0; l < t.lines; l += safe, codes += safe * kBytes, a += safe * kColumns) {
        add_lines<Bits>(codes, safe, a, part);
      }
      for (int n = 0; n < kRows; ++n) {
        total[n] = (part[4 * n] + part[4 * n + 1]) + (part[4 * n + 2] + part[4 * n + 3]);
      }
      for (int n = 0; n < kRows; ++n) {
        sums[n] += static_cast<float>(total[n] + z[n] * x->minus_total[b]) * x->unit[b] * s[n];
      }
      codes += scale_bytes + zero_bytes;
    }
  }
}

template <int Bits>
void exact(const NBitsTile& t, const NBitsActivations* x, int64_t rows, double* sums) {
  constexpr int kColumns = 32 / Bits;
  const int64_t code_bytes = t.lines * kBytes, scale_bytes = nbits_scale_bytes(t.halves);
  const int64_t zero_bytes = nbits_zero_bytes(t.zeros, Bits);
  for (int64_t m = 0; m < rows; ++m, ++x, sums += kRows) {
    const uint8_t* codes = t.data;
    const float* v = x->x;
    for (int n = 0; n < kRows; ++n) sums[n] = 0.0;
    for (int64_t b = 0; b < t.blocks; ++b) {
      float s[kRows], part[4][kRows] = {};
      int32_t z[kRows];
      read_scales(codes + code_bytes, t.halves, s);
      read_zeros<Bits>(codes + code_bytes + scale_bytes, t.zeros, z);
      for (int64_t l = 0; l < t.lines; ++l, codes += kBytes, v += kColumns) {
        uint32_t words[kRows];
        std::memcpy(words, codes, sizeof words);
        for (int j = 0; j < kColumns; ++j) {
          const int shift = 8 * (j & 3) + 4 * (j >> 2);
          for (int n = 0; n < kRows; ++n) {
            const int32_t q = static_cast<int32_t>(words[n] >> shift & ((1 << Bits) - 1));
            part[j & 3][n] += static_cast<float>(q - z[n]) * v[j];
          }
        }
      }
      for (int n = 0; n < kRows; ++n) {
        const float total = (part[0][n] + part[1][n]) + (part[2][n] + part[3][n]);
        sums[n] += static_cast<double>(total) * static_cast<double>(s[n]);
      }
      codes += scale_bytes + zero_bytes;
    }
  }
}

constexpr NBitsKernels kKernels = {rounded<4>, rounded<8>, exact<4>, exact<8>};

}  // namespace nbits_scalar
}  // namespace
}  // namespace lit_binq
