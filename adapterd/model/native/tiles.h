// The two products that everything here is made of. Both accumulate in float32.
//
//   dot   out[i][j] += sum_k w[j][k] * x[i][k]      rows of weights, of A, of keys
//   axpy  y[i][:]  += sum_r h[i][r] * b[r][:]      rows of B, of values
//
// Weights are read where they lie, row by row, as the checkpoint has them: nothing is packed and nothing is copied,
// so a tied embedding stays one tensor, and any other code may still use it. x is "prepared": padded with zeros to
// whole blocks, and where no instruction multiplies bfloat16, as float32 "split" in each block as load_pair gives it.

#pragma once

#include "simd.h"

#include <algorithm>
#include <type_traits>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace adapterd {

#if defined(__AVX512BF16__)
// vdpbf16ps multiplies bfloat16 as it is, two products a lane: x stays bfloat16 beside weights of it.
template <typename T>
using Prepared = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
#else
template <typename T>
using Prepared = float;
#endif

constexpr int kTileRows = 4;    // rows of weights that a tile takes
constexpr int kGroupRows = 16;  // rows of weights that meet all tokens before the next rows are read
constexpr int kTileTokens = 6;  // tokens that a tile takes: 4 * 6 sums, with a block of weights, fill 32 registers

// Columns at a time: 6 tokens of them, 24 KiB, stay in the first cache.
template <typename T>
constexpr int64_t kChunk = 24 * 1024 / (kTileTokens * sizeof(Prepared<T>));

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
template <typename T>
struct Prefetch {
  const T* rows = nullptr;
  int count = 0;
};

// out[i * ldo + j] += the product over columns [0, n), i < NX, j < NW.
template <typename T, int NW, int NX>
inline void dot_tile(const T* w, int64_t ldw, const Prepared<T>* x, int64_t ldx, int64_t n, float* out, int64_t ldo,
                     Prefetch<T> next) {
  // Every loop over NW or NX must unroll, or the sums live in memory and not in registers.
  Vec sums[NX][NW];
#pragma GCC unroll 8
  for (int i = 0; i < NX; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NW; ++j) sums[i][j] = Vec{};
  }
  const auto add = [&](const T* tile_w, int64_t stride, const Prepared<T>* tile_x) __attribute__((always_inline)) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) {
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
    if constexpr (std::is_same_v<Prepared<T>, float>) {
      Vec weights[NW];
#pragma GCC unroll 8
      for (int j = 0; j < NW; ++j) weights[j] = load_first(tile_w + j * stride);
#pragma GCC unroll 8
      for (int i = 0; i < NX; ++i) {
        const Vec token = load_as<Vec>(tile_x + i * ldx);
#pragma GCC unroll 8
        for (int j = 0; j < NW; ++j) sums[i][j] += weights[j] * token;
      }
      // The compiler must not keep both halves of the weights: with 24 sums there are not enough registers.
      asm volatile("" ::: "memory");
#pragma GCC unroll 8
      for (int j = 0; j < NW; ++j) weights[j] = load_second(tile_w + j * stride);
#pragma GCC unroll 8
      for (int i = 0; i < NX; ++i) {
        const Vec token = load_as<Vec>(tile_x + i * ldx + kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < NW; ++j) sums[i][j] += weights[j] * token;
      }
    }
  };
  int64_t k = 0;
  for (; k + kBlock <= n; k += kBlock) {
    for (int r = 0; r < next.count; ++r) __builtin_prefetch(next.rows + r * ldw + k, 0, 2);
    add(w + k, ldw, x + k);
  }
  if (k < n) {
    T rest[NW][kBlock] = {};
    for (int j = 0; j < NW; ++j) std::memcpy(rest[j], w + j * ldw + k, (n - k) * sizeof(T));
    add(rest[0], kBlock, x + k);
  }
#pragma GCC unroll 8
  for (int i = 0; i < NX; ++i) {
    if constexpr (NW == 4) {
      const auto four = load_as<Floats<4>::type>(out + i * ldo) +
                        sum_lanes_of_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
      std::memcpy(out + i * ldo, &four, sizeof four);
    } else {
      static_assert(NW == 1);
      out[i * ldo] += sum_lanes(sums[i][0]);
    }
  }
}

template <typename T, int NW>
inline void dot_tokens(int tokens, const T* w, int64_t ldw, const Prepared<T>* x, int64_t ldx, int64_t n, float* out,
                       int64_t ldo, Prefetch<T> next) {
  switch (tokens) {
    case 1: return dot_tile<T, NW, 1>(w, ldw, x, ldx, n, out, ldo, next);
    case 2: return dot_tile<T, NW, 2>(w, ldw, x, ldx, n, out, ldo, next);
    case 3: return dot_tile<T, NW, 3>(w, ldw, x, ldx, n, out, ldo, next);
    case 4: return dot_tile<T, NW, 4>(w, ldw, x, ldx, n, out, ldo, next);
    case 5: return dot_tile<T, NW, 5>(w, ldw, x, ldx, n, out, ldo, next);
    default: return dot_tile<T, NW, 6>(w, ldw, x, ldx, n, out, ldo, next);
  }
}

// Ask for `count` rows of n numbers each, `stride` apart, before they are needed.
template <typename T>
inline void prefetch_rows(const T* rows, int64_t stride, int64_t count, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(rows + r * stride + i, 0, 2);
  }
}

// out[i * ldo + j] += the product over columns [0, n), for j < rows and any number of tokens. `next` is
// what will be multiplied after this, as many rows with the same stride: while the processor is busy with what is
// here, each tile asks memory for its share of them, else memory would stand idle for all passes but the first.
//
//            x: 6 tokens, stay in the first cache
//   w  rows 0..3     tile -> tile       the second six tokens meet the same rows in the second cache
//      rows 4..7     tile -> tile
//      ...
template <typename T>
inline void dot_group(int rows, const T* w, int64_t ldw, const Prepared<T>* x, int64_t ldx, int64_t tokens, int64_t n,
                      float* out, int64_t ldo, const T* next) {
  if (tokens == 0) return;
  const int64_t passes = (tokens + kTileTokens - 1) / kTileTokens;
  const int64_t share = (kTileRows + passes - 1) / passes;
  int64_t start = 0;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int count = static_cast<int>((tokens - start + passes - pass - 1) / (passes - pass));
    const Prepared<T>* tile_x = x + start * ldx;
    float* tile_out = out + start * ldo;
    const int64_t first = std::min<int64_t>(pass * share, kTileRows);
    const int64_t last = std::min<int64_t>(first + share, kTileRows);
    int row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) {
      Prefetch<T> ahead;
      if (next) ahead = {next + (row + first) * ldw, static_cast<int>(last - first)};
      dot_tokens<T, kTileRows>(count, w + row * ldw, ldw, tile_x, ldx, n, tile_out + row, ldo, ahead);
    }
    for (; row < rows; ++row) dot_tokens<T, 1>(count, w + row * ldw, ldw, tile_x, ldx, n, tile_out + row, ldo, {});
    start += count;
  }
}

// `rows` consecutive rows of b, and for each token i what they are multiplied by: h[i * ldh + r].
template <typename T>
struct Run {
  const T* b;
  const float* h;
  int64_t ldh;
  int64_t rows;
};

// y[i][column + c] (+)= sum over all rows of all runs of h * b, for NT tokens and NC blocks of columns. Tokens start at
// `token` in every h. With `partial`, the last block has only that many columns.
template <typename T, int NT, int NC>
inline void axpy_tile(T* const* y, bool add, const Run<T>* runs, int64_t num_runs, int64_t ldb, int64_t token,
                      int64_t column, int64_t partial) {
  Vec first[NT][NC];
  Vec second[NT][NC];
#pragma GCC unroll 8
  for (int i = 0; i < NT; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      Pair before{};
      if (add) {
        const T* from = y[i] + column + c * kBlock;
        before = partial ? load_pair(from, partial) : load_pair(from);
      }
      first[i][c] = before.a;
      second[i][c] = before.b;
    }
  }
  for (int64_t index = 0; index < num_runs; ++index) {
    const Run<T> run = runs[index];
    const float* h = run.h + token * run.ldh;
    const T* b = run.b + column;
    for (int64_t r = 0; r < run.rows; ++r, b += ldb) {
      Vec factor[NT];
#pragma GCC unroll 8
      for (int i = 0; i < NT; ++i) factor[i] = splat(h[i * run.ldh + r]);
#pragma GCC unroll 8
      for (int c = 0; c < NC; ++c) {
        const Pair row = partial ? load_pair(b, partial) : load_pair(b + c * kBlock);
#pragma GCC unroll 8
        for (int i = 0; i < NT; ++i) {
          first[i][c] += factor[i] * row.a;
          second[i][c] += factor[i] * row.b;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NT; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      T* to = y[i] + column + c * kBlock;
      const Pair after{first[i][c], second[i][c]};
      if (partial) {
        store_pair(to, after, partial);
      } else {
        store_pair(to, after);
      }
    }
  }
}

template <typename T, int NT, int NC>
inline void axpy_columns(T* const* y, bool add, const Run<T>* runs, int64_t num_runs, int64_t ldb, int64_t token,
                         int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + NC * kBlock <= end; c += NC * kBlock) {
    axpy_tile<T, NT, NC>(y, add, runs, num_runs, ldb, token, c, 0);
  }
  for (; c + kBlock <= end; c += kBlock) axpy_tile<T, NT, 1>(y, add, runs, num_runs, ldb, token, c, 0);
  if (c < end) axpy_tile<T, NT, 1>(y, add, runs, num_runs, ldb, token, c, end - c);
}

// y[i][begin:end] (+)= sum over the runs' rows of h[i] * b, for any number of tokens; y[i] are their rows.
template <typename T>
inline void axpy(T* const* y, int64_t tokens, bool add, const Run<T>* runs, int64_t num_runs, int64_t ldb,
                 int64_t begin, int64_t end) {
  int64_t t = 0;
  for (; t + 8 <= tokens; t += 8) axpy_columns<T, 8, 1>(y + t, add, runs, num_runs, ldb, t, begin, end);
  if (t + 4 <= tokens) {
    axpy_columns<T, 4, 2>(y + t, add, runs, num_runs, ldb, t, begin, end);
    t += 4;
  }
  if (t + 2 <= tokens) {
    axpy_columns<T, 2, 4>(y + t, add, runs, num_runs, ldb, t, begin, end);
    t += 2;
  }
  if (t < tokens) axpy_columns<T, 1, 4>(y + t, add, runs, num_runs, ldb, t, begin, end);
}

}  // namespace adapterd
