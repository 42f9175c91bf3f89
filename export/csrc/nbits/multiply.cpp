// Rows of x in panels; of each panel first all rows are prepared, then all tiles of the weights pass over them.
// Allocates from the workspace pool only. Loops are written so that a compiler makes vectors of them on any machine.
//
// Legend: as in nbits/kernel.h; e the exponent of the power of two that a row of x is divided by.
#include "nbits/multiply.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/powers.h"
#include "common/workspace.h"

namespace lit_binq {
namespace {

// Rows that share a pass over the weights: 32 of 576 bytes stay in a cache of the first level with a tile of weights,
// and 32 of 8192 in one of the second.
constexpr int64_t kPanel = 32;

// How many bytes ahead one row of activations prefetches its weights. A tile is one stream, which the processor follows
// by itself nearly as well: on a Zen 4, 6 to 10 KB were some percent faster than the 16 KB of prefetch.h or nothing.
constexpr int64_t kNBitsAhead = 8192;

constexpr int64_t kTaskTiles = 4;                    // of one task: a thread is asked for no less
constexpr int64_t kGrain = int64_t{1} << 18;         // weights worth handing to another thread: some microseconds
constexpr int64_t kPrepareGrain = int64_t{1} << 14;  // columns

struct Row {
  bool finite;
  int exponent;
};

struct Panel {
  const NBitsKernels& kernels;
  const NBitsMatrix& weights;
  Mode mode;
  const float* x;  // (rows, K)
  float* y;        // (rows, N)
  int64_t rows;
  uint8_t* prepared;
  int64_t prepared_bytes;  // of a row
  Row row[kPanel];
  NBitsActivations activations[kPanel];
};

// One block of a row: a of its activations, times `down`; returns -sum a. Columns beyond `count` have a = 0.
int32_t round_block(const float* x, int64_t count, int64_t block, float down, int8_t* a, float* unit) {
  float v[kNBitsLargestBlock];
  for (int64_t k = 0; k < count; ++k) v[k] = x[k] * down;
  for (int64_t k = count; k < block; ++k) v[k] = 0.0f;
  const int32_t word = largest_magnitude(v, block);
  float largest;
  std::memcpy(&largest, &word, sizeof largest);
  const bool zero = largest < kNBitsTiniest;
  const float inverse = zero ? 0.0f : kNBitsLimit / largest;
  *unit = zero ? 0.0f : largest / kNBitsLimit;
  // Adding and subtracting 3 * 2^22 rounds to the nearest integer, halves to even.
  constexpr float kRound = 12582912.0f;
  int32_t total = 0;
  for (int64_t k = 0; k < block; ++k) {
    const int32_t rounded = static_cast<int32_t>((v[k] * inverse + kRound) - kRound);
    a[k] = static_cast<int8_t>(rounded);
    total += rounded;
  }
  return -total;
}

int64_t round_up(int64_t size) { return (size + 63) / 64 * 64; }

// Of a row: exact, its floats; rounded, its a, then units, then sums. Whole cache lines each.
int64_t bytes_of_row(const NBitsMatrix& w, Mode mode) {
  if (mode == Mode::kExact) return round_up(w.positions() * 4);
  return round_up(w.positions()) + 2 * round_up(w.blocks() * 4);
}

void prepare(void* argument, size_t task) {
  Panel& p = *static_cast<Panel*>(argument);
  const NBitsMatrix& w = p.weights;
  const int64_t m = static_cast<int64_t>(task), K = w.cols();
  const float* x = p.x + m * K;
  const int32_t largest = largest_magnitude(x, K);
  Row& row = p.row[m];
  row.finite = largest < kInfinity;
  row.exponent = row_exponent(largest);
  if (!row.finite) return;
  const float down = power_of_two(-row.exponent);
  uint8_t* const bytes = p.prepared + m * p.prepared_bytes;
  NBitsActivations& made = p.activations[m];
  if (p.mode == Mode::kExact) {
    float* const values = reinterpret_cast<float*>(bytes);
    for (int64_t k = 0; k < K; ++k) values[k] = x[k] * down;
    std::fill(values + K, values + w.positions(), 0.0f);
    made = {nullptr, nullptr, nullptr, values};
    return;
  }
  int8_t* const a = reinterpret_cast<int8_t*>(bytes);
  float* const unit = reinterpret_cast<float*>(bytes + round_up(w.positions()));
  int32_t* const minus_total = reinterpret_cast<int32_t*>(bytes + round_up(w.positions()) + round_up(w.blocks() * 4));
  const int64_t g = w.block();
  for (int64_t b = 0; b < w.blocks(); ++b) {
    minus_total[b] = round_block(x + b * g, std::min(g, K - b * g), g, down, a + b * g, unit + b);
  }
  made = {a, unit, minus_total, nullptr};
}

// y = sum 2^exponent.
void write(const float* sums, int64_t count, int exponent, float* y) {
  if (exponent < -126 || exponent > 126) {
    for (int64_t n = 0; n < count; ++n) y[n] = std::ldexp(sums[n], exponent);
    return;
  }
  const float factor = power_of_two(exponent);
  for (int64_t n = 0; n < count; ++n) y[n] = sums[n] * factor;
}

void write(const double* sums, int64_t count, int exponent, float* y) {
  for (int64_t n = 0; n < count; ++n) y[n] = static_cast<float>(std::ldexp(sums[n], exponent));
}

void multiply_tile(const Panel& p, int64_t index) {
  const NBitsMatrix& w = p.weights;
  const NBitsKernels& kernels = p.kernels;
  NBitsTile tile = w.tile(index);
  tile.ahead = p.rows == 1 ? kNBitsAhead : 0;  // several rows find the weights in a cache
  const int64_t first = index * kNBitsRows, count = std::min(kNBitsRows, w.rows() - first);
  int64_t together[kNBitsTogether];
  NBitsActivations x[kNBitsTogether];
  for (int64_t m = 0; m < p.rows;) {
    int64_t found = 0;
    for (; m < p.rows && found < kNBitsTogether; ++m) {
      if (p.row[m].finite) {
        x[found] = p.activations[m];
        together[found++] = m;
      } else {
        write_nan(p.y + m * w.rows() + first, count);
      }
    }
    if (found == 0) continue;
    const auto put = [&](const auto* sums) {
      for (int64_t i = 0; i < found; ++i) {
        const int exponent = p.row[together[i]].exponent + w.exponent(index);
        write(sums + i * kNBitsRows, count, exponent, p.y + together[i] * w.rows() + first);
      }
    };
    if (p.mode == Mode::kExact) {
      alignas(kAlignment) double sums[kNBitsTogether * kNBitsRows];
      (w.bits() == 4 ? kernels.exact4 : kernels.exact8)(tile, x, found, sums);
      put(sums);
    } else {
      alignas(kAlignment) float sums[kNBitsTogether * kNBitsRows];
      (w.bits() == 4 ? kernels.rounded4 : kernels.rounded8)(tile, x, found, sums);
      put(sums);
    }
  }
}

void multiply_tiles(void* argument, size_t task) {
  const Panel& p = *static_cast<const Panel*>(argument);
  const int64_t begin = static_cast<int64_t>(task) * kTaskTiles;
  const int64_t end = std::min(begin + kTaskTiles, p.weights.tiles());
  for (int64_t tile = begin; tile < end; ++tile) multiply_tile(p, tile);
}

void run_panel(Panel& p, Executor& executor) {
  const NBitsMatrix& w = p.weights;
  run_tasks(p.rows > 1 && p.rows * w.cols() >= kPrepareGrain, executor, p.rows, p.rows, prepare, &p);
  const int64_t tasks = (w.tiles() + kTaskTiles - 1) / kTaskTiles;
  const int64_t batches = std::min(tasks, p.rows * w.rows() * w.cols() / kGrain);
  run_tasks(batches >= 2, executor, tasks, batches, multiply_tiles, &p);
}

}  // namespace

void nbits_multiply(const NBitsKernels& kernels, const NBitsMatrix& w, Mode mode, const float* x, int64_t M, float* y,
                    Executor& executor) {
  if (M == 0 || w.rows() == 0) return;
  const int64_t bytes = bytes_of_row(w, mode);
  Workspace workspace(static_cast<size_t>(std::min(M, kPanel) * bytes));
  for (int64_t m = 0; m < M; m += kPanel) {
    const int64_t rows = std::min(kPanel, M - m);
    Panel p{kernels, w, mode, x + m * w.cols(), y + m * w.rows(), rows, workspace.data(), bytes, {}, {}};
    run_panel(p, executor);
  }
}

}  // namespace lit_binq
