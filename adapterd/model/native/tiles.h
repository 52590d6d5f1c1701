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

// Else a compiler that runs short of registers reads it anew from memory for each product.
inline void keep_in_register(Vec& v) {
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

// out[i * ldo + j * gap] += the product of row j * gap over columns [0, n), i < NX, j < NW. Weights are of x's type T, or
// others that load_first and load_second split as they split those (W).
template <typename T, int NW, int NX, typename W>
inline void dot_tile(const W* w, int64_t ldw, int64_t gap, const Prepared<T>* x, int64_t ldx, int64_t n, float* out,
                     int64_t ldo, Prefetch<W> next) {
  const int64_t stride_w = ldw * gap;
  // Every loop over NW or NX must unroll, or the sums live in memory and not in registers.
  Vec sums[NX][NW];
#pragma GCC unroll 8
  for (int i = 0; i < NX; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NW; ++j) sums[i][j] = Vec{};
  }
  const auto add = [&](const W* tile_w, int64_t stride, const Prepared<T>* tile_x) __attribute__((always_inline)) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<W, bf16>) {
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
      const auto add_half = [&](const Prepared<T>* half_x, auto load) __attribute__((always_inline)) {
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
      const Prepared<T>* second_x = tile_x + kLanes;
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
template <typename T, int NX, typename W>
inline void dot_pass(int rows, const W* w, int64_t ldw, const Prepared<T>* x, int64_t ldx, int64_t n, float* out,
                     int64_t ldo, const W* next, int64_t pass, int64_t passes) {
  constexpr int64_t NW = tile_rows(NX);
  const int64_t share = (NW + passes - 1) / passes;
  const int64_t first = std::min<int64_t>(pass * share, NW);
  const int64_t last = std::min<int64_t>(first + share, NW);
  const int64_t tiles = rows / NW;
  const int64_t gap = kSpreadRows ? tiles : 1;
  const bool asks = next && !(kSpreadRows && passes == 1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = kSpreadRows ? tile : tile * NW;
    Prefetch<W> ahead;
    if (asks) ahead = {next + (row + first * gap) * ldw, static_cast<int>(last - first)};
    dot_tile<T, NW, NX>(w + row * ldw, ldw, gap, x, ldx, n, out + row, ldo, ahead);
  }
  for (int64_t row = tiles * NW; row < rows; ++row) {
    dot_tile<T, 1, NX>(w + row * ldw, ldw, 1, x, ldx, n, out + row, ldo, Prefetch<W>{});
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
template <typename T, typename W>
inline void dot_group(int rows, const W* w, int64_t ldw, const Prepared<T>* x, int64_t ldx, int64_t tokens, int64_t n,
                      float* out, int64_t ldo, const std::type_identity_t<W>* next) {
  const int64_t passes = (tokens + kTileTokens - 1) / kTileTokens;
  int64_t start = 0;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t count = (tokens - start + passes - pass - 1) / (passes - pass);
    const Prepared<T>* tokens_x = x + start * ldx;
    float* sums = out + start * ldo;
    switch (count) {
      case 1: dot_pass<T, 1>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      case 2: dot_pass<T, 2>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      case 3: dot_pass<T, 3>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      case 4: dot_pass<T, 4>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      case 5: dot_pass<T, 5>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes); break;
      default: dot_pass<T, kTileTokens>(rows, w, ldw, tokens_x, ldx, n, sums, ldo, next, pass, passes);
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
  constexpr int kMost = kFewRegisters ? 4 : 8;  // tokens of one tile: two sums for each block of each
  constexpr int kWide = kFewRegisters ? 1 : 2;
  int64_t t = 0;
  for (; t + kMost <= tokens; t += kMost) axpy_columns<T, kMost, 1>(y + t, add, runs, num_runs, ldb, t, begin, end);
  if (t + 4 <= tokens) {
    axpy_columns<T, 4, kWide>(y + t, add, runs, num_runs, ldb, t, begin, end);
    t += 4;
  }
  if (t + 2 <= tokens) {
    axpy_columns<T, 2, 2 * kWide>(y + t, add, runs, num_runs, ldb, t, begin, end);
    t += 2;
  }
  if (t < tokens) axpy_columns<T, 1, 4>(y + t, add, runs, num_runs, ldb, t, begin, end);
}

}  // namespace adapterd
