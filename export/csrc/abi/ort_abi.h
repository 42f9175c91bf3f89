// The part of ONNX Runtime's C ABI that this library uses, written down as facts: positions in a table of function
// pointers, positions in a struct of callbacks, values of enumerations. Touches nothing; holds no logic.
//
// ONNX Runtime hands out a table that only ever grows at its end, so a position, once published, keeps its meaning.
// Everything named here exists since version 1.18. abi_guard.cpp exercises it before anything is trusted.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Opaque handles.
struct OrtAllocator;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;  // nullptr means success
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
struct OrtCustomOp;

using OrtApiSlot = const void*;

struct OrtApiBase {
  const OrtApiSlot* (*GetApi)(uint32_t version);  // nullptr where the runtime is older than `version`
  const char* (*GetVersionString)();
};
}

namespace lit_binq {

// The API version asked for, and the layout version that OrtCustomOp declares below: 1.18 is the first release whose
// custom operators have shape inference with symbolic dimensions and KernelContext_ParallelFor.
constexpr uint32_t kApiVersion = 18;

enum OrtErrorCode : int { kOrtFail = 1, kOrtInvalidArgument = 2, kOrtRuntimeException = 6 };
enum OrtElementType : int { kOrtFloat = 1, kOrtUint8 = 2, kOrtInt32 = 6, kOrtFloat16 = 10 };
enum OrtCharacteristic : int { kOrtRequired = 0, kOrtOptional = 1 };

// X(name, position in the table, return type, arguments)
// clang-format off
#define LIT_BINQ_ORT_API(X)                                                                                          \
  X(CreateStatus, 0, OrtStatus*, (int code, const char* message))                                                    \
  X(GetErrorCode, 1, int, (const OrtStatus*))                                                                        \
  X(GetErrorMessage, 2, const char*, (const OrtStatus*))                                                             \
  X(CreateCustomOpDomain, 26, OrtStatus*, (const char* name, OrtCustomOpDomain**))                                   \
  X(CustomOpDomain_Add, 27, OrtStatus*, (OrtCustomOpDomain*, const OrtCustomOp*))                                    \
  X(AddCustomOpDomain, 28, OrtStatus*, (OrtSessionOptions*, OrtCustomOpDomain*))                                     \
  X(CreateTensorAsOrtValue, 48, OrtStatus*, (OrtAllocator*, const int64_t* dims, size_t rank, int type, OrtValue**)) \
  X(IsTensor, 50, OrtStatus*, (const OrtValue*, int*))                                                               \
  X(GetTensorMutableData, 51, OrtStatus*, (OrtValue*, void**))                                                       \
  X(CreateTensorTypeAndShapeInfo, 57, OrtStatus*, (OrtTensorTypeAndShapeInfo**))                                     \
  X(SetTensorElementType, 58, OrtStatus*, (OrtTensorTypeAndShapeInfo*, int))                                         \
  X(SetDimensions, 59, OrtStatus*, (OrtTensorTypeAndShapeInfo*, const int64_t*, size_t rank))                        \
  X(GetTensorElementType, 60, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int*))                                  \
  X(GetDimensionsCount, 61, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))                                 \
  X(GetDimensions, 62, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, int64_t*, size_t rank))                        \
  X(GetSymbolicDimensions, 63, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, const char**, size_t rank))            \
  X(GetTensorShapeElementCount, 64, OrtStatus*, (const OrtTensorTypeAndShapeInfo*, size_t*))                         \
  X(GetTensorTypeAndShape, 65, OrtStatus*, (const OrtValue*, OrtTensorTypeAndShapeInfo**))                           \
  X(GetAllocatorWithDefaultOptions, 78, OrtStatus*, (OrtAllocator**))                                                \
  X(KernelInfoGetAttribute_float, 85, OrtStatus*, (const OrtKernelInfo*, const char*, float*))                       \
  X(KernelInfoGetAttribute_int64, 86, OrtStatus*, (const OrtKernelInfo*, const char*, int64_t*))                     \
  X(KernelContext_GetInputCount, 88, OrtStatus*, (const OrtKernelContext*, size_t*))                                 \
  X(KernelContext_GetInput, 90, OrtStatus*, (const OrtKernelContext*, size_t index, const OrtValue**))               \
  X(KernelContext_GetOutput, 91, OrtStatus*, (OrtKernelContext*, size_t, const int64_t*, size_t rank, OrtValue**))   \
  X(ReleaseStatus, 93, void, (OrtStatus*))                                                                           \
  X(ReleaseValue, 96, void, (OrtValue*))                                                                             \
  X(ReleaseTensorTypeAndShapeInfo, 99, void, (OrtTensorTypeAndShapeInfo*))                                           \
  X(ReleaseCustomOpDomain, 101, void, (OrtCustomOpDomain*))                                                          \
  X(HasSessionConfigEntry, 237, OrtStatus*, (const OrtSessionOptions*, const char* key, int* found))                 \
  X(GetSessionConfigEntry, 238, OrtStatus*, (const OrtSessionOptions*, const char* key, char* value, size_t* size))  \
  X(KernelInfoGetConstantInput_tensor, 249, OrtStatus*, (const OrtKernelInfo*, size_t, int*, const OrtValue**))      \
  X(ShapeInferContext_GetInputTypeShape, 268, OrtStatus*,                                                            \
    (const OrtShapeInferContext*, size_t index, OrtTensorTypeAndShapeInfo**))                                        \
  X(ShapeInferContext_SetOutputTypeShape, 270, OrtStatus*,                                                           \
    (const OrtShapeInferContext*, size_t index, const OrtTensorTypeAndShapeInfo*))                                   \
  X(SetSymbolicDimensions, 271, OrtStatus*, (OrtTensorTypeAndShapeInfo*, const char**, size_t rank))                 \
  X(KernelContext_ParallelFor, 274, OrtStatus*,                                                                      \
    (const OrtKernelContext*, void (*task)(void*, size_t), size_t tasks, size_t batches, void* argument))
// clang-format on

// The functions above, bound to the table of one runtime.
struct OrtApi {
#define LIT_BINQ_MEMBER(name, position, result, arguments) result(*name) arguments = nullptr;
  LIT_BINQ_ORT_API(LIT_BINQ_MEMBER)
#undef LIT_BINQ_MEMBER

  void bind(const OrtApiSlot* table) {
#define LIT_BINQ_BIND(name, position, result, arguments) \
  name = reinterpret_cast<result(*) arguments>(const_cast<void*>(table[position]));
    LIT_BINQ_ORT_API(LIT_BINQ_BIND)
#undef LIT_BINQ_BIND
  }
};

}  // namespace lit_binq

extern "C" {

// What a custom operator shows the runtime: a version, then 25 callbacks. The runtime reads as many of them as the
// version promises.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApiSlot*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApiSlot*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** input, int** output);
  void (*ReleaseMayInplace)(int* input, int* output);
  size_t (*GetAliasMap)(int** input, int** output);
  void (*ReleaseAliasMap)(int* input, int* output);
};

static_assert(sizeof(void*) == 8 && sizeof(OrtCustomOp) == 26 * 8, "OrtCustomOp: 26 slots of 8 bytes");
static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 17 * 8, "OrtCustomOp: CreateKernelV2 is slot 17");
static_assert(offsetof(OrtCustomOp, ReleaseAliasMap) == 25 * 8, "OrtCustomOp: ReleaseAliasMap is slot 25");
}
