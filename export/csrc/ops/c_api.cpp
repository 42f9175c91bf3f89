// C functions beside the operators, for tests and for session code (lit_binq_onnx/library.py binds them).
#include <cstdint>
#include <cstring>
#include <exception>

#include "abi/export.h"
#include "binary/matrix.h"
#include "binary/multiply.h"
#include "common/cpu.h"
#include "ops/operator.h"

using namespace lit_binq;

// Multiplications and attentions that native operators have done since the library was loaded.
LIT_BINQ_EXPORT int64_t lit_binq_calls(void) { return call_count().load(); }

// Instruction set of operators created from now on.
LIT_BINQ_EXPORT const char* lit_binq_isa(void) { return current_kernels().name; }

// Chooses it: 0, or -1 where the name is unknown or the machine lacks it.
LIT_BINQ_EXPORT int lit_binq_force_isa(const char* name) { return force_kernels(name) ? 0 : -1; }

// One row x column multiplication without ONNX Runtime, on the calling thread: x (M, K), y (M, N) row-major,
// bias (N,) or null, scales as float16 bits. 0, or -1 where memory ran out.
LIT_BINQ_EXPORT int lit_binq_matmul(const float* x, int64_t M, int64_t K, int64_t N, const uint8_t* codes,
                                    const uint16_t* row_scale, const uint16_t* col_scale, const float* bias, int exact,
                                    float* y) {
  try {
    const Kernels& kernels = current_kernels();
    const PackedMatrix weights = PackedMatrix::row_column(codes, row_scale, col_scale, N, K, kernels.layout);
    SerialExecutor serial;
    multiply(kernels, weights, exact ? Mode::kExact : Mode::kLut, x, M, bias, y, serial);
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

// gate_i = silu(gate_i) * up_i for i < count, as the operator NormBinaryGatedMLP computes it between its products.
LIT_BINQ_EXPORT void lit_binq_apply_gate(float* gate, const float* up, int64_t count) {
  current_kernels().apply_gate(gate, up, count);
}

// sum and x (M, K) of hidden and skip (M, K) and gamma (K,), as the operators with a norm compute them (norm.h).
LIT_BINQ_EXPORT void lit_binq_normalize(const float* hidden, const float* skip, const float* gamma, float epsilon,
                                        int64_t M, int64_t K, float* sum, float* x) {
  const Norm norm = {skip, K, gamma, epsilon, sum};
  for (int64_t m = 0; m < M; ++m) norm.apply(hidden + m * K, m, K, x + m * K);
}

// The tables that LUT mode makes of one row, K <= 256: ceil(K / 8) * 32 bytes, the 16 sums of 4 columns after those of
// the 4 columns before, whatever the layout; and their scale.
LIT_BINQ_EXPORT void lit_binq_build_lut(const float* x, const float* c, int64_t K, uint8_t* table, float* scale) {
  const Kernels& kernels = current_kernels();
  uint8_t tables[kBlockBytes * kLutEntries];
  kernels.build_lut(x, c, K, 1.0f, false, tables, scale);
  for (int64_t group = 0; group < 2 * ((K + 7) / 8); ++group) {
    const int64_t quad = group / (2 * kQuad) * (2 * kQuad), byte = (group - quad) / 2, half = group % 2;
    const int64_t place = kernels.layout == Layout::kBytes ? group : quad + kQuad * half + byte;
    std::memcpy(table + 16 * group, tables + 16 * place, 16);
  }
}

// The lut5 tables of one row, K <= 256, as they are: lookups(quads of K) * 64 bytes. -1 where the set has none.
LIT_BINQ_EXPORT int lit_binq_build_lut5(const float* x, const float* c, int64_t K, uint8_t* table, float* scale) {
  const Kernels& kernels = current_kernels();
  if (kernels.reference != &kScalarLut5Kernels) return -1;
  kernels.build_lut(x, c, K, 1.0f, true, table, scale);
  return 0;
}

// Name of the i-th instruction set that this machine has, the best one first; null from their number on.
LIT_BINQ_EXPORT const char* lit_binq_isa_name(int i) {
  const Kernels* kernels = available_kernels(i);
  return kernels != nullptr ? kernels->name : nullptr;
}

// Exact float32 value of float16 bits.
LIT_BINQ_EXPORT float lit_binq_half_to_float(uint16_t bits) { return half_to_float(bits); }
