// Which two-plane kernels run on this machine. Touches CPUID.
#include <cstring>
#include <initializer_list>

#include "two_plane/kernel.h"

namespace lit_binq {
namespace {

#if LIT_BINQ_TWO_PLANE_X86
// The compiler's runtime asks CPUID and whether the operating system saves the registers.
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq");
}
#endif

}  // namespace

const TwoPlaneKernels* two_plane_kernels(const char* name) {
  if (name == nullptr) return nullptr;
#if LIT_BINQ_TWO_PLANE_X86
  const bool avx512 = std::strncmp(name, "avx512", 6) == 0;
  if (avx512 && has_avx512()) return &kTwoPlaneAvx512;
  if ((avx512 || std::strcmp(name, "avx2") == 0) && has_avx2()) return &kTwoPlaneAvx2;
#endif
  for (const char* known : {"scalar", "avx2", "avx512", "neon"}) {
    if (std::strncmp(name, known, std::strlen(known)) == 0) return &kTwoPlaneScalar;
  }
  return nullptr;
}

}  // namespace lit_binq
