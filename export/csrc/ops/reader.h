// Reading what comes from outside: attributes and constants of a node, and tensors of a call. Every number and every
// product of dimensions passes through here and is bounded, so that no sum or product made of it later can overflow.
// Touches the runtime through ort_abi.h. Everything throws Failure.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "abi/ort_abi.h"
#include "common/executor.h"
#include "common/workspace.h"
#include "sets/kernel_sets.h"

namespace lit_binq {

constexpr size_t kMaxRank = 16;  // shapes are kept on the stack: no allocation while computing

// The largest value of an integer attribute: columns are numbered in 32 bits, and a product of any two attributes stays
// within 64.
constexpr int64_t kMostNumber = INT32_MAX;

// The most elements of a tensor, more than a memory holds: with the factors that drivers put to it (32 rows for one, 4
// planes, 32 bytes of table a byte, 128 rows of a panel) it stays within 63 bits.
constexpr int64_t kMostElements = int64_t{1} << 31 << 16;

struct Input {
  const char* name;
  OrtElementType type;
};

constexpr size_t kX = 0, kCodes = 1;
inline constexpr size_t kFirstCodes[] = {kCodes};

// The last inputs are optional: the bias. N is the number of rows of the inputs `row_inputs`, together. All outputs are
// float32.
struct Signature {
  const char* name;
  const Input* inputs;
  size_t count;
  size_t optional = 1;
  const size_t* row_inputs = kFirstCodes;
  size_t row_inputs_count = 1;
  size_t outputs = 1;
};

// Carries the status of a failed call, or our own message, to the ABI boundary.
class Failure : public std::exception {
 public:
  explicit Failure(OrtStatus* status) : status(status) {}
  OrtStatus* status;
};

void check(OrtStatus* status);

struct Tensor {
  const void* data = nullptr;  // nullptr: there is none, or no elements
  LayerBytes copy;             // what data points to where the runtime's memory is not aligned for its type
  int64_t dims[kMaxRank] = {0};
  size_t rank = 0;
  int64_t elements = 0;  // product of dims, at most kMostElements

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// "(2, 3)"
std::string shape_text(const Tensor& t);

// "%lld" takes it.
constexpr long long as_long(int64_t value) { return value; }

// What reading a node and reading a call have in common.
class Reader {
 public:
  const OrtApi& ort() const { return ort_; }

  [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) const;
  // a * b of numbers from 0; refused where it is above kMostElements.
  int64_t product(int64_t a, int64_t b, const char* what) const;
  const char* name_of(size_t index) const { return signature_.inputs[index].name; }

  void expect_vector(const Tensor& t, const char* name, int64_t length) const;
  void expect_finite(const Tensor& t, const char* name) const;  // float16

 protected:
  Reader(const OrtApi& ort, const Signature& signature) : ort_(ort), signature_(signature) {}
  Tensor read(const OrtValue* value, const Input& input) const;

  const OrtApi& ort_;
  const Signature& signature_;
};

// What a session says of its operators' modes: the node's attribute `exact` decides, or one mode for all.
enum class SessionMode { kOfNode = 0, kLut = 1, kExact = 2 };

struct SessionOptions {
  SessionMode mode;
  const KernelSet* kernels;
};

// A node of the model while its operator is created.
class NodeReader final : public Reader {
 public:
  NodeReader(const OrtApi& ort, const Signature& signature, const OrtKernelInfo* info, const SessionOptions& session)
      : Reader(ort, signature), info_(info), session_(session) {}

  // An integer attribute from `least` to `most`. `meaning` completes "is missing, expected ...".
  int64_t number(const char* name, const char* meaning, int64_t least = 1, int64_t most = kMostNumber) const;
  // The same, or `absent` where the node leaves it out.
  int64_t number_or(int64_t absent, const char* name, int64_t least, int64_t most) const;
  float finite(const char* name, const char* meaning) const;  // a float attribute
  static constexpr const char* kColumns = "the number of columns (in_features)";  // meaning of attribute K

  // What the session says, else the attribute `exact`, which must be 0 or 1 in either case.
  Mode mode() const;
  const KernelSet& kernels() const { return *session_.kernels; }

  // Input `index`, which must be a constant of the model. Its data is the file's, or a copy; valid while the reader is.
  Tensor constant(size_t index) const;
  // An input that is left out and one that is computed look alike while the operator is created: false for both.
  bool has_constant(size_t index) const;
  // Bits of a matrix (N, ceil(K / 8)) with the K columns that attribute `name` says.
  Tensor codes(size_t index, int64_t K, const char* name) const;
  Tensor scales(size_t index, int64_t length) const;  // finite float16 (length,)

 private:
  bool find_number(const char* name, int64_t* value) const;

  const OrtKernelInfo* info_;
  SessionOptions session_;
  mutable std::vector<LayerBytes> copies_;
};

}  // namespace lit_binq
