// y = x W^T with weights of 4 or 8 bits: the driver between an operator and the kernels. Threads are the caller's.
#pragma once

#include <cstdint>

#include "common/executor.h"
#include "nbits/matrix.h"

namespace lit_binq {

// x (M, K) and y (M, N) row-major. M may be 0. Safe to call from many threads on one matrix. A row of x that holds an
// infinity or a NaN gives a row of NaN. Throws std::bad_alloc.
void nbits_multiply(const NBitsKernels& kernels, const NBitsMatrix& weights, Mode mode, const float* x, int64_t M,
                    float* y, Executor& executor);

}  // namespace lit_binq
