// RegisterCustomOps, the one function that ONNX Runtime looks up. Guards the ABI, then adds domain lit_binq.
//
// A session may choose for all its operators, by entries of its configuration that are set before the library is
// registered:
//
//     lit_binq.mode       "lut" or "exact"; without it the attribute `exact` of each node decides
//     lit_binq.kernels    the name of a kernel set; without it the environment variable LIT_BINQ_KERNELS, else the best
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "abi/abi_guard.h"
#include "abi/export.h"
#include "ops/operator.h"
#include "ops/operators.h"
#include "sets/kernel_sets.h"

namespace lit_binq {
namespace {

constexpr const char* kModeEntry = "lit_binq.mode";
constexpr const char* kKernelsEntry = "lit_binq.kernels";

// The operators for sessions of one mode and one kernel set.
struct Domain {
  Description operators[kOperatorsCount];
  OrtCustomOpDomain* domain = nullptr;
};

// One copy of ONNX Runtime. A process may hold several, each with sessions and threads of its own.
struct Runtime {
  const OrtApiBase* base;
  OrtApi ort;
  std::map<std::pair<SessionMode, const KernelSet*>, std::unique_ptr<Domain>> domains;
};

// Kept for the life of the process: sessions hold pointers into it.
struct Runtimes {
  std::mutex mutex;
  std::vector<std::unique_ptr<Runtime>> all;
};

Runtimes& runtimes() {
  static Runtimes* const instance = new Runtimes;
  return *instance;
}

// The guard runs once for a runtime that passes; one that fails is asked again the next time. nullptr where it fails.
Runtime* find_runtime(Runtimes& known, const OrtApiBase* base, const char** problem) {
  for (const auto& runtime : known.all) {
    if (runtime->base == base) return runtime.get();
  }
  auto fresh = std::make_unique<Runtime>();
  fresh->base = base;
  *problem = check_abi(base, fresh->ort);
  if (*problem != nullptr) return nullptr;
  known.all.push_back(std::move(fresh));
  return known.all.back().get();
}

[[noreturn]] void refuse_entry(const OrtApi& ort, const std::string& message) {
  throw Failure(ort.CreateStatus(kOrtInvalidArgument, ("lit_binq: " + message).c_str()));
}

// An entry of the session's configuration; false where there is none. Throws Failure.
bool read_entry(const OrtApi& ort, const OrtSessionOptions* options, const char* name, std::string* value) {
  int found = 0;
  check(ort.HasSessionConfigEntry(options, name, &found));
  if (!found) return false;
  size_t size = 0;  // with the zero at the end
  check(ort.GetSessionConfigEntry(options, name, nullptr, &size));
  value->assign(size, '\0');
  check(ort.GetSessionConfigEntry(options, name, value->data(), &size));
  *value = value->c_str();
  return true;
}

SessionMode read_mode(const OrtApi& ort, const OrtSessionOptions* options) {
  std::string value;
  if (!read_entry(ort, options, kModeEntry, &value)) return SessionMode::kOfNode;
  if (value == "lut") return SessionMode::kLut;
  if (value == "exact") return SessionMode::kExact;
  refuse_entry(ort, "session configuration entry " + std::string(kModeEntry) + " is '" + value.substr(0, 40) +
                        "', expected 'lut' or 'exact'");
}

const KernelSet* read_kernels(const OrtApi& ort, const OrtSessionOptions* options) {
  std::string value;
  const bool given = read_entry(ort, options, kKernelsEntry, &value);
  const Choice choice =
      given ? choose_kernels(value.c_str(), "session configuration entry lit_binq.kernels") : default_kernels();
  if (choice.set == nullptr) refuse_entry(ort, choice.reason);
  return choice.set;
}

std::unique_ptr<Domain> make_domain(const OrtApi& ort, const SessionOptions& session) {
  auto made = std::make_unique<Domain>();
  for (size_t i = 0; i < kOperatorsCount; ++i) made->operators[i] = kOperators[i](ort, session);
  check(ort.CreateCustomOpDomain("lit_binq", &made->domain));
  for (const Description& op : made->operators) {
    if (OrtStatus* status = ort.CustomOpDomain_Add(made->domain, &op)) {
      ort.ReleaseCustomOpDomain(made->domain);
      throw Failure(status);
    }
  }
  return made;
}

void add_domain(Runtime& runtime, OrtSessionOptions* options) {
  const SessionOptions session = {read_mode(runtime.ort, options), read_kernels(runtime.ort, options)};
  std::unique_ptr<Domain>& domain = runtime.domains[{session.mode, session.kernels}];
  if (domain == nullptr) domain = make_domain(runtime.ort, session);
  check(runtime.ort.AddCustomOpDomain(options, domain->domain));
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
    Runtimes& known = runtimes();
    std::lock_guard<std::mutex> lock(known.mutex);
    const char* problem = nullptr;
    Runtime* const runtime = find_runtime(known, base, &problem);
    if (runtime == nullptr) return refuse(base, problem);
    add_domain(*runtime, options);
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return refuse(base, error.what());
  }
}
