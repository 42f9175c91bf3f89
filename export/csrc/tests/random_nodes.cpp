// The nodes of random_nodes.h.
#include "tests/random_nodes.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "common/workspace.h"

namespace lit_binq {
namespace {

enum class Fill { kZero, kBytes, kNormal, kHalf, kPositive };

void fill(Random& random, FakeTensor& t, Fill kind) {
  const size_t size = kind == Fill::kBytes ? 8 : element_bytes(t.type);
  if (kind == Fill::kZero || t.bytes == 0) return;
  for (size_t i = 0; i < t.bytes; i += size) {
    uint8_t* const at = t.data() + i;
    if (kind == Fill::kNormal || kind == Fill::kPositive) {
      const float v = kind == Fill::kNormal ? random.normal() : std::abs(random.normal()) + 0.01f;
      std::memcpy(at, &v, sizeof v);
    } else if (kind == Fill::kHalf) {
      const uint16_t v = random.half();
      std::memcpy(at, &v, sizeof v);
    } else if (kind == Fill::kBytes) {
      const uint64_t v = random.next();
      std::memcpy(at, &v, std::min<size_t>(size, t.bytes - i));
    }
  }
}

FakeInput input(Random& random, int type, std::vector<int64_t> dims, Fill kind, bool constant) {
  FakeInput made;
  made.tensor.type = type;
  made.tensor.dims = std::move(dims);
  made.constant = constant;
  allocate(made.tensor);
  fill(random, made.tensor, kind);
  return made;
}

FakeInput absent() {
  FakeInput made;
  made.present = false;
  allocate(made.tensor);
  return made;
}

// Rows of activations (..., K), of any rank; sometimes huge, tiny, or not finite.
FakeInput activations(Random& random, int64_t K, std::vector<int64_t>* leading) {
  leading->clear();
  const int64_t rank = random.one_in(6) ? random.below(4) : 1;
  for (int64_t i = 0; i < rank; ++i)
    leading->push_back(random.one_in(20) ? 0 : random.one_in(3) ? 1 : 1 + random.below(rank == 1 ? 20 : 4));
  std::vector<int64_t> dims = *leading;
  dims.push_back(K);
  FakeInput x = input(random, kOrtFloat, dims, Fill::kNormal, false);
  float* const values = reinterpret_cast<float*>(x.tensor.data());
  const size_t count = x.tensor.bytes / sizeof(float);
  if (random.one_in(6)) {
    const float scale = random.of({0.0f, 1e-45f, 1e-38f, 1e-20f, 1e20f, 3e37f});
    for (size_t i = 0; i < count; ++i) values[i] *= scale;
  }
  if (random.one_in(8) && count != 0) {
    values[static_cast<size_t>(random.below(static_cast<int64_t>(count)))] =
        random.of({std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                   std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::max()});
  }
  return x;
}

void bias(Random& random, FakeNode& node, int64_t N) {
  const int64_t kind = random.below(4);
  if (kind == 0) return;
  node.inputs.push_back(kind == 1 ? absent() : input(random, kOrtFloat, {N}, Fill::kNormal, kind == 2));
}

void set(FakeNode& node, const char* name, int64_t value) { node.attributes[name] = {false, value, 0.0f}; }
void set_real(FakeNode& node, const char* name, float value) { node.attributes[name] = {true, 0, value}; }

int64_t rows(Random& random) { return random.one_in(40) ? 0 : random.size(300); }

void binary(Random& random, FakeNode& node) {
  const int64_t K = random.size(700), N = rows(random);
  std::vector<int64_t> leading;
  set(node, "K", K);
  node.inputs.push_back(activations(random, K, &leading));
  node.inputs.push_back(input(random, kOrtUint8, {N, divide_up(K, 8)}, Fill::kBytes, true));
  node.inputs.push_back(input(random, kOrtFloat16, {N}, Fill::kHalf, true));
  node.inputs.push_back(input(random, kOrtFloat16, {K}, Fill::kHalf, true));
  bias(random, node, N);
}

int64_t group_of(Random& random, int64_t K) {
  return random.one_in(4)   ? random.of<int64_t>({K, K + 1, 2 * K, INT32_MAX})
         : random.one_in(3) ? random.size(700)
                            : 1 + random.below(160);
}

void grouped(Random& random, FakeNode& node) {
  const int64_t K = random.size(500), N = rows(random), group = group_of(random, K);
  std::vector<int64_t> leading;
  set(node, "K", K), set(node, "group", group);
  node.inputs.push_back(activations(random, K, &leading));
  node.inputs.push_back(input(random, kOrtUint8, {N, divide_up(K, 8)}, Fill::kBytes, true));
  node.inputs.push_back(input(random, kOrtFloat16, {N, divide_up(K, group)}, Fill::kHalf, true));
  bias(random, node, N);
}

int64_t bits_set(const FakeTensor& t, int64_t N, int64_t K) {
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) count += t.data()[n * divide_up(K, 8) + k / 8] >> (k % 8) & 1;
  }
  return count;
}

void two_plane(Random& random, FakeNode& node) {
  const int64_t K = random.size(500), N = rows(random), group = group_of(random, K), L = 2 + random.below(3);
  const int64_t bits = random.of<int64_t>({0, 4, 8});
  std::vector<int64_t> leading;
  node.inputs.push_back(activations(random, K, &leading));
  for (int i = 0; i < 2; ++i) node.inputs.push_back(input(random, kOrtUint8, {N, divide_up(K, 8)}, Fill::kBytes, true));
  node.inputs.push_back(input(random, kOrtFloat16, {N, divide_up(K, group), L}, Fill::kHalf, true));
  FakeInput marks = input(random, kOrtUint8, {divide_up(K, 8)}, random.one_in(2) ? Fill::kBytes : Fill::kZero, true);
  const int64_t P = bits_set(marks.tensor, 1, K);
  node.inputs.push_back(P != 0 ? std::move(marks) : input(random, kOrtUint8, {0}, Fill::kZero, true));
  node.inputs.push_back(input(random, kOrtFloat16, {bits == 4 ? 5 : 0}, Fill::kHalf, true));
  node.inputs.push_back(input(random, kOrtFloat, {random.one_in(2) ? 4 : 0}, Fill::kPositive, true));
  bias(random, node, N);
  set(node, "K", K), set(node, "group", group), set(node, "activation_bits", bits), set(node, "outliers", P);
}

void nbits(Random& random, FakeNode& node) {
  const int64_t K = random.size(600), N = 1 + random.below(80), bits = random.of<int64_t>({4, 8});
  const int64_t block = random.of<int64_t>({16, 32, 64, 128, 256}), G = divide_up(K, block);
  std::vector<int64_t> leading;
  node.inputs.push_back(activations(random, K, &leading));
  node.inputs.push_back(input(random, kOrtUint8, {N, G, block * bits / 8}, Fill::kBytes, true));
  const bool flat = random.one_in(3);
  node.inputs.push_back(
      input(random, kOrtFloat, flat ? std::vector<int64_t>{N * G} : std::vector<int64_t>{N, G}, Fill::kNormal, true));
  if (random.one_in(3)) {  // scales that float16 holds
    float* const s = reinterpret_cast<float*>(node.inputs[2].tensor.data());
    for (int64_t i = 0; i < N * G; ++i) s[i] = std::round(s[i] * 64.0f) / 64.0f;
  }
  const int64_t width = divide_up(G * bits, 8);
  if (random.one_in(2))
    node.inputs.push_back(input(random, kOrtUint8,
                                flat ? std::vector<int64_t>{N * width} : std::vector<int64_t>{N, width}, Fill::kBytes,
                                true));
  set(node, "K", K), set(node, "N", N), set(node, "bits", bits), set(node, "block_size", block);
}

void norm_inputs(Random& random, FakeNode& node, int64_t K) {
  std::vector<int64_t> leading;
  node.inputs.push_back(activations(random, K, &leading));
  leading.push_back(K);
  node.inputs.push_back(
      input(random, kOrtFloat, random.one_in(2) ? std::vector<int64_t>{K} : leading, Fill::kNormal, random.one_in(2)));
  node.inputs.push_back(input(random, kOrtFloat, {K}, Fill::kNormal, true));
  set(node, "K", K), set_real(node, "epsilon", random.of({0.0f, 1e-6f, 1e-5f, 1.0f}));
}

void matrix(Random& random, FakeNode& node, int64_t N, int64_t K) {
  node.inputs.push_back(input(random, kOrtUint8, {N, divide_up(K, 8)}, Fill::kBytes, true));
  node.inputs.push_back(input(random, kOrtFloat16, {N}, Fill::kHalf, true));
  node.inputs.push_back(input(random, kOrtFloat16, {K}, Fill::kHalf, true));
}

void qkv(Random& random, FakeNode& node) {
  const int64_t K = random.size(300);
  norm_inputs(random, node, K);
  int64_t N[3];
  for (int64_t& n : N) matrix(random, node, n = rows(random), K);
  for (const int64_t n : N) {
    if (random.one_in(4)) break;
    node.inputs.push_back(random.one_in(3) ? absent() : input(random, kOrtFloat, {n}, Fill::kNormal, random.one_in(2)));
  }
}

void mlp(Random& random, FakeNode& node) {
  const int64_t K = random.size(300), H = random.size(300), N = rows(random);
  norm_inputs(random, node, K);
  matrix(random, node, H, K), matrix(random, node, H, K), matrix(random, node, N, H);
  set(node, "H", H);
}

void put(FakeTensor& t, size_t i, int32_t value) { std::memcpy(t.data() + 4 * i, &value, sizeof value); }

void attention(Random& random, FakeNode& node) {
  const int64_t kv = 1 + random.below(3), heads = kv * (1 + random.below(4)),
                d = 16 * (1 + random.below(random.one_in(4) ? 9 : 4));
  const int64_t b = random.one_in(20) ? 0 : 1 + random.below(3);
  const int64_t s = random.one_in(20)  ? 0
                    : random.one_in(2) ? 1
                                       : random.size(70),
                past = random.one_in(3) ? 0 : random.below(90);
  const int64_t room = past + random.below(3) * random.below(80), P = std::max<int64_t>(past + s, 1) + random.below(20);
  const int64_t total = past + s, width = (heads + 2 * kv) * d;
  const bool packed = random.one_in(2);
  node.inputs.push_back(input(random, kOrtFloat, {b, s, packed ? width : heads * d}, Fill::kNormal, false));
  for (int i = 0; i < 2; ++i) node.inputs.push_back(input(random, kOrtFloat, {b, kv, room, d}, Fill::kNormal, false));
  FakeInput last = input(random, kOrtInt32, {b}, Fill::kZero, false);
  for (int64_t i = 0; i < b; ++i) {
    const int64_t least = past == 0 ? -1 : s - 1;  // where rows begin, a shorter one is padded
    put(last.tensor, static_cast<size_t>(i),
        static_cast<int32_t>(random.one_in(2) ? total - 1 : least + random.below(total - least)));
  }
  node.inputs.push_back(std::move(last));
  node.inputs.push_back(input(random, kOrtInt32, random.one_in(2) ? std::vector<int64_t>{} : std::vector<int64_t>{1},
                              Fill::kZero, false));
  put(node.inputs.back().tensor, 0, static_cast<int32_t>(total));
  for (int i = 0; i < 2; ++i)
    node.inputs.push_back(input(random, kOrtFloat, {P, d / 2}, Fill::kNormal, random.one_in(2)));
  for (int i = 0; i < 2 && !packed; ++i)
    node.inputs.push_back(input(random, kOrtFloat, {b, s, kv * d}, Fill::kNormal, false));
  set(node, "num_heads", heads), set(node, "kv_num_heads", kv),
      set_real(node, "scale", random.of({0.1f, 1.0f, 0.0f, -3.0f}));
  if (random.one_in(2)) set(node, "local_window_size", random.of<int64_t>({-1, 1, 2, 7, 63, 64, 65, 300, INT64_MAX}));
}

struct Kind {
  const char* name;
  void (*make)(Random&, FakeNode&);
};
constexpr Kind kKinds[] = {
    {"BinaryMatMul", binary},     {"GroupedBinaryMatMul", grouped}, {"TwoPlaneMatMul", two_plane}, {"NBitsMatMul", nbits},
    {"NormBinaryMatMulQKV", qkv}, {"NormBinaryGatedMLP", mlp},      {"CachedAttention", attention}};
constexpr int64_t kKindsCount = sizeof kKinds / sizeof kKinds[0];

int64_t hostile(Random& random, int64_t before) {
  const auto bits = static_cast<uint64_t>(before);
  switch (random.below(7)) {
    case 0:
      return static_cast<int64_t>(bits + random.of<uint64_t>({1, 8, ~uint64_t{0}, ~uint64_t{7}}));
    case 1:
      return random.one_in(2) ? static_cast<int64_t>(bits * 2) : before / 2;
    case 2:
      return random.of<int64_t>({0, 1, 2, 3, 4, 8, 16, 256, -1, -2});
    case 3:
      return random.of<int64_t>(
          {INT64_MAX, INT64_MAX - 1, INT64_MAX - 7, INT64_MIN, INT64_MIN + 1, INT64_MAX / 2, INT64_MAX / 8 + 1});
    case 4:
      return random.of<int64_t>({INT32_MAX, int64_t{INT32_MAX} + 1, int64_t{1} << 32, INT32_MIN, int64_t{1} << 40,
                                 int64_t{1} << 47, (int64_t{1} << 47) + 1});
    case 5:
      return static_cast<int64_t>(random.next() >> random.below(64));
    default:
      return (int64_t{1} << random.below(62)) + random.below(3) - 1;
  }
}

// New dimensions get new memory, where that is of a size that a file may have; else another dimension becomes 0.
void reshape(Random& random, FakeTensor& t) {
  constexpr uint64_t kMost = uint64_t{1} << 20;
  for (int64_t& d : t.dims) {
    if (d < 0) d = 0;  // no tensor has such a shape
  }
  if (count_elements(t.dims, kMost) > kMost) {
    t.dims[static_cast<size_t>(random.below(static_cast<int64_t>(t.dims.size())))] = 0;
  }
  if (count_elements(t.dims, kMost) > kMost) t.dims = {0};
  allocate(t, t.shift);
  fill(random, t,
       t.type == kOrtFloat     ? Fill::kNormal
       : t.type == kOrtFloat16 ? Fill::kHalf
       : t.type == kOrtInt32   ? Fill::kZero
                               : Fill::kBytes);
}

}  // namespace

FakeNode random_node(Random& random) {
  FakeNode node;
  const Kind& kind = kKinds[random.below(kKindsCount)];
  node.kind = kind.name;
  if (random.one_in(2)) set(node, "exact", random.below(2));
  kind.make(random, node);
  return node;
}

void misplace(Random& random, FakeNode& node) {
  for (FakeInput& constant : node.inputs) {
    if (!constant.constant || !random.one_in(8)) continue;
    FakeTensor moved;
    moved.type = constant.tensor.type, moved.dims = constant.tensor.dims;
    allocate(moved, static_cast<size_t>(1 + random.below(3)));
    if (moved.bytes != 0) std::memcpy(moved.data(), constant.tensor.data(), moved.bytes);
    constant.tensor = std::move(moved);
  }
}

void damage(Random& random, FakeNode& node) {
  FakeInput& chosen = node.inputs[static_cast<size_t>(random.below(static_cast<int64_t>(node.inputs.size())))];
  FakeTensor& t = chosen.tensor;
  auto attribute = node.attributes.begin();
  std::advance(attribute, random.below(static_cast<int64_t>(std::max<size_t>(node.attributes.size(), 1))));
  const bool has_attribute = attribute != node.attributes.end();
  switch (random.below(14)) {
    case 0:
    case 1:
    case 2:
      if (!has_attribute) return;
      attribute->second.number = hostile(random, attribute->second.number);
      attribute->second.real = random.of(
          {0.0f, -1.0f, 1e38f, -0.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()});
      return;
    case 3:
      if (has_attribute) node.attributes.erase(attribute);
      return;
    case 4:
      if (has_attribute) attribute->second.is_float = !attribute->second.is_float;
      return;
    case 5:
    case 6:
    case 7: {
      if (t.dims.empty() || random.one_in(8)) {
        t.dims.insert(t.dims.begin() + random.below(static_cast<int64_t>(t.dims.size()) + 1),
                      random.of<int64_t>({0, 1, 1, 2}));
      } else if (random.one_in(8)) {
        t.dims.erase(t.dims.begin() + random.below(static_cast<int64_t>(t.dims.size())));
      } else if (random.one_in(30)) {
        t.dims.assign(static_cast<size_t>(random.below(30)), 1);
      } else {
        int64_t& d = t.dims[static_cast<size_t>(random.below(static_cast<int64_t>(t.dims.size())))];
        d = random.one_in(6) ? 0 : hostile(random, d);
      }
      return reshape(random, t);
    }
    case 8:
      t.type = random.of<int>({kOrtFloat, kOrtUint8, 3, kOrtInt32, kOrtFloat16, 7, 11});
      return reshape(random, t);
    case 9:
      chosen.present = !chosen.present;
      return;
    case 10:
      chosen.constant = !chosen.constant;
      return;
    case 11:
      node.inputs.resize(static_cast<size_t>(1 + random.below(static_cast<int64_t>(node.inputs.size()))));
      return;
    case 12:  // damage
      if (t.bytes == 0) return;
      for (int64_t i = 1 + random.below(8); i > 0; --i) {
        t.data()[static_cast<size_t>(random.below(static_cast<int64_t>(t.bytes)))] =
            static_cast<uint8_t>(random.one_in(2) ? 0xff : random.next());
      }
      return;
    default:  // shapes that inference does not know, or knows by name; sizes that no memory bounds
      chosen.known = !random.one_in(3);
      chosen.symbols.assign(t.dims.size(), "");
      for (auto& symbol : chosen.symbols) symbol = random.one_in(3) ? "s" : "";
      return;
  }
}

}  // namespace lit_binq
