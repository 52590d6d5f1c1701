// The two products that everything here is made of, for any number of tokens. Both accumulate in float32.
//
//   dot   out[i][j] += sum_k w[j][k] * x[i][k]      rows of weights, of A, of keys
//   axpy  y[i][:] = before[i][:] + sum_r h[i][r] * b[r][:]      rows of B, of values

#pragma once

#include "fixed.h"

namespace adapterd {

// Ask for `count` rows of n numbers each, `stride` apart, before they are needed.
template <typename T>
inline void prefetch_rows(const T* rows, int64_t stride, int64_t count, int64_t n) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(rows + r * stride + i, 0, 2);
  }
}

// out[i * ldo + j] += the product over columns [0, n), i < NX, j < rows: the pass `pass` of `passes` over these rows. Each
// asks for its share of the rows from `next` on.
template <int NX, typename W, typename X>
inline void dot_pass(int rows, const W* w, int64_t ldw, const X* x, int64_t ldx, int64_t n, float* out,
                     int64_t ldo, const W* next, int64_t pass, int64_t passes) {
  constexpr int64_t NW = tile_rows(NX);
  const int64_t share = (NW + passes - 1) / passes;
  const int64_t first = std::min<int64_t>(pass * share, NW);
  const int64_t last = std::min<int64_t>(first + share, NW);
  const int64_t tiles = rows / NW;
  const int64_t gap = kSpreadRows ? tiles : 1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = kSpreadRows ? tile : tile * NW;
    Prefetch<W> ahead;
    if (next) ahead = {next + (row + first * gap) * ldw, static_cast<int>(last - first)};
    dot_tile<NW, NX>(w + row * ldw, ldw, gap, x, ldx, n, out + row, ldo, ahead);
  }
  for (int64_t row = tiles * NW; row < rows; ++row) {
    dot_tile<1, NX>(w + row * ldw, ldw, 1, x, ldx, n, out + row, ldo, Prefetch<W>{});
  }
}

// out[i * ldo + j] += the product over columns [0, n), for j < rows and any number of tokens. `next` is
// what will be multiplied after this, as many rows with the same stride: while the processor is busy with what is
// here, each tile asks memory for its share of them, else memory would stand idle for all passes but the first.
//
//            x: a tile's tokens, stay in the first cache
//   w  rows 0..3     tile -> tile       the next tokens meet the same rows in the second cache
//      rows 4..7     tile -> tile
//      ...
template <typename W, typename X>
inline void dot_group(int rows, const W* w, int64_t ldw, const X* x, int64_t ldx, int64_t tokens, int64_t n,
                      float* out, int64_t ldo, const std::type_identity_t<W>* next) {
  const int64_t passes = (tokens + kTileTokens - 1) / kTileTokens;
  int64_t start = 0;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t count = (tokens - start + passes - pass - 1) / (passes - pass);
    const X* tokens_x = x + start * ldx;
    float* sums = out + start * ldo;
    switch (count) {
      case 1: dot_pass<1>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      case 2: dot_pass<2>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      case 3: dot_pass<3>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      case 4: dot_pass<4>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      case 5: dot_pass<5>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      default: dot_pass<kTileTokens>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes);
    }
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

// What a sum begins with: `before(token, column, partial)` is a block from there on, or its first `partial` numbers.
struct FromZero {
  Pair operator()(int64_t, int64_t, int64_t) const { return Pair{}; }
};

template <typename Y>
struct FromRows {
  Y* const* y;
  Pair operator()(int64_t token, int64_t column, int64_t partial) const {
    return partial ? load_pair(y[token] + column, partial) : load_pair(y[token] + column);
  }
};

// y[token + i][column + c] = before + sum over all rows of all runs of h * b, for NT tokens and NC blocks of columns; Y
// is T, or Split. With `partial`, the last block has only that many columns.
template <int NT, int NC, typename Y, typename T, typename Before>
inline void axpy_tile(Y* const* y, const Before& before, const Run<T>* runs, int64_t num_runs, int64_t ldb,
                      int64_t token, int64_t column, int64_t partial) {
  Vec first[NT][NC];
  Vec second[NT][NC];
#pragma GCC unroll 8
  for (int i = 0; i < NT; ++i) {
#pragma GCC unroll 8
    for (int c = 0; c < NC; ++c) {
      const Pair begin = before(token + i, column + c * kBlock, partial);
      first[i][c] = begin.a;
      second[i][c] = begin.b;
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
      Y* to = y[token + i] + column + c * kBlock;
      const Pair after{first[i][c], second[i][c]};
      if (partial) {
        store_pair(to, after, partial);
      } else {
        store_pair(to, after);
      }
    }
  }
}

template <int NT, int NC, typename Y, typename T, typename Before>
inline void axpy_columns(Y* const* y, const Before& before, const Run<T>* runs, int64_t num_runs, int64_t ldb,
                         int64_t token, int64_t begin, int64_t end) {
  int64_t c = begin;
  for (; c + NC * kBlock <= end; c += NC * kBlock) axpy_tile<NT, NC>(y, before, runs, num_runs, ldb, token, c, 0);
  for (; c + kBlock <= end; c += kBlock) axpy_tile<NT, 1>(y, before, runs, num_runs, ldb, token, c, 0);
  if (c < end) axpy_tile<NT, 1>(y, before, runs, num_runs, ldb, token, c, end - c);
}

// y[i][begin:end] = before + the sum over the runs' rows of h[i] * b, for any number of tokens; y[i] are their rows.
template <typename Y, typename T, typename Before>
inline void axpy(Y* const* y, int64_t tokens, const Before& before, const Run<T>* runs, int64_t num_runs, int64_t ldb,
                 int64_t begin, int64_t end) {
  constexpr int kMost = kFewRegisters ? 4 : 8;  // tokens of one tile: two sums for each block of each
  constexpr int kWide = kFewRegisters ? 1 : 2;
  int64_t t = 0;
  for (; t + kMost <= tokens; t += kMost) axpy_columns<kMost, 1>(y, before, runs, num_runs, ldb, t, begin, end);
  if (t + 4 <= tokens) {
    axpy_columns<4, kWide>(y, before, runs, num_runs, ldb, t, begin, end);
    t += 4;
  }
  if (t + 2 <= tokens) {
    axpy_columns<2, 2 * kWide>(y, before, runs, num_runs, ldb, t, begin, end);
    t += 2;
  }
  if (t < tokens) axpy_columns<1, 4>(y, before, runs, num_runs, ldb, t, begin, end);
}

}  // namespace adapterd
