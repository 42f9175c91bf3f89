// Prefetching weights. One row of activations reads every weight once, from memory.
// Touches nothing; nothing of the standard library may be instantiated here (sets/avx2.cpp says why).
#pragma once

#include <cstdint>

namespace lit_binq {

// How many bytes ahead: about 4 blocks of a tile. There reading keeps up with the memory; nearer it does not.
constexpr int64_t kAhead = 16384;

// A loop that outruns the memory prefetches lines faster than they come, and a processor may drop what it has no room to
// remember; a dropped line costs its whole latency. So such a loop repeats each prefetch at 3/4, 2/4 and 1/4 of the way.
// One row of activations on a Zen 4, all sides alternating: signs of 4096 x 4096 take 0.073 ms with four prefetches of a
// line, 0.086 with three, 0.102 with two, 0.079 with one and every lookup done twice to slow the loop down; two planes of
// three levels take 0.19 ms with four, 0.22 with none.
constexpr int64_t kRepeatStride = kAhead / 4;

// Brings `lines` cache lines, from the one `ahead` bytes behind `p` on, to the second-level cache: into the first-level
// one reading does not keep up either. They may lie beyond the weights: they are never read. Static: see binary/kernel.h,
// block_bytes.
static inline void prefetch(const void* p, int64_t ahead, int lines = 1) {
  constexpr int kRead = 0, kSecondLevel = 2;
  constexpr uintptr_t kLine = 64;
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead);
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + kLine * static_cast<uintptr_t>(i)), kRead, kSecondLevel);
  }
}

// The same `times` times: kAhead ahead and nearer.
static inline void prefetch_repeatedly(const void* p, int times, int lines = 1) {
#pragma GCC unroll 4
  for (int i = 0; i < times; ++i) prefetch(p, kAhead - i * kRepeatStride, lines);
}

}  // namespace lit_binq
