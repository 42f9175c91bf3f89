// The operators of the domain. A new one is a class in a file of its own, a function here and a line in `kOperators`.
#pragma once

#include "ort_abi.h"

namespace lit_binq {

// Descriptions; they live as long as the library.
const OrtCustomOp* binary_matmul_op();
const OrtCustomOp* cached_attention_op();
const OrtCustomOp* grouped_binary_matmul_op();
const OrtCustomOp* levels_matmul_op();
const OrtCustomOp* nbits_matmul_op();
const OrtCustomOp* norm_binary_gated_mlp_op();
const OrtCustomOp* norm_binary_matmul_qkv_op();
const OrtCustomOp* sparse8_matmul_op();
const OrtCustomOp* two_plane_matmul_op();

constexpr const OrtCustomOp* (*kOperators[])() = {binary_matmul_op,         cached_attention_op, grouped_binary_matmul_op,
                                                   levels_matmul_op,         nbits_matmul_op,     norm_binary_gated_mlp_op,
                                                   norm_binary_matmul_qkv_op, sparse8_matmul_op,  two_plane_matmul_op};

}  // namespace lit_binq
