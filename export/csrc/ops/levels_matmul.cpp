// The operator lit_binq.LevelsMatMul, version 1:  Y_n = sum_j L[n, group(j), A_nj + 2 B_nj] X_j + bias_n,
// group(j) = zones * (j / group) + (bit j of column_bits, where zones = 2)
//
//   codes        uint8   (N, ceil(K / 8))                    bits A
//   selector     uint8   (N, ceil(K / 8))                    bits B
//   levels       float16 (N, zones * ceil(K / group), 4)     L
//   column_bits  uint8   (ceil(K / 8),), or (0,) where zones = 1
//   group        int, columns of a group
//   zones        int, 1 or 2
//
// and what all operators have (operator.h).
#include "ops/operator.h"
#include "ops/operators.h"

namespace lit_binq {
namespace {

class LevelsMatMul final : public MatrixOperator {
 public:
  static constexpr Input kInputs[] = {{"X", kOrtFloat},        {"codes", kOrtUint8},       {"selector", kOrtUint8},
                                      {"levels", kOrtFloat16}, {"column_bits", kOrtUint8}, {"bias", kOrtFloat}};
  static constexpr Signature kSignature = {"LevelsMatMul", kInputs, 6};

  explicit LevelsMatMul(const NodeReader& node) : MatrixOperator(node) {
    const int64_t group = node.number("group", "the columns that share levels");
    const int64_t zones = node.number("zones", "1 or 2");
    if (zones > 2) fail("attribute zones is %lld, expected 1 or 2", as_long(zones));
    const int64_t groups = zones * divide_up(K_, group);
    const Tensor selector = node.constant(2), levels = node.constant(3), column_bits = node.constant(4);
    expect_codes(selector, "selector");
    if (levels.rank != 3 || levels.dims[0] != N_ || levels.dims[1] != groups || levels.dims[2] != 4) {
      fail("levels has shape %s, expected (%lld, %lld, 4) for %lld columns in groups of %lld",
           shape_text(levels).c_str(), as_long(N_), as_long(groups),
           as_long(K_), as_long(group));
    }
    expect_finite(levels, "levels");
    expect_vector(column_bits, "column_bits", zones == 2 ? divide_up(K_, 8) : 0);
    weights_ = std::make_unique<PackedMatrix>(
        PackedMatrix::levels(codes_.as<uint8_t>(), selector.as<uint8_t>(), levels.as<uint16_t>(),
                             zones == 2 ? column_bits.as<uint8_t>() : nullptr, N_, K_, group, kernels_.layout));
  }
};

}  // namespace

Description levels_matmul_op(const OrtApi& ort, SessionMode mode) { return describe<LevelsMatMul>(ort, mode); }

}  // namespace lit_binq
