// The kernels of attention/kernel.h, written once for registers of W floats. Every instruction set includes
// them for its own registers, with multiply-adds fused where the processor can: results of two instruction sets differ
// by rounding. Uses vectors as GCC and Clang have them in the language; touches nothing.
//
// Nothing of the standard library may be instantiated (sets/avx2.cpp says why).
//
// Softmax goes block by block of keys: `most` is the largest score so far and `sum` the sum of e^(score - most). Where
// a block raises `most`, what is there already is multiplied by e^(old - new).
#pragma once

#include <cstdint>

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__AVX2__)
#include <immintrin.h>
#endif

#include "attention/kernel.h"
#include "common/exp.h"

namespace lit_binq {
namespace {

constexpr float kLowest = -3.402823466e38f;
constexpr float kMinusInfinity = -__builtin_inff();

// Lanes of two vectors by their numbers, those of b from W on.
#if defined(__clang__)
#define LIT_BINQ_LANES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LIT_BINQ_LANES(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// f(l) for each lane l.
#define LIT_BINQ_4(f, l) f(l), f(l + 1), f(l + 2), f(l + 3)
#define LIT_BINQ_8(f, l) LIT_BINQ_4(f, l), LIT_BINQ_4(f, l + 4)
#define LIT_BINQ_16(f, l) LIT_BINQ_8(f, l), LIT_BINQ_8(f, l + 8)

// Lanes whose number has bit H, or has not, of two vectors: what transposing is made of.
#define LIT_BINQ_CLEAR(l) (((l) & H) == 0 ? (l) : kWidth + (l) - H)
#define LIT_BINQ_SET(l) (((l) & H) == 0 ? (l) + H : kWidth + (l))
#define LIT_BINQ_SWAPPED(l) ((l) ^ H)

// Says that a vector is needed in a register here. Without it the compiler loads a vector that R rows of a product use R
// times, and loading takes longer than multiplying.
#if defined(__x86_64__)
#define LIT_BINQ_IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define LIT_BINQ_IN_REGISTER(v) __asm__("" : "+w"(v))
#else
#define LIT_BINQ_IN_REGISTER(v)
#endif

// a * b + c of vectors of so many floats.
#if defined(__aarch64__)
#define LIT_BINQ_FUSED_4(a, b, c) vfmaq_f32(c, a, b)
#else
#define LIT_BINQ_FUSED_4(a, b, c) ((a) * (b) + (c))
#endif
#define LIT_BINQ_FUSED_8(a, b, c) _mm256_fmadd_ps(a, b, c)
#define LIT_BINQ_FUSED_16(a, b, c) _mm512_fmadd_ps(a, b, c)

// A vector type, a multiply-add and the three shuffles.
template <int W>
struct Lanes;

#define LIT_BINQ_DEFINE_LANES(W)                                                                   \
  template <>                                                                                      \
  struct Lanes<W> {                                                                                \
    static constexpr int kWidth = W;                                                               \
    typedef float Floats __attribute__((vector_size(4 * W)));                                      \
    typedef int32_t Ints __attribute__((vector_size(4 * W)));                                      \
    typedef uint32_t Words __attribute__((vector_size(4 * W)));                                    \
    static constexpr Ints kNumbers = {LIT_BINQ_##W(, 0)};                                          \
    static inline Floats fused(Floats a, Floats b, Floats c) {                                     \
      return LIT_BINQ_FUSED_##W(a, b, c);                                                          \
    }                                                                                              \
    template <int H>                                                                               \
    static inline Floats clear(Floats a, Floats b) {                                               \
      return LIT_BINQ_LANES(a, b, LIT_BINQ_##W(LIT_BINQ_CLEAR, 0));                                \
    }                                                                                              \
    template <int H>                                                                               \
    static inline Floats set(Floats a, Floats b) {                                                 \
      return LIT_BINQ_LANES(a, b, LIT_BINQ_##W(LIT_BINQ_SET, 0));                                  \
    }                                                                                              \
    template <int H>                                                                               \
    static inline Floats swapped(Floats a) {                                                       \
      return LIT_BINQ_LANES(a, a, LIT_BINQ_##W(LIT_BINQ_SWAPPED, 0));                               \
    }                                                                                              \
  }

LIT_BINQ_DEFINE_LANES(4);
#if defined(__FMA__)
LIT_BINQ_DEFINE_LANES(8);
#endif
#if defined(__AVX512F__)
LIT_BINQ_DEFINE_LANES(16);
#endif

// W lanes; products take kColumns registers of columns at a time.
template <int W, int kColumns>
struct Attention {
  using L = Lanes<W>;
  using V = typename L::Floats;
  using Ints = typename L::Ints;
  using Words = typename L::Words;

  static inline V load(const float* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static inline void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
  static inline V all(float f) { return f - V{}; }
  // a * b + c, rounded once where the processor can.
  static inline V fused(V a, V b, V c) { return L::fused(a, b, c); }
  static inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }
  static inline V larger(V a, V b) { return a > b ? a : b; }  // b where a is NaN

  template <int H = W / 2>
  static inline float largest(V v) {
    v = larger(v, L::template swapped<H>(v));
    if constexpr (H > 1) return largest<H / 2>(v);
    else return v[0];
  }
  template <int H = W / 2>
  static inline float total(V v) {
    v = v + L::template swapped<H>(v);
    if constexpr (H > 1) return total<H / 2>(v);
    else return v[0];
  }

  // Lane i of the result is the sum of the lanes of v[i].
  template <int H = W / 2>
  static inline V totals(V* v) {
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i) v[i] = L::template clear<H>(v[i], v[i + H]) + L::template set<H>(v[i], v[i + H]);
    if constexpr (H > 1) return totals<H / 2>(v);
    else return v[0];
  }

  // Rows become columns.
  template <int H = W / 2>
  static inline void transpose(V* v) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if ((i & H) != 0) continue;
      const V a = v[i], b = v[i + H];
      v[i] = L::template clear<H>(a, b);
      v[i + H] = L::template set<H>(a, b);
    }
    if constexpr (H > 1) transpose<H / 2>(v);
  }

  // e^x for x <= 0, relative error below 3e-7; 0 below -87; NaN stays.
  static inline V exponential(V x) {
    const V least = all(kLeastExponent);
    V power;
    const V e = exp_parts<Words>(x < least ? least : x, [](V a, V b, V c) { return fused(a, b, c); }, &power);
    return x < least ? V{} : e * power;
  }

  // Scores (columns,), a multiple of W, become e^(score - most). Returns what older sums are to be multiplied by.
  static inline float soften(float* scores, int64_t columns, float& most, float& sum) {
    V high = all(most);
    for (int64_t c = 0; c < columns; c += W) high = larger(load(scores + c), high);
    const float now = largest(high);
    V added = V{};
    for (int64_t c = 0; c < columns; c += W) {
      const V e = exponential(load(scores + c) - now);
      store(scores + c, e);
      added += e;
    }
    const float older = exponential(all(most - now))[0];
    sum = fused(sum, older, total(added));
    most = now;
    return older;
  }

  // Scores (columns,) outside [low, high) become minus infinity.
  static inline void hide(float* scores, int64_t columns, int64_t low, int64_t high) {
    const V nothing = all(kMinusInfinity);
    for (int64_t c = 0; c < columns; c += W) {
      const Ints column = L::kNumbers + static_cast<int32_t>(c);
      const V kept = column >= static_cast<int32_t>(low) ? load(scores + c) : nothing;
      store(scores + c, column < static_cast<int32_t>(high) ? kept : nothing);
    }
  }

  // c (R, N W) = factors * c + a (R, k) b (k, N W), rows `lda`, `ldb`, `ldc` floats apart; without factors c starts at 0.
  template <int R, int N>
  static inline void block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                           const float* factors) {
    V sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r][n] = factors != nullptr ? load(c + r * ldc + n * W) * factors[r] : V{};
    }
    for (int64_t i = 0; i < k; ++i) {
      V x[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        x[n] = load(b + i * ldb + n * W);
        LIT_BINQ_IN_REGISTER(x[n]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float f = a[r * lda + i];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n] = fused(x[n], all(f), sum[r][n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(c + r * ldc + n * W, sum[r][n]);
    }
  }

  template <int R>
  static void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                      int64_t columns, const float* factors) {
    int64_t n = 0;
    for (; n + kColumns * W <= columns; n += kColumns * W) block<R, kColumns>(a, lda, b + n, ldb, c + n, ldc, k, factors);
    for (; n < columns; n += W) block<R, 1>(a, lda, b + n, ldb, c + n, ldc, k, factors);
  }

  // The same for 1 to kQueryRows rows and any multiple of W of columns.
  static inline void multiply(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                              int64_t ldc, int64_t k, int64_t columns, const float* factors) {
    static_assert(kQueryRows == 6, "one case for each number of rows");
    switch (rows) {
      case 1: return product<1>(a, lda, b, ldb, c, ldc, k, columns, factors);
      case 2: return product<2>(a, lda, b, ldb, c, ldc, k, columns, factors);
      case 3: return product<3>(a, lda, b, ldb, c, ldc, k, columns, factors);
      case 4: return product<4>(a, lda, b, ldb, c, ldc, k, columns, factors);
      case 5: return product<5>(a, lda, b, ldb, c, ldc, k, columns, factors);
      default: return product<6>(a, lda, b, ldb, c, ldc, k, columns, factors);
    }
  }

  static inline void scale(const float* x, float factor, float* y, int64_t d) {
    for (int64_t i = 0; i < d; i += W) store(y + i, load(x + i) * factor);
  }

  static void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t half,
                     float factor, float* __restrict y) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i];
      y[i] = fused(a, cos[i], -(b * sin[i])) * factor;
      y[half + i] = fused(b, cos[i], a * sin[i]) * factor;
    }
  }

  // Scores of W keys for every query of the group, `count` of them keys: the last one stands for those beyond. D is d
  // where it is known, else 0: rows of keys at known distances leave the compiler registers for addresses.
  template <bool kAll, int D>
  static inline void scores(const DecodeArgs& t, const float* keys, int64_t count, float* out) {
    const int64_t d = D != 0 ? D : t.d;
    for (int64_t g = 0; g < t.group; ++g) {
      const float* query = t.queries + g * d;
      V sum[W] = {};
      for (int64_t i = 0; i < d; i += W) {
        const V q = load(query + i);
#pragma GCC unroll 16
        for (int64_t j = 0; j < W; ++j) {
          const int64_t key = kAll || j < count ? j : count - 1;
          sum[j] = fused(q, load(keys + key * d + i), sum[j]);
        }
      }
      store(out + g * kOneBlock, totals(sum));
    }
  }

  // The same for whole registers of keys of a block. Returns how many keys those are.
  template <int D>
  static int64_t many_scores(const DecodeArgs& t, const float* keys, int64_t count, float* out) {
    int64_t c = 0;
    for (; c + W <= count; c += W) scores<true, D>(t, keys + c * t.d, W, out + c);
    return c;
  }

  static void one(const DecodeArgs& t) {
    float* const scored = t.workspace;  // (group, kOneBlock)
    float* const most = scored + t.group * kOneBlock;
    float* const sum = most + t.group;
    float* const older = sum + t.group;
    for (int64_t g = 0; g < t.group; ++g) most[g] = kLowest, sum[g] = 0.0f;
    for (int64_t first = 0; first < t.n; first += kOneBlock) {
      const int64_t count = t.n - first < kOneBlock ? t.n - first : kOneBlock;
      const float* const keys = t.keys + first * t.d;
      int64_t c = t.d == 64    ? many_scores<64>(t, keys, count, scored)
                  : t.d == 128 ? many_scores<128>(t, keys, count, scored)
                               : many_scores<0>(t, keys, count, scored);
      if (c < count) {
        scores<false, 0>(t, keys + c * t.d, count - c, scored + c);
        for (int64_t g = 0; g < t.group; ++g) hide(scored + g * kOneBlock + c, W, 0, count - c);
        c += W;
      }
      for (int64_t g = 0; g < t.group; ++g) older[g] = soften(scored + g * kOneBlock, c, most[g], sum[g]);
      for (int64_t g = 0; g < t.group; g += kQueryRows) {
        const int64_t rows = t.group - g < kQueryRows ? t.group - g : kQueryRows;
        multiply(rows, scored + g * kOneBlock, kOneBlock, t.values + first * t.d, t.d, t.out + g * t.d, t.d, count, t.d,
                 first != 0 ? older + g : nullptr);
      }
    }
    for (int64_t g = 0; g < t.group; ++g) scale(t.out + g * t.d, 1.0f / sum[g], t.out + g * t.d, t.d);
  }

  // transposed (d, kKeyBlock) from keys (count, d), zeros beyond them.
  static inline void transpose_keys(const float* keys, int64_t count, int64_t d, float* transposed) {
    for (int64_t c = 0; c < kKeyBlock; c += W) {
      for (int64_t i = 0; i < d; i += W) {
        V v[W];
#pragma GCC unroll 16
        for (int64_t j = 0; j < W; ++j) v[j] = c + j < count ? load(keys + (c + j) * d + i) : V{};
        transpose(v);
#pragma GCC unroll 16
        for (int64_t j = 0; j < W; ++j) store(transposed + (i + j) * kKeyBlock + c, v[j]);
      }
    }
  }

  static void tile(const TokenTile& t) {
    const int64_t rows = t.group * t.tokens, end = t.first + t.tokens;
    float* const transposed = t.workspace;                        // (d, kKeyBlock)
    float* const scored = transposed + t.d * kKeyBlock;           // (kQueryRows, kKeyBlock)
    float* const sums = scored + kQueryRows * kKeyBlock;      // (rows, d)
    float* const most = sums + rows * t.d;
    float* const sum = most + rows;
    for (int64_t i = 0; i < rows * t.d; ++i) sums[i] = 0.0f;
    for (int64_t r = 0; r < rows; ++r) most[r] = kLowest, sum[r] = 0.0f;
    const int64_t seen = t.first >= t.window ? t.first - t.window + 1 : 0;
    for (int64_t key = seen / kKeyBlock * kKeyBlock; key < end; key += kKeyBlock) {
      const int64_t count = end - key < kKeyBlock ? end - key : kKeyBlock;
      transpose_keys(t.keys + key * t.d, count, t.d, transposed);
      for (int64_t g = 0; g < t.group; ++g) {
        for (int64_t j = 0; j < t.tokens; j += kQueryRows) {
          const int64_t together = t.tokens - j < kQueryRows ? t.tokens - j : kQueryRows;
          // Columns of this block that the last of these tokens sees, and that the first of them still does.
          const int64_t reach = t.first + j + together - key;
          const int64_t start = t.first + j - t.window + 1 - key;
          if (reach <= 0 || start >= count) continue;
          const int64_t used = reach < count ? reach : count, columns = (used + W - 1) / W * W;
          const int64_t row = g * t.tokens + j;
          multiply(together, t.queries + row * t.d, t.d, transposed, kKeyBlock, scored, kKeyBlock, t.d, columns, nullptr);
          float older[kQueryRows];
          for (int64_t r = 0; r < together; ++r) {
            const int64_t high = t.first + j + r + 1 - key, low = start + r > 0 ? start + r : 0;
            if (high < columns || low > 0) hide(scored + r * kKeyBlock, columns, low, high);
            older[r] = soften(scored + r * kKeyBlock, columns, most[row + r], sum[row + r]);
          }
          multiply(together, scored, kKeyBlock, t.values + key * t.d, t.d, sums + row * t.d, t.d, used, t.d, older);
        }
      }
    }
    for (int64_t g = 0; g < t.group; ++g) {
      for (int64_t j = 0; j < t.tokens; ++j) {
        const int64_t row = g * t.tokens + j;
        scale(sums + row * t.d, 1.0f / sum[row], t.out + j * t.out_stride + g * t.d, t.d);
      }
    }
  }

  static constexpr AttentionKernels kernels() { return {rotate, one, tile}; }
};

}  // namespace
}  // namespace lit_binq
