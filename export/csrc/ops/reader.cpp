// The reading of reader.h.
#include "common/half.h"
#include "ops/reader.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace lit_binq {
namespace {

size_t element_size(OrtElementType type) {
  return type == kOrtFloat || type == kOrtInt32 ? 4 : type == kOrtFloat16 ? 2 : 1;
}

}  // namespace

void check(OrtStatus* status) {
  if (status != nullptr) throw Failure(status);
}

std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (size_t i = 0; i < t.rank; ++i) {
    char number[32];
    std::snprintf(number, sizeof number, i ? ", %lld" : "%lld", as_long(t.dims[i]));
    text += number;
  }
  return text + (t.rank == 1 ? ",)" : ")");
}

void Reader::fail(const char* format, ...) const {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const std::string message = std::string("lit_binq.") + signature_.name + ": " + text;
  throw Failure(ort_.CreateStatus(kOrtInvalidArgument, message.c_str()));
}

int64_t Reader::product(int64_t a, int64_t b, const char* what) const {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result) || result > kMostElements) {
    fail("%s are %lld times %lld, expected at most %lld", what, as_long(a), as_long(b), as_long(kMostElements));
  }
  return result;
}

Tensor Reader::read(const OrtValue* value, const Input& input) const {
  Tensor t;
  OrtTensorTypeAndShapeInfo* raw = nullptr;
  check(ort_.GetTensorTypeAndShape(value, &raw));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> info(
      raw, ort_.ReleaseTensorTypeAndShapeInfo);
  int type = 0;
  check(ort_.GetTensorElementType(raw, &type));
  if (type != input.type) fail("%s has element type %d, expected %d", input.name, type, input.type);
  check(ort_.GetDimensionsCount(raw, &t.rank));
  if (t.rank > kMaxRank) fail("%s has %zu dimensions, expected at most %zu", input.name, t.rank, kMaxRank);
  check(ort_.GetDimensions(raw, t.dims, t.rank));
  // An empty tensor has no memory that would bound its other dimensions: each of them is looked at.
  bool empty = false, large = false;
  t.elements = 1;
  for (size_t i = 0; i < t.rank; ++i) {
    empty = empty || t.dims[i] == 0;
    large = large || t.dims[i] < 0 || t.dims[i] > kMostElements;
  }
  for (size_t i = 0; i < t.rank && !empty && !large; ++i) {
    large = __builtin_mul_overflow(t.elements, t.dims[i], &t.elements) || t.elements > kMostElements;
  }
  if (large) {
    fail("%s has shape %s, expected at most %lld elements", input.name, shape_text(t).c_str(), as_long(kMostElements));
  }
  if (empty) t.elements = 0;
  void* data = nullptr;
  check(ort_.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  t.data = data;
  // The runtime maps a data file as it is: an offset in it may be any.
  const size_t size = element_size(input.type);
  if (t.elements != 0 && reinterpret_cast<uintptr_t>(data) % size != 0) {
    AlignedBytes bytes = allocate_aligned(static_cast<size_t>(t.elements) * size);
    std::memcpy(bytes.get(), data, static_cast<size_t>(t.elements) * size);
    t.copy = LayerBytes(bytes.release(), AlignedDelete{});
    t.data = t.copy.get();
  }
  return t;
}

void Reader::expect_vector(const Tensor& t, const char* name, int64_t length) const {
  if (t.rank != 1 || t.dims[0] != length) {
    fail("%s has shape %s, expected (%lld,)", name, shape_text(t).c_str(), as_long(length));
  }
}

void Reader::expect_finite(const Tensor& t, const char* name) const {
  const int64_t bad = first_non_finite(t.as<uint16_t>(), t.elements);
  if (bad >= 0) fail("%s[%lld] is not finite, expected finite scales", name, as_long(bad));
}

bool NodeReader::find_number(const char* name, int64_t* value) const {
  OrtStatus* const status = ort_.KernelInfoGetAttribute_int64(info_, name, value);
  if (status != nullptr) ort_.ReleaseStatus(status);
  return status == nullptr;
}

int64_t NodeReader::number(const char* name, const char* meaning, int64_t least, int64_t most) const {
  int64_t value = 0;
  if (!find_number(name, &value)) fail("attribute %s is missing, expected %s", name, meaning);
  if (value < least) fail("attribute %s is %lld, expected at least %lld", name, as_long(value), as_long(least));
  if (value > most) fail("attribute %s is %lld, expected at most %lld", name, as_long(value), as_long(most));
  return value;
}

int64_t NodeReader::number_or(int64_t absent, const char* name, int64_t least, int64_t most) const {
  int64_t value = 0;
  return find_number(name, &value) ? number(name, "", least, most) : absent;
}

float NodeReader::finite(const char* name, const char* meaning) const {
  float value = 0.0f;
  if (OrtStatus* status = ort_.KernelInfoGetAttribute_float(info_, name, &value)) {
    ort_.ReleaseStatus(status);
    fail("attribute %s is missing, expected %s", name, meaning);
  }
  if (!std::isfinite(value)) {
    fail("attribute %s is %g, expected a finite number", name, static_cast<double>(value));
  }
  return value;
}

Mode NodeReader::mode() const {
  int64_t exact = 0;  // not given: the default
  find_number("exact", &exact);
  if (exact != 0 && exact != 1) fail("attribute exact is %lld, expected 0 or 1", as_long(exact));
  if (session_.mode != SessionMode::kOfNode) return session_.mode == SessionMode::kExact ? Mode::kExact : Mode::kLut;
  return exact == 1 ? Mode::kExact : Mode::kLut;
}

bool NodeReader::has_constant(size_t index) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(ort_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  return is_constant && value != nullptr;
}

Tensor NodeReader::constant(size_t index) const {
  const Input& input = signature_.inputs[index];
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(ort_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  if (!is_constant || value == nullptr) {
    fail("%s is computed at run time or can be overridden by the caller, expected a constant initializer",
         input.name);
  }
  Tensor t = read(value, input);
  if (t.copy != nullptr) copies_.push_back(t.copy);
  return t;
}

Tensor NodeReader::codes(size_t index, int64_t K, const char* name) const {
  const Tensor codes = constant(index);
  const int64_t width = divide_up(K, 8);
  if (codes.rank != 2 || codes.dims[1] != width || codes.dims[0] > kMostNumber) {
    fail("%s has shape %s, expected (N, %lld) for attribute %s = %lld", name_of(index), shape_text(codes).c_str(),
         as_long(width), name, as_long(K));
  }
  return codes;
}

Tensor NodeReader::scales(size_t index, int64_t length) const {
  const Tensor t = constant(index);
  expect_vector(t, name_of(index), length);
  expect_finite(t, name_of(index));
  return t;
}

}  // namespace lit_binq
