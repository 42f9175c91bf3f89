// Which kernels for 4 and 8 bits run on this machine. Touches CPUID.
#include <cstring>

#include "common/cpu.h"
#include "nbits/kernel.h"

namespace lit_binq {
namespace {

#if LIT_BINQ_HAVE_AVX2 || LIT_BINQ_HAVE_AVX512
// Whether this machine has what binary/kernel.h's kernels of this name need.
bool is_here(const char* name) {
  for (int i = 0; const Kernels* kernels = available_kernels(i); ++i) {
    if (std::strcmp(kernels->name, name) == 0) return true;
  }
  return false;
}
#endif

}  // namespace

const NBitsKernels* nbits_kernels(const char* name) {
  if (name == nullptr) return nullptr;
  const auto is = [name](const char* known) { return std::strcmp(name, known) == 0; };
#if LIT_BINQ_HAVE_AVX512
  if (is("avx512") && is_here("avx512")) return &kNBitsAvx512;
#endif
#if LIT_BINQ_HAVE_AVX2
  if ((is("avx512") || is("avx2")) && is_here("avx2")) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("f16c")) return &kNBitsAvx2;
  }
#endif
  return is("scalar") || is("scalar-lut5") || is("avx2") || is("avx512") || is("neon") ? &kNBitsScalar : nullptr;
}

}  // namespace lit_binq
