// x86-64 with AVX-512 F, BW, VL, VBMI, VNNI and VPOPCNTDQ: Ice Lake, Zen 4 and later. What avx2.cpp says about the
// standard library holds here too.
#include "attention/kernels-inl.h"
#include "binary/avx512-inl.h"
#include "common/cpu.h"
#include "nbits/avx512-inl.h"
#include "sets/kernel_sets.h"
#include "two_plane/avx512-inl.h"

namespace lit_binq {
namespace {

// 24 of 32 registers hold sums of a product, 4 its columns.
constexpr AttentionKernels kAttention = Attention<16, 4>::kernels();

}  // namespace

const KernelSet kAvx512Set = {
    "avx512", kAvx512Features, binary_avx512::kKernels, two_plane_avx512::kKernels, nbits_avx512::kKernels, kAttention};

}  // namespace lit_binq
