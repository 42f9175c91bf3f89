// The shared half of all operators (operator.h).
#include "operator.h"

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <vector>

#include "cpu.h"

namespace lit_binq {
namespace {

Mode read_mode(const OrtKernelInfo* info, int64_t* exact) {
  if (OrtStatus* status = ort().KernelInfoGetAttribute_int64(info, "exact", exact)) {
    ort().ReleaseStatus(status);
    *exact = 0;  // not given: the default
  }
  const int forced = forced_mode().load();
  return static_cast<Mode>(forced < 0 ? static_cast<int>(*exact) : forced);
}

}  // namespace

OrtApi& ort() {
  static OrtApi api;
  return api;
}

std::atomic<int64_t>& call_count() {
  static std::atomic<int64_t> calls{0};
  return calls;
}

std::atomic<int>& forced_mode() {
  static std::atomic<int> mode{-1};
  return mode;
}

void check(OrtStatus* status) {
  if (status != nullptr) throw Failure(status);
}

std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (size_t i = 0; i < t.rank; ++i) {
    char number[32];
    std::snprintf(number, sizeof number, i ? ", %lld" : "%lld", static_cast<long long>(t.dims[i]));
    text += number;
  }
  return text + (t.rank == 1 ? ",)" : ")");
}

Operator::Operator(const Signature& signature, const OrtKernelInfo* info) : signature_(signature) {
  int64_t exact = 0;
  mode_ = read_mode(info, &exact);
  if (exact != 0 && exact != 1) fail("attribute exact is %lld, expected 0 or 1", static_cast<long long>(exact));
}

void Operator::fail(const char* format, ...) const {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const std::string message = std::string("lit_binq.") + signature_.name + ": " + text;
  throw Failure(ort().CreateStatus(kOrtInvalidArgument, message.c_str()));
}

int64_t Operator::required_attribute(const OrtKernelInfo* info, const char* name, const char* meaning) const {
  int64_t value = 0;
  if (OrtStatus* status = ort().KernelInfoGetAttribute_int64(info, name, &value)) {
    ort().ReleaseStatus(status);
    fail("attribute %s is missing, expected %s", name, meaning);
  }
  if (value < 1) fail("attribute %s is %lld, expected at least 1", name, static_cast<long long>(value));
  return value;
}

Tensor Operator::read(const OrtValue* value, const Input& input) const {
  Tensor t;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(ort().GetTensorTypeAndShape(value, &raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
      raw, ort().ReleaseTensorTypeAndShapeInfo);
  int type = 0;
  check(ort().GetTensorElementType(raw, &type));
  if (type != input.type) fail("%s has element type %d, expected %d", input.name, type, input.type);
  check(ort().GetDimensionsCount(raw, &t.rank));
  if (t.rank > kMaxRank) fail("%s has %zu dimensions, expected at most %zu", input.name, t.rank, kMaxRank);
  check(ort().GetDimensions(raw, t.dims, t.rank));
  void* data = nullptr;
  check(ort().GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  t.data = data;
  return t;
}

Tensor Operator::constant(const OrtKernelInfo* info, size_t index) const {
  const Input& input = signature_.inputs[index];
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(ort().KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (!is_constant || value == nullptr) {
    fail("%s is computed at run time or can be overridden by the caller, expected a constant initializer",
         input.name);
  }
  return read(value, input);
}

void Operator::expect_vector(const Tensor& t, const char* name, int64_t length) const {
  if (t.rank != 1 || t.dims[0] != length) {
    fail("%s has shape %s, expected (%lld,)", name, shape_text(t).c_str(), static_cast<long long>(length));
  }
}

Tensor Operator::constant_codes(const OrtKernelInfo* info, size_t index, int64_t K, const char* name) const {
  const Tensor codes = constant(info, index);
  const int64_t width = (K + 7) / 8;
  if (codes.rank != 2 || codes.dims[1] != width) {
    fail("%s has shape %s, expected (N, %lld) for attribute %s = %lld", signature_.inputs[index].name,
         shape_text(codes).c_str(), static_cast<long long>(width), name, static_cast<long long>(K));
  }
  return codes;
}

void Operator::expect_finite(const Tensor& t, const char* name, int64_t length) const {
  const int64_t bad = first_non_finite(t.as<uint16_t>(), length);
  if (bad >= 0) fail("%s[%lld] is not finite, expected finite scales", name, static_cast<long long>(bad));
}

Tensor Operator::constant_scales(const OrtKernelInfo* info, size_t index, int64_t length) const {
  const Tensor t = constant(info, index);
  expect_vector(t, signature_.inputs[index].name, length);
  expect_finite(t, signature_.inputs[index].name, length);
  return t;
}

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
  *M = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) *M *= x.dims[i];
  return x;
}

const float* Operator::read_bias(const OrtKernelContext* context, size_t index, int64_t N) const {
  size_t inputs = 0;
  check(ort().KernelContext_GetInputCount(context, &inputs));
  if (inputs <= index) return nullptr;
  const OrtValue* value = nullptr;
  check(ort().KernelContext_GetInput(context, index, &value));
  if (value == nullptr) return nullptr;
  const Tensor bias = read(value, signature_.inputs[index]);
  expect_vector(bias, signature_.inputs[index].name, N);
  return bias.as<float>();
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

PackedOperator::PackedOperator(const Signature& signature, const OrtKernelInfo* info) : Operator(signature, info) {
  K_ = required_attribute(info, "K", kColumns);
  codes_ = constant_codes(info, kCodes, K_, "K");
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
  const float* bias = read_bias(context, signature_.count - 1, N_);
  float* y = make_y(context, x, N_);
  PoolExecutor executor(context);
  run(x.as<float>(), M, bias, y, executor);
  check(executor.status);
  call_count().fetch_add(1, std::memory_order_relaxed);
}

MatrixOperator::MatrixOperator(const Signature& signature, const OrtKernelInfo* info)
    : PackedOperator(signature, info), kernels_(current_kernels()) {}

void MatrixOperator::run(const float* x, int64_t M, const float* bias, float* y, Executor& executor) const {
  multiply(kernels_, *weights_, mode_, x, M, bias, y, executor);
}

Shape input_shape(const OrtShapeInferContext* context, size_t index) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's, not ours to release
  check(ort().ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  check(ort().GetDimensionsCount(info, &rank));
  Shape shape{std::vector<int64_t>(rank), std::vector<const char*>(rank, "")};
  if (rank == 0) return shape;
  check(ort().GetDimensions(info, shape.dims.data(), rank));
  check(ort().GetSymbolicDimensions(info, shape.symbols.data(), rank));
  return shape;
}

void set_output_shape(const OrtShapeInferContext* context, size_t index, const Shape& shape) {
  const size_t rank = shape.dims.size();
  if (rank == 0) return;
  for (size_t i = 0; i < rank; ++i) {
    if (shape.dims[i] < 0 && shape.symbols[i][0] == '\0') return;
  }
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(ort().CreateTensorTypeAndShapeInfo(&raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
      raw, ort().ReleaseTensorTypeAndShapeInfo);
  std::vector<const char*> symbols = shape.symbols;
  check(ort().SetTensorElementType(raw, kOrtFloat));
  check(ort().SetDimensions(raw, shape.dims.data(), rank));
  check(ort().SetSymbolicDimensions(raw, symbols.data(), rank));
  check(ort().ShapeInferContext_SetOutputTypeShape(context, index, raw));
}

// Dimensions keep their symbols.
void infer_shape(const Signature& signature, const OrtShapeInferContext* context) {
  Shape y = input_shape(context, kX);
  if (y.dims.empty()) return;
  y.dims.back() = 0;
  y.symbols.back() = "";
  for (size_t i = 0; i < signature.row_inputs_count; ++i) {
    const Shape codes = input_shape(context, signature.row_inputs[i]);
    if ((codes.dims.size() != 2 && codes.dims.size() != 3) || codes.dims[0] < 0) return;
    y.dims.back() += codes.dims[0];
  }
  set_output_shape(context, 0, y);
}

}  // namespace lit_binq
