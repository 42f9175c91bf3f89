// What all operators of domain lit_binq share: reading arguments, errors, threads, shape inference. Touches the runtime
// through ort_abi.h. An operator is a class derived from Operator with a Signature, described by `describe<Op>`.
//
// Most of them are a linear layer with packed weights, derived from PackedOperator:
//
//   X       float32 (..., K)    first input
//   codes   uint8   (N, ceil(K / 8))    second input: bits, least significant first; constant
//   ...     whatever else the weight is made of; constant
//   bias    float32 (N,)        last input, optional
//   Y       float32 (..., N)
//   K       int, in_features
//   exact   int, default 0: int8-table LUT mode; 1: float32 activations. Operators without a LUT mode are always exact.
//
// Every error leaves as an OrtStatus; no exception crosses the ABI.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "multiply.h"
#include "ort_abi.h"

namespace lit_binq {

// The API that operators call; filled by RegisterCustomOps after the guard has passed.
OrtApi& ort();

// Multiplications done by all operators since the library was loaded: as many for a call as it has matrices; an
// attention is one.
std::atomic<int64_t>& call_count();

// -1: operators created from now on follow their attribute `exact`; 0: LUT mode; 1: exact mode.
std::atomic<int>& forced_mode();

constexpr size_t kMaxRank = 16;  // shapes are kept on the stack: no allocation while computing
constexpr size_t kX = 0, kCodes = 1;

struct Input {
  const char* name;
  OrtElementType type;
};

inline constexpr size_t kFirstCodes[] = {kCodes};

// The last inputs are optional: the bias. N is the number of rows of the inputs `row_inputs`, together. All outputs are
// float32.
struct Signature {
  const char* name;
  const Input* inputs;
  size_t count;
  size_t optional = 1;
  const size_t* row_inputs = kFirstCodes;
  size_t row_inputs_count = 1;
  size_t outputs = 1;
};

// Carries the status of a failed call, or our own message, to the ABI boundary.
class Failure : public std::exception {
 public:
  explicit Failure(OrtStatus* status) : status(status) {}
  OrtStatus* status;
};

void check(OrtStatus* status);

struct Tensor {
  const void* data = nullptr;
  int64_t dims[kMaxRank] = {0};
  size_t rank = 0;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// "(2, 3)"
std::string shape_text(const Tensor& t);

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

// Dimensions of a value: a size, or below 0 with a symbol. Rank 0: unknown.
struct Shape {
  std::vector<int64_t> dims;
  std::vector<const char*> symbols;  // "" where there is none
};

Shape input_shape(const OrtShapeInferContext* context, size_t index);
// Says nothing where the shape is unknown, or where a dimension has neither size nor symbol, which cannot be handed on.
void set_output_shape(const OrtShapeInferContext* context, size_t index, const Shape& shape);

// Y has the shape of X with its last dimension replaced by N. Throws Failure.
void infer_shape(const Signature& signature, const OrtShapeInferContext* context);

// Reading arguments. Everything throws Failure.
class Operator {
 public:
  // Shapes of the outputs; an operator whose outputs are not one Y hides it with one of its own.
  static void infer(const Signature& signature, const OrtShapeInferContext* context) {
    infer_shape(signature, context);
  }

 protected:
  // Reads exact.
  Operator(const Signature& signature, const OrtKernelInfo* info);

  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) const;
  static constexpr const char* kColumns = "the number of columns (in_features)";  // meaning of attribute K
  int64_t required_attribute(const OrtKernelInfo* info, const char* name, const char* meaning) const;  // at least 1
  // Input `index`, which must be a constant of the model. Its data is the file's, valid while the operator is created.
  Tensor constant(const OrtKernelInfo* info, size_t index) const;
  // Bits of a matrix (N, ceil(K / 8)) with the K columns that attribute `name` says.
  Tensor constant_codes(const OrtKernelInfo* info, size_t index, int64_t K, const char* name) const;
  void expect_vector(const Tensor& t, const char* name, int64_t length) const;
  void expect_finite(const Tensor& t, const char* name, int64_t length) const;       // float16
  Tensor constant_scales(const OrtKernelInfo* info, size_t index, int64_t length) const;  // finite float16 (length,)

  // While computing: X (..., K), its rows in M; a bias (N,) at `index`, nullptr where the node leaves it out; and the
  // memory of Y (..., N).
  Tensor read_x(const OrtKernelContext* context, int64_t K, int64_t* M) const;
  const float* read_bias(const OrtKernelContext* context, size_t index, int64_t N) const;
  float* make_y(OrtKernelContext* context, const Tensor& x, int64_t N) const;
  // While computing: any input, refused where it is missing; the memory of output `index`.
  Tensor read_input(const OrtKernelContext* context, size_t index) const;
  float* make_output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank) const;

  const Signature& signature_;
  Mode mode_;

 private:
  Tensor read(const OrtValue* value, const Input& input) const;
};

class PackedOperator : public Operator {
 public:
  virtual ~PackedOperator() = default;
  void compute(OrtKernelContext* context) const;

 protected:
  // Reads K and codes.
  PackedOperator(const Signature& signature, const OrtKernelInfo* info);

  // One multiplication: x (M, K), bias (N,) or nullptr, y (M, N).
  virtual void run(const float* x, int64_t M, const float* bias, float* y, Executor& executor) const = 0;

  void expect_codes(const Tensor& t, const char* name) const;  // (N, ceil(K / 8))

  int64_t K_ = 0, N_ = 0;
  Tensor codes_;  // valid while the operator is created
};

// A weight that packed_matrix.h holds; runs multiply.h on the kernels that are best when it is created.
class MatrixOperator : public PackedOperator {
 protected:
  MatrixOperator(const Signature& signature, const OrtKernelInfo* info);
  void run(const float* x, int64_t M, const float* bias, float* y, Executor& executor) const override;

  const Kernels& kernels_;
  std::unique_ptr<PackedMatrix> weights_;  // set by the derived class's constructor, in the layout of kernels_
};

// Runs `body` and turns whatever it throws into a status.
template <typename Body>
OrtStatus* guarded(const Signature& signature, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    char text[100];
    std::snprintf(text, sizeof text, "lit_binq.%s: out of memory", signature.name);
    return ort().CreateStatus(kOrtRuntimeException, text);
  } catch (const std::exception& error) {
    return ort().CreateStatus(kOrtRuntimeException, error.what());
  } catch (...) {
    return ort().CreateStatus(kOrtRuntimeException, "lit_binq: unknown error");
  }
}

// What the runtime sees of the operator Op, which has a static Signature `kSignature`.
template <typename Op>
OrtCustomOp describe() {
  OrtCustomOp op = {};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return Op::kSignature.name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return Op::kSignature.count; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) -> int { return Op::kSignature.inputs[index].type; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return index + Op::kSignature.optional >= Op::kSignature.count ? kOrtOptional : kOrtRequired;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return Op::kSignature.outputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return kOrtFloat; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kOrtRequired; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApiSlot*, const OrtKernelInfo* info, void** kernel) {
    return guarded(Op::kSignature, [&] { *kernel = new Op(info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded(Op::kSignature, [&] { static_cast<const Op*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  op.InferOutputShape = [](const OrtCustomOp*, OrtShapeInferContext* context) {
    return guarded(Op::kSignature, [&] { Op::infer(Op::kSignature, context); });
  };
  return op;
}

}  // namespace lit_binq
