// The operator lit_binq.Sparse8MatMul, version 1:
//     Y_n = sum_j X_j (s_n Q_nj where bit (n, j) of mask is set, else r_n B_nj) + bias_n
//
//   codes        uint8   (N, ceil(K / 8))  signs of B
//   mask         uint8   (N, ceil(K / 8))
//   values       int8    (count,)          Q at the set bits of mask, row by row
//   row_scale    float16 (N,)              r
//   value_scale  float16 (N,)              s
//
// and what all operators have (operator.h). A format for comparisons: there is one kernel, exact and in plain C++. It
// decodes a row of weights block by block and multiplies all rows of X with it, sums in float64.
#include <algorithm>
#include <vector>

#include "ops/operator.h"
#include "ops/operators.h"

namespace lit_binq {
namespace {

constexpr int64_t kTaskRows = 32;  // rows of weights of a task
constexpr int64_t kSums = 16;      // rows of X that are multiplied at a time: their sums stay on the stack

// Bits set in the first `count` bits of `bytes`.
int64_t count_bits(const uint8_t* bytes, int64_t count) {
  int64_t bits = 0;
  for (int64_t k = 0; k < count; ++k) bits += bytes[k / 8] >> (k % 8) & 1;
  return bits;
}

class Sparse8MatMul final : public PackedOperator {
 public:
  static constexpr Input kInputs[] = {{"X", kOrtFloat},
                                      {"codes", kOrtUint8},
                                      {"mask", kOrtUint8},
                                      {"values", kOrtInt8},
                                      {"row_scale", kOrtFloat16},
                                      {"value_scale", kOrtFloat16},
                                      {"bias", kOrtFloat}};
  static constexpr Signature kSignature = {"Sparse8MatMul", kInputs, 7};

  explicit Sparse8MatMul(const NodeReader& node)
      : PackedOperator(node), first_(N_ + 1, 0), row_scale_(N_), value_scale_(N_) {
    const Tensor mask = node.constant(2), values = node.constant(3);
    expect_codes(mask, "mask");
    const int64_t width = (K_ + 7) / 8;
    for (int64_t n = 0; n < N_; ++n) first_[n + 1] = first_[n] + count_bits(mask.as<uint8_t>() + n * width, K_);
    expect_vector(values, "values", first_[N_]);
    const uint16_t* r = node.scales(4, N_).as<uint16_t>();
    const uint16_t* s = node.scales(5, N_).as<uint16_t>();
    std::transform(r, r + N_, row_scale_.begin(), half_to_float);
    std::transform(s, s + N_, value_scale_.begin(), half_to_float);
    signs_.assign(codes_.as<uint8_t>(), codes_.as<uint8_t>() + N_ * width);
    mask_.assign(mask.as<uint8_t>(), mask.as<uint8_t>() + N_ * width);
    values_.assign(values.as<int8_t>(), values.as<int8_t>() + first_[N_]);
  }

 protected:
  void run(const float* x, int64_t M, const float* bias, float* y, Executor& executor) const override {
    if (M == 0 || N_ == 0) return;
    Job job{*this, x, M, bias, y};
    const size_t tasks = static_cast<size_t>((N_ + kTaskRows - 1) / kTaskRows);
    executor.run(tasks, tasks, multiply_rows, &job);
  }

 private:
  struct Job {
    const Sparse8MatMul& op;
    const float* x;
    int64_t M;
    const float* bias;
    float* y;
  };

  // Weights of columns `column` to `column` + `count` of row n; `value` moves on over the values taken.
  void decode(int64_t n, int64_t column, int64_t count, const int8_t*& value, float* weights) const {
    const int64_t width = (K_ + 7) / 8;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t byte = n * width + (column + i) / 8, bit = (column + i) % 8;
      const float sign = signs_[byte] >> bit & 1 ? row_scale_[n] : -row_scale_[n];
      weights[i] = mask_[byte] >> bit & 1 ? value_scale_[n] * static_cast<float>(*value++) : sign;
    }
  }

  static void multiply_rows(void* argument, size_t task) {
    const Job& job = *static_cast<const Job*>(argument);
    const Sparse8MatMul& op = job.op;
    const int64_t start = static_cast<int64_t>(task) * kTaskRows, end = std::min(op.N_, start + kTaskRows);
    float weights[kBlock];
    for (int64_t n = start; n < end; ++n) {
      for (int64_t m0 = 0; m0 < job.M; m0 += kSums) {
        const int64_t rows = std::min(kSums, job.M - m0);
        double sums[kSums] = {0.0};
        const int8_t* value = op.values_.data() + op.first_[n];
        for (int64_t column = 0; column < op.K_; column += kBlock) {
          const int64_t count = std::min(kBlock, op.K_ - column);
          op.decode(n, column, count, value, weights);
          for (int64_t m = 0; m < rows; ++m) {
            const float* x = job.x + (m0 + m) * op.K_ + column;
            for (int64_t i = 0; i < count; ++i) sums[m] += static_cast<double>(weights[i]) * static_cast<double>(x[i]);
          }
        }
        for (int64_t m = 0; m < rows; ++m) {
          const double bias = job.bias != nullptr ? static_cast<double>(job.bias[n]) : 0.0;
          job.y[(m0 + m) * op.N_ + n] = static_cast<float>(sums[m] + bias);
        }
      }
    }
  }

  std::vector<uint8_t> signs_, mask_;
  std::vector<int8_t> values_;
  std::vector<int64_t> first_;  // (N + 1,): where the values of a row start
  std::vector<float> row_scale_, value_scale_;
};

}  // namespace

Description sparse8_matmul_op(const OrtApi& ort, SessionMode mode) { return describe<Sparse8MatMul>(ort, mode); }

}  // namespace lit_binq
