// The driver: rows of x in panels; for each panel first its norm where there is one, then the tables of all its rows,
// then all tiles of the weights.
// Several matrices that read the same x, each with column scales and hence tables of its own, are one panel.
// Allocates from the workspace pool only.
//
// Legend: as in kernel.h. M rows of x, "panel" a run of rows whose tables exist at the same time, "part" one matrix of
// a panel.
#include "binary/multiply.h"

#include <algorithm>

#include "common/powers.h"
#include "common/prefetch.h"
#include "common/workspace.h"

namespace lit_binq {
namespace {

// Rows of a panel: whatever is done once for a block of weights (reading them from memory, rewriting them, making their
// indices) is done once for so many rows. In LUT mode they use a weight block (4 KB, up to 20 KB rewritten) from L1; a
// tile's sums (128 * 128 floats = 64 KB) and the block's tables (up to 128 KB) pass through L1 once for a block, in
// step, and stay in L2. On one core 32 rows lose up to 7% to rewriting, 64 up to 4%; two threads wait for each other
// twice a panel, and at 4096 x 4096 and M = 128 they are 1.65 times as fast as one with 64 rows, 2.0 times with 128.
// Exact mode has sums and tables of 2 and 3 times the size, nothing to rewrite and takes longer: an eighth of the rows.
// This also bounds the workspace: 512 K bytes in LUT mode, 192 K bytes in exact mode, for each part.
constexpr int64_t kLutPanel = 128;
constexpr int64_t kExactPanel = 16;

// Work that is not worth waking a thread for (a few microseconds): one core does 150 to 300 signs a nanosecond in
// LUT mode and a quarter of it in exact mode, and makes the tables of 4096 activations in 1 to 2 microseconds.
constexpr int64_t kLutGrain = int64_t{1} << 19;
constexpr int64_t kExactGrain = int64_t{1} << 17;
constexpr int64_t kSegmentColumns = 16 * kBlock;  // a task of table making
constexpr int64_t kMinSegments = 4;
constexpr int64_t kMinNormalized = int64_t{1} << 15;  // activations; 5 a nanosecond
constexpr int64_t kManyRows = 16;  // tasks enough for the threads: a row is prepared by one of them, with one wait less

// Power-of-two scale of one row: x * down is of order 1, and results are multiplied by up.
struct RowScale {
  float down;
  float up;
  bool finite;
};

// By the largest magnitude of a column with c != 0 (of all columns, where c is nullptr).
RowScale row_scale(const BinaryKernels& kernels, const float* x, const float* c, int64_t K) {
  const Magnitudes largest = kernels.largest(x, c, K);
  if (largest.all >= kInfinity) return {0.0f, 0.0f, false};
  const int exponent = row_exponent(largest.live);
  return {power_of_two(-exponent), power_of_two(exponent), true};
}

// One matrix in a panel.
struct Part {
  const PackedMatrix* weights;
  const float* bias;  // (N,) or nullptr
  float* y;           // of the panel's first row
  int64_t stride;     // of y
  RowScale scale[kLutPanel];
  uint8_t* lut;       // LUT: rows x table bytes x kLutEntries
  float* lut_scale;   // LUT: rows x blocks
  float* exact;       // exact: rows x table bytes x kExactEntries
  int64_t segments;   // table tasks for each row
  int64_t segment_blocks;

  // A product from row m on.
  void set(const Product& product, int64_t m) {
    weights = product.weights;
    bias = product.bias;
    y = product.y + m * product.stride;
    stride = product.stride;
  }
};
static_assert(kExactPanel <= kLutPanel, "Part::scale holds either");

// What the tasks of one panel share. Large, so only what is read is written: parts are set by the caller, the rest of
// them and the counts of tasks by run_panel.
struct Panel {
  Panel(const BinaryKernels& kernels, Mode mode, bool gated, size_t count, const float* x, int64_t rows)
      : kernels(kernels), mode(mode), gated(gated), count(count), x(x), rows(rows),
        dense(rows >= kernels.rows_for_dense) {}

  // From now on x are the normalized rows, which `memory` takes; the panel's first row is row `first_row` of the call.
  void normalize(const Norm* with, int64_t first_row, uint8_t* memory) {
    if (with == nullptr) return;
    norm = with;
    first = first_row;
    hidden = x;
    x = normalized = reinterpret_cast<float*>(memory);
  }

  const BinaryKernels& kernels;
  Mode mode;
  bool gated;         // parts 0 and 1 are gate and up of an MLP: y of part 0 takes silu(gate) * up
  size_t count;       // of parts
  const float* x;     // (rows, K)
  int64_t rows;
  bool dense;         // form of the tables (kernel.h)
  int64_t segments;   // table tasks for each row, of all parts
  int64_t row_parts;  // multiplication tasks for each tile
  const Norm* norm = nullptr;
  int64_t first = 0;
  const float* hidden = nullptr;  // (rows, K), where there is a norm
  float* normalized = nullptr;    // x, where there is one
  Part parts[kMaxProducts];
};

size_t aligned(int64_t bytes) { return (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment; }

// Workspace for the tables of `rows` rows.
size_t lut_bytes(const PackedMatrix& w, int64_t rows) { return aligned(rows * w.row_bytes() * kLutEntries); }
size_t exact_bytes(const PackedMatrix& w, int64_t rows) {
  return aligned(rows * w.row_bytes() * kExactEntries * static_cast<int64_t>(sizeof(float)));
}
size_t table_bytes(const PackedMatrix& w, Mode mode, int64_t rows) {
  if (mode == Mode::kExact) return exact_bytes(w, rows);
  return lut_bytes(w, rows) + aligned(rows * w.blocks() * static_cast<int64_t>(sizeof(float)));
}

// Gives a part its tables at `memory`; returns what is behind them.
uint8_t* place_tables(Part& part, Mode mode, int64_t rows, uint8_t* memory) {
  const PackedMatrix& w = *part.weights;
  part.lut = memory;
  part.lut_scale = reinterpret_cast<float*>(memory + lut_bytes(w, rows));
  part.exact = reinterpret_cast<float*>(memory);
  return memory + table_bytes(w, mode, rows);
}

// Workspace for `rows` normalized rows.
size_t normalized_bytes(const Norm* norm, int64_t rows, int64_t K) {
  return norm != nullptr ? aligned(rows * K * static_cast<int64_t>(sizeof(float))) : 0;
}

int64_t panel_rows(Mode mode, int64_t M) { return std::min(M, mode == Mode::kLut ? kLutPanel : kExactPanel); }

// Task: the tables of one segment of one row, for one part.
void make_tables(void* argument, size_t task) {
  Panel& p = *static_cast<Panel*>(argument);
  const int64_t m = static_cast<int64_t>(task) / p.segments;
  int64_t segment = static_cast<int64_t>(task) % p.segments;
  Part* part = p.parts;
  for (; segment >= part->segments; ++part) segment -= part->segments;
  const PackedMatrix& w = *part->weights;
  const int64_t first = segment * part->segment_blocks, last = std::min(w.blocks(), first + part->segment_blocks);
  // A row that is not finite gets the tables of a zero row; its result is written as NaN in the end.
  static constexpr float kZeros[kBlock] = {0.0f};
  const RowScale& scale = part->scale[m];
  for (int64_t i = first; i < last; ++i) {
    const ColumnBlock& b = w.block(i);
    const float* x = scale.finite ? p.x + m * w.cols() + b.column : kZeros;
    const float* c = w.col_scale() + b.column;
    const int64_t table = m * w.row_bytes() + b.byte;
    if (p.mode == Mode::kLut) {
      p.kernels.build_lut(x, c, b.count, scale.down, p.dense, part->lut + table * kLutEntries,
                          part->lut_scale + m * w.blocks() + i);
    } else {
      p.kernels.build_exact(x, c, b.count, scale.down, part->exact + table * kExactEntries);
    }
  }
}

// Adds the products of block b of a tile for `rows` rows from m0 on: in LUT mode,
void add_block(const Panel& p, const Part& part, const TileBlock& block, const float* factors, int64_t b, int64_t m0,
               int64_t rows, float* sums) {
  const PackedMatrix& w = *part.weights;
  p.kernels.add_lut(block, part.lut + (m0 * w.row_bytes() + w.block(b).byte) * kLutEntries, p.dense,
                    w.row_bytes() * kLutEntries, part.lut_scale + m0 * w.blocks() + b, w.blocks(), factors, rows,
                    sums);
}

// and in exact mode.
void add_block(const Panel& p, const Part& part, const TileBlock& block, const float* factors, int64_t b, int64_t m0,
               int64_t rows, double* sums) {
  const PackedMatrix& w = *part.weights;
  p.kernels.add_exact(block, part.exact + (m0 * w.row_bytes() + w.block(b).byte) * kExactEntries,
                      w.row_bytes() * kExactEntries, factors, rows, sums);
}

// A tile's sums for `rows` rows from m0 on. Blocks are the outer loop: a weight block stays in L1 while the rows pass
// over it.
template <typename Sum>
void add_blocks(const Panel& p, const Part& part, int64_t tile, int64_t m0, int64_t rows, Sum* sums) {
  const PackedMatrix& w = *part.weights;
  std::fill_n(sums, rows * kTileRows, Sum{0});
  for (int64_t b = 0; b < w.blocks(); ++b) {
    add_block(p, part, w.tile_block(tile, b), w.factors(tile, b), b, m0, rows, sums);
  }
}

// Writes columns `first` to `last` of row m to `y` from a tile's sums. Row scale and bias come last, the power of two
// in between: the product overflows only where the result does.
template <typename Sum>
void write_row(const Part& part, int64_t m, int64_t first, int64_t last, const Sum* sums, float* y) {
  const float* r = part.weights->row_scale() + first;
  const int64_t count = last - first;
  if (!part.scale[m].finite) return write_nan(y, count);
  const Sum up = part.scale[m].up;
  if (part.bias != nullptr) {
    const float* bias = part.bias + first;
    for (int64_t n = 0; n < count; ++n) {
      y[n] = static_cast<float>((sums[n] * static_cast<Sum>(r[n])) * up + static_cast<Sum>(bias[n]));
    }
  } else {
    for (int64_t n = 0; n < count; ++n) y[n] = static_cast<float>((sums[n] * static_cast<Sum>(r[n])) * up);
  }
}

// Scales that are read when a tile is done; one row of activations finds them in no cache.
void prefetch_floats(const float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) prefetch(p + i, 0);
}

// One tile of one part, or the same tile of gate and up, for `rows` rows from m0 on. `sums` takes rows * kTileRows.
template <typename Sum>
void multiply_rows(const Panel& p, const Part& part, int64_t tile, int64_t m0, int64_t rows, Sum* sums) {
  const int64_t first = tile * kTileRows, last = std::min(part.weights->rows(), first + kTileRows);
  if (p.rows == 1) {
    prefetch_floats(part.weights->row_scale() + first, last - first);
    if (p.gated) prefetch_floats(p.parts[1].weights->row_scale() + first, last - first);
  }
  add_blocks(p, part, tile, m0, rows, sums);
  for (int64_t m = 0; m < rows; ++m) {
    write_row(part, m0 + m, first, last, sums + m * kTileRows, part.y + (m0 + m) * part.stride + first);
  }
  if (!p.gated) return;
  const Part& up = p.parts[1];
  add_blocks(p, up, tile, m0, rows, sums);
  for (int64_t m = 0; m < rows; ++m) {
    float y[kTileRows];
    write_row(up, m0 + m, first, last, sums + m * kTileRows, y);
    p.kernels.apply_gate(part.y + (m0 + m) * part.stride + first, y, last - first);
  }
}

// Task: one tile for one range of the panel's rows.
void multiply_tile(void* argument, size_t task) {
  const Panel& p = *static_cast<Panel*>(argument);
  int64_t tile = static_cast<int64_t>(task) / p.row_parts;
  const int64_t range = static_cast<int64_t>(task) % p.row_parts;
  const Part* part = p.parts;
  for (; tile >= part->weights->tiles(); ++part) tile -= part->weights->tiles();
  const int64_t m0 = p.rows * range / p.row_parts, rows = p.rows * (range + 1) / p.row_parts - m0;
  if (p.mode == Mode::kLut) {
    alignas(kAlignment) float sums[kLutPanel * kTileRows];
    multiply_rows(p, *part, tile, m0, rows, sums);
  } else {
    alignas(kAlignment) double sums[kExactPanel * kTileRows];
    multiply_rows(p, *part, tile, m0, rows, sums);
  }
}

// Task: the norm of one row, where there is one, and its scales. Parts without dead columns find the same one.
void prepare_row(void* argument, size_t task) {
  Panel& p = *static_cast<Panel*>(argument);
  const int64_t m = static_cast<int64_t>(task), K = p.parts[0].weights->cols();
  const float* const x = p.x + m * K;
  if (p.norm != nullptr) p.norm->apply(p.hidden + m * K, p.first + m, K, p.normalized + m * K);
  for (size_t i = 0; i < p.count; ++i) {
    const PackedMatrix& w = *p.parts[i].weights;
    const bool known = i > 0 && w.live_scale() == nullptr && p.parts[i - 1].weights->live_scale() == nullptr;
    p.parts[i].scale[m] = known ? p.parts[i - 1].scale[m] : row_scale(p.kernels, x, w.live_scale(), K);
  }
}

// Task: both of the above for one row.
void prepare_whole_row(void* argument, size_t task) {
  const size_t segments = static_cast<size_t>(static_cast<Panel*>(argument)->segments);
  prepare_row(argument, task);
  for (size_t i = 0; i < segments; ++i) make_tables(argument, task * segments + i);
}

void run_panel(Panel& p, Executor& executor) {
  int64_t tables = 0, signs = 0, tiles = 0;  // of a row; columns of tables
  p.segments = 0;
  for (size_t i = 0; i < p.count; ++i) {
    Part& part = p.parts[i];
    const PackedMatrix& w = *part.weights;
    // Blocks are of one size but for the ends of groups: as many of them as make kSegmentColumns columns.
    if (w.blocks() == 0) {  // no rows of weights
      part.segments = 0;
      continue;
    }
    part.segment_blocks = std::max(kSegmentColumns / w.block(0).count, int64_t{1});
    part.segments = (w.blocks() + part.segment_blocks - 1) / part.segment_blocks;
    p.segments += part.segments;
    tables += 8 * w.row_bytes();
    signs += w.rows() * w.cols();
    if (i == 0 || !p.gated) tiles += w.tiles();
  }
  const int64_t table_tasks = p.rows * p.segments;
  const bool share_tables = p.rows * tables >= kMinSegments * kSegmentColumns;
  if (p.rows >= kManyRows) {
    run_tasks(share_tables, executor, p.rows, p.rows, prepare_whole_row, &p);
  } else {
    const bool share_norm = p.norm != nullptr && p.rows * p.parts[0].weights->cols() >= kMinNormalized;
    run_tasks(share_norm, executor, p.rows, p.rows, prepare_row, &p);
    run_tasks(share_tables, executor, table_tasks, table_tasks, make_tables, &p);
  }

  const int64_t pieces = p.rows * signs / (p.mode == Mode::kLut ? kLutGrain : kExactGrain);
  p.row_parts = row_parts(pieces, p.rows, tiles);
  const int64_t tasks = tiles * p.row_parts;
  run_tasks(pieces >= 2, executor, tasks, std::min(tasks, pieces), multiply_tile, &p);
}

// What is left of a call without rows of weights: the sums in front of the norm.
void add_only(const Norm* norm, const float* x, int64_t M, int64_t K) {
  if (norm == nullptr || M == 0) return;
  Workspace workspace(normalized_bytes(norm, 1, K));
  for (int64_t m = 0; m < M; ++m) norm->apply(x + m * K, m, K, reinterpret_cast<float*>(workspace.data()));
}

}  // namespace

void multiply_all(const BinaryKernels& kernels, const Product* products, size_t count, Mode mode, const Norm* norm,
                  const float* x, int64_t M, Executor& executor) {
  int64_t N = 0;
  for (size_t i = 0; i < count; ++i) N += products[i].weights->rows();
  const int64_t panel = panel_rows(mode, M), K = products[0].weights->cols();
  if (M == 0 || N == 0) return add_only(norm, x, M, K);
  const size_t norm_bytes = normalized_bytes(norm, panel, K);
  size_t size = norm_bytes;
  for (size_t i = 0; i < count; ++i) size += table_bytes(*products[i].weights, mode, panel);
  Workspace workspace(size);
  for (int64_t m = 0; m < M; m += panel) {
    Panel p(kernels, mode, false, count, x + m * K, std::min(panel, M - m));
    uint8_t* memory = workspace.data();
    p.normalize(norm, m, memory);
    memory += norm_bytes;
    for (size_t i = 0; i < count; ++i) {
      p.parts[i].set(products[i], m);
      memory = place_tables(p.parts[i], mode, panel, memory);
    }
    run_panel(p, executor);
  }
}

void multiply(const BinaryKernels& kernels, const PackedMatrix& weights, Mode mode, const float* x, int64_t M,
              const float* bias, float* y, Executor& executor) {
  const Product product = {&weights, bias, y, weights.rows()};
  multiply_all(kernels, &product, 1, mode, nullptr, x, M, executor);
}

void multiply_gated(const BinaryKernels& kernels, const PackedMatrix& gate, const PackedMatrix& up,
                    const PackedMatrix& down, Mode mode, const Norm* norm, const float* x, int64_t M, float* y, Executor& executor) {
  if (M == 0 || down.rows() == 0) return add_only(norm, x, M, gate.cols());
  const int64_t panel = panel_rows(mode, M), K = gate.cols(), H = gate.rows(), N = down.rows();
  const size_t opened_bytes = aligned(panel * H * static_cast<int64_t>(sizeof(float)));
  const size_t norm_bytes = normalized_bytes(norm, panel, K);
  const size_t first_bytes = norm_bytes + table_bytes(gate, mode, panel) + table_bytes(up, mode, panel);
  Workspace workspace(opened_bytes + std::max(first_bytes, table_bytes(down, mode, panel)));
  float* const opened = reinterpret_cast<float*>(workspace.data());  // (rows, H)
  uint8_t* const memory = workspace.data() + opened_bytes;
  for (int64_t m = 0; m < M; m += panel) {
    const int64_t rows = std::min(panel, M - m);
    Panel first(kernels, mode, true, 2, x + m * K, rows);
    first.parts[0].set({&gate, nullptr, opened, H}, 0);
    first.parts[1].set({&up, nullptr, nullptr, 0}, 0);
    first.normalize(norm, m, memory);
    place_tables(first.parts[1], mode, panel, place_tables(first.parts[0], mode, panel, memory + norm_bytes));
    run_panel(first, executor);
    Panel second(kernels, mode, false, 1, opened, rows);
    second.parts[0].set({&down, nullptr, y, N}, m);
    place_tables(second.parts[0], mode, panel, memory);
    run_panel(second, executor);
  }
}

}  // namespace lit_binq
