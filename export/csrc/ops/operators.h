// The operators of the domain. A new one is a class in a file of its own, a function here and a line in `kOperators`.
#pragma once

#include "ops/operator.h"

namespace lit_binq {

Description binary_matmul_op(const OrtApi& ort, const SessionOptions& session);
Description cached_attention_op(const OrtApi& ort, const SessionOptions& session);
Description grouped_binary_matmul_op(const OrtApi& ort, const SessionOptions& session);
Description nbits_matmul_op(const OrtApi& ort, const SessionOptions& session);
Description norm_binary_gated_mlp_op(const OrtApi& ort, const SessionOptions& session);
Description norm_binary_matmul_qkv_op(const OrtApi& ort, const SessionOptions& session);
Description two_plane_matmul_op(const OrtApi& ort, const SessionOptions& session);

constexpr Description (*kOperators[])(const OrtApi&, const SessionOptions&) = {
    binary_matmul_op,
    cached_attention_op,
    grouped_binary_matmul_op,
    nbits_matmul_op,
    norm_binary_gated_mlp_op,
    norm_binary_matmul_qkv_op,
    two_plane_matmul_op,
};
constexpr size_t kOperatorsCount = sizeof kOperators / sizeof kOperators[0];

}  // namespace lit_binq
