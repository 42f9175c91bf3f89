// Reading what norm_binary_operator.h describes.
#include "ops/norm_binary_operator.h"

#include <algorithm>


namespace lit_binq {
namespace {

constexpr size_t kSkip = 1, kGamma = 2;  // inputs
constexpr size_t kSum = 1;               // output

}  // namespace

NormBinaryOperator::NormBinaryOperator(const NodeReader& node) : Operator(node), kernels_(node.kernels().binary) {
  K_ = node.number("K", NodeReader::kColumns);
  epsilon_ = node.finite("epsilon", "what the norm adds to the mean of squares");
  if (epsilon_ < 0.0f) {
    fail("attribute epsilon is %g, expected a finite number of at least 0", static_cast<double>(epsilon_));
  }
  const Tensor gamma = node.constant(kGamma);
  expect_vector(gamma, name_of(kGamma), K_);
  gamma_.assign(gamma.as<float>(), gamma.as<float>() + K_);
}

void NormBinaryOperator::add_matrix(const NodeReader& node, size_t index, int64_t K, const char* name) {
  const Tensor codes = node.codes(index, K, name);
  const int64_t N = codes.dims[0];
  const Tensor row_scale = node.scales(index + 1, N), col_scale = node.scales(index + 2, K);
  weights_.push_back(PackedMatrix::row_column(codes.as<uint8_t>(), row_scale.as<uint16_t>(), col_scale.as<uint16_t>(),
                                              N, K, kernels_.layout));
}

Tensor NormBinaryOperator::read_hidden(OrtKernelContext* context, int64_t* M, Tensor* read_skip, Norm* norm) const {
  const Tensor hidden = read_x(context, K_, M);
  *read_skip = read_input(context, kSkip);
  const Tensor& skip = *read_skip;
  const bool one_row = skip.rank == 1 && skip.dims[0] == K_;
  if (!one_row && (skip.rank != hidden.rank || !std::equal(skip.dims, skip.dims + skip.rank, hidden.dims))) {
    fail("skip has shape %s, expected %s as hidden, or (%lld,)", shape_text(skip).c_str(), shape_text(hidden).c_str(),
         as_long(K_));
  }
  float* const sum = make_output(context, kSum, hidden.dims, hidden.rank);
  *norm = {skip.as<float>(), one_row ? 0 : K_, gamma_.data(), epsilon_, sum};
  return hidden;
}

void NormBinaryOperator::infer(const OrtApi& ort, const Signature& signature, const OrtShapeInferContext* context) {
  infer_shape(ort, signature, context);
  set_output_shape(ort, context, kSum, input_shape(ort, context, kX));
}

}  // namespace lit_binq
