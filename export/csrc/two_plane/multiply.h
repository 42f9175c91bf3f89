// y = x W^T + bias with two-plane weights: the driver between an operator and the kernels. Threads are the caller's.
#pragma once

#include <cstdint>

#include "common/executor.h"
#include "two_plane/matrix.h"

namespace lit_binq {

// x (M, K) and y (M, N) row-major; bias (N,) or nullptr. M may be 0. Safe to call from many threads on one matrix.
// A row of x that holds an infinity or a NaN gives a row of NaN. Throws std::bad_alloc.
void two_plane_multiply(const TwoPlaneMatrix& weights, const float* x, int64_t M, const float* bias, float* y,
                        Executor& executor);

}  // namespace lit_binq
