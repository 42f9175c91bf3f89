// x86-64 with AVX2, FMA, F16C and POPCNT: every processor with AVX2 but for a few of VIA.
//
// This file is compiled with the flags of these sets. It must not instantiate anything from the standard library: such a
// template would be emitted here as AVX2 code under a shared name, and the linker could pick it for a machine without
// AVX2. tests/native/test_native_library.py looks for such symbols.
#include "attention/kernels-inl.h"
#include "binary/avx2-inl.h"
#include "common/cpu.h"
#include "nbits/avx2-inl.h"
#include "sets/kernel_sets.h"
#include "two_plane/avx2-inl.h"

namespace lit_binq {
namespace {

// 12 of 16 registers hold sums of a product, 2 its columns.
constexpr AttentionKernels kAttention = Attention<8, 2>::kernels();

}  // namespace

const KernelSet kAvx2Set = {
    "avx2", kAvx2Features, binary_avx2::kKernels, two_plane_avx2::kKernels, nbits_avx2::kKernels, kAttention};

}  // namespace lit_binq
