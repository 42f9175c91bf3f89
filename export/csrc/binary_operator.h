// Several row x column matrices in one operator (binary_matmul_qkv.cpp, binary_gated_mlp.cpp).
//
// Each matrix is three constant inputs, one after the other, as in BinaryMatMul:
//   codes      uint8   (N, ceil(K / 8))  signs of B
//   row_scale  float16 (N,)              r
//   col_scale  float16 (K,)              c
#pragma once

#include <vector>

#include "operator.h"

// Its inputs, as elements of an array of `Input`.
#define LIT_BINQ_MATRIX_INPUTS(name) \
  {"codes_" name, kOrtUint8}, {"row_scale_" name, kOrtFloat16}, {"col_scale_" name, kOrtFloat16}

namespace lit_binq {

class BinaryOperator : public Operator {
 protected:
  BinaryOperator(const Signature& signature, const OrtKernelInfo* info);

  // The matrix whose codes are input `index`; its K columns are what attribute `name` says. Throws Failure.
  void add_matrix(const OrtKernelInfo* info, size_t index, int64_t K, const char* name);

  const Kernels& kernels_;
  std::vector<PackedMatrix> weights_;
};

}  // namespace lit_binq
