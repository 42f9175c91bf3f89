// C functions of the test library: two-plane products without ONNX Runtime, on the calling thread.
#include <algorithm>
#include <cstring>
#include <exception>

#include "abi/export.h"
#include "tests/c_api.h"
#include "two_plane/activations.h"
#include "two_plane/multiply.h"

using namespace lit_binq;

// y (M, N) = x (M, K) W^T + bias. 0, or -1 where memory ran out or the set is unknown.
LIT_BINQ_EXPORT int lit_binq_two_plane_matmul(const char* set, const TwoPlaneTensors* tensors, int exact,
                                              const float* x, int64_t M, const float* bias, float* y) {
  try {
    const auto& kernels = test_set(set).two_plane;
    const TwoPlaneMatrix weights(kernels, *tensors, exact != 0);
    SerialExecutor serial;
    two_plane_multiply(weights, x, M, bias, y, serial);
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

// The integers of one quantized row x (K,): its codes (K,) in stored order, range (4,) = lo, R of the 4-bit part, lo, R
// of the 8-bit part, and counts (blocks, 3, 8, N): over the columns of each block, of A & q_k, B & q_k, A & B & q_k
// (the last zero unless L = 4). columns (blocks, 2) takes the first column and the number of columns of each block.
// Returns the number of blocks, or -1. Where counts is null, nothing but that and `columns` is done.
LIT_BINQ_EXPORT int64_t lit_binq_two_plane_counts(const char* set, const TwoPlaneTensors* tensors, const float* x,
                                                  int64_t* columns, uint8_t* codes, float* range, int32_t* counts) {
  try {
    if (tensors->activation_bits == 0) return -1;
    const auto& kernels = test_set(set).two_plane;
    const TwoPlaneMatrix w(kernels, *tensors, false);
    for (int64_t b = 0; columns != nullptr && b < w.blocks(); ++b) {
      columns[2 * b] = w.block(b).column;
      columns[2 * b + 1] = w.block(b).count;
    }
    if (counts == nullptr) return w.blocks();
    const AlignedBytes prepared = allocate_aligned(static_cast<size_t>(w.prepared_bytes()));
    const AlignedBytes scratch = allocate_aligned(static_cast<size_t>(two_plane_scratch_bytes(w)));
    const AlignedBytes per_block = allocate_aligned(static_cast<size_t>(w.blocks()) * 2 * sizeof(float));
    const TwoPlanePrepared one = {prepared.get(), reinterpret_cast<float*>(per_block.get()), 1};
    TwoPlaneRow row;
    prepare_row(w, x, one, 0, scratch.get(), row);
    for (int part = 0; part < kParts; ++part) {
      range[2 * part] = row.low[part];
      range[2 * part + 1] = row.range[part];
    }
    const int64_t N = w.rows();
    std::fill_n(counts, w.blocks() * kWeightPlanes * kMaxPlanes * N, 0);
    for (int64_t b = 0; b < w.blocks(); ++b) {
      const TwoPlaneColumns& c = w.block(b);
      std::copy_n(two_plane_codes(w, scratch.get()) + c.position, c.count, codes + c.column);
      const int64_t weight_planes = w.levels() == 4 ? 3 : 2;
      for (int64_t tile = 0; tile < w.tiles(); ++tile) {
        int32_t of_tile[kWeightPlanes * kMaxPlanes * kTwoPlaneRows];
        float sums[kTwoPlaneRows] = {0.0f};
        const TwoPlaneActivations a = {one.at(c, 0), one.of(b, 0)[0], one.of(b, 0)[1], row.twice[c.part]};
        kernels.add_planes(w.tile_block(tile, b), w.levels(), c.planes, a, sums, of_tile);
        const int64_t first = tile * kTwoPlaneRows, rows = std::min(kTwoPlaneRows, N - first);
        for (int64_t p = 0; p < weight_planes; ++p) {
          for (int64_t k = 0; k < c.planes; ++k) {
            std::copy_n(of_tile + (p * c.planes + k) * kTwoPlaneRows, rows,
                        counts + ((b * kWeightPlanes + p) * kMaxPlanes + k) * N + first);
          }
        }
      }
    }
    return w.blocks();
  } catch (const std::exception&) {
    return -1;
  }
}
