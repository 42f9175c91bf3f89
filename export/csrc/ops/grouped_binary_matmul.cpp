// The operator lit_binq.GroupedBinaryMatMul, version 1:  Y_n = sum_j s[n, j / group] B_nj X_j + bias_n
//
//   codes   uint8   (N, ceil(K / 8))      signs of B
//   scales  float16 (N, ceil(K / group))  s
//   group   int, columns that share a scale
//
// and what all operators have (operator.h).
#include "ops/operator.h"
#include "ops/operators.h"

namespace lit_binq {
namespace {

class GroupedBinaryMatMul final : public MatrixOperator {
 public:
  static constexpr Input kInputs[] = {
      {"X", kOrtFloat}, {"codes", kOrtUint8}, {"scales", kOrtFloat16}, {"bias", kOrtFloat}};
  static constexpr Signature kSignature = {"GroupedBinaryMatMul", kInputs, 4};

  explicit GroupedBinaryMatMul(const NodeReader& node) : MatrixOperator(node) {
    const int64_t group = node.number("group", "the columns that share a scale");
    const int64_t groups = divide_up(K_, group);
    const Tensor scales = node.constant(2);
    if (scales.rank != 2 || scales.dims[0] != N_ || scales.dims[1] != groups) {
      fail("scales has shape %s, expected (%lld, %lld) for %lld columns in groups of %lld", shape_text(scales).c_str(),
           as_long(N_), as_long(groups), as_long(K_),
           as_long(group));
    }
    expect_finite(scales, "scales");
    weights_ = std::make_unique<PackedMatrix>(
        PackedMatrix::grouped(codes_.as<uint8_t>(), scales.as<uint16_t>(), N_, K_, group, kernels_.layout));
  }
};

}  // namespace

Description grouped_binary_matmul_op(const OrtApi& ort, const SessionOptions& session) {
  return describe<GroupedBinaryMatMul>(ort, session);
}

}  // namespace lit_binq
