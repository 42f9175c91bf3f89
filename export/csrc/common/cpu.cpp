// The questions of cpu.h to CPUID, each asked once: under a hypervisor each of them leaves the machine.
#include "common/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace lit_binq {
namespace {

constexpr struct {
  uint32_t bit;
  const char* name;
} kNames[] = {
    {kAvx2, "avx2"},           {kFma, "fma"},           {kF16c, "f16c"},
    {kPopcnt, "popcnt"},       {kAvx512f, "avx512f"},   {kAvx512bw, "avx512bw"},
    {kAvx512vl, "avx512vl"},   {kAvx512vbmi, "avx512vbmi"}, {kAvx512vnni, "avx512_vnni"},
    {kAvx512vpopcntdq, "avx512_vpopcntdq"},
};

#if defined(__x86_64__)
// The compiler's runtime asks CPUID, and whether the operating system saves the registers.
uint32_t find_features() {
  __builtin_cpu_init();
  uint32_t found = 0;
#define LIT_BINQ_FIND(bit, name) \
  if (__builtin_cpu_supports(name)) found |= bit
  LIT_BINQ_FIND(kAvx2, "avx2");
  LIT_BINQ_FIND(kFma, "fma");
  LIT_BINQ_FIND(kF16c, "f16c");
  LIT_BINQ_FIND(kPopcnt, "popcnt");
  LIT_BINQ_FIND(kAvx512f, "avx512f");
  LIT_BINQ_FIND(kAvx512bw, "avx512bw");
  LIT_BINQ_FIND(kAvx512vl, "avx512vl");
  LIT_BINQ_FIND(kAvx512vbmi, "avx512vbmi");
  LIT_BINQ_FIND(kAvx512vnni, "avx512vnni");
  LIT_BINQ_FIND(kAvx512vpopcntdq, "avx512vpopcntdq");
#undef LIT_BINQ_FIND
  return found;
}

int find_prefetch_repeats() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAuth = 0x68747541, kHygo = 0x6f677948;  // the first letters of the vendor's name
  const bool amd = __get_cpuid(0, &eax, &ebx, &ecx, &edx) && (ebx == kAuth || ebx == kHygo);
  return amd ? 4 : 1;
}
#else
uint32_t find_features() { return 0; }
int find_prefetch_repeats() { return 1; }
#endif

}  // namespace

uint32_t missing_features(uint32_t needed) {
  static const uint32_t found = find_features();
  return needed & ~found;
}

std::string feature_names(uint32_t features) {
  std::string names;
  for (const auto& feature : kNames) {
    if ((features & feature.bit) != 0) names += (names.empty() ? "" : " ") + std::string(feature.name);
  }
  return names;
}

int prefetch_repeats() {
  static const int repeats = find_prefetch_repeats();
  return repeats;
}

}  // namespace lit_binq
