// The kernels of attention/kernels.h for registers of 4 floats, which every 64-bit processor has.
#include "attention/kernels.h"

namespace lit_binq {

// 12 of 16 registers hold sums of a product, 2 its columns; on 64-bit Arm 24 of 32, and 4.
#if defined(__aarch64__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

const AttentionKernels kAttentionScalar = Attention<4, kColumns>::kernels("scalar");

}  // namespace lit_binq
