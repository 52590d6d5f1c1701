// One tile of the product of rows of weights and tokens: sums of a few rows with a few tokens, held in registers.
//
// Weights are read where they lie, row by row, as the checkpoint has them: nothing is packed and nothing is copied,
// so a tied embedding stays one tensor, and any other code may still use it. x is "prepared": padded with zeros to
// whole blocks, and where no instruction multiplies bfloat16, as float32 "split" in each block as load_pair gives it.

#pragma once

#include "simd.h"

#include <algorithm>
#include <type_traits>

namespace adapterd {

#if defined(__AVX512BF16__)
// vdpbf16ps multiplies bfloat16 as it is, two products a lane: x stays bfloat16 beside weights of it.
template <typename T>
using Prepared = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
#else
template <typename T>
using Prepared = float;
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kFewRegisters = true;  // 16
#else
constexpr bool kFewRegisters = false;  // 32
#endif

constexpr int64_t kLineBytes = 64;                  // of a cache
constexpr int kGroupRows = 16;                      // rows of weights that meet all tokens before the next rows are read
constexpr int kTileTokens = kFewRegisters ? 5 : 6;  // tokens that a tile takes at most

// Rows of weights that a tile of so many tokens takes. Its sums must stay in registers beside a block of weights and one
// of x, so 4 * 6 go with 32 registers, 2 * 5 with 16; and be many, since each product waits for its sum's last.
constexpr int tile_rows(int tokens) { return kFewRegisters && tokens > 2 ? 2 : 4; }
constexpr int kTileRows = tile_rows(1);

// Whether a tile's rows lie apart, a share of the group from one to the next, and not side by side. The one
// processor without AVX-512 that was measured (Zen 3) fetches ahead within a page alone: read from four pages at once,
// memory gives half as much again as from one, and to ask for each row as well adds nothing.
constexpr bool kSpreadRows = kFewRegisters;

// Columns at a time: a tile's tokens of them, 24 KiB at most, stay in the first cache.
template <typename T>
constexpr int64_t kChunk = 4096 / sizeof(Prepared<T>);

// The same for so many tokens: fewer can have more. A multiple of kChunk.
template <typename T>
inline int64_t chunk_columns(int64_t tokens) {
  return kSpreadRows ? kChunk<T> * std::max<int64_t>(1, kTileTokens / std::max<int64_t>(1, tokens)) : kChunk<T>;
}

// Numbers from one prepared row to the next: whole blocks, and one more, since rows a multiple of 4096 bytes apart
// would all fall into the same few lines of the first cache.
inline int64_t prepared_stride(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock + kBlock; }

// One row of x, prepared. out holds prepared_stride(n) numbers.
template <typename T>
inline void prepare_row(const T* x, int64_t n, Prepared<T>* out) {
  const int64_t whole = n / kBlock * kBlock;
  if constexpr (std::is_same_v<Prepared<T>, bf16>) {
    std::memcpy(out, x, n * sizeof(bf16));
    if (whole < n) std::memset(out + n, 0, (whole + kBlock - n) * sizeof(bf16));
  } else {
    for (int64_t k = 0; k < whole; k += kBlock) store_pair(out + k, load_pair(x + k));
    if (whole < n) store_pair(out + whole, load_pair(x + whole, n - whole));
  }
}

// What to fetch from memory while computing on what is already here: `count` rows from `rows` on.
template <typename W>
struct Prefetch {
  const W* rows = nullptr;
  int count = 0;
};

// Else a compiler that runs short of registers reads it anew from memory for each product, or puts off a sum.
template <typename V>
inline void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));  // any vector register
#endif
}

// out[i * ldo + j * gap] += the lanes of sums[i][j].
template <int NW, int NX>
__attribute__((always_inline)) inline void add_sums(const Vec (&sums)[NX][NW], float* out, int64_t ldo, int64_t gap) {
  const auto add = [gap](float* to, const auto& four, int first, int count) __attribute__((always_inline)) {
    if constexpr (kSpreadRows || NW != 4) {
      for (int j = 0; j < count; ++j) to[j * gap] += four[first + j];
    } else {
      const auto sum = load_as<Floats<4>::type>(to) + four;
      std::memcpy(to, &sum, sizeof sum);
    }
  };
  if constexpr (NW == 4) {
#pragma GCC unroll 8
    for (int i = 0; i < NX; ++i) {
      add(out + i * ldo, sum_lanes_of_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]), 0, 4);
    }
  } else if constexpr (NW == 2) {
#pragma GCC unroll 8
    for (int i = 0; i + 1 < NX; i += 2) {
      const auto four = sum_lanes_of_four(sums[i][0], sums[i][1], sums[i + 1][0], sums[i + 1][1]);
      add(out + i * ldo, four, 0, 2);
      add(out + (i + 1) * ldo, four, 2, 2);
    }
    if constexpr (NX % 2) {
#pragma GCC unroll 8
      for (int j = 0; j < NW; ++j) out[(NX - 1) * ldo + j * gap] += sum_lanes(sums[NX - 1][j]);
    }
  } else {
    static_assert(NW == 1);
#pragma GCC unroll 8
    for (int i = 0; i < NX; ++i) out[i * ldo] += sum_lanes(sums[i][0]);
  }
}

// out[i * ldo + j * gap] += the product of row j * gap over columns [0, n), i < NX, j < NW, of x prepared for weights
// of type W.
template <int NW, int NX, typename W, typename X>
inline void dot_tile(const W* w, int64_t ldw, int64_t gap, const X* x, int64_t ldx, int64_t n, float* out, int64_t ldo,
                     Prefetch<W> next) {
  const int64_t stride_w = ldw * gap;
  // Every loop over NW or NX must unroll, or the sums live in memory and not in registers.
  Vec sums[NX][NW];
#pragma GCC unroll 8
  for (int i = 0; i < NX; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NW; ++j) sums[i][j] = Vec{};
  }
  const auto add = [&](const W* tile_w, int64_t stride, const X* tile_x) __attribute__((always_inline)) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<X, bf16>) {
      __m512bh weights[NW];
#pragma GCC unroll 8
      for (int j = 0; j < NW; ++j) weights[j] = load_as<__m512bh>(tile_w + j * stride);
#pragma GCC unroll 8
      for (int i = 0; i < NX; ++i) {
        const auto token = load_as<__m512bh>(tile_x + i * ldx);
#pragma GCC unroll 8
        for (int j = 0; j < NW; ++j) sums[i][j] = bits<Vec>(_mm512_dpbf16_ps(bits<__m512>(sums[i][j]), weights[j], token));
      }
      return;
    }
#endif
    if constexpr (std::is_same_v<X, float>) {
      const auto add_half = [&](const float* half_x, auto load) __attribute__((always_inline)) {
        Vec weights[NW];
#pragma GCC unroll 8
        for (int j = 0; j < NW; ++j) weights[j] = load(tile_w + j * stride);
#pragma GCC unroll 8
        for (int i = 0; i < NX; ++i) {
          Vec token = load_as<Vec>(half_x + i * ldx);
          keep_in_register(token);
#pragma GCC unroll 8
          for (int j = 0; j < NW; ++j) sums[i][j] += weights[j] * token;
        }
      };
      add_half(tile_x, [](const W* p) { return load_first(p); });
      // The compiler must not keep both halves of the weights: there are not enough registers.
      const float* second_x = tile_x + kLanes;
      asm volatile("" : "+r"(second_x) : : "memory");
      add_half(second_x, [](const W* p) { return load_second(p); });
    }
  };
  int64_t k = 0;
  for (; k + kBlock <= n; k += kBlock) {
    if (k * sizeof(W) % kLineBytes == 0) {
      for (int r = 0; r < next.count; ++r) __builtin_prefetch(next.rows + r * stride_w + k, 0, 2);
    }
    add(w + k, stride_w, x + k);
  }
  if (k < n) {
    W rest[NW][kBlock] = {};
    for (int j = 0; j < NW; ++j) std::memcpy(rest[j], w + j * stride_w + k, (n - k) * sizeof(W));
    add(rest[0], kBlock, x + k);
  }
  add_sums(sums, out, ldo, gap);
}

}  // namespace adapterd
