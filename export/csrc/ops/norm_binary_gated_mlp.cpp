// The operator lit_binq.NormBinaryGatedMLP, version 1: the MLP of a LLaMA-like block, and the sum and norm in front.
//
//   Y = ((o * c) B^T) * r of down,  o = silu(gate of x) * (up of x), gate and up of the same form;  x of hidden and
//   skip: norm_binary_operator.h
//
//   hidden, skip, gamma     see there
//   codes_gate, row_scale_gate, col_scale_gate, then _up: (H, K); then _down: (N, H)
//   Y                       float32 (..., N)
//   sum, K, epsilon, exact  see there
//   H                       int, rows of gate and of up, columns of down
#include "ops/norm_binary_operator.h"
#include "ops/operators.h"

namespace lit_binq {
namespace {

constexpr size_t kGate = kFirstMatrix, kUp = kGate + 3, kDown = kUp + 3;
constexpr size_t kDownCodes[] = {kDown};

class NormBinaryGatedMLP final : public NormBinaryOperator {
 public:
  static constexpr Input kInputs[] = {LIT_BINQ_NORM_INPUTS, LIT_BINQ_MATRIX_INPUTS("gate"),
                                      LIT_BINQ_MATRIX_INPUTS("up"), LIT_BINQ_MATRIX_INPUTS("down")};
  static constexpr Signature kSignature = {"NormBinaryGatedMLP", kInputs, kDown + 3, 0, kDownCodes, 1, 2};

  explicit NormBinaryGatedMLP(const NodeReader& node) : NormBinaryOperator(node) {
    const int64_t H = node.number("H", "the rows of gate and up");
    add_matrix(node, kGate, K_, "K");
    add_matrix(node, kUp, K_, "K");
    add_matrix(node, kDown, H, "H");
    for (size_t i = 0; i < 2; ++i) {
      if (weights_[i].rows() != H) {
        fail("%s has %lld rows, expected %lld as attribute H says", kInputs[i == 0 ? kGate : kUp].name,
             as_long(weights_[i].rows()), as_long(H));
      }
    }
  }

  void compute(OrtKernelContext* context) const {
    int64_t M = 0;
    Norm norm;
    Tensor skip;
    const Tensor hidden = read_hidden(context, &M, &skip, &norm);
    float* y = make_y(context, hidden, weights_[2].rows());
    PoolExecutor executor(ort(), context);
    multiply_gated(kernels_, weights_[0], weights_[1], weights_[2], mode_, &norm, hidden.as<float>(), M, y, executor);
    check(executor.status);
    call_count().fetch_add(3, std::memory_order_relaxed);
  }
};

}  // namespace

Description norm_binary_gated_mlp_op(const OrtApi& ort, const SessionOptions& session) {
  return describe<NormBinaryGatedMLP>(ort, session);
}

}  // namespace lit_binq
