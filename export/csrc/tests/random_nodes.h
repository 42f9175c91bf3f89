// Random nodes of all operators for operator_fuzz: right ones, and faults to do to them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "tests/fake_runtime.h"

namespace lit_binq {

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <typename T>
  T of(std::initializer_list<T> values) {
    return *(values.begin() + below(static_cast<int64_t>(values.size())));
  }
  // Small ones mostly, and those around powers of two and sizes of tiles and blocks.
  int64_t size(int64_t most) {
    const int64_t v = one_in(4) ? of<int64_t>({1,  7,   8,   9,   15,  16,  17,  31,  32,  33,  63,  64,
                                               65, 127, 128, 129, 160, 161, 255, 256, 257, 320, 512, 513})
                                : 1 + below(one_in(4) ? most : std::min<int64_t>(most, 40));
    return std::min(v, most);
  }
  float normal() {
    const uint64_t z = next();  // three uniform numbers, near enough
    return static_cast<float>(static_cast<int64_t>((z & 0x1fffff) + (z >> 21 & 0x1fffff) + (z >> 42 & 0x1fffff)) -
                              3145728) *
           0x1p-20f;
  }
  uint16_t half() {  // finite
    const auto bits = static_cast<uint16_t>(next());
    return one_in(16)   ? 0
           : one_in(16) ? static_cast<uint16_t>(bits & 0x83ffu)
                        : static_cast<uint16_t>((bits & 0x87ffu) | 0x3000u);
  }
};

// A node of any operator that must compute.
FakeNode random_node(Random& random);

// Does one of many faults to it: an attribute, a shape, a type, an input that is missing or computed, damaged data, or
// what shape inference knows.
void damage(Random& random, FakeNode& node);

// Moves data of constants to odd addresses, as a mapped data file may have them.
void misplace(Random& random, FakeNode& node);

}  // namespace lit_binq
