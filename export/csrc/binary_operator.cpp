// Reading the matrices of binary_operator.h.
#include "binary_operator.h"

#include "cpu.h"

namespace lit_binq {

BinaryOperator::BinaryOperator(const Signature& signature, const OrtKernelInfo* info)
    : Operator(signature, info), kernels_(current_kernels()) {}

void BinaryOperator::add_matrix(const OrtKernelInfo* info, size_t index, int64_t K, const char* name) {
  const Tensor codes = constant_codes(info, index, K, name);
  const int64_t N = codes.dims[0];
  const Tensor row_scale = constant_scales(info, index + 1, N), col_scale = constant_scales(info, index + 2, K);
  weights_.push_back(PackedMatrix::row_column(codes.as<uint8_t>(), row_scale.as<uint16_t>(), col_scale.as<uint16_t>(),
                                              N, K, kernels_.layout));
}

}  // namespace lit_binq
