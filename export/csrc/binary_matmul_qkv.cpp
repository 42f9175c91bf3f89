// The operator lit_binq.BinaryMatMulQKV, version 1: queries, keys and values of an attention beside each other, as
// com.microsoft.GroupQueryAttention takes them packed.
//
//   Y = [Q, K, V],  each ((X * c) B^T) * r + bias with tensors of its own
//
//   X                      float32 (..., K)
//   codes_q, row_scale_q, col_scale_q, then _k, then _v: see binary_operator.h
//   bias_q, bias_k, bias_v float32 (Nq,), (Nk,), (Nv,), optional
//   Y                      float32 (..., Nq + Nk + Nv)
//   K, exact               as in operator.h
#include "binary_operator.h"
#include "operators.h"

namespace lit_binq {
namespace {

constexpr size_t kCodesAt[] = {1, 4, 7};
constexpr size_t kBiases = 10;
constexpr size_t kMatrices = 3;
static_assert(kMatrices <= kMaxProducts, "one panel takes them all");

class BinaryMatMulQKV final : public BinaryOperator {
 public:
  static constexpr Input kInputs[] = {
      {"X", kOrtFloat},
      LIT_BINQ_MATRIX_INPUTS("q"), LIT_BINQ_MATRIX_INPUTS("k"), LIT_BINQ_MATRIX_INPUTS("v"),
      {"bias_q", kOrtFloat}, {"bias_k", kOrtFloat}, {"bias_v", kOrtFloat}};
  static constexpr Signature kSignature = {"BinaryMatMulQKV", kInputs, 13, kMatrices, kCodesAt, kMatrices};

  explicit BinaryMatMulQKV(const OrtKernelInfo* info) : BinaryOperator(kSignature, info) {
    K_ = required_attribute(info, "K", kColumns);
    for (const size_t index : kCodesAt) add_matrix(info, index, K_, "K");
    for (const PackedMatrix& w : weights_) N_ += w.rows();
  }

  void compute(OrtKernelContext* context) const {
    int64_t M = 0;
    const Tensor x = read_x(context, K_, &M);
    Product products[kMatrices];
    for (size_t i = 0; i < kMatrices; ++i) {
      products[i] = {&weights_[i], read_bias(context, kBiases + i, weights_[i].rows()), nullptr, N_};
    }
    float* y = make_y(context, x, N_);
    for (Product& product : products) {
      product.y = y;
      y += product.weights->rows();
    }
    PoolExecutor executor(context);
    multiply_all(kernels_, products, kMatrices, mode_, x.as<float>(), M, executor);
    check(executor.status);
    call_count().fetch_add(kMatrices, std::memory_order_relaxed);
  }

 private:
  int64_t K_, N_ = 0;
};

}  // namespace

const OrtCustomOp* binary_matmul_qkv_op() {
  static const OrtCustomOp op = describe<BinaryMatMulQKV>();
  return &op;
}

}  // namespace lit_binq
