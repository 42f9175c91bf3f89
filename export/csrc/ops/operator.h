// What all operators of domain lit_binq share: reading a call, threads, shape inference, what the runtime sees. Touches
// the runtime through ort_abi.h; there is no global one: an operator keeps the table of the runtime that made it, so
// that several copies of ONNX Runtime in one process may use the library. An operator is a class derived from Operator
// with a Signature, constructed from a NodeReader and described by `describe<Op>`.
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

#include "abi/ort_abi.h"
#include "binary/multiply.h"
#include "ops/reader.h"

namespace lit_binq {

// Multiplications done by all operators since the library was loaded: as many for a call as it has matrices; an
// attention is one.
std::atomic<int64_t>& call_count();

// The thread pool of the session. The first failure ends it: later runs do nothing.
class PoolExecutor final : public Executor {
 public:
  PoolExecutor(const OrtApi& ort, const OrtKernelContext* context) : ort_(ort), context_(context) {}
  void run(size_t tasks, size_t batches, void (*task)(void*, size_t), void* argument) override {
    if (status == nullptr) status = ort_.KernelContext_ParallelFor(context_, task, tasks, batches, argument);
  }
  OrtStatus* status = nullptr;

 private:
  const OrtApi& ort_;
  const OrtKernelContext* context_;
};

// Dimensions of a value: a size, or below 0 with a symbol. Rank 0: unknown.
struct Shape {
  std::vector<int64_t> dims;
  std::vector<const char*> symbols;  // "" where there is none
};

Shape input_shape(const OrtApi& ort, const OrtShapeInferContext* context, size_t index);
// Says nothing where the shape is unknown, or where a dimension has neither size nor symbol, which cannot be handed on.
void set_output_shape(const OrtApi& ort, const OrtShapeInferContext* context, size_t index, const Shape& shape);

// Y has the shape of X with its last dimension replaced by N. Throws Failure.
void infer_shape(const OrtApi& ort, const Signature& signature, const OrtShapeInferContext* context);

// Reading a call. Everything throws Failure.
class Operator : public Reader {
 public:
  // Shapes of the outputs; an operator whose outputs are not one Y hides it with one of its own.
  static void infer(const OrtApi& ort, const Signature& signature, const OrtShapeInferContext* context) {
    infer_shape(ort, signature, context);
  }

 protected:
  // Reads the mode.
  explicit Operator(const NodeReader& node);

  // While computing: X (..., K), its rows in M; a bias (N,) at `index`, without data where the node leaves it out; and
  // the memory of Y (..., N).
  Tensor read_x(const OrtKernelContext* context, int64_t K, int64_t* M) const;
  Tensor read_bias(const OrtKernelContext* context, size_t index, int64_t N) const;
  float* make_y(OrtKernelContext* context, const Tensor& x, int64_t N) const;
  // While computing: any input, refused where it is missing; the memory of output `index`.
  Tensor read_input(const OrtKernelContext* context, size_t index) const;
  float* make_output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank) const;

  bool is_given(const OrtKernelContext* context, size_t index) const;  // an optional input

  Mode mode_;
};

class PackedOperator : public Operator {
 public:
  virtual ~PackedOperator() = default;
  void compute(OrtKernelContext* context) const;

 protected:
  // Reads K and codes.
  explicit PackedOperator(const NodeReader& node);

  // One multiplication: x (M, K), bias (N,) or nullptr, y (M, N).
  virtual void run(const float* x, int64_t M, const float* bias, float* y, Executor& executor) const = 0;

  void expect_codes(const Tensor& t, const char* name) const;  // (N, ceil(K / 8))

  int64_t K_ = 0, N_ = 0;
  Tensor codes_;  // its data is valid while the operator is created
};

// A weight that binary/matrix.h holds; runs binary/multiply.h on the session's kernels.
class MatrixOperator : public PackedOperator {
 protected:
  explicit MatrixOperator(const NodeReader& node);
  void run(const float* x, int64_t M, const float* bias, float* y, Executor& executor) const override;

  const BinaryKernels& kernels_;
  std::unique_ptr<PackedMatrix> weights_;  // set by the derived class's constructor, in the layout of kernels_
};

// Runs `body` and turns whatever it throws into a status of the runtime.
template <typename Body>
OrtStatus* guarded(const OrtApi& ort, const Signature& signature, Body&& body) noexcept {
  char text[100];
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    std::snprintf(text, sizeof text, "lit_binq.%s: out of memory", signature.name);
  } catch (const std::exception& error) {
    std::snprintf(text, sizeof text, "lit_binq.%s: %s", signature.name, error.what());
  } catch (...) {
    std::snprintf(text, sizeof text, "lit_binq.%s: unknown error", signature.name);
  }
  return ort.CreateStatus(kOrtRuntimeException, text);
}

// An operator as one runtime sees it in sessions of one kind. The runtime hands this very object to the callbacks.
struct Description : OrtCustomOp {
  const OrtApi* ort;
  SessionOptions session;

  static const Description& of(const OrtCustomOp* op) { return *static_cast<const Description*>(op); }
};

// What the runtime sees of the operator Op, which has a static Signature `kSignature`. `ort` must outlive it.
template <typename Op>
Description describe(const OrtApi& ort, const SessionOptions& session) {
  Description op = {};
  op.ort = &ort;
  op.session = session;
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
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApiSlot*, const OrtKernelInfo* info, void** kernel) {
    const Description& of = Description::of(self);
    return guarded(*of.ort, Op::kSignature,
                   [&] { *kernel = new Op(NodeReader(*of.ort, Op::kSignature, info, of.session)); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Op& made = *static_cast<const Op*>(kernel);
    return guarded(made.ort(), Op::kSignature, [&] { made.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
  op.InferOutputShape = [](const OrtCustomOp* self, OrtShapeInferContext* context) {
    const OrtApi& ort = *Description::of(self).ort;
    return guarded(ort, Op::kSignature, [&] { Op::infer(ort, Op::kSignature, context); });
  };
  return op;
}

}  // namespace lit_binq
