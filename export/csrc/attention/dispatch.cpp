// Which attention kernels run on this machine. Touches CPUID.
#include <cstring>

#include "attention/kernel.h"

namespace lit_binq {

const AttentionKernels& attention_kernels(const char* name) {
#if LIT_BINQ_ATTENTION_X86
  // The compiler's runtime asks CPUID and whether the operating system saves the registers.
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = std::strcmp(name, "avx512") == 0;
  if (avx512 && fma && __builtin_cpu_supports("avx512f")) return kAttentionAvx512;
  if ((avx512 || std::strcmp(name, "avx2") == 0) && fma) return kAttentionAvx2;
#else
  (void)name;
#endif
  return kAttentionScalar;
}

}  // namespace lit_binq
