// The runtime of fake_runtime.h. Opaque handles are pointers to the structs here; nothing is checked that the library
// should check itself.
#include "tests/fake_runtime.h"

#include <cstring>

#include "abi/export.h"

LIT_BINQ_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

struct OrtStatus {
  int code;
  std::string message;
};
struct OrtValue {
  lit_binq::FakeTensor* tensor;
};
struct OrtTensorTypeAndShapeInfo {
  int type = 0;
  std::vector<int64_t> dims;
  std::vector<std::string> symbols;
};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> ops;
};
struct OrtSessionOptions {
  std::map<std::string, std::string> entries;
  OrtCustomOpDomain* domain = nullptr;
};
struct OrtKernelInfo {
  const lit_binq::FakeNode* node;
  std::vector<OrtValue> values;
};
struct OrtKernelContext {
  const lit_binq::FakeNode* node;
  std::vector<OrtValue> values, outputs;
  lit_binq::Ran* ran;
};
struct OrtShapeInferContext {
  const lit_binq::FakeNode* node;
  std::vector<OrtTensorTypeAndShapeInfo> shapes;
};
struct OrtAllocator {};

namespace lit_binq {

size_t element_bytes(int type) {
  switch (type) {
    case kOrtUint8:
      return 1;
    case kOrtFloat16:
      return 2;
    case 7:
    case 11:
      return 8;  // int64, double
    default:
      return 4;
  }
}

uint64_t count_elements(const std::vector<int64_t>& dims, uint64_t most) {
  uint64_t count = 1;
  for (const int64_t d : dims) {
    if (d == 0) return 0;
  }
  for (const int64_t d : dims) {
    if (d < 0 || static_cast<uint64_t>(d) > most / count) return most + 1;
    count *= static_cast<uint64_t>(d);
  }
  return count;
}

void allocate(FakeTensor& tensor, size_t shift) {
  tensor.bytes = static_cast<size_t>(count_elements(tensor.dims, uint64_t{1} << 40)) * element_bytes(tensor.type);
  tensor.shift = shift;
  tensor.memory.reset(new uint8_t[tensor.bytes + shift]);
  std::memset(tensor.memory.get(), 0, tensor.bytes + shift);
}

namespace {

constexpr size_t kMostOutput = size_t{1} << 26;  // bytes: a runtime has an end too

int64_t made = 0, released = 0;
OrtSessionOptions current;

OrtStatus* status(int code, const char* message) {
  ++made;
  return new OrtStatus{code, message};
}

OrtStatus* get_integer(const OrtKernelInfo* info, const char* name, int64_t* value) {
  const auto found = info->node->attributes.find(name);
  if (found == info->node->attributes.end() || found->second.is_float) return status(kOrtFail, "no such attribute");
  *value = found->second.number;
  return nullptr;
}

OrtStatus* get_float(const OrtKernelInfo* info, const char* name, float* value) {
  const auto found = info->node->attributes.find(name);
  if (found == info->node->attributes.end() || !found->second.is_float) return status(kOrtFail, "no such attribute");
  *value = found->second.real;
  return nullptr;
}

OrtStatus* get_constant(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** value) {
  const bool here =
      index < info->node->inputs.size() && info->node->inputs[index].present && info->node->inputs[index].constant;
  *is_constant = here;
  *value = here ? &info->values[index] : nullptr;
  return nullptr;
}

OrtStatus* get_input(const OrtKernelContext* context, size_t index, const OrtValue** value) {
  if (index >= context->node->inputs.size()) return status(kOrtFail, "no such input");
  *value = context->node->inputs[index].present ? &context->values[index] : nullptr;
  return nullptr;
}

OrtStatus* get_output(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, OrtValue** value) {
  if (index >= context->outputs.size()) return status(kOrtFail, "no such output");
  auto tensor = std::make_unique<FakeTensor>();
  tensor->dims.assign(dims, dims + rank);
  if (count_elements(tensor->dims, kMostOutput) > kMostOutput / sizeof(float)) return status(kOrtFail, "too large");
  allocate(*tensor);
  std::memset(tensor->memory.get(), 0xff, tensor->bytes);  // NaN: whoever forgets to write shows
  context->outputs[index] = {tensor.get()};
  context->ran->outputs[index] = std::move(tensor);
  *value = &context->outputs[index];
  return nullptr;
}

OrtStatus* make_info(OrtTensorTypeAndShapeInfo** info) {
  ++made;
  *info = new OrtTensorTypeAndShapeInfo;
  return nullptr;
}

OrtStatus* info_of(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) {
  make_info(info);
  (*info)->type = value->tensor->type;
  (*info)->dims = value->tensor->dims;
  return nullptr;
}

OrtStatus* get_shape(const OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** info) {
  if (index >= context->shapes.size() || !context->node->inputs[index].present)
    return status(kOrtFail, "no such input");
  *info = const_cast<OrtTensorTypeAndShapeInfo*>(&context->shapes[index]);
  return nullptr;
}

OrtStatus* get_symbols(const OrtTensorTypeAndShapeInfo* info, const char** symbols, size_t rank) {
  for (size_t i = 0; i < rank; ++i) symbols[i] = i < info->symbols.size() ? info->symbols[i].c_str() : "";
  return nullptr;
}

// As the real one, it wants as many symbols as there are dimensions.
OrtStatus* set_symbols(OrtTensorTypeAndShapeInfo* info, const char** symbols, size_t rank) {
  info->symbols.assign(symbols, symbols + rank);
  return nullptr;
}

OrtStatus* get_entry(const OrtSessionOptions* options, const char* name, char* value, size_t* size) {
  const std::string& entry = options->entries.at(name);
  if (value != nullptr) std::memcpy(value, entry.c_str(), std::min(*size, entry.size() + 1));
  *size = entry.size() + 1;
  return nullptr;
}

OrtStatus* make_tensor(OrtAllocator*, const int64_t* dims, size_t rank, int type, OrtValue** value) {
  ++made;
  auto tensor = std::make_unique<FakeTensor>();
  tensor->type = type;
  tensor->dims.assign(dims, dims + rank);
  allocate(*tensor);
  *value = new OrtValue{tensor.release()};
  return nullptr;
}

template <typename T>
OrtApiSlot slot(T* function) {
  return reinterpret_cast<OrtApiSlot>(function);
}

template <typename Result, typename... Arguments>
OrtApiSlot slot(Result (*function)(Arguments...)) {
  return reinterpret_cast<OrtApiSlot>(function);
}

const OrtApiSlot* table() {
  static OrtApiSlot slots[300];
  static OrtAllocator allocator;
  const auto put = [](size_t position, auto function) { slots[position] = slot(+function); };
  put(0, [](int code, const char* message) { return status(code, message); });
  put(1, [](const OrtStatus* s) { return s->code; });
  put(2, [](const OrtStatus* s) { return s->message.c_str(); });
  put(26, [](const char*, OrtCustomOpDomain** domain) -> OrtStatus* {
    *domain = new OrtCustomOpDomain;
    return nullptr;
  });
  put(27, [](OrtCustomOpDomain* domain, const OrtCustomOp* op) -> OrtStatus* {
    domain->ops.push_back(op);
    return nullptr;
  });
  put(28, [](OrtSessionOptions* options, OrtCustomOpDomain* domain) -> OrtStatus* {
    options->domain = domain;
    return nullptr;
  });
  put(48, make_tensor);
  put(50, [](const OrtValue*, int* is) -> OrtStatus* {
    *is = 1;
    return nullptr;
  });
  put(51, [](OrtValue* value, void** data) -> OrtStatus* {
    *data = value->tensor->data();
    return nullptr;
  });
  put(57, make_info);
  put(58, [](OrtTensorTypeAndShapeInfo* info, int type) -> OrtStatus* {
    info->type = type;
    return nullptr;
  });
  put(59, [](OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t rank) -> OrtStatus* {
    info->dims.assign(dims, dims + rank);
    return nullptr;
  });
  put(60, [](const OrtTensorTypeAndShapeInfo* info, int* type) -> OrtStatus* {
    *type = info->type;
    return nullptr;
  });
  put(61, [](const OrtTensorTypeAndShapeInfo* info, size_t* rank) -> OrtStatus* {
    *rank = info->dims.size();
    return nullptr;
  });
  put(62, [](const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t rank) -> OrtStatus* {
    if (rank != 0) std::memcpy(dims, info->dims.data(), rank * sizeof(int64_t));
    return nullptr;
  });
  put(63, get_symbols);
  put(64, [](const OrtTensorTypeAndShapeInfo* info, size_t* count) -> OrtStatus* {
    *count = count_elements(info->dims, uint64_t{1} << 62);
    return nullptr;
  });
  put(65, info_of);
  put(78, [](OrtAllocator** result) -> OrtStatus* {
    *result = &allocator;
    return nullptr;
  });
  put(85, get_float);
  put(86, get_integer);
  put(88, [](const OrtKernelContext* context, size_t* count) -> OrtStatus* {
    *count = context->node->inputs.size();
    return nullptr;
  });
  put(90, get_input);
  put(91, get_output);
  put(93, [](OrtStatus* s) {
    released += s != nullptr;
    delete s;
  });
  put(96, [](OrtValue* value) {
    ++released;
    delete value->tensor;
    delete value;
  });
  put(99, [](OrtTensorTypeAndShapeInfo* info) {
    released += info != nullptr;
    delete info;
  });
  put(101, [](OrtCustomOpDomain* domain) { delete domain; });
  put(237, [](const OrtSessionOptions* options, const char* name, int* found) -> OrtStatus* {
    *found = options->entries.count(name) != 0;
    return nullptr;
  });
  put(238, get_entry);
  put(249, get_constant);
  put(268, get_shape);
  put(270, [](const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*) -> OrtStatus* { return nullptr; });
  put(271, set_symbols);
  put(274,
      [](const OrtKernelContext*, void (*task)(void*, size_t), size_t tasks, size_t, void* argument) -> OrtStatus* {
        for (size_t i = tasks; i-- > 0;) task(argument, i);  // any order will do
        return nullptr;
      });
  return slots;
}

std::string take(OrtStatus* s) {
  if (s == nullptr) return "";
  std::string message = s->message;
  ++released;
  delete s;
  return message;
}

}  // namespace

int64_t alive() { return made - released; }

std::string register_operators(const std::map<std::string, std::string>& entries) {
  static const OrtApiSlot* const slots = table();
  static const OrtApiBase base = {[](uint32_t) { return slots; }, [] { return "1.99.0"; }};
  current = {entries};
  return take(RegisterCustomOps(&current, &base));
}

Ran run(const FakeNode& node, int times) {
  Ran ran;
  const OrtCustomOp* op = nullptr;
  for (const OrtCustomOp* candidate : current.domain->ops) {
    if (node.kind == candidate->GetName(candidate)) op = candidate;
  }
  OrtShapeInferContext shapes = {&node, {}};
  OrtKernelInfo info = {&node, {}};
  for (const FakeInput& input : node.inputs) {
    OrtTensorTypeAndShapeInfo shape;
    shape.type = input.tensor.type;
    if (input.known) shape.dims = input.tensor.dims, shape.symbols = input.symbols;
    for (size_t i = 0; i < shape.symbols.size() && i < shape.dims.size(); ++i) {
      if (!shape.symbols[i].empty()) shape.dims[i] = -1;
    }
    shapes.shapes.push_back(shape);
    info.values.push_back({const_cast<FakeTensor*>(&input.tensor)});
  }
  ran.error = take(op->InferOutputShape(op, &shapes));
  ran.inferred = ran.error.empty();
  void* kernel = nullptr;
  const std::string refused = take(op->CreateKernelV2(op, nullptr, &info, &kernel));
  if (ran.error.empty()) ran.error = refused;
  ran.created = refused.empty();
  if (!ran.created) return ran;
  ran.computed = true;
  for (int i = 0; i < times && ran.computed; ++i) {
    ran.outputs.clear();
    ran.outputs.resize(op->GetOutputTypeCount(op));
    OrtKernelContext context = {&node, info.values, std::vector<OrtValue>(ran.outputs.size(), OrtValue{nullptr}), &ran};
    const std::string failed = take(op->KernelComputeV2(kernel, &context));
    if (ran.error.empty()) ran.error = failed;
    ran.computed = failed.empty();
  }
  op->KernelDestroy(kernel);
  return ran;
}

}  // namespace lit_binq
