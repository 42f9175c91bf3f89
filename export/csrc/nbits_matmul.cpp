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

#include "cpu.h"
#include "nbits_multiply.h"
#include "operator.h"
#include "operators.h"

namespace lit_binq {
namespace {

constexpr size_t kScales = 2, kZeros = 3;

class NBitsMatMul final : public Operator {
 public:
  static constexpr Input kInputs[] = {
      {"X", kOrtFloat}, {"codes", kOrtUint8}, {"scales", kOrtFloat}, {"zero_points", kOrtUint8}};
  static constexpr Signature kSignature = {"NBitsMatMul", kInputs, 4};

  explicit NBitsMatMul(const OrtKernelInfo* info) : Operator(kSignature, info), kernels_(best_kernels()) {
    NBitsTensors t = {};
    t.K = required_attribute(info, "K", kColumns);
    t.N = required_attribute(info, "N", "the number of rows (out_features)");
    t.bits = required_attribute(info, "bits", "4 or 8");
    t.block = required_attribute(info, "block_size", "the columns that share a scale");
    if (t.bits != 4 && t.bits != 8) fail("attribute bits is %lld, expected 4 or 8", static_cast<long long>(t.bits));
    if (t.block < kNBitsSmallestBlock || t.block > kNBitsLargestBlock || (t.block & (t.block - 1)) != 0) {
      fail("attribute block_size is %lld, expected 16, 32, 64, 128 or 256", static_cast<long long>(t.block));
    }
    const int64_t G = t.K / t.block + (t.K % t.block != 0), bytes = t.block * t.bits / 8;
    const Tensor codes = constant(info, kCodes), scales = constant(info, kScales);
    if (codes.rank != 3 || codes.dims[0] != t.N || codes.dims[1] != G || codes.dims[2] != bytes) {
      fail("codes has shape %s, expected (%lld, %lld, %lld) for %lld rows and %lld columns in blocks of %lld",
           shape_text(codes).c_str(), static_cast<long long>(t.N), static_cast<long long>(G),
           static_cast<long long>(bytes), static_cast<long long>(t.N), static_cast<long long>(t.K),
           static_cast<long long>(t.block));
    }
    expect_rows(scales, "scales", t.N, G);
    t.codes = codes.as<uint8_t>();
    t.scales = scales.as<float>();
    for (int64_t i = 0; i < t.N * G; ++i) {
      if (!std::isfinite(t.scales[i])) {
        fail("scales[%lld, %lld] is not finite, expected finite scales", static_cast<long long>(i / G),
             static_cast<long long>(i % G));
      }
    }
    if (has_constant(info, kZeros)) {
      const Tensor zeros = constant(info, kZeros);
      expect_rows(zeros, "zero_points", t.N, (G * t.bits + 7) / 8);
      t.zeros = zeros.as<uint8_t>();
    }
    has_zeros_ = t.zeros != nullptr;
    weights_ = std::make_unique<NBitsMatrix>(t);
  }

  void compute(OrtKernelContext* context) const {
    if (!has_zeros_) expect_no_zeros(context);
    int64_t M = 0;
    const Tensor x = read_x(context, weights_->cols(), &M);
    float* const y = make_y(context, x, weights_->rows());
    PoolExecutor executor(context);
    nbits_multiply(kernels_, *weights_, mode_, x.as<float>(), M, y, executor);
    check(executor.status);
    call_count().fetch_add(1, std::memory_order_relaxed);
  }

 private:
  static const NBitsKernels& best_kernels() {
    const NBitsKernels* kernels = nbits_kernels(current_kernels().name);
    return kernels != nullptr ? *kernels : kNBitsScalar;
  }

  void expect_rows(const Tensor& t, const char* name, int64_t N, int64_t width) const {
    const bool matrix = t.rank == 2 && t.dims[0] == N && t.dims[1] == width;
    if (matrix || (t.rank == 1 && t.dims[0] == N * width)) return;
    fail("%s has shape %s, expected (%lld, %lld) or (%lld,)", name, shape_text(t).c_str(), static_cast<long long>(N),
         static_cast<long long>(width), static_cast<long long>(N * width));
  }

  static bool has_constant(const OrtKernelInfo* info, size_t index) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(ort().KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
    return is_constant && value != nullptr;
  }

  // An input that is left out and one that is computed look alike while the operator is created.
  void expect_no_zeros(const OrtKernelContext* context) const {
    size_t inputs = 0;
    check(ort().KernelContext_GetInputCount(context, &inputs));
    if (inputs <= kZeros) return;
    const OrtValue* value = nullptr;
    check(ort().KernelContext_GetInput(context, kZeros, &value));
    if (value != nullptr) {
      fail("zero_points is computed at run time or can be overridden by the caller, expected a constant initializer");
    }
  }

  const NBitsKernels& kernels_;
  bool has_zeros_ = false;
  std::unique_ptr<NBitsMatrix> weights_;
};

}  // namespace

const OrtCustomOp* nbits_matmul_op() {
  static const OrtCustomOp op = describe<NBitsMatMul>();
  return &op;
}

}  // namespace lit_binq
