// C functions of the test library: products with weights of 4 and 8 bits without ONNX Runtime, on the calling thread.
#include <exception>

#include "abi/export.h"
#include "tests/c_api.h"
#include "nbits/multiply.h"

using namespace lit_binq;

// y (M, N) = x (M, K) W^T. 1 where the scales are packed as float16, 0 where as float32, -1 where memory ran out or the
// set is unknown.
LIT_BINQ_EXPORT int lit_binq_nbits_matmul(const char* set, const NBitsTensors* tensors, int exact, const float* x,
                                          int64_t M, float* y) {
  try {
    const auto& kernels = test_set(set).nbits;
    const NBitsMatrix weights(*tensors);
    SerialExecutor serial;
    nbits_multiply(kernels, weights, exact ? Mode::kExact : Mode::kLut, x, M, y, serial);
    return weights.halves() ? 1 : 0;
  } catch (const std::exception&) {
    return -1;
  }
}
