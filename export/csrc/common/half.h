// Numbers of 16 bits as files hold them.
#pragma once

#include <cstdint>

namespace lit_binq {

// Exact value of an IEEE 754 binary16, subnormals included, without F16C.
float half_to_float(uint16_t bits);

// Index of the first scale that is infinite or not a number; -1 where all are finite.
int64_t first_non_finite(const uint16_t* scales, int64_t count);

}  // namespace lit_binq
