// The choice of kernel_sets.h. Compiled once for the library and once for tests, which have a set more.
#include "sets/kernel_sets.h"

#include <cstdlib>
#include <cstring>

#include "common/cpu.h"

namespace lit_binq {
namespace {

constexpr const char* kVariable = "LIT_BINQ_KERNELS";

// Best first.
constexpr const KernelSet* kSets[] = {
#if defined(__x86_64__)
    &kAvx512Set,
    &kAvx2Set,
#elif defined(__aarch64__)
    &kNeonSet,
#endif
    &kScalarSet,
#if LIT_BINQ_TESTS
    &kScalarLut5Set,
#endif
};

std::string names_here() {
  std::string names;
  for (const KernelSet* set : kSets) {
    if (runs_here(*set)) names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  return names;
}

Choice choose_default() {
  const char* const wanted = std::getenv(kVariable);
  if (wanted != nullptr && wanted[0] != '\0') return choose_kernels(wanted, kVariable);
  for (const KernelSet* set : kSets) {
    if (runs_here(*set)) return {set, "the best that this processor can run"};
  }
  return {&kScalarSet, "plain C++ runs everywhere"};
}

}  // namespace

const KernelSet* kernel_set(int i) {
  constexpr int kCount = static_cast<int>(sizeof kSets / sizeof kSets[0]);
  return i >= 0 && i < kCount ? kSets[i] : nullptr;
}

bool runs_here(const KernelSet& set) { return missing_features(set.needs) == 0; }

Choice choose_kernels(const char* name, const char* source) {
  const std::string got = std::string(source) + " is '" + std::string(name).substr(0, 40) + "', ";
  for (const KernelSet* set : kSets) {
    if (std::strcmp(set->name, name) != 0) continue;
    if (runs_here(*set)) return {set, std::string("forced: ") + got.substr(0, got.size() - 2)};
    return {nullptr, got + "which needs " + feature_names(missing_features(set->needs)) +
                         ", which this processor or its system lacks; expected one of " + names_here()};
  }
  return {nullptr, got + "expected one of " + names_here()};
}

const Choice& default_kernels() {
  static const Choice choice = choose_default();
  return choice;
}

}  // namespace lit_binq
