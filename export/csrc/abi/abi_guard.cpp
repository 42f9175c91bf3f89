// The guard of abi_guard.h. Runs inside RegisterCustomOps, before anything is handed to the runtime. What it relies on
// is the documented contract: a runtime grants the version of the API that is asked for, or gives null where it is
// older. A newer one grants it for ever. Texts of the runtime are not looked at: they are promised nowhere.
#include "abi/abi_guard.h"

#include <cstring>

namespace lit_binq {
namespace {

constexpr int64_t kProbeDims[3] = {2, 3, 5};
constexpr size_t kProbeElements = 30;

// True where `status` means success. A failure's status is released: the guard reports by name, not by its message.
bool ok(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

bool status_round_trip(const OrtApi& api) {
  OrtStatus* status = api.CreateStatus(kOrtInvalidArgument, "probe");
  if (status == nullptr) return false;
  const bool same =
      api.GetErrorCode(status) == kOrtInvalidArgument && std::strcmp(api.GetErrorMessage(status), "probe") == 0;
  api.ReleaseStatus(status);
  return same;
}

bool shape_round_trip(const OrtApi& api) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (!ok(api, api.CreateTensorTypeAndShapeInfo(&info)) || info == nullptr) return false;
  int type = 0;
  size_t rank = 0, elements = 0;
  int64_t dims[3] = {0, 0, 0};
  const char* symbols[3] = {"a", "", "b"};
  const bool same = ok(api, api.SetTensorElementType(info, kOrtUint8)) &&
                    ok(api, api.SetDimensions(info, kProbeDims, 3)) &&
                    ok(api, api.GetTensorElementType(info, &type)) && type == kOrtUint8 &&
                    ok(api, api.GetDimensionsCount(info, &rank)) && rank == 3 &&
                    ok(api, api.GetDimensions(info, dims, 3)) && std::memcmp(dims, kProbeDims, sizeof dims) == 0 &&
                    ok(api, api.GetTensorShapeElementCount(info, &elements)) && elements == kProbeElements &&
                    ok(api, api.SetSymbolicDimensions(info, symbols, 3)) &&
                    ok(api, api.GetSymbolicDimensions(info, symbols, 3)) && std::strcmp(symbols[0], "a") == 0 &&
                    std::strcmp(symbols[2], "b") == 0;
  api.ReleaseTensorTypeAndShapeInfo(info);
  return same;
}

bool tensor_round_trip(const OrtApi& api) {
  OrtAllocator* allocator = nullptr;
  OrtValue* value = nullptr;
  if (!ok(api, api.GetAllocatorWithDefaultOptions(&allocator)) ||
      !ok(api, api.CreateTensorAsOrtValue(allocator, kProbeDims, 3, kOrtFloat, &value)) || value == nullptr) {
    return false;
  }
  int is_tensor = 0, type = 0;
  void* data = nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  bool same = ok(api, api.IsTensor(value, &is_tensor)) && is_tensor == 1 &&
              ok(api, api.GetTensorMutableData(value, &data)) && data != nullptr &&
              ok(api, api.GetTensorTypeAndShape(value, &info)) && info != nullptr;
  if (same) {
    std::memset(data, 0, kProbeElements * sizeof(float));
    same = ok(api, api.GetTensorElementType(info, &type)) && type == kOrtFloat;
    api.ReleaseTensorTypeAndShapeInfo(info);
  }
  api.ReleaseValue(value);
  return same;
}

}  // namespace

const char* check_abi(const OrtApiBase* base, OrtApi& api) {
  if (base == nullptr || base->GetApi == nullptr) return "no OrtApiBase came";
  const OrtApiSlot* table = base->GetApi(kApiVersion);
  if (table == nullptr) return "it is too old, expected ONNX Runtime 1.18 or newer";
  api.bind(table);
  if (!status_round_trip(api)) return "it has another ABI (status)";
  if (!shape_round_trip(api)) return "it has another ABI (type and shape)";
  if (!tensor_round_trip(api)) return "it has another ABI (tensor)";
  return nullptr;
}

}  // namespace lit_binq
