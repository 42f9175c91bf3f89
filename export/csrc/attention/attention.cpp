// The driver of attention.h. A single new token is one task for each row and KV head. Several are written to the cache
// first, then attended to in tiles of tokens, so that every tile finds all keys before it.
#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>

#include "common/workspace.h"

namespace lit_binq {
namespace {

// Rows of queries in a tile, the group's heads together: a block of keys is transposed once for them. 192 rows of 64
// floats, and as many sums, stay in the second-level cache. Tiles no longer than a block of keys, so that little of the
// triangle above the diagonal is computed.
constexpr int64_t kTileQueries = 192;
constexpr int64_t kTileTokens = kKeyBlock;

// Multiplications that are not worth waking a thread for: one core does 10 to 40 a nanosecond.
constexpr int64_t kGrain = int64_t{1} << 17;

struct Tasks {
  const AttentionKernels& kernels;
  const AttentionArgs& a;
  int64_t tile_tokens;
  int64_t tiles;
  std::atomic<bool> out_of_memory{false};

  int64_t group() const { return a.heads / a.kv_heads; }
  int64_t count(int64_t row) const { return a.first ? a.last[row] + int64_t{1} : a.tokens; }
  int64_t past(int64_t row) const { return a.first ? 0 : a.last[row] + int64_t{1} - a.tokens; }

  // Query heads of KV head `head` for one token.
  const float* query(int64_t row, int64_t token, int64_t head) const {
    return a.q + (row * a.tokens + token) * a.q_stride + head * group() * a.d;
  }
  float* out(int64_t row, int64_t token, int64_t head) const {
    return a.out + ((row * a.tokens + token) * a.heads + head * group()) * a.d;
  }
  void rotate(const float* x, int64_t position, float factor, float* y) const {
    const int64_t half = a.d / 2;
    kernels.rotate(x, a.cos + position * half, a.sin + position * half, half, factor, y);
  }
};

void copy(const float* from, int64_t floats, float* to) {
  std::memcpy(to, from, static_cast<size_t>(floats) * sizeof(float));
}

// Past's tokens where they are elsewhere, the new ones, zeros behind them.
void write_cache(const Tasks& t, int64_t row, int64_t head) {
  const AttentionArgs& a = t.a;
  const int64_t pair = row * a.kv_heads + head, past = t.past(row), count = t.count(row);
  float* const key = a.key + pair * a.room * a.d;
  float* const value = a.value + pair * a.room * a.d;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t token = (row * a.tokens + j) * a.kv_stride + head * a.d;
    t.rotate(a.k + token, past + j, 1.0f, key + (past + j) * a.d);
    copy(a.v + token, a.d, value + (past + j) * a.d);
  }
  const struct {
    const float* past;
    float* present;
  } caches[] = {{a.past_key, a.key}, {a.past_value, a.value}};
  for (const auto& cache : caches) {
    if (cache.past == cache.present) continue;
    float* const present = cache.present + pair * a.room * a.d;
    if (past != 0) copy(cache.past + pair * a.past_room * a.d, past * a.d, present);
    std::fill(present + (past + count) * a.d, present + a.room * a.d, 0.0f);
  }
}

void attend_one(const Tasks& t, int64_t row, int64_t head, float* memory) {
  const AttentionArgs& a = t.a;
  const int64_t position = a.last[row], seen = std::min(position + 1, a.window);
  const int64_t start = ((row * a.kv_heads + head) * a.room + position + 1 - seen) * a.d;
  const float* const query = t.query(row, 0, head);
  for (int64_t g = 0; g < t.group(); ++g) t.rotate(query + g * a.d, position, a.scale, memory + g * a.d);
  t.kernels.one({a.d, t.group(), memory, a.key + start, a.value + start, seen, memory + t.group() * a.d,
                 t.out(row, 0, head)});
}

void attend_tile(const Tasks& t, int64_t row, int64_t head, int64_t first, float* memory) {
  const AttentionArgs& a = t.a;
  const int64_t all = std::min(t.tile_tokens, a.tokens - first), group = t.group();
  const int64_t tokens = std::clamp(t.count(row) - first, int64_t{0}, all), past = t.past(row);
  for (int64_t j = tokens; j < all; ++j) {
    std::fill_n(t.out(row, first + j, head), group * a.d, 0.0f);
  }
  if (tokens == 0) return;
  for (int64_t g = 0; g < group; ++g) {
    for (int64_t j = 0; j < tokens; ++j) {
      t.rotate(t.query(row, first + j, head) + g * a.d, past + first + j, a.scale, memory + (g * tokens + j) * a.d);
    }
  }
  const int64_t start = (row * a.kv_heads + head) * a.room * a.d;
  t.kernels.tile({a.d, group, tokens, memory, a.key + start, a.value + start, past + first, a.window,
                  memory + group * tokens * a.d, t.out(row, first, head), a.heads * a.d});
}

size_t memory_bytes(const Tasks& t) {
  const int64_t group = t.group(), rows = group * t.tile_tokens, d = t.a.d;
  const int64_t floats = t.a.tokens == 1 ? group * d + one_workspace(group) : rows * d + tile_workspace(d, rows);
  return static_cast<size_t>(floats) * sizeof(float);
}

// Tasks must not throw: a failure is kept for the caller.
template <typename Body>
void with_memory(Tasks& t, Body&& body) {
  try {
    Workspace workspace(memory_bytes(t));
    body(reinterpret_cast<float*>(workspace.data()));
  } catch (const std::bad_alloc&) {
    t.out_of_memory.store(true, std::memory_order_relaxed);
  }
}

void write_task(void* argument, size_t i) {
  const Tasks& t = *static_cast<Tasks*>(argument);
  write_cache(t, static_cast<int64_t>(i) / t.a.kv_heads, static_cast<int64_t>(i) % t.a.kv_heads);
}

void one_task(void* argument, size_t i) {
  Tasks& t = *static_cast<Tasks*>(argument);
  const int64_t row = static_cast<int64_t>(i) / t.a.kv_heads, head = static_cast<int64_t>(i) % t.a.kv_heads;
  write_cache(t, row, head);
  if (t.count(row) == 0) {
    std::fill_n(t.out(row, 0, head), t.group() * t.a.d, 0.0f);
    return;
  }
  with_memory(t, [&](float* memory) { attend_one(t, row, head, memory); });
}

// The longest tiles, which are a row's last ones, come first: they end together.
void tile_task(void* argument, size_t i) {
  Tasks& t = *static_cast<Tasks*>(argument);
  const int64_t pairs = t.a.batch * t.a.kv_heads, pair = static_cast<int64_t>(i) % pairs;
  const int64_t tile = t.tiles - 1 - static_cast<int64_t>(i) / pairs;
  with_memory(t, [&](float* memory) {
    attend_tile(t, pair / t.a.kv_heads, pair % t.a.kv_heads, tile * t.tile_tokens, memory);
  });
}

void run(size_t tasks, int64_t work, void (*task)(void*, size_t), Tasks& t, Executor& executor) {
  const size_t batches = std::min(tasks, static_cast<size_t>(work / kGrain));
  if (batches > 1) {
    executor.run(tasks, batches, task, &t);
  } else {
    for (size_t i = 0; i < tasks; ++i) task(&t, i);
  }
}

}  // namespace

void attend(const AttentionKernels& kernels, const AttentionArgs& a, Executor& executor) {
  Tasks t{kernels, a, std::clamp(kTileQueries / (a.heads / a.kv_heads), int64_t{1}, kTileTokens), 0};
  t.tile_tokens = std::min(t.tile_tokens, std::max(a.tokens, int64_t{1}));
  t.tiles = (a.tokens + t.tile_tokens - 1) / t.tile_tokens;
  int64_t longest = 0;
  for (int64_t i = 0; i < a.batch; ++i) longest = std::max(longest, a.last[i] + int64_t{1});
  const size_t pairs = static_cast<size_t>(a.batch * a.kv_heads);
  const bool copies = a.past_key != a.key || a.past_value != a.value;
  const int64_t copied = a.batch * a.kv_heads * (copies ? a.room : a.tokens) * a.d;
  const int64_t work = 2 * a.batch * a.heads * a.d * a.tokens * std::min(longest, a.window);
  if (a.tokens == 1) {
    run(pairs, work + copied, one_task, t, executor);
  } else {
    run(pairs, copied, write_task, t, executor);
    run(pairs * static_cast<size_t>(t.tiles), work, tile_task, t, executor);
  }
  if (t.out_of_memory.load()) throw std::bad_alloc();
}

}  // namespace lit_binq
