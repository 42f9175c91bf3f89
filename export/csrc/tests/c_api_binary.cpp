// C functions of the test library: the binary kernels without ONNX Runtime. `set` is the name of a kernel set that runs
// here.
#include <cstdint>
#include <cstring>
#include <exception>

#include "abi/export.h"
#include "binary/matrix.h"
#include "binary/multiply.h"
#include "sets/kernel_sets.h"
#include "tests/c_api.h"

using namespace lit_binq;

// One row x column multiplication on the calling thread: x (M, K), y (M, N) row-major, bias (N,) or null, scales as
// float16 bits. 0, or -1 where memory ran out or the set is unknown.
LIT_BINQ_EXPORT int lit_binq_matmul(const char* set, const float* x, int64_t M, int64_t K, int64_t N,
                                    const uint8_t* codes, const uint16_t* row_scale, const uint16_t* col_scale,
                                    const float* bias, int exact, float* y) {
  try {
    const BinaryKernels& kernels = test_set(set).binary;
    const PackedMatrix weights = PackedMatrix::row_column(codes, row_scale, col_scale, N, K, kernels.layout);
    SerialExecutor serial;
    multiply(kernels, weights, exact ? Mode::kExact : Mode::kLut, x, M, bias, y, serial);
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

// gate_i = silu(gate_i) * up_i for i < count, as the operator NormBinaryGatedMLP computes it between its products.
LIT_BINQ_EXPORT void lit_binq_apply_gate(const char* set, float* gate, const float* up, int64_t count) {
  test_set(set).binary.apply_gate(gate, up, count);
}

// sum and x (M, K) of hidden and skip (M, K) and gamma (K,), as the operators with a norm compute them (norm.h).
LIT_BINQ_EXPORT void lit_binq_normalize(const float* hidden, const float* skip, const float* gamma, float epsilon,
                                        int64_t M, int64_t K, float* sum, float* x) {
  const Norm norm = {skip, K, gamma, epsilon, sum};
  for (int64_t m = 0; m < M; ++m) norm.apply(hidden + m * K, m, K, x + m * K);
}

// The tables that LUT mode makes of one row, K <= 256: ceil(K / 8) * 32 bytes, the 16 sums of 4 columns after those of
// the 4 columns before, whatever the layout; and their scale.
LIT_BINQ_EXPORT void lit_binq_build_lut(const char* set, const float* x, const float* c, int64_t K, uint8_t* table,
                                        float* scale) {
  const BinaryKernels& kernels = test_set(set).binary;
  uint8_t tables[kBlockBytes * kLutEntries];
  kernels.build_lut(x, c, K, 1.0f, false, tables, scale);
  for (int64_t group = 0; group < 2 * ((K + 7) / 8); ++group) {
    const int64_t quad = group / (2 * kQuad) * (2 * kQuad), byte = (group - quad) / 2, half = group % 2;
    const int64_t place = kernels.layout == Layout::kBytes ? group : quad + kQuad * half + byte;
    std::memcpy(table + 16 * group, tables + 16 * place, 16);
  }
}

// The lut5 tables of one row, K <= 256, as they are: lookups(quads of K) * 64 bytes. -1 where the set has none.
LIT_BINQ_EXPORT int lit_binq_build_lut5(const char* set, const float* x, const float* c, int64_t K, uint8_t* table,
                                        float* scale) {
  const BinaryKernels& kernels = test_set(set).binary;
  if (kernels.rows_for_dense != kLut5From) return -1;
  kernels.build_lut(x, c, K, 1.0f, true, table, scale);
  return 0;
}

// Exact float32 value of float16 bits.
LIT_BINQ_EXPORT float lit_binq_half_to_float(uint16_t bits) { return half_to_float(bits); }
