// The operator lit_binq.NormBinaryMatMulQKV, version 1: queries, keys and values of an attention beside each other, and
// the sum and norm in front of them.
//
//   Y = [Q, K, V],  each ((x * c) B^T) * r + bias with tensors of its own;  x of hidden and skip: norm_binary_operator.h
//
//   hidden, skip, gamma    see there
//   codes_q, row_scale_q, col_scale_q, then _k, then _v
//   bias_q, bias_k, bias_v float32 (Nq,), (Nk,), (Nv,), optional
//   Y                      float32 (..., Nq + Nk + Nv)
//   sum, K, epsilon, exact see there
#include "ops/norm_binary_operator.h"
#include "ops/operators.h"

namespace lit_binq {
namespace {

constexpr size_t kMatrices = 3;
constexpr size_t kCodesAt[] = {kFirstMatrix, kFirstMatrix + 3, kFirstMatrix + 6};
constexpr size_t kBiases = kFirstMatrix + 3 * kMatrices;
static_assert(kMatrices <= kMaxProducts, "one panel takes them all");

class NormBinaryMatMulQKV final : public NormBinaryOperator {
 public:
  static constexpr Input kInputs[] = {
      LIT_BINQ_NORM_INPUTS,
      LIT_BINQ_MATRIX_INPUTS("q"), LIT_BINQ_MATRIX_INPUTS("k"), LIT_BINQ_MATRIX_INPUTS("v"),
      {"bias_q", kOrtFloat}, {"bias_k", kOrtFloat}, {"bias_v", kOrtFloat}};
  static constexpr Signature kSignature = {
      "NormBinaryMatMulQKV", kInputs, kBiases + kMatrices, kMatrices, kCodesAt, kMatrices, 2};

  explicit NormBinaryMatMulQKV(const NodeReader& node) : NormBinaryOperator(node) {
    for (const size_t index : kCodesAt) add_matrix(node, index, K_, "K");
    for (const PackedMatrix& w : weights_) N_ += w.rows();
  }

  void compute(OrtKernelContext* context) const {
    Product products[kMatrices];
    Tensor biases[kMatrices], skip;
    for (size_t i = 0; i < kMatrices; ++i) {
      biases[i] = read_bias(context, kBiases + i, weights_[i].rows());
      products[i] = {&weights_[i], biases[i].as<float>(), nullptr, N_};
    }
    int64_t M = 0;
    Norm norm;
    const Tensor hidden = read_hidden(context, &M, &skip, &norm);
    float* y = make_y(context, hidden, N_);
    for (Product& product : products) {
      product.y = y;
      y += product.weights->rows();
    }
    PoolExecutor executor(ort(), context);
    multiply_all(kernels_, products, kMatrices, mode_, &norm, hidden.as<float>(), M, executor);
    check(executor.status);
    call_count().fetch_add(kMatrices, std::memory_order_relaxed);
  }

 private:
  int64_t N_ = 0;
};

}  // namespace

Description norm_binary_matmul_qkv_op(const OrtApi& ort, const SessionOptions& session) {
  return describe<NormBinaryMatMulQKV>(ort, session);
}

}  // namespace lit_binq
