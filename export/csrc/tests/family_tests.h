// The parts of kernel_test about each family of kernels but the binary ones. Each compares the kernels of an
// instruction set with plain loops in double; prints a line for each difference and returns how many there are.
#pragma once

namespace lit_binq {

int attention_failures(const char* set);
int nbits_failures(const char* set);  // and with plain C++, bit for bit
int two_plane_failures(const char* set);

}  // namespace lit_binq
