// The kernels of attention/kernels.h for AVX-512.
#include "attention/kernels.h"

namespace lit_binq {

// 24 of 32 registers hold sums of a product, 4 its columns.
const AttentionKernels kAttentionAvx512 = Attention<16, 4>::kernels("avx512");

}  // namespace lit_binq
