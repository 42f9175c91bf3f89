// The choice of cpu.h. Touches CPUID, XGETBV and one atomic pointer.
#include "cpu.h"

#include <atomic>
#include <cstring>

#if LIT_BINQ_HAVE_AVX2
#include <cpuid.h>
#endif

namespace lit_binq {
namespace {

#if LIT_BINQ_HAVE_AVX2
// A processor may have AVX2 while the operating system does not save its registers: both must say yes.
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kOsxsave = 1u << 27, kAvx = 1u << 28;
  if ((ecx & (kOsxsave | kAvx)) != (kOsxsave | kAvx)) return false;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kXmmAndYmm = 0x6;  // bits 1 and 2 of XCR0
  if ((low & kXmmAndYmm) != kXmmAndYmm) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAvx2 = 1u << 5;
  return (ebx & kAvx2) != 0;
}
#endif

const Kernels* best_kernels() {
#if LIT_BINQ_HAVE_AVX2
  if (has_avx2()) return &kAvx2Kernels;
#endif
  return &kScalarKernels;
}

std::atomic<const Kernels*>& choice() {
  static std::atomic<const Kernels*> kernels{best_kernels()};
  return kernels;
}

}  // namespace

const Kernels& current_kernels() { return *choice().load(); }

bool force_kernels(const char* name) {
  if (name == nullptr) return false;
  if (std::strcmp(name, kScalarKernels.name) == 0) {
    choice().store(&kScalarKernels);
    return true;
  }
#if LIT_BINQ_HAVE_AVX2
  if (std::strcmp(name, kAvx2Kernels.name) == 0 && has_avx2()) {
    choice().store(&kAvx2Kernels);
    return true;
  }
#endif
  return false;
}

}  // namespace lit_binq
