// Rows of x in panels; of each panel first all rows are prepared, then all tiles of the weights pass over them.
// Allocates from the workspace pool only.
#include "two_plane/multiply.h"

#include <algorithm>

#include "common/cpu.h"
#include "common/powers.h"
#include "common/workspace.h"
#include "two_plane/activations.h"

namespace lit_binq {
namespace {

// Rows that share a pass over the weights: their tables (4 to 16 bytes a column) stay in a cache of the second level,
// and a block of weights (up to 3 KB) in the first while the rows use it.
constexpr int64_t kPanel = 16;

// Weights worth handing to another thread: some microseconds.
constexpr int64_t kGrain = int64_t{1} << 18;
constexpr int64_t kPrepareGrain = int64_t{1} << 13;  // columns

struct Panel {
  const TwoPlaneMatrix& weights;
  const float* x;     // (rows, K)
  const float* bias;  // (N,) or nullptr
  float* y;           // (rows, N)
  int64_t rows;
  TwoPlanePrepared prepared;
  uint8_t* scratch;   // of all rows
  int64_t scratch_bytes;
  int64_t row_parts;  // tasks for each tile
  TwoPlaneRow row[kPanel];
};

void prepare(void* argument, size_t task) {
  Panel& p = *static_cast<Panel*>(argument);
  const int64_t m = static_cast<int64_t>(task);
  const TwoPlaneMatrix& w = p.weights;
  prepare_row(w, p.x + m * w.cols(), p.prepared, m, p.scratch + m * p.scratch_bytes, p.row[m]);
}

// Writes a tile's rows of y. The power of two comes before the bias: the product overflows only where the result does.
void write_tile(const Panel& p, int64_t m, int64_t tile, const float* sums) {
  const TwoPlaneMatrix& w = p.weights;
  const int64_t first = tile * kTwoPlaneRows, count = std::min(kTwoPlaneRows, w.rows() - first);
  float* y = p.y + m * w.rows() + first;
  const TwoPlaneRow& row = p.row[m];
  const float* bias = p.bias != nullptr ? p.bias + first : nullptr;
  if (!row.finite) return write_nan(y, count);
  const auto write = [&](auto product) {
    for (int64_t n = 0; n < count; ++n) y[n] = product(n) * row.up + (bias != nullptr ? bias[n] : 0.0f);
  };
  if (w.input() == TwoPlaneInput::kPlanes) {
    const float* four = w.row_sums(kFour, tile);
    const float* eight = w.row_sums(kEight, tile);
    write([&](int64_t n) { return sums[n] + (row.offset[kFour] * four[n] + row.offset[kEight] * eight[n]); });
  } else if (const float* units = w.row_units(tile)) {
    write([&](int64_t n) { return sums[n] * units[n]; });
  } else {
    write([&](int64_t n) { return sums[n]; });
  }
}

void multiply_tile(void* argument, size_t task) {
  Panel& p = *static_cast<Panel*>(argument);
  const TwoPlaneMatrix& w = p.weights;
  const TwoPlaneKernels& kernels = w.kernels();
  const int64_t tile = static_cast<int64_t>(task) / p.row_parts, part = static_cast<int64_t>(task) % p.row_parts;
  const int64_t m0 = p.rows * part / p.row_parts, m1 = p.rows * (part + 1) / p.row_parts;
  alignas(kAlignment) float sums[kPanel * kTwoPlaneRows];
  std::fill_n(sums, (m1 - m0) * kTwoPlaneRows, 0.0f);
  for (int64_t b = 0; b < w.blocks(); ++b) {
    const TwoPlaneColumns& columns = w.block(b);
    TwoPlaneBlock block = w.tile_block(tile, b);
    block.repeats = m1 - m0 == 1 ? prefetch_repeats() : 0;  // several rows find the weights in a cache
    for (int64_t m = m0; m < m1; ++m) {
      if (!p.row[m].finite) continue;
      const float* unit_and_total = p.prepared.of(b, m);
      const TwoPlaneActivations x = {p.prepared.at(columns, m), unit_and_total[0], unit_and_total[1],
                                     p.row[m].twice[columns.part]};
      float* sum = sums + (m - m0) * kTwoPlaneRows;
      switch (w.input()) {
        case TwoPlaneInput::kLut: kernels.add_lut(block, w.levels(), x, sum); break;
        case TwoPlaneInput::kExact: kernels.add_exact(block, w.levels(), x, sum); break;
        case TwoPlaneInput::kPlanes: kernels.add_planes(block, w.levels(), columns.planes, x, sum, nullptr); break;
      }
    }
  }
  for (int64_t m = m0; m < m1; ++m) write_tile(p, m, tile, sums + (m - m0) * kTwoPlaneRows);
}

void run_panel(Panel& p, Executor& executor) {
  const TwoPlaneMatrix& w = p.weights;
  run_tasks(p.rows > 1 && p.rows * w.cols() >= kPrepareGrain, executor, p.rows, p.rows, prepare, &p);
  const int64_t pieces = p.rows * w.rows() * w.cols() / kGrain;
  p.row_parts = row_parts(pieces, p.rows, w.tiles());
  const int64_t tasks = w.tiles() * p.row_parts;
  run_tasks(pieces >= 2, executor, tasks, std::min(tasks, pieces), multiply_tile, &p);
}

}  // namespace

void two_plane_multiply(const TwoPlaneMatrix& w, const float* x, int64_t M, const float* bias, float* y,
                        Executor& executor) {
  if (M == 0 || w.rows() == 0) return;
  const int64_t panel = std::min(M, kPanel), scratch = two_plane_scratch_bytes(w);
  const int64_t per_block = 2 * w.blocks() * static_cast<int64_t>(sizeof(float));
  Workspace workspace(static_cast<size_t>(panel * (w.prepared_bytes() + scratch + per_block)));
  uint8_t* const prepared = workspace.data();
  uint8_t* const scratches = prepared + panel * w.prepared_bytes();
  float* const blocks = reinterpret_cast<float*>(scratches + panel * scratch);
  for (int64_t m = 0; m < M; m += panel) {
    const int64_t rows = std::min(panel, M - m);
    const TwoPlanePrepared all = {prepared, blocks, rows};
    Panel p{w, x + m * w.cols(), bias, y + m * w.rows(), rows, all, scratches, scratch, 1, {}};
    run_panel(p, executor);
  }
}

}  // namespace lit_binq
