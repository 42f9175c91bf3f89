// What the C functions of the test library share.
#pragma once

#include <optional>

#include "sets/kernel_sets.h"

namespace lit_binq {

// Throws std::bad_optional_access where there is no such set, or none that runs here.
inline const KernelSet& test_set(const char* name) {
  const Choice choice = choose_kernels(name, "set");
  if (choice.set == nullptr) throw std::bad_optional_access();
  return *choice.set;
}

}  // namespace lit_binq
