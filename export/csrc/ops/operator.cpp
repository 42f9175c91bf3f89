// The shared half of all operators (operator.h).
#include "ops/operator.h"

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <vector>


namespace lit_binq {

std::atomic<int64_t>& call_count() {
  static std::atomic<int64_t> calls{0};
  return calls;
}

Operator::Operator(const NodeReader& node) : Reader(node), mode_(node.mode()) {}

Tensor Operator::read_input(const OrtKernelContext* context, size_t index) const {
  const OrtValue* value = nullptr;
  check(ort().KernelContext_GetInput(context, index, &value));
  if (value == nullptr) fail("%s is missing", signature_.inputs[index].name);
  return read(value, signature_.inputs[index]);
}

Tensor Operator::read_x(const OrtKernelContext* context, int64_t K, int64_t* M) const {
  const Tensor x = read_input(context, kX);
  if (x.rank == 0 || x.dims[x.rank - 1] != K) {
    fail("%s has shape %s, expected (..., %lld) as attribute K says", signature_.inputs[kX].name,
         shape_text(x).c_str(), static_cast<long long>(K));
  }
  *M = x.elements / K;
  return x;
}

bool Operator::is_given(const OrtKernelContext* context, size_t index) const {
  size_t inputs = 0;
  check(ort().KernelContext_GetInputCount(context, &inputs));
  if (inputs <= index) return false;
  const OrtValue* value = nullptr;
  check(ort().KernelContext_GetInput(context, index, &value));
  return value != nullptr;
}

Tensor Operator::read_bias(const OrtKernelContext* context, size_t index, int64_t N) const {
  if (!is_given(context, index)) return {};
  Tensor bias = read_input(context, index);
  expect_vector(bias, name_of(index), N);
  return bias;
}

float* Operator::make_y(OrtKernelContext* context, const Tensor& x, int64_t N) const {
  int64_t dims[kMaxRank];
  for (size_t i = 0; i < x.rank; ++i) dims[i] = x.dims[i];
  dims[x.rank - 1] = N;
  return make_output(context, 0, dims, x.rank);
}

float* Operator::make_output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank) const {
  OrtValue* output = nullptr;
  check(ort().KernelContext_GetOutput(context, index, dims, rank, &output));
  void* data = nullptr;
  check(ort().GetTensorMutableData(output, &data));
  return static_cast<float*>(data);
}

PackedOperator::PackedOperator(const NodeReader& node) : Operator(node) {
  K_ = node.number("K", NodeReader::kColumns);
  codes_ = node.codes(kCodes, K_, "K");
  N_ = codes_.dims[0];
}

void PackedOperator::expect_codes(const Tensor& t, const char* name) const {
  if (t.rank != 2 || t.dims[0] != N_ || t.dims[1] != codes_.dims[1]) {
    fail("%s has shape %s, expected %s as codes", name, shape_text(t).c_str(), shape_text(codes_).c_str());
  }
}

void PackedOperator::compute(OrtKernelContext* context) const {
  int64_t M = 0;
  const Tensor x = read_x(context, K_, &M);
  const Tensor bias = read_bias(context, signature_.count - 1, N_);
  float* y = make_y(context, x, N_);
  PoolExecutor executor(ort(), context);
  run(x.as<float>(), M, bias.as<float>(), y, executor);
  check(executor.status);
  call_count().fetch_add(1, std::memory_order_relaxed);
}

MatrixOperator::MatrixOperator(const NodeReader& node) : PackedOperator(node), kernels_(node.kernels().binary) {}

void MatrixOperator::run(const float* x, int64_t M, const float* bias, float* y, Executor& executor) const {
  multiply(kernels_, *weights_, mode_, x, M, bias, y, executor);
}

Shape input_shape(const OrtApi& ort, const OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's, not ours to release
  check(ort.ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  check(ort.GetDimensionsCount(info, &rank));
  Shape shape{std::vector<int64_t>(rank), std::vector<const char*>(rank, "")};
  if (rank == 0) return shape;
  check(ort.GetDimensions(info, shape.dims.data(), rank));
  check(ort.GetSymbolicDimensions(info, shape.symbols.data(), rank));
  return shape;
}

void set_output_shape(const OrtApi& ort, const OrtShapeInferContext* context, size_t index, const Shape& shape) {
  const size_t rank = shape.dims.size();
  if (rank == 0) return;
  for (size_t i = 0; i < rank; ++i) {
    if (shape.dims[i] < 0 && shape.symbols[i][0] == '\0') return;
  }
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(ort.CreateTensorTypeAndShapeInfo(&raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
      raw, ort.ReleaseTensorTypeAndShapeInfo);
  std::vector<const char*> symbols = shape.symbols;
  check(ort.SetTensorElementType(raw, kOrtFloat));
  check(ort.SetDimensions(raw, shape.dims.data(), rank));
  check(ort.SetSymbolicDimensions(raw, symbols.data(), rank));
  check(ort.ShapeInferContext_SetOutputTypeShape(context, index, raw));
}

// Dimensions keep their symbols.
void infer_shape(const OrtApi& ort, const Signature& signature, const OrtShapeInferContext* context) {
  Shape y = input_shape(ort, context, kX);
  if (y.dims.empty()) return;
  y.dims.back() = 0;
  y.symbols.back() = "";
  for (size_t i = 0; i < signature.row_inputs_count; ++i) {
    const Shape codes = input_shape(ort, context, signature.row_inputs[i]);
    const bool known = (codes.dims.size() == 2 || codes.dims.size() == 3) && codes.dims[0] >= 0;
    if (!known || __builtin_add_overflow(y.dims.back(), codes.dims[0], &y.dims.back())) return;
  }
  set_output_shape(ort, context, 0, y);
}

}  // namespace lit_binq
