// RegisterCustomOps, the one function that ONNX Runtime looks up. Guards the ABI, then adds domain lit_binq.
#include <exception>
#include <mutex>
#include <string>

#include "abi_guard.h"
#include "export.h"
#include "operator.h"
#include "operators.h"

namespace lit_binq {
namespace {

// The domain is made once and kept for the life of the process: sessions hold pointers into it.
OrtStatus* add_domain(OrtSessionOptions* options) {
  static std::mutex mutex;
  static OrtCustomOpDomain* domain = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    OrtCustomOpDomain* fresh = nullptr;
    if (OrtStatus* status = ort().CreateCustomOpDomain("lit_binq", &fresh)) return status;
    for (const auto op : kOperators) {
      if (OrtStatus* status = ort().CustomOpDomain_Add(fresh, op())) {
        ort().ReleaseCustomOpDomain(fresh);
        return status;
      }
    }
    domain = fresh;
  }
  return ort().AddCustomOpDomain(options, domain);
}

// The guard runs once for a runtime that passes; one that fails is asked again the next time. Operators reach the
// runtime through one global table, so a second copy of ONNX Runtime in the same process is refused.
const char* bind_once(const OrtApiBase* base) {
  static std::mutex mutex;
  static const OrtApiBase* bound = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (bound != nullptr && bound == base) return nullptr;
  OrtApi api;
  if (const char* problem = check_abi(base, api)) return problem;
  if (bound != nullptr) return "the library already serves another copy of ONNX Runtime in this process";
  ort() = api;
  bound = base;
  return nullptr;
}

// A status on a runtime that the guard refused: only the first position of the oldest table is used, which is where
// CreateStatus has been since version 1. Where not even that table is there, nothing can be reported and nothing is
// registered: the session then fails by itself on the unknown domain.
OrtStatus* refuse(const OrtApiBase* base, const char* problem) {
  const OrtApiSlot* table = base != nullptr && base->GetApi != nullptr ? base->GetApi(1) : nullptr;
  if (table == nullptr) return nullptr;
  const char* version = base->GetVersionString != nullptr ? base->GetVersionString() : nullptr;
  const std::string message = std::string("lit_binq: ONNX Runtime ") + (version != nullptr ? version : "(unknown)") +
                              " cannot run this library: " + problem;
  const auto create_status = reinterpret_cast<OrtStatus* (*)(int, const char*)>(const_cast<void*>(table[0]));
  return create_status(kOrtFail, message.c_str());
}

}  // namespace
}  // namespace lit_binq

LIT_BINQ_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace lit_binq;
  try {
    if (const char* problem = bind_once(base)) return refuse(base, problem);
    return add_domain(options);
  } catch (const std::exception& error) {
    return refuse(base, error.what());
  }
}
