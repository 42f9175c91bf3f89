// y = ((x * c) B^T) * r + bias with packed B: the driver between an operator and the kernels.
// Knows kernel.h, binary/matrix.h and workspace.h; threads are the caller's (Executor).
#pragma once

#include <cstddef>
#include <cstdint>

#include "binary/kernel.h"
#include "binary/matrix.h"
#include "common/executor.h"
#include "common/norm.h"

namespace lit_binq {

// x (M, K) and y (M, N) row-major; bias (N,) or nullptr. M may be 0. Safe to call from many threads on one matrix.
// A row of x that holds an infinity or a NaN gives a row of NaN. Throws std::bad_alloc.
void multiply(const BinaryKernels& kernels, const PackedMatrix& weights, Mode mode, const float* x, int64_t M,
              const float* bias, float* y, Executor& executor);

// A product whose row m goes to y + m * stride.
struct Product {
  const PackedMatrix* weights;
  const float* bias;  // (N,) or nullptr
  float* y;
  int64_t stride;
};

constexpr size_t kMaxProducts = 3;

// 1 to kMaxProducts products of the same x (M, K), bit for bit what as many calls of `multiply` give, with one region
// of parallel work for the tables of all and one for the rows of all. Where `norm` is not null, x is its `hidden`, and
// the products are those of the normalized rows.
void multiply_all(const BinaryKernels& kernels, const Product* products, size_t count, Mode mode, const Norm* norm,
                  const float* x, int64_t M, Executor& executor);

// y = D (silu(G x) * (U x)), each of the three products bit for bit what `multiply` gives: gate G and up U (H, K),
// down D (N, H), x (M, K), y (M, N). `norm` as above.
void multiply_gated(const BinaryKernels& kernels, const PackedMatrix& gate, const PackedMatrix& up,
                    const PackedMatrix& down, Mode mode, const Norm* norm, const float* x, int64_t M, float* y, Executor& executor);

}  // namespace lit_binq
