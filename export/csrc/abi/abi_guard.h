// Asks a running ONNX Runtime whether ort_abi.h describes it. Touches only the runtime's API table.
#pragma once

#include "abi/ort_abi.h"

namespace lit_binq {

// Binds `api` to the runtime behind `base` and exercises it. Returns nullptr where the runtime grants the version of
// the API that ort_abi.h describes and values of ours come back as they went in, else a static message that names what
// did not. `api` is usable only after nullptr.
const char* check_abi(const OrtApiBase* base, OrtApi& api);

}  // namespace lit_binq
