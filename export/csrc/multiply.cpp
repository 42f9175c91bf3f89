// The driver: rows of x in panels; for each panel first the tables of all its rows, then all tiles of the weights.
// Allocates from the workspace pool only.
//
// Legend: as in kernel.h. M rows of x, "panel" a run of rows whose tables exist at the same time.
#include "multiply.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "workspace.h"

namespace lit_binq {
namespace {

// Rows of a panel: whatever is done once for a block of weights (reading them from memory, rewriting them, making their
// indices) is done once for so many rows. In LUT mode they use a weight block (4 KB, up to 20 KB rewritten) from L1; a
// tile's sums (64 * 128 floats = 32 KB) and the block's tables (up to 64 KB) pass through L1 once for a block, in step,
// and stay in L2. 32 rows lose up to 7% to rewriting, 128 win nothing more. Exact mode has sums and tables of 2 and 3
// times the size and nothing to rewrite: a quarter of the rows. This also bounds the workspace: 256 K bytes in LUT
// mode, 192 K bytes in exact mode; twice that with two zones.
constexpr int64_t kLutPanel = 64;
constexpr int64_t kExactPanel = 16;

// Work that is not worth waking a thread for (a few microseconds): one core does 150 to 300 signs a nanosecond in
// LUT mode and a quarter of it in exact mode, and makes the tables of 4096 activations in 1 to 2 microseconds.
constexpr int64_t kLutGrain = int64_t{1} << 19;
constexpr int64_t kExactGrain = int64_t{1} << 17;
constexpr int64_t kSegmentColumns = 16 * kBlock;  // a task of table making
constexpr int64_t kMinSegments = 4;

// Tasks that a panel should at least give, so that few tiles and many rows still feed several threads.
constexpr int64_t kWantedTasks = 16;
constexpr int64_t kMinTaskRows = 4;

// Power-of-two scale of one row: x * down is of order 1, and results are multiplied by up.
struct RowScale {
  float down;
  float up;
  bool finite;
};

float power_of_two(int exponent) {
  const uint32_t word = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Chooses the power so that neither huge nor tiny activations leave the range of float32 on the way: the largest
// magnitude of a column with c != 0 (of all columns, where c is nullptr) lands in [1, 4), or in [2^-23, 1) where it is
// subnormal.
RowScale row_scale(const Kernels& kernels, const float* x, const float* c, int64_t K) {
  const Magnitudes largest = kernels.largest(x, c, K);
  constexpr int32_t kInfinity = 0x7f800000;
  if (largest.all >= kInfinity) return {0.0f, 0.0f, false};
  if (largest.live == 0) return {1.0f, 1.0f, true};
  const int exponent = std::clamp(static_cast<int>(largest.live >> 23) - 127, -126, 126);
  return {power_of_two(-exponent), power_of_two(exponent), true};
}

// What the tasks of one panel share.
struct Panel {
  const Kernels& kernels;
  const PackedMatrix& weights;
  Mode mode;
  const float* x;     // (rows, K)
  const float* bias;  // (N,) or nullptr
  float* y;           // (rows, N)
  int64_t rows;
  bool halves;        // form of the tables (kernel.h)
  RowScale scale[kLutPanel];
  uint8_t* lut;       // LUT: rows x table bytes x kLutEntries
  float* lut_scale;   // LUT: rows x blocks
  float* exact;       // exact: rows x table bytes x kExactEntries
  int64_t segments;   // table tasks for each row
  int64_t segment_blocks;
  int64_t row_parts;  // multiplication tasks for each tile
};
static_assert(kExactPanel <= kLutPanel, "Panel::scale holds either");

// Task: the tables of one segment of one row.
void make_tables(void* argument, size_t task) {
  Panel& p = *static_cast<Panel*>(argument);
  const int64_t m = static_cast<int64_t>(task) / p.segments, segment = static_cast<int64_t>(task) % p.segments;
  const PackedMatrix& w = p.weights;
  const int64_t first = segment * p.segment_blocks, last = std::min(w.blocks(), first + p.segment_blocks);
  // A row that is not finite gets the tables of a zero row; its result is written as NaN in the end.
  static constexpr float kZeros[kBlock] = {0.0f};
  for (int64_t i = first; i < last; ++i) {
    const ColumnBlock& b = w.block(i);
    const float* x = p.scale[m].finite ? p.x + m * w.cols() + b.column : kZeros;
    const float* c = w.col_scale() + b.scale;
    const int64_t table = m * w.table_bytes() + b.table;
    if (p.mode == Mode::kLut) {
      p.kernels.build_lut(x, c, b.count, p.scale[m].down, p.halves, p.lut + table * kLutEntries,
                          p.lut_scale + m * w.blocks() + i);
    } else {
      p.kernels.build_exact(x, c, b.count, p.scale[m].down, p.exact + table * kExactEntries);
    }
  }
}

// Writes row m of y from a tile's sums. Row scale and bias come last, the power of two in between: the product
// overflows only where the result does.
template <typename Sum>
void write_row(const Panel& p, int64_t m, int64_t first, int64_t last, const Sum* sums) {
  const float* r = p.weights.row_scale();
  float* y = p.y + m * p.weights.rows();
  if (!p.scale[m].finite) {
    std::fill(y + first, y + last, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const Sum up = p.scale[m].up;
  if (p.bias != nullptr) {
    for (int64_t n = first; n < last; ++n) {
      y[n] = static_cast<float>((sums[n - first] * static_cast<Sum>(r[n])) * up + static_cast<Sum>(p.bias[n]));
    }
  } else {
    for (int64_t n = first; n < last; ++n) {
      y[n] = static_cast<float>((sums[n - first] * static_cast<Sum>(r[n])) * up);
    }
  }
}

// Task: one tile for one part of the panel's rows. Blocks are the outer loop: a weight block stays in L1 while the
// rows pass over it.
void multiply_tile(void* argument, size_t task) {
  Panel& p = *static_cast<Panel*>(argument);
  const PackedMatrix& w = p.weights;
  const int64_t tile = static_cast<int64_t>(task) / p.row_parts, part = static_cast<int64_t>(task) % p.row_parts;
  const int64_t m0 = p.rows * part / p.row_parts, rows = p.rows * (part + 1) / p.row_parts - m0;
  const int64_t first = tile * kTileRows, last = std::min(w.rows(), first + kTileRows);
  alignas(kAlignment) uint8_t scratch[kTileRows * kBlockBytes];
  if (p.mode == Mode::kLut) {
    alignas(kAlignment) float sums[kLutPanel * kTileRows];
    std::fill_n(sums, rows * kTileRows, 0.0f);
    for (int64_t b = 0; b < w.blocks(); ++b) {
      for (int64_t plane = 0; plane < w.planes(); ++plane) {
        p.kernels.add_lut(w.tile_block(plane, tile, b, scratch),
                          p.lut + (m0 * w.table_bytes() + w.block(b).table) * kLutEntries, p.halves,
                          w.table_bytes() * kLutEntries, p.lut_scale + m0 * w.blocks() + b, w.blocks(),
                          w.factors(plane, tile, b), rows, sums);
      }
    }
    for (int64_t m = 0; m < rows; ++m) write_row(p, m0 + m, first, last, sums + m * kTileRows);
  } else {
    alignas(kAlignment) double sums[kExactPanel * kTileRows];
    std::fill_n(sums, rows * kTileRows, 0.0);
    for (int64_t b = 0; b < w.blocks(); ++b) {
      for (int64_t plane = 0; plane < w.planes(); ++plane) {
        p.kernels.add_exact(w.tile_block(plane, tile, b, scratch),
                            p.exact + (m0 * w.table_bytes() + w.block(b).table) * kExactEntries,
                            w.table_bytes() * kExactEntries, w.factors(plane, tile, b), rows, sums);
      }
    }
    for (int64_t m = 0; m < rows; ++m) write_row(p, m0 + m, first, last, sums + m * kTileRows);
  }
}

void run_panel(Panel& p, Executor& executor) {
  const PackedMatrix& w = p.weights;
  SerialExecutor serial;
  for (int64_t m = 0; m < p.rows; ++m) p.scale[m] = row_scale(p.kernels, p.x + m * w.cols(), w.live_scale(), w.cols());

  // Blocks are of one size but for the ends of groups: as many of them as make kSegmentColumns columns.
  p.segment_blocks = std::max(kSegmentColumns / w.block(0).count, int64_t{1});
  p.segments = (w.blocks() + p.segment_blocks - 1) / p.segment_blocks;
  const int64_t table_tasks = p.rows * p.segments;
  const bool share_tables = p.rows * 8 * w.table_bytes() >= kMinSegments * kSegmentColumns;
  (share_tables ? executor : serial).run(table_tasks, table_tasks, make_tables, &p);

  const int64_t pieces = p.rows * w.rows() * w.cols() * w.planes() / (p.mode == Mode::kLut ? kLutGrain : kExactGrain);
  const bool share = pieces >= 2;
  const int64_t wanted = share ? std::min(pieces, kWantedTasks) : 1;
  const int64_t most_parts = std::max(p.rows / kMinTaskRows, int64_t{1});
  p.row_parts = std::clamp((wanted + w.tiles() - 1) / w.tiles(), int64_t{1}, most_parts);
  const int64_t tasks = w.tiles() * p.row_parts;
  (share ? executor : serial).run(tasks, std::min(tasks, std::max(pieces, int64_t{1})), multiply_tile, &p);
}

}  // namespace

void multiply(const Kernels& kernels, const PackedMatrix& weights, Mode mode, const float* x, int64_t M,
              const float* bias, float* y, Executor& executor) {
  if (M == 0 || weights.rows() == 0) return;
  const int64_t panel = std::min(M, mode == Mode::kLut ? kLutPanel : kExactPanel);
  const size_t table_bytes =
      mode == Mode::kLut ? static_cast<size_t>(panel * weights.table_bytes() * kLutEntries)
                         : static_cast<size_t>(panel * weights.table_bytes() * kExactEntries) * sizeof(float);
  const size_t scale_bytes = mode == Mode::kLut ? static_cast<size_t>(panel * weights.blocks()) * sizeof(float) : 0;
  Workspace workspace(table_bytes + scale_bytes);  // table_bytes is a multiple of 32: the scales behind are aligned
  float* const behind = reinterpret_cast<float*>(workspace.data() + table_bytes);
  for (int64_t m = 0; m < M; m += panel) {
    const int64_t rows = std::min(panel, M - m);
    Panel p{kernels, weights, mode, x + m * weights.cols(), bias, y + m * weights.rows(), rows,
            rows >= kernels.rows_for_halves, {}, workspace.data(), behind, reinterpret_cast<float*>(workspace.data()),
            1, 1, 1};
    run_panel(p, executor);
  }
}

}  // namespace lit_binq
