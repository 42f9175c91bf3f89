// The kernel sets of this build, one for each instruction set, and which of them runs.
//
// A new instruction set is one file here that includes the kernels of its families, an entry in kernel_sets.cpp and a
// line with its compiler flags in CMakeLists.txt.
#pragma once

#include <cstdint>
#include <string>

namespace lit_binq {

struct BinaryKernels;
struct TwoPlaneKernels;
struct NBitsKernels;
struct AttentionKernels;

// The kernels of all families for one instruction set. A family without kernels for it has those of a plainer one.
struct KernelSet {
  const char* name;
  uint32_t needs;  // bits of common/cpu.h
  const BinaryKernels& binary;
  const TwoPlaneKernels& two_plane;
  const NBitsKernels& nbits;
  const AttentionKernels& attention;
};

extern const KernelSet kScalarSet;
#if defined(__x86_64__)
extern const KernelSet kAvx2Set;
extern const KernelSet kAvx512Set;
#elif defined(__aarch64__)
extern const KernelSet kNeonSet;
#endif
#if LIT_BINQ_TESTS
extern const KernelSet kScalarLut5Set;
#endif

// All sets in this build, the best first, whether this machine can run them or not; nullptr from their number on.
const KernelSet* kernel_set(int i);
bool runs_here(const KernelSet& set);

struct Choice {
  const KernelSet* set;  // nullptr: refused
  std::string reason;    // why this set runs, or what is refused, in one line
};

// The set of this name; `source` is who asks for it, as the user knows it. Refused where there is none of this name, or
// where this machine cannot run it.
Choice choose_kernels(const char* name, const char* source);

// What the environment variable LIT_BINQ_KERNELS says, else the best set that this machine can run. Chosen once.
const Choice& default_kernels();

}  // namespace lit_binq
