// C functions beside the operators; lit_binq_onnx/runtime/library.py binds them.
#include <cstdint>
#include <string>
#include <vector>

#include "abi/export.h"
#include "common/cpu.h"
#include "ops/operator.h"
#include "sets/kernel_sets.h"

using namespace lit_binq;

// Multiplications and attentions that native operators have done since the library was loaded.
LIT_BINQ_EXPORT int64_t lit_binq_calls(void) { return call_count().load(); }

// The i-th kernel set of this library, the best one first; null from their number on.
LIT_BINQ_EXPORT const char* lit_binq_kernel_set(int i) {
  const KernelSet* const set = kernel_set(i);
  return set != nullptr ? set->name : nullptr;
}

// What this machine lacks for it, "" where it can run: names as in /proc/cpuinfo with spaces between.
LIT_BINQ_EXPORT const char* lit_binq_kernel_set_lacks(int i) {
  static const std::vector<std::string> lacks = [] {
    std::vector<std::string> all;
    for (int k = 0; kernel_set(k) != nullptr; ++k) all.push_back(feature_names(missing_features(kernel_set(k)->needs)));
    return all;
  }();
  return i >= 0 && static_cast<size_t>(i) < lacks.size() ? lacks[static_cast<size_t>(i)].c_str() : nullptr;
}

// The set that sessions run which do not choose one themselves; null where LIT_BINQ_KERNELS asks for what cannot be.
LIT_BINQ_EXPORT const char* lit_binq_kernels(void) {
  const KernelSet* const set = default_kernels().set;
  return set != nullptr ? set->name : nullptr;
}

// Why that set, or why none.
LIT_BINQ_EXPORT const char* lit_binq_kernels_reason(void) { return default_kernels().reason.c_str(); }
