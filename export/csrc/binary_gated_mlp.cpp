// The operator lit_binq.BinaryGatedMLP, version 1: the MLP of a LLaMA-like block.
//
//   Y = ((h * c) B^T) * r of down,  h = silu(gate of X) * (up of X), gate and up of the same form
//
//   X         float32 (..., K)
//   codes_gate, row_scale_gate, col_scale_gate, then _up: (H, K); then _down: (N, H); see binary_operator.h
//   Y         float32 (..., N)
//   K, exact  as in operator.h
//   H         int, rows of gate and of up, columns of down
#include "binary_operator.h"
#include "operators.h"

namespace lit_binq {
namespace {

constexpr size_t kGate = 1, kUp = 4, kDown = 7;
constexpr size_t kDownCodes[] = {kDown};

class BinaryGatedMLP final : public BinaryOperator {
 public:
  static constexpr Input kInputs[] = {
      {"X", kOrtFloat}, LIT_BINQ_MATRIX_INPUTS("gate"), LIT_BINQ_MATRIX_INPUTS("up"), LIT_BINQ_MATRIX_INPUTS("down")};
  static constexpr Signature kSignature = {"BinaryGatedMLP", kInputs, 10, 0, kDownCodes, 1};

  explicit BinaryGatedMLP(const OrtKernelInfo* info) : BinaryOperator(kSignature, info) {
    K_ = required_attribute(info, "K", kColumns);
    const int64_t H = required_attribute(info, "H", "the rows of gate and up");
    add_matrix(info, kGate, K_, "K");
    add_matrix(info, kUp, K_, "K");
    add_matrix(info, kDown, H, "H");
    for (size_t i = 0; i < 2; ++i) {
      if (weights_[i].rows() != H) {
        fail("%s has %lld rows, expected %lld as attribute H says", kInputs[i == 0 ? kGate : kUp].name,
             static_cast<long long>(weights_[i].rows()), static_cast<long long>(H));
      }
    }
  }

  void compute(OrtKernelContext* context) const {
    int64_t M = 0;
    const Tensor x = read_x(context, K_, &M);
    float* y = make_y(context, x, weights_[2].rows());
    PoolExecutor executor(context);
    multiply_gated(kernels_, weights_[0], weights_[1], weights_[2], mode_, x.as<float>(), M, y, executor);
    check(executor.status);
    call_count().fetch_add(3, std::memory_order_relaxed);
  }

 private:
  int64_t K_;
};

}  // namespace

const OrtCustomOp* binary_gated_mlp_op() {
  static const OrtCustomOp op = describe<BinaryGatedMLP>();
  return &op;
}

}  // namespace lit_binq
