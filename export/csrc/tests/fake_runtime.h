// A runtime of our own for operator_fuzz: the functions of ort_abi.h over plain structs, so that operators are
// registered, created and called as ONNX Runtime does it, hundreds of times as often. Every tensor has memory of its
// exact size.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "abi/ort_abi.h"

namespace lit_binq {

struct FakeTensor {
  int type = kOrtFloat;
  std::vector<int64_t> dims;
  std::unique_ptr<uint8_t[]> memory;
  size_t bytes = 0;
  size_t shift = 0;  // data starts so many bytes into the memory

  uint8_t* data() const { return bytes == 0 ? nullptr : memory.get() + shift; }
};

size_t element_bytes(int type);
// Product of the dimensions from 0, at most `most` + 1.
uint64_t count_elements(const std::vector<int64_t>& dims, uint64_t most);
// Gives it zeroed memory for its dimensions.
void allocate(FakeTensor& tensor, size_t shift = 0);

struct FakeInput {
  FakeTensor tensor;
  bool present = true, constant = false;
  std::vector<std::string> symbols;  // for shape inference; a dimension with one is -1 there
  bool known = true;                 // whether shape inference knows the shape
};

struct FakeAttribute {
  bool is_float = false;
  int64_t number = 0;
  float real = 0.0f;
};

// A node, and a call of it.
struct FakeNode {
  std::string kind;
  std::map<std::string, FakeAttribute> attributes;
  std::vector<FakeInput> inputs;
};

struct Ran {
  bool inferred = false, created = false, computed = false;
  std::string error;  // of the first thing that was refused
  std::vector<std::unique_ptr<FakeTensor>> outputs;
};

// Registers the library in this runtime. Returns the error, empty where there is none.
std::string register_operators(const std::map<std::string, std::string>& entries);  // of the session's configuration

// Infers shapes, creates and computes (`times` in a row) in a session of the entries registered last.
Ran run(const FakeNode& node, int times);

// Statuses and infos that were made and not released.
int64_t alive();

}  // namespace lit_binq
