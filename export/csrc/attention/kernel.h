// The interface that every instruction set implements for attention over a cache, and the sizes it shares with the
// driver (attention.cpp). Knows nothing of ONNX Runtime, allocates nothing, starts no threads.
//
// Legend: d width of a head; keys and values (n, d) of one KV head, by position; "group" the query heads that read one
// KV head; queries are rotated and carry the factor of the scores already.
#pragma once

#include <cstdint>

namespace lit_binq {

// Widths of heads are multiples of it: a register of every instruction set.
constexpr int64_t kHeadUnit = 16;

// Keys that many tokens look at together. A block of keys, transposed, and one of values are 16 KB each where d = 64.
constexpr int64_t kKeyBlock = 64;

// Keys that a single token looks at together: bounds its scores, and is long enough for the work between two blocks
// not to count.
constexpr int64_t kOneBlock = 256;

// Rows of queries that registers hold together.
constexpr int64_t kQueryRows = 6;

// One token, all query heads of a group.
struct DecodeArgs {
  int64_t d, group;
  const float* queries;  // (group, d)
  const float* keys;     // (n, d): what the token sees
  const float* values;   // (n, d)
  int64_t n;             // at least 1
  float* workspace;      // one_workspace() floats
  float* out;            // (group, d)
};

// Consecutive tokens, all query heads of a group. Token j has position first + j and sees the keys up to its own.
struct TokenTile {
  int64_t d, group, tokens;
  const float* queries;  // (group, tokens, d)
  const float* keys;     // (first + tokens, d)
  const float* values;   // (first + tokens, d)
  int64_t first;
  int64_t window;        // how many keys a token sees at most, its own included; at least 1
  float* workspace;      // tile_workspace() floats
  float* out;            // of token 0: (group, d)
  int64_t out_stride;    // from a token to the next
};

// Floats of workspace.
constexpr int64_t one_workspace(int64_t group) { return group * (kOneBlock + 3); }
constexpr int64_t tile_workspace(int64_t d, int64_t rows) {
  return d * kKeyBlock + kQueryRows * kKeyBlock + rows * (d + 2);
}

// Kernels of one instruction set. Every function is safe to call from many threads. Pointers need no alignment beyond
// that of a float. An infinite score or a NaN gives NaN; a value of a later token that is not finite may give NaN to
// earlier ones of its tile.
struct AttentionKernels {
  // y (2 half,) = factor * (x rotated by the angles of cos, sin (half,)): (a, b) -> (a cos - b sin, b cos + a sin), a
  // from the first half of x and b from the second one. May not overlap.
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, float factor, float* y);
  void (*one)(const DecodeArgs& token);
  void (*tile)(const TokenTile& tile);
};

}  // namespace lit_binq
