// The operator lit_binq.CachedAttention, version 1: causal attention of new tokens over a cache, rotary embedding and
// grouped heads included, as com.microsoft.GroupQueryAttention has it; that is its function body.
//
//   query           float32 (b, s, heads * d), or (b, s, (heads + 2 kv) * d) where key and value are left out:
//                   queries, keys and values beside each other
//   past_key        float32 (b, kv, c, d)    room for c tokens of each row
//   past_value      float32 (b, kv, c, d)
//   last_positions  int32   (b,)             how many tokens each row has, the new ones included, less one
//   total_tokens    int32   ()               t, at least that of the longest row
//   cos, sin        float32 (P, d / 2)       rotary angles by position
//   key, value      float32 (b, s, kv * d)   optional
//   heads           float32 (b, s, heads * d)
//   present_key     float32 (b, kv, max(c, t), d)
//   present_value   float32 (b, kv, max(c, t), d)
//   num_heads           int
//   kv_num_heads        int, divides num_heads
//   scale               float, of the scores
//   local_window_size   int, how many tokens a token sees, itself included; -1, the default: all before it
//
// Where t = s, rows begin: new tokens are 0 to s - 1, a shorter row's are followed by padding, for which heads are 0.
// Else new tokens are the last s of each row. Where a present buffer is the memory of past, only new tokens are
// written; else it takes past's tokens, the new ones, and zeros.
#include <algorithm>

#include "attention/attention.h"
#include "ops/operator.h"
#include "ops/operators.h"

namespace lit_binq {
namespace {

constexpr size_t kPastKey = 1, kPastValue = 2, kLast = 3, kTotal = 4, kCos = 5, kSin = 6, kKey = 7, kValue = 8;

class CachedAttention final : public Operator {
 public:
  static constexpr Input kInputs[] = {{"query", kOrtFloat},          {"past_key", kOrtFloat},
                                      {"past_value", kOrtFloat},     {"last_positions", kOrtInt32},
                                      {"total_tokens", kOrtInt32},   {"cos", kOrtFloat},
                                      {"sin", kOrtFloat},            {"key", kOrtFloat},
                                      {"value", kOrtFloat}};
  static constexpr Signature kSignature = {"CachedAttention", kInputs, 9, 2, nullptr, 0, 3};

  explicit CachedAttention(const NodeReader& node)
      : Operator(node), kernels_(node.kernels().attention) {
    heads_ = node.number("num_heads", "the number of query heads");
    kv_heads_ = node.number("kv_num_heads", "the number of key and value heads");
    if (heads_ % kv_heads_ != 0) {
      fail("attribute num_heads is %lld, expected a multiple of kv_num_heads = %lld", as_long(heads_),
           as_long(kv_heads_));
    }
    scale_ = node.finite("scale", "the factor of the scores");
    window_ = node.number_or(-1, "local_window_size", INT64_MIN, INT64_MAX);
    if (window_ != -1 && window_ < 1) {
      fail("attribute local_window_size is %lld, expected at least 1, or -1 for all tokens", as_long(window_));
    }
    window_ = window_ == -1 ? kAll : std::min(window_, kAll);
  }

  void compute(OrtKernelContext* context) const {
    const bool packed = !is_given(context, kKey);
    if (packed == is_given(context, kValue)) {
      fail("%s is missing, expected key and value, or neither of them", packed ? "key" : "value");
    }
    const Tensor query = read_input(context, 0), past_key = read_input(context, kPastKey);
    const Tensor past_value = read_input(context, kPastValue), last = read_input(context, kLast);
    const Tensor cos = read_input(context, kCos), sin = read_input(context, kSin);
    AttentionArgs a = {};
    a.heads = heads_, a.kv_heads = kv_heads_, a.scale = scale_, a.window = window_;
    if (query.rank != 3) fail("query has shape %s, expected 3 dimensions", shape_text(query).c_str());
    a.batch = query.dims[0], a.tokens = query.dims[1];
    expect_cache(past_key, kPastKey, a.batch);
    expect_cache(past_value, kPastValue, a.batch);
    a.past_room = past_key.dims[2], a.d = past_key.dims[3];
    if (past_value.dims[2] != a.past_room || past_value.dims[3] != a.d) {
      fail("past_value has shape %s, expected %s as past_key", shape_text(past_value).c_str(),
           shape_text(past_key).c_str());
    }
    const int64_t q_width = product(heads_, a.d, "columns of all heads"), kv_width = kv_heads_ * a.d;
    expect_tokens(query, 0, a, packed ? q_width + 2 * kv_width : q_width);
    a.q = query.as<float>(), a.q_stride = query.dims[2];
    Tensor key, value;
    if (packed) {
      a.k = a.q + q_width, a.v = a.k + kv_width, a.kv_stride = a.q_stride;
    } else {
      key = read_input(context, kKey), value = read_input(context, kValue);
      expect_tokens(key, kKey, a, kv_width);
      expect_tokens(value, kValue, a, kv_width);
      a.k = key.as<float>(), a.v = value.as<float>(), a.kv_stride = kv_width;
    }
    expect_angles(cos, kCos, cos.dims[0], a.d);
    expect_angles(sin, kSin, cos.dims[0], a.d);
    a.cos = cos.as<float>(), a.sin = sin.as<float>();
    expect_vector(last, "last_positions", a.batch);
    a.last = last.as<int32_t>();
    const int64_t total = read_total(context, a, cos.dims[0]);
    expect_lengths(a, total, cos.dims[0]);
    a.room = std::max(a.past_room, total);
    a.past_key = past_key.as<float>(), a.past_value = past_value.as<float>();

    const int64_t heads_dims[] = {a.batch, a.tokens, q_width};
    const int64_t cache_dims[] = {a.batch, kv_heads_, a.room, a.d};
    a.out = make_output(context, 0, heads_dims, 3);
    a.key = make_output(context, 1, cache_dims, 4);
    a.value = make_output(context, 2, cache_dims, 4);
    const bool shared = past_key.elements != 0 && (a.key == a.past_key || a.value == a.past_value);
    if (a.room != a.past_room && shared) {  // without rows neither has an address
      fail("past and present share memory for %lld tokens, expected room for total_tokens = %lld",
           as_long(a.past_room), as_long(total));
    }
    PoolExecutor executor(ort(), context);
    attend(kernels_, a, executor);
    check(executor.status);
    call_count().fetch_add(1, std::memory_order_relaxed);
  }

  // Only `heads`: how large the cache will be is not known before total_tokens is.
  static void infer(const OrtApi& ort, const Signature&, const OrtShapeInferContext* context) {
    OrtTensorTypeAndShapeInfo* key = nullptr;
    if (OrtStatus* status = ort.ShapeInferContext_GetInputTypeShape(context, kKey, &key)) {
      ort.ReleaseStatus(status);
      key = nullptr;  // left out
    }
    Shape heads = input_shape(ort, context, 0);
    const Shape past = input_shape(ort, context, kPastKey);
    if (heads.dims.size() != 3 || past.dims.size() != 4) return;
    const int64_t kv = past.dims[1], d = past.dims[3];
    if (key == nullptr) {
      int64_t width = 0;  // of keys and values, which are in heads.dims[2] too
      if (kv < 0 || kv > kMostNumber || d < 0 || __builtin_mul_overflow(2 * kv, d, &width)) return;
      heads.dims[2] = std::max(heads.dims[2] - width, int64_t{-1});
    }
    heads.symbols[2] = "";
    set_output_shape(ort, context, 0, heads);
  }

 private:
  static constexpr int64_t kAll = int64_t{1} << 31;  // above every position

  void expect_cache(const Tensor& t, size_t index, int64_t batch) const {
    const bool fits = t.rank == 4 && t.dims[0] == batch && t.dims[1] == kv_heads_ && t.dims[3] > 0 &&
                      t.dims[3] % kHeadUnit == 0;
    if (!fits) {
      fail("%s has shape %s, expected (%lld, %lld, tokens, a multiple of %lld)", name_of(index),
           shape_text(t).c_str(), as_long(batch), as_long(kv_heads_), as_long(kHeadUnit));
    }
  }

  void expect_tokens(const Tensor& t, size_t index, const AttentionArgs& a, int64_t width) const {
    if (t.rank != 3 || t.dims[0] != a.batch || t.dims[1] != a.tokens || t.dims[2] != width) {
      fail("%s has shape %s, expected (%lld, %lld, %lld) for %lld and %lld heads of %lld",
           name_of(index), shape_text(t).c_str(), as_long(a.batch), as_long(a.tokens), as_long(width),
           as_long(heads_), as_long(kv_heads_), as_long(a.d));
    }
  }

  void expect_angles(const Tensor& t, size_t index, int64_t positions, int64_t d) const {
    if (t.rank != 2 || t.dims[0] != positions || t.dims[1] != d / 2) {
      fail("%s has shape %s, expected (positions, %lld), as many positions as cos", name_of(index),
           shape_text(t).c_str(), as_long(d / 2));
    }
  }

  // A cache grows to it: it must not be beyond what the model has positions for.
  int64_t read_total(const OrtKernelContext* context, const AttentionArgs& a, int64_t positions) const {
    const Tensor t = read_input(context, kTotal);
    if (t.elements != 1) fail("total_tokens has shape %s, expected one number", shape_text(t).c_str());
    const int64_t total = *t.as<int32_t>(), most = std::max(positions, a.past_room);
    if (total < a.tokens || total > most) {
      fail("total_tokens is %lld, expected %lld to %lld", as_long(total), as_long(a.tokens), as_long(most));
    }
    return total;
  }

  void expect_lengths(AttentionArgs& a, int64_t total, int64_t positions) const {
    a.first = total == a.tokens;
    const int64_t least = a.first ? -1 : a.tokens - 1, most = std::min(total, positions) - 1;
    for (int64_t i = 0; i < a.batch; ++i) {
      if (a.last[i] < least || a.last[i] > most) {
        fail("last_positions[%lld] is %lld, expected %lld to %lld for %lld new tokens, total_tokens = %lld and %lld "
             "positions", as_long(i), as_long(a.last[i]), as_long(least), as_long(most), as_long(a.tokens),
             as_long(total), as_long(positions));
      }
      // Tokens before the new ones are read from past.
      const int64_t past = a.first ? 0 : a.last[i] + int64_t{1} - a.tokens;
      if (past > a.past_room) {
        fail("last_positions[%lld] is %lld with %lld new tokens, expected at most %lld tokens before them, which is "
             "what past_key has room for", as_long(i), as_long(a.last[i]), as_long(a.tokens), as_long(a.past_room));
      }
    }
  }

  const AttentionKernels& kernels_;
  int64_t heads_ = 0, kv_heads_ = 0, window_ = -1;
  float scale_ = 0.0f;
};

}  // namespace

Description cached_attention_op(const OrtApi& ort, const SessionOptions& session) {
  return describe<CachedAttention>(ort, session);
}

}  // namespace lit_binq
