// Asking for weights ahead of reading them. One row of activations reads every weight once, from memory.
// Touches nothing; nothing of the standard library may be instantiated here (kernels_avx2.cpp says why).
#pragma once

#include <cstdint>

namespace lit_binq {

// How many bytes ahead: about 4 blocks of a tile. There reading keeps up with the memory; nearer it does not.
constexpr int64_t kAhead = 16384;

// Asks for `lines` cache lines, from the one `ahead` bytes behind `p` on, to be brought to the second-level cache: into
// the first-level one reading does not keep up either. They may lie beyond the weights: they are never read. Static:
// see kernel.h, block_bytes.
static inline void prefetch(const void* p, int64_t ahead, int lines = 1) {
  constexpr int kRead = 0, kSecondLevel = 2;
  constexpr uintptr_t kLine = 64;
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead);
#pragma GCC unroll 8
  for (int i = 0; i < lines; ++i) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + kLine * static_cast<uintptr_t>(i)), kRead, kSecondLevel);
  }
}

}  // namespace lit_binq
