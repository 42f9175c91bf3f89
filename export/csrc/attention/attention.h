// Attention of new tokens over a cache of keys and values: the driver between an operator and the kernels. Knows
// attention/kernel.h and workspace.h; threads are the caller's (Executor).
#pragma once

#include <cstdint>

#include "attention/kernel.h"
#include "common/executor.h"

namespace lit_binq {

// One call. All sizes and positions have been checked: nothing here is.
struct AttentionArgs {
  int64_t batch, tokens;           // new tokens of each row
  int64_t heads, kv_heads, d;      // kv_heads divides heads, kHeadUnit divides d
  int64_t past_room, room;         // capacity of past and of present; room is at least past_room
  bool first;                      // the rows' first tokens; a row may have fewer than the others
  int64_t window;                  // how many keys a token sees at most, 1 to 2^31
  float scale;                     // of scores
  const float *q, *k, *v;          // of token 0 of row 0; (heads, d) and twice (kv_heads, d)
  int64_t q_stride, kv_stride;     // from a token to the next
  const int32_t* last;             // (batch,) position of each row's last token
  const float *cos, *sin;          // (positions, d / 2)
  const float *past_key, *past_value;  // (batch, kv_heads, past_room, d)
  float *key, *value;              // (batch, kv_heads, room, d): past with the new tokens, may be the same memory
  float* out;                      // (batch, tokens, heads, d)
};

// Writes key, value and out. A present buffer that is not past's memory takes past's tokens, the new ones and zeros
// beyond them; one that is takes the new tokens. Tokens that a shorter row does not have get zeros in `out`.
// Throws std::bad_alloc.
void attend(const AttentionKernels& kernels, const AttentionArgs& a, Executor& executor);

}  // namespace lit_binq
