// The choice of cpu.h. Touches CPUID, XGETBV and one atomic pointer.
#include "common/cpu.h"

#include <atomic>
#include <cstring>

#if LIT_BINQ_HAVE_AVX2 || LIT_BINQ_HAVE_AVX512
#include <cpuid.h>
#endif

namespace lit_binq {
namespace {

#if LIT_BINQ_HAVE_AVX2 || LIT_BINQ_HAVE_AVX512
// Bits of the processor's answers. A processor may have instructions whose registers the operating system does not
// save: both must say yes.
struct Processor {
  unsigned ebx7 = 0, ecx7 = 0;  // leaf 7
  bool saves_ymm = false, saves_zmm = false;
};

Processor ask_processor() {
  Processor p;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return p;
  constexpr unsigned kOsxsave = 1u << 27, kAvx = 1u << 28;
  if ((ecx & (kOsxsave | kAvx)) != (kOsxsave | kAvx)) return p;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kXmmAndYmm = 0x06, kMasksAndZmm = 0xe0;  // bits of XCR0
  p.saves_ymm = (low & kXmmAndYmm) == kXmmAndYmm;
  p.saves_zmm = p.saves_ymm && (low & kMasksAndZmm) == kMasksAndZmm;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) p.ebx7 = ebx, p.ecx7 = ecx;
  return p;
}

// Asked once: under a hypervisor each question leaves the machine.
const Processor& read_processor() {
  static const Processor p = ask_processor();
  return p;
}

bool has_avx2() {
  constexpr unsigned kAvx2 = 1u << 5;
  const Processor& p = read_processor();
  return p.saves_ymm && (p.ebx7 & kAvx2) != 0;
}

bool has_avx512() {
  constexpr unsigned kF = 1u << 16, kBw = 1u << 30, kVl = 1u << 31, kVbmi = 1u << 1, kVnni = 1u << 11;
  const Processor& p = read_processor();
  constexpr unsigned kOfB = kF | kBw | kVl, kOfC = kVbmi | kVnni;
  return p.saves_zmm && (p.ebx7 & kOfB) == kOfB && (p.ecx7 & kOfC) == kOfC;
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*here)();
};

// Best first.
constexpr Candidate kCandidates[] = {
#if LIT_BINQ_HAVE_AVX512
    {&kAvx512Kernels, has_avx512},
#endif
#if LIT_BINQ_HAVE_AVX2
    {&kAvx2Kernels, has_avx2},
#endif
#if LIT_BINQ_HAVE_NEON
    {&kNeonKernels, [] { return true; }},
#endif
    {&kScalarKernels, [] { return true; }},
    {&kScalarLut5Kernels, [] { return true; }},
};

std::atomic<const Kernels*>& choice() {
  static std::atomic<const Kernels*> kernels{available_kernels(0)};
  return kernels;
}

int find_prefetch_repeats() {
#if LIT_BINQ_HAVE_AVX2 || LIT_BINQ_HAVE_AVX512
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAuth = 0x68747541, kHygo = 0x6f677948;  // the first letters of the vendor's name
  if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) && (ebx == kAuth || ebx == kHygo)) return 4;
#endif
  return 1;
}

}  // namespace

const Kernels& current_kernels() { return *choice().load(); }

const Kernels* available_kernels(int i) {
  if (i < 0) return nullptr;
  for (const Candidate& c : kCandidates) {
    if (c.here() && i-- == 0) return c.kernels;
  }
  return nullptr;
}

bool force_kernels(const char* name) {
  for (const Candidate& c : kCandidates) {
    if (name == nullptr || std::strcmp(name, c.kernels->name) != 0 || !c.here()) continue;
    choice().store(c.kernels);
    return true;
  }
  return false;
}

int prefetch_repeats() {
  static const int times = find_prefetch_repeats();
  return times;
}

}  // namespace lit_binq
