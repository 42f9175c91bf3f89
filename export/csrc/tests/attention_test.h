// The part of kernel_test about attention.
#pragma once

namespace lit_binq {

// Compares attention on the kernels of an instruction set with plain loops in double; prints a line for each
// difference and returns how many there are.
int attention_failures(const char* set);

}  // namespace lit_binq
