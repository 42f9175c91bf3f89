// The kernels of attention/kernels.h for AVX2 and FMA.
#include "attention/kernels.h"

namespace lit_binq {

// 12 of 16 registers hold sums of a product, 2 its columns.
const AttentionKernels kAttentionAvx2 = Attention<8, 2>::kernels("avx2");

}  // namespace lit_binq
