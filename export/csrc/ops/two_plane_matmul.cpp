// The operator lit_binq.TwoPlaneMatMul, version 1:  Y_n = sum_j W_nj x^_j + bias_n, with W and x^ in stored order
// (outlier columns of X first, ascending, then the others, ascending) and j's group j / group:
//
//   L = 4   W_nj = levels[n, group(j), A_nj + 2 B_nj]
//   L = 3   W_nj = m + (2 A_nj - 1) a1 + (2 B_nj - 1) a2,  (m, a1, a2) = levels[n, group(j)]
//   L = 2   the same with m = 0,  (a1, a2) = levels[n, group(j)]
//
//   codes         uint8   (N, ceil(K / 8))             bits A
//   selector      uint8   (N, ceil(K / 8))             bits B
//   levels        float16 (N, ceil(K / group), L)
//   outlier_bits  uint8   (ceil(K / 8),) bitmap over the columns of X, or (0,) where outliers = 0
//   input_scales  float16 (5,) zeta, rho_0..rho_3 where activation_bits = 4, else (0,)
//   input_range   float32 (4,) lo and R of the 4-bit part, lo and R of the 8-bit part, or (0,): of each row of X
//   group             int, columns of a group
//   activation_bits   int: 0, x^ = X; 8, every column; 4, the outlier columns have 8 bits, the others 4:
//       8 bits   x^ = lo + q R / 255,  q = round((X - lo) / (R / 255)), halves to even, from 0 to 255
//       4 bits   x^ = lo + R l_b,  l_b = zeta + sum_k rho_k bit_k(b),  b the pattern whose l_b is nearest to
//                (X - lo) / R, of two equally near the one with the lower l_b
//   outliers          int, how many columns outlier_bits marks
//
// and what all operators have (operator.h). The attribute exact matters where activation_bits = 0.
#include <cmath>

#include "ops/operator.h"
#include "ops/operators.h"
#include "two_plane/multiply.h"

namespace lit_binq {
namespace {

class TwoPlaneMatMul final : public PackedOperator {
 public:
  static constexpr Input kInputs[] = {{"X", kOrtFloat},
                                      {"codes", kOrtUint8},
                                      {"selector", kOrtUint8},
                                      {"levels", kOrtFloat16},
                                      {"outlier_bits", kOrtUint8},
                                      {"input_scales", kOrtFloat16},
                                      {"input_range", kOrtFloat},
                                      {"bias", kOrtFloat}};
  static constexpr Signature kSignature = {"TwoPlaneMatMul", kInputs, 8};

  explicit TwoPlaneMatMul(const NodeReader& node) : PackedOperator(node) {
    TwoPlaneTensors t = {};
    t.N = N_;
    t.K = K_;
    t.group = node.number("group", "the columns that share levels");
    t.activation_bits = node.number("activation_bits", "0, 4 or 8", 0);
    t.P = node.number("outliers", "the number of outlier columns", 0);
    if (t.activation_bits != 0 && t.activation_bits != 4 && t.activation_bits != 8) {
      fail("attribute activation_bits is %lld, expected 0, 4 or 8", as_long(t.activation_bits));
    }
    const Tensor selector = node.constant(2), levels = node.constant(3), outlier_bits = node.constant(4);
    const Tensor input_range = node.constant(6);
    expect_codes(selector, "selector");
    const int64_t groups = divide_up(K_, t.group);
    t.L = levels.rank == 3 ? levels.dims[2] : 0;
    if (t.L < 2 || t.L > 4 || levels.dims[0] != N_ || levels.dims[1] != groups) {
      fail("levels has shape %s, expected (%lld, %lld, 2 to 4) for %lld columns in groups of %lld",
           shape_text(levels).c_str(), as_long(N_), as_long(groups),
           as_long(K_), as_long(t.group));
    }
    expect_finite(levels, "levels");
    expect_vector(outlier_bits, "outlier_bits", t.P != 0 ? divide_up(K_, 8) : 0);
    int64_t marked = 0;
    for (int64_t k = 0; t.P != 0 && k < K_; ++k) marked += outlier_bits.as<uint8_t>()[k / 8] >> (k % 8) & 1;
    if (marked != t.P) {
      fail("outlier_bits marks %lld columns, expected %lld as attribute outliers says", as_long(marked),
           as_long(t.P));
    }
    t.input_scales = node.scales(5, t.activation_bits == 4 ? 5 : 0).as<uint16_t>();
    if (input_range.rank != 1 || (input_range.dims[0] != 0 && input_range.dims[0] != 4)) {
      fail("input_range has shape %s, expected (4,) or (0,)", shape_text(input_range).c_str());
    }
    t.input_range = input_range.dims[0] != 0 ? input_range.as<float>() : nullptr;
    for (int i = 0; t.input_range != nullptr && i < 4; ++i) {
      if (!std::isfinite(t.input_range[i])) fail("input_range[%d] is not finite, expected finite ranges", i);
    }
    t.codes = codes_.as<uint8_t>();
    t.selector = selector.as<uint8_t>();
    t.levels = levels.as<uint16_t>();
    t.outlier_bits = outlier_bits.as<uint8_t>();
    weights_ = std::make_unique<TwoPlaneMatrix>(node.kernels().two_plane, t, mode_ == Mode::kExact);
  }

 protected:
  void run(const float* x, int64_t M, const float* bias, float* y, Executor& executor) const override {
    two_plane_multiply(*weights_, x, M, bias, y, executor);
  }

 private:
  std::unique_ptr<TwoPlaneMatrix> weights_;
};

}  // namespace

Description two_plane_matmul_op(const OrtApi& ort, const SessionOptions& session) {
  return describe<TwoPlaneMatMul>(ort, session);
}

}  // namespace lit_binq
