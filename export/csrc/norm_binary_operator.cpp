// Reading what norm_binary_operator.h describes.
#include "norm_binary_operator.h"

#include <algorithm>
#include <cmath>

#include "cpu.h"

namespace lit_binq {
namespace {

constexpr size_t kSkip = 1, kGamma = 2;  // inputs
constexpr size_t kSum = 1;               // output

}  // namespace

NormBinaryOperator::NormBinaryOperator(const Signature& signature, const OrtKernelInfo* info)
    : Operator(signature, info), kernels_(current_kernels()) {
  K_ = required_attribute(info, "K", kColumns);
  if (OrtStatus* status = ort().KernelInfoGetAttribute_float(info, "epsilon", &epsilon_)) {
    ort().ReleaseStatus(status);
    fail("attribute epsilon is missing, expected what the norm adds to the mean of squares");
  }
  if (!(epsilon_ >= 0.0f) || std::isinf(epsilon_)) {
    fail("attribute epsilon is %g, expected a finite number of at least 0", static_cast<double>(epsilon_));
  }
  const Tensor gamma = constant(info, kGamma);
  expect_vector(gamma, signature_.inputs[kGamma].name, K_);
  gamma_.assign(gamma.as<float>(), gamma.as<float>() + K_);
}

void NormBinaryOperator::add_matrix(const OrtKernelInfo* info, size_t index, int64_t K, const char* name) {
  const Tensor codes = constant_codes(info, index, K, name);
  const int64_t N = codes.dims[0];
  const Tensor row_scale = constant_scales(info, index + 1, N), col_scale = constant_scales(info, index + 2, K);
  weights_.push_back(PackedMatrix::row_column(codes.as<uint8_t>(), row_scale.as<uint16_t>(), col_scale.as<uint16_t>(),
                                              N, K, kernels_.layout));
}

Tensor NormBinaryOperator::read_hidden(OrtKernelContext* context, int64_t* M, Norm* norm) const {
  const Tensor hidden = read_x(context, K_, M), skip = read_input(context, kSkip);
  const bool one_row = skip.rank == 1 && skip.dims[0] == K_;
  if (!one_row && (skip.rank != hidden.rank || !std::equal(skip.dims, skip.dims + skip.rank, hidden.dims))) {
    fail("skip has shape %s, expected %s as hidden, or (%lld,)", shape_text(skip).c_str(), shape_text(hidden).c_str(),
         static_cast<long long>(K_));
  }
  float* const sum = make_output(context, kSum, hidden.dims, hidden.rank);
  *norm = {skip.as<float>(), one_row ? 0 : K_, gamma_.data(), epsilon_, sum};
  return hidden;
}

void NormBinaryOperator::infer(const Signature& signature, const OrtShapeInferContext* context) {
  infer_shape(signature, context);
  set_output_shape(context, kSum, input_shape(context, kX));
}

}  // namespace lit_binq
