// 64-bit Arm, whose NEON unit is always there. Only the binary kernels are written for it; the loops of the others become
// vectors in plain C++ already.
#include "binary/neon-inl.h"
#include "sets/kernel_sets.h"

namespace lit_binq {

const KernelSet kNeonSet = {"neon", 0, binary_neon::kKernels, kScalarSet.two_plane, kScalarSet.nbits,
                            kScalarSet.attention};

}  // namespace lit_binq
