// The operator lit_binq.NBitsMatMul, version 1:  Y_n = sum_j s_ng (q_nj - z_ng) X_j, with j's block g = j / block_size.
// Tensors and attributes are those of com.microsoft.MatMulNBits, which is its function body.
//
//   X            float32 (..., K)
//   codes        uint8   (N, G, block_size bits / 8)   q; of two 4-bit codes in a byte the first is in the low half
//   scales       float32 (N, G) or (N G,)              s
//   zero_points  uint8   (N, ceil(G bits / 8)) or flat  z, packed as codes; optional: z = 2^(bits - 1) without
//   Y            float32 (..., N)
//   K            int, columns; G = ceil(K / block_size), codes beyond column K count nothing
//   N            int, rows
//   bits         int, 4 or 8
//   block_size   int, columns of a scale: 16, 32, 64, 128 or 256
//   exact        int, default 0: X is rounded to 8 bits block by block; 1: float32
#include <cmath>
#include <memory>

#include "nbits/multiply.h"
#include "ops/operator.h"
#include "ops/operators.h"

namespace lit_binq {
namespace {

constexpr size_t kScales = 2, kZeros = 3;

class NBitsMatMul final : public Operator {
 public:
  static constexpr Input kInputs[] = {
      {"X", kOrtFloat}, {"codes", kOrtUint8}, {"scales", kOrtFloat}, {"zero_points", kOrtUint8}};
  static constexpr Signature kSignature = {"NBitsMatMul", kInputs, 4};

  explicit NBitsMatMul(const NodeReader& node) : Operator(node), kernels_(node.kernels().nbits) {
    NBitsTensors t = {};
    t.K = node.number("K", NodeReader::kColumns);
    t.N = node.number("N", "the number of rows (out_features)");
    t.bits = node.number("bits", "4 or 8");
    t.block = node.number("block_size", "the columns that share a scale");
    if (t.bits != 4 && t.bits != 8) fail("attribute bits is %lld, expected 4 or 8", as_long(t.bits));
    if (t.block < kNBitsSmallestBlock || t.block > kNBitsLargestBlock || (t.block & (t.block - 1)) != 0) {
      fail("attribute block_size is %lld, expected 16, 32, 64, 128 or 256", as_long(t.block));
    }
    const int64_t G = divide_up(t.K, t.block), bytes = t.block * t.bits / 8;
    const Tensor codes = node.constant(kCodes), scales = node.constant(kScales);
    if (codes.rank != 3 || codes.dims[0] != t.N || codes.dims[1] != G || codes.dims[2] != bytes) {
      fail("codes has shape %s, expected (%lld, %lld, %lld) for %lld rows and %lld columns in blocks of %lld",
           shape_text(codes).c_str(), as_long(t.N), as_long(G),
           as_long(bytes), as_long(t.N), as_long(t.K),
           as_long(t.block));
    }
    expect_rows(scales, "scales", t.N, G);
    t.codes = codes.as<uint8_t>();
    t.scales = scales.as<float>();
    for (int64_t i = 0; i < t.N * G; ++i) {
      if (!std::isfinite(t.scales[i])) {
        fail("scales[%lld, %lld] is not finite, expected finite scales", as_long(i / G),
             as_long(i % G));
      }
    }
    if (node.has_constant(kZeros)) {
      const Tensor zeros = node.constant(kZeros);
      expect_rows(zeros, "zero_points", t.N, divide_up(G * t.bits, 8));
      t.zeros = zeros.as<uint8_t>();
    }
    has_zeros_ = t.zeros != nullptr;
    weights_ = std::make_unique<NBitsMatrix>(t);
  }

  void compute(OrtKernelContext* context) const {
    if (!has_zeros_ && is_given(context, kZeros)) {
      fail("zero_points is computed at run time or can be overridden by the caller, expected a constant initializer");
    }
    int64_t M = 0;
    const Tensor x = read_x(context, weights_->cols(), &M);
    float* const y = make_y(context, x, weights_->rows());
    PoolExecutor executor(ort(), context);
    nbits_multiply(kernels_, *weights_, mode_, x.as<float>(), M, y, executor);
    check(executor.status);
    call_count().fetch_add(1, std::memory_order_relaxed);
  }

 private:

  void expect_rows(const Tensor& t, const char* name, int64_t N, int64_t width) const {
    const bool matrix = t.rank == 2 && t.dims[0] == N && t.dims[1] == width;
    if (matrix || (t.rank == 1 && t.dims[0] == N * width)) return;
    fail("%s has shape %s, expected (%lld, %lld) or (%lld,)", name, shape_text(t).c_str(), as_long(N),
         as_long(width), as_long(N * width));
  }

  const NBitsKernels& kernels_;
  bool has_zeros_ = false;
  std::unique_ptr<NBitsMatrix> weights_;
};

}  // namespace

Description nbits_matmul_op(const OrtApi& ort, const SessionOptions& session) {
  return describe<NBitsMatMul>(ort, session);
}

}  // namespace lit_binq
