// The operator lit_binq.BinaryMatMul, version 1:  Y = ((X * c) B^T) * r + bias
//
//   X          float32 (..., K)
//   codes      uint8   (N, ceil(K / 8))  signs of B, least significant bit first; constant
//   row_scale  float16 (N,)              r; constant
//   col_scale  float16 (K,)              c; constant
//   bias       float32 (N,)              optional
//   Y          float32 (..., N)
//   K          int, in_features
//   exact      int, default 0: int8-table LUT mode; 1: float32 activations
//
// Checks shapes, repacks constants when the operator is created, and runs multiply.h on the runtime's threads. Every
// error leaves as an OrtStatus; no exception crosses the ABI.
#include "binary_matmul.h"

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"
#include "multiply.h"
#include "packed_matrix.h"

namespace lit_binq {
namespace {

constexpr size_t kX = 0, kCodes = 1, kRowScale = 2, kColScale = 3, kBias = 4, kInputs = 5;
constexpr size_t kMaxRank = 16;  // shapes are kept on the stack: no allocation while computing

// Carries the status of a failed call, or our own message, to the ABI boundary.
class Failure : public std::exception {
 public:
  explicit Failure(OrtStatus* status) : status(status) {}
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status != nullptr) throw Failure(status);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure(ort().CreateStatus(kOrtInvalidArgument, (std::string("lit_binq.BinaryMatMul: ") + text).c_str()));
}

// Runs `body` and turns whatever it throws into a status.
template <typename Body>
OrtStatus* guarded(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    return ort().CreateStatus(kOrtRuntimeException, "lit_binq.BinaryMatMul: out of memory");
  } catch (const std::exception& error) {
    return ort().CreateStatus(kOrtRuntimeException, error.what());
  } catch (...) {
    return ort().CreateStatus(kOrtRuntimeException, "lit_binq.BinaryMatMul: unknown error");
  }
}

struct Tensor {
  const void* data = nullptr;
  int64_t dims[kMaxRank] = {0};
  size_t rank = 0;
};

std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (size_t i = 0; i < t.rank; ++i) {
    char number[32];
    std::snprintf(number, sizeof number, i ? ", %lld" : "%lld", static_cast<long long>(t.dims[i]));
    text += number;
  }
  return text + (t.rank == 1 ? ",)" : ")");
}

Tensor read(const OrtValue* value, const char* name, int expected_type) {
  Tensor t;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(ort().GetTensorTypeAndShape(value, &raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
      raw, ort().ReleaseTensorTypeAndShapeInfo);
  int type = 0;
  check(ort().GetTensorElementType(raw, &type));
  if (type != expected_type) fail("%s has element type %d, expected %d", name, type, expected_type);
  check(ort().GetDimensionsCount(raw, &t.rank));
  if (t.rank > kMaxRank) fail("%s has %zu dimensions, expected at most %zu", name, t.rank, kMaxRank);
  check(ort().GetDimensions(raw, t.dims, t.rank));
  void* data = nullptr;
  check(ort().GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  t.data = data;
  return t;
}

void expect_vector(const Tensor& t, const char* name, int64_t length) {
  if (t.rank != 1 || t.dims[0] != length) {
    fail("%s has shape %s, expected (%lld,)", name, shape_text(t).c_str(), static_cast<long long>(length));
  }
}

// Input `index` as a tensor, where it is a constant of the model.
bool constant_input(const OrtKernelInfo* info, size_t index, const char* name, int type, Tensor& t) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(ort().KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (!is_constant || value == nullptr) return false;
  t = read(value, name, type);
  return true;
}

Tensor required_constant(const OrtKernelInfo* info, size_t index, const char* name, int type) {
  Tensor t;
  if (!constant_input(info, index, name, type, t)) {
    fail("%s is computed at run time or can be overridden by the caller, expected a constant initializer", name);
  }
  return t;
}

void expect_finite(const Tensor& t, const char* name, int64_t length) {
  const int64_t bad = first_non_finite(static_cast<const uint16_t*>(t.data), length);
  if (bad >= 0) fail("%s[%lld] is not finite, expected finite scales", name, static_cast<long long>(bad));
}

class BinaryMatMul {
 public:
  explicit BinaryMatMul(const OrtKernelInfo* info) : kernels_(current_kernels()) {
    int64_t K = 0;
    if (OrtStatus* status = ort().KernelInfoGetAttribute_int64(info, "K", &K)) {
      ort().ReleaseStatus(status);
      fail("attribute K is missing, expected the number of columns (in_features)");
    }
    if (K < 1) fail("attribute K is %lld, expected at least 1", static_cast<long long>(K));
    const Tensor codes = required_constant(info, kCodes, "codes", kOrtUint8);
    const int64_t width = (K + 7) / 8;
    if (codes.rank != 2 || codes.dims[1] != width) {
      fail("codes has shape %s, expected (N, %lld) for attribute K = %lld", shape_text(codes).c_str(),
           static_cast<long long>(width), static_cast<long long>(K));
    }
    const int64_t N = codes.dims[0];
    const Tensor row_scale = required_constant(info, kRowScale, "row_scale", kOrtFloat16);
    const Tensor col_scale = required_constant(info, kColScale, "col_scale", kOrtFloat16);
    expect_vector(row_scale, "row_scale", N);
    expect_vector(col_scale, "col_scale", K);
    expect_finite(row_scale, "row_scale", N);
    expect_finite(col_scale, "col_scale", K);
    mode_ = read_mode(info);
    weights_ = std::make_unique<PackedMatrix>(
        static_cast<const uint8_t*>(codes.data), static_cast<const uint16_t*>(row_scale.data),
        static_cast<const uint16_t*>(col_scale.data), N, K);
  }

  void compute(OrtKernelContext* context) const {
    const Tensor x = input(context, kX, "X", kOrtFloat);
    if (x.rank == 0 || x.dims[x.rank - 1] != weights_->cols()) {
      fail("X has shape %s, expected (..., %lld) as attribute K says", shape_text(x).c_str(),
           static_cast<long long>(weights_->cols()));
    }
    int64_t M = 1;
    for (size_t i = 0; i + 1 < x.rank; ++i) M *= x.dims[i];
    const float* bias = read_bias(context);

    int64_t dims[kMaxRank];
    for (size_t i = 0; i < x.rank; ++i) dims[i] = x.dims[i];
    dims[x.rank - 1] = weights_->rows();
    OrtValue* output = nullptr;
    check(ort().KernelContext_GetOutput(context, 0, dims, x.rank, &output));
    void* y = nullptr;
    check(ort().GetTensorMutableData(output, &y));

    PoolExecutor executor(context);
    multiply(kernels_, *weights_, mode_, static_cast<const float*>(x.data), M, bias, static_cast<float*>(y), executor);
    check(executor.status);
    call_count().fetch_add(1, std::memory_order_relaxed);
  }

 private:
  // The thread pool of the session. The first failure ends it: later runs do nothing.
  class PoolExecutor final : public Executor {
   public:
    explicit PoolExecutor(const OrtKernelContext* context) : context_(context) {}
    void run(size_t tasks, size_t batches, void (*task)(void*, size_t), void* argument) override {
      if (status == nullptr) status = ort().KernelContext_ParallelFor(context_, task, tasks, batches, argument);
    }
    OrtStatus* status = nullptr;

   private:
    const OrtKernelContext* context_;
  };

  static Mode read_mode(const OrtKernelInfo* info) {
    int64_t exact = 0;
    if (OrtStatus* status = ort().KernelInfoGetAttribute_int64(info, "exact", &exact)) {
      ort().ReleaseStatus(status);
      exact = 0;  // not given: the default
    }
    if (exact != 0 && exact != 1) fail("attribute exact is %lld, expected 0 or 1", static_cast<long long>(exact));
    const int forced = forced_mode().load();
    return static_cast<Mode>(forced < 0 ? static_cast<int>(exact) : forced);
  }

  static Tensor input(const OrtKernelContext* context, size_t index, const char* name, int type) {
    const OrtValue* value = nullptr;
    check(ort().KernelContext_GetInput(context, index, &value));
    if (value == nullptr) fail("%s is missing", name);
    return read(value, name, type);
  }

  const float* read_bias(const OrtKernelContext* context) const {
    size_t inputs = 0;
    check(ort().KernelContext_GetInputCount(context, &inputs));
    if (inputs <= kBias) return nullptr;
    const OrtValue* value = nullptr;
    check(ort().KernelContext_GetInput(context, kBias, &value));
    if (value == nullptr) return nullptr;
    const Tensor bias = read(value, "bias", kOrtFloat);
    expect_vector(bias, "bias", weights_->rows());
    return static_cast<const float*>(bias.data);
  }

  const Kernels& kernels_;
  Mode mode_ = Mode::kLut;
  std::unique_ptr<PackedMatrix> weights_;
};

// Y has the shape of X with its last dimension replaced by N. Dimensions keep their symbols. Where an input's shape
// is unknown, or a dimension has neither size nor symbol (which cannot be handed on), nothing is said.
void infer_shape(const OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo *x = nullptr, *codes = nullptr;  // the context's, not ours to release
  check(ort().ShapeInferContext_GetInputTypeShape(context, kX, &x));
  check(ort().ShapeInferContext_GetInputTypeShape(context, kCodes, &codes));
  size_t rank = 0, codes_rank = 0;
  check(ort().GetDimensionsCount(x, &rank));
  check(ort().GetDimensionsCount(codes, &codes_rank));
  if (rank == 0 || codes_rank != 2) return;
  std::vector<int64_t> dims(rank);
  std::vector<const char*> symbols(rank, "");
  int64_t codes_dims[2] = {0, 0};
  check(ort().GetDimensions(x, dims.data(), rank));
  check(ort().GetSymbolicDimensions(x, symbols.data(), rank));
  check(ort().GetDimensions(codes, codes_dims, 2));
  dims[rank - 1] = codes_dims[0];
  symbols[rank - 1] = "";
  for (size_t i = 0; i < rank; ++i) {
    if (dims[i] < 0 && symbols[i][0] == '\0') return;
  }
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(ort().CreateTensorTypeAndShapeInfo(&raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> y(
      raw, ort().ReleaseTensorTypeAndShapeInfo);
  check(ort().SetTensorElementType(raw, kOrtFloat));
  check(ort().SetDimensions(raw, dims.data(), rank));
  check(ort().SetSymbolicDimensions(raw, symbols.data(), rank));
  check(ort().ShapeInferContext_SetOutputTypeShape(context, 0, raw));
}

OrtCustomOp describe() {
  OrtCustomOp op = {};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "BinaryMatMul"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) -> int {
    if (index == kCodes) return kOrtUint8;
    return index == kRowScale || index == kColScale ? kOrtFloat16 : kOrtFloat;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return index == kBias ? kOrtOptional : kOrtRequired;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return kOrtFloat; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kOrtRequired; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApiSlot*, const OrtKernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new BinaryMatMul(info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] { static_cast<const BinaryMatMul*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<BinaryMatMul*>(kernel); };
  op.InferOutputShape = [](const OrtCustomOp*, OrtShapeInferContext* context) {
    return guarded([&] { infer_shape(context); });
  };
  return op;
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

const OrtCustomOp* binary_matmul_op() {
  static const OrtCustomOp op = describe();
  return &op;
}

}  // namespace lit_binq
