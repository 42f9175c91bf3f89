// Plain C++ for the baseline of the processor: the reference for every other set, and what runs where there is none.
// Attention has registers of 4 floats, which every 64-bit processor has: 12 of 16 hold sums of a product, 2 its columns;
// on 64-bit Arm 24 of 32, and 4.
#include "attention/kernels-inl.h"
#include "binary/scalar-inl.h"
#include "nbits/scalar-inl.h"
#include "sets/kernel_sets.h"
#include "two_plane/scalar-inl.h"

namespace lit_binq {
namespace {

#if defined(__aarch64__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif
constexpr AttentionKernels kAttention = Attention<4, kColumns>::kernels();

}  // namespace

const KernelSet kScalarSet = {
    "scalar", 0, binary_scalar::kKernels, two_plane_scalar::kKernels, nbits_scalar::kKernels, kAttention};

}  // namespace lit_binq
