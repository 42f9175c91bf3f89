// The operator lit_binq.BinaryMatMul, version 1:  Y = ((X * c) B^T) * r + bias
//
//   codes      uint8   (N, ceil(K / 8))  signs of B
//   row_scale  float16 (N,)              r
//   col_scale  float16 (K,)              c
//
// and what all operators have (operator.h).
#include "ops/operator.h"
#include "ops/operators.h"

namespace lit_binq {
namespace {

class BinaryMatMul final : public MatrixOperator {
 public:
  static constexpr Input kInputs[] = {{"X", kOrtFloat},
                                      {"codes", kOrtUint8},
                                      {"row_scale", kOrtFloat16},
                                      {"col_scale", kOrtFloat16},
                                      {"bias", kOrtFloat}};
  static constexpr Signature kSignature = {"BinaryMatMul", kInputs, 5};

  explicit BinaryMatMul(const NodeReader& node) : MatrixOperator(node) {
    const Tensor row_scale = node.scales(2, N_), col_scale = node.scales(3, K_);
    weights_ = std::make_unique<PackedMatrix>(PackedMatrix::row_column(
        codes_.as<uint8_t>(), row_scale.as<uint16_t>(), col_scale.as<uint16_t>(), N_, K_, kernels_.layout));
  }
};

}  // namespace

Description binary_matmul_op(const OrtApi& ort, const SessionOptions& session) {
  return describe<BinaryMatMul>(ort, session);
}

}  // namespace lit_binq
