// Which kernels this machine can run, and which ones new operators take. Touches CPUID and one process-wide choice.
#pragma once

#include "binary/kernel.h"

namespace lit_binq {

// The kernels for operators created from now on: the best ones this machine has, or those that `force_kernels` chose.
const Kernels& current_kernels();

// Those that this machine can run, the best ones first; nullptr where there are not so many.
const Kernels* available_kernels(int i);

// Chooses by name ("scalar", "scalar-lut5", "avx2", "avx512", "neon"). False, and nothing changed, where the name is
// unknown or the machine lacks it.
bool force_kernels(const char* name);

// How often one row of activations prefetches a line that it will read (prefetch.h): 4 times where the processor drops
// lines it has no room to remember, as AMD's do, else once: of two Xeons four times took a fifth longer on one.
int prefetch_repeats();

}  // namespace lit_binq
