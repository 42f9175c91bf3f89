// What this machine's processor has. Knows no kernels.
#pragma once

#include <cstdint>
#include <string>

namespace lit_binq {

// Sets of instructions of x86-64, as bits.
enum Feature : uint32_t {
  kAvx2 = 1,
  kFma = 2,
  kF16c = 4,
  kPopcnt = 8,
  kAvx512f = 16,
  kAvx512bw = 32,
  kAvx512vl = 64,
  kAvx512vbmi = 128,
  kAvx512vnni = 256,
  kAvx512vpopcntdq = 512,
};
constexpr uint32_t kAvx2Features = kAvx2 | kFma | kF16c | kPopcnt;
constexpr uint32_t kAvx512Features =
    kAvx2Features | kAvx512f | kAvx512bw | kAvx512vl | kAvx512vbmi | kAvx512vnni | kAvx512vpopcntdq;

// Those of `needed` that the processor lacks, or whose registers the operating system does not save.
uint32_t missing_features(uint32_t needed);

// "avx2 fma", by their names in /proc/cpuinfo.
std::string feature_names(uint32_t features);

// How often one row of activations prefetches a line that it will read (prefetch.h): 4 times where the processor drops
// lines it has no room to remember, as AMD's do, else once: of two Xeons four times took a fifth longer on one.
int prefetch_repeats();

}  // namespace lit_binq
