// The operator lit_binq.BinaryMatMul as ONNX Runtime sees it. Touches the runtime through ort_abi.h.
#pragma once

#include <atomic>
#include <cstdint>

#include "ort_abi.h"

namespace lit_binq {

// The API that the operator calls; filled by RegisterCustomOps after the guard has passed.
OrtApi& ort();

// Multiplications done by the operator since the library was loaded.
std::atomic<int64_t>& call_count();

// -1: operators created from now on follow their attribute `exact`; 0: LUT mode; 1: exact mode.
std::atomic<int>& forced_mode();

// The operator's description; lives as long as the library.
const OrtCustomOp* binary_matmul_op();

}  // namespace lit_binq
