// The parts of kernel_test about each family of kernels but the binary ones. Each compares the kernels of an
// instruction set with plain loops in double; prints a line for each difference and returns how many there are.
#pragma once

#include "sets/kernel_sets.h"

namespace lit_binq {

int attention_failures(const KernelSet& set);
int nbits_failures(const KernelSet& set);  // and with plain C++, bit for bit
int two_plane_failures(const KernelSet& set);

}  // namespace lit_binq
