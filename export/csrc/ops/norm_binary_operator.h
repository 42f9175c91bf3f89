// Several row x column matrices behind the sum and norm of a block, in one operator (norm_binary_matmul_qkv.cpp,
// norm_binary_gated_mlp.cpp). What their products are taken of is
//
//   x = h / sqrt(mean of h^2 + epsilon) * gamma,  h = hidden + skip,  mean over the last dimension
//
//   hidden     float32 (..., K)   first input
//   skip       float32 (..., K), or (K,) for all rows: zeros where nothing is added
//   gamma      float32 (K,); constant
//   Y          float32 (..., N)
//   sum        float32 (..., K)   second output: h
//   epsilon    float, at least 0
//   K, exact   as in operator.h
//
// Each matrix is three constant inputs, one after the other, as in BinaryMatMul:
//   codes      uint8   (N, ceil(K / 8))  signs of B
//   row_scale  float16 (N,)              r
//   col_scale  float16 (K,)              c
#pragma once

#include <vector>

#include "common/norm.h"
#include "ops/operator.h"

// The inputs in front of the matrices, and those of a matrix, as elements of an array of `Input`.
#define LIT_BINQ_NORM_INPUTS {"hidden", kOrtFloat}, {"skip", kOrtFloat}, {"gamma", kOrtFloat}
#define LIT_BINQ_MATRIX_INPUTS(name) \
  {"codes_" name, kOrtUint8}, {"row_scale_" name, kOrtFloat16}, {"col_scale_" name, kOrtFloat16}

namespace lit_binq {

constexpr size_t kFirstMatrix = 3;  // input of its codes

class NormBinaryOperator : public Operator {
 public:
  // Y and sum.
  static void infer(const OrtApi& ort, const Signature& signature, const OrtShapeInferContext* context);

 protected:
  // Reads K, epsilon and gamma.
  explicit NormBinaryOperator(const NodeReader& node);

  // The matrix whose codes are input `index`; its K columns are what attribute `name` says. Throws Failure.
  void add_matrix(const NodeReader& node, size_t index, int64_t K, const char* name);
  // While computing: hidden, its rows in M, and the norm of its rows with skip, whose sums go to the second output. The
  // norm points into skip.
  Tensor read_hidden(OrtKernelContext* context, int64_t* M, Tensor* skip, Norm* norm) const;

  const BinaryKernels& kernels_;
  int64_t K_ = 0;
  std::vector<PackedMatrix> weights_;

 private:
  float epsilon_ = 0.0f;
  std::vector<float> gamma_;
};

}  // namespace lit_binq
