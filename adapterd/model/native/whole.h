// Products of weights that are whole numbers of 8 bits: dot, as in tiles.h, for rows of int8.
//
// Where an instruction multiplies bfloat16, they become such, in which a whole number is exact: for few tokens in
// registers, for many written out, four rows at a time in the first cache or more in the second. Elsewhere x becomes
// whole numbers too (fixed.h), but for one of float32, for which weights are written out as well.

#pragma once

#include "prepared.h"

#include <vector>

namespace adapterd {

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
constexpr int64_t kWholeBlock = 64;  // whole numbers in a vector

// Tokens up to which whole numbers become bfloat16 anew in each pass: cheaper than to write them out.
constexpr int64_t kRegisterTokens = 2 * kTileTokens;

// The bytes of the bfloat16 of 0 to 127, and the order in which a vector's halves are to be taken apart.
struct WholeTables {
  __m512i low[2], high[2], order;
};

inline WholeTables make_whole_tables() {
  alignas(64) uint8_t low[128], high[128], order[64];
  for (int v = 0; v < 128; ++v) {
    const uint32_t word = bits<uint32_t>(static_cast<float>(v));
    low[v] = static_cast<uint8_t>(word >> 16);
    high[v] = static_cast<uint8_t>(word >> 24);
  }
  // Bytes are interleaved within each quarter of a vector: its first half there makes the first 32 numbers.
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int i = 0; i < 8; ++i) {
      order[16 * quarter + i] = static_cast<uint8_t>(8 * quarter + i);
      order[16 * quarter + 8 + i] = static_cast<uint8_t>(32 + 8 * quarter + i);
    }
  }
  return {{load_as<__m512i>(low), load_as<__m512i>(low + 64)},
          {load_as<__m512i>(high), load_as<__m512i>(high + 64)},
          load_as<__m512i>(order)};
}

struct WholePair {
  __m512i first, second;  // bfloat16
};

// 64 whole numbers as bfloat16, in order: their bytes are looked up, and the sign put in front.
inline WholePair as_bfloat16(const int8_t* from, const WholeTables& tables) {
  const __m512i numbers = _mm512_permutexvar_epi8(tables.order, load_as<__m512i>(from));
  const __m512i size = _mm512_abs_epi8(numbers);
  const __m512i low = _mm512_permutex2var_epi8(tables.low[0], size, tables.low[1]);
  const __m512i plain = _mm512_permutex2var_epi8(tables.high[0], size, tables.high[1]);
  // plain | (numbers & 0x80)
  const __m512i high = _mm512_ternarylogic_epi32(plain, numbers, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// out[i * ldo + j] += the product over columns [0, n), i < NX, j < 4; n is a multiple of 64. `ahead` rows, as far as
// there are any, are asked for `next_rows` below.
template <int NX>
inline void dot_whole_tile(const int8_t* w, int64_t ldw, const bf16* x, int64_t ldx, int64_t n, float* out, int64_t ldo,
                           int ahead, int64_t next_rows, const WholeTables& tables) {
  Vec sums[NX][kTileRows];
#pragma GCC unroll 8
  for (int i = 0; i < NX; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTileRows; ++j) sums[i][j] = Vec{};
  }
  for (int64_t k = 0; k < n; k += kWholeBlock) {
    for (int r = 0; r < ahead; ++r) __builtin_prefetch(w + (next_rows + r) * ldw + k, 0, 2);
#pragma GCC unroll 8
    for (int j = 0; j < kTileRows; ++j) {
      const WholePair weights = as_bfloat16(w + j * ldw + k, tables);
#pragma GCC unroll 8
      for (int i = 0; i < NX; ++i) {
        const bf16* token = x + i * ldx + k;
        __m512 sum = bits<__m512>(sums[i][j]);
        sum = _mm512_dpbf16_ps(sum, bits<__m512bh>(weights.first), load_as<__m512bh>(token));
        sum = _mm512_dpbf16_ps(sum, bits<__m512bh>(weights.second), load_as<__m512bh>(token + 32));
        sums[i][j] = bits<Vec>(sum);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NX; ++i) {
    const auto four = load_as<Floats<4>::type>(out + i * ldo) +
                      sum_lanes_of_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    std::memcpy(out + i * ldo, &four, sizeof four);
  }
}

inline void dot_whole_tokens(int tokens, const int8_t* w, int64_t ldw, const bf16* x, int64_t ldx, int64_t n, float* out,
                             int64_t ldo, int ahead, int64_t next_rows, const WholeTables& tables) {
  switch (tokens) {
    case 1: return dot_whole_tile<1>(w, ldw, x, ldx, n, out, ldo, ahead, next_rows, tables);
    case 2: return dot_whole_tile<2>(w, ldw, x, ldx, n, out, ldo, ahead, next_rows, tables);
    case 3: return dot_whole_tile<3>(w, ldw, x, ldx, n, out, ldo, ahead, next_rows, tables);
    case 4: return dot_whole_tile<4>(w, ldw, x, ldx, n, out, ldo, ahead, next_rows, tables);
    case 5: return dot_whole_tile<5>(w, ldw, x, ldx, n, out, ldo, ahead, next_rows, tables);
    default: return dot_whole_tile<6>(w, ldw, x, ldx, n, out, ldo, ahead, next_rows, tables);
  }
}

inline void unpack(const int8_t* from, int64_t n, bf16* to) {
  static const WholeTables tables = make_whole_tables();
  auto* out = reinterpret_cast<uint16_t*>(to);
  int64_t k = 0;
  for (; k + kWholeBlock <= n; k += kWholeBlock) {
    const WholePair pair = as_bfloat16(from + k, tables);
    std::memcpy(out + k, &pair, sizeof pair);
  }
  for (; k < n; ++k) out[k] = static_cast<uint16_t>(bits<uint32_t>(static_cast<float>(from[k])) >> 16);
}
#elif defined(__AVX512BF16__)
// bfloat16 is the upper half of float32.
inline void unpack(const int8_t* from, int64_t n, bf16* to) {
  auto* out = reinterpret_cast<uint16_t*>(to);
  for (int64_t k = 0; k < n; ++k) out[k] = static_cast<uint16_t>(bits<uint32_t>(static_cast<float>(from[k])) >> 16);
}
#endif

inline void unpack(const int8_t* from, int64_t n, float* to) {
  for (int64_t k = 0; k < n; ++k) to[k] = static_cast<float>(from[k]);
}

// From one row that is written out to the next: never a multiple of 4096 bytes.
template <typename T>
constexpr int64_t kUnpackedStride = kChunk<T> + kBlock;

template <typename T>
void dot_whole_written(const int8_t* w, int64_t ldw, int rows, int64_t left, const Prepared<T>* x, int64_t ldx,
                       int64_t tokens, int64_t n, float* out, int64_t ldo) {
  thread_local std::vector<T> written;
  written.resize(rows * kUnpackedStride<T>);
  for (int j = 0; j < rows; ++j) {
    if (j < left) prefetch_rows(w + (rows + j) * ldw, ldw, 1, n);
    unpack(w + j * ldw, n, written.data() + j * kUnpackedStride<T>);
  }
  dot_group(rows, written.data(), kUnpackedStride<T>, x, ldx, tokens, n, out, ldo, nullptr);
}

// out[i * ldo + j] += the product over columns [k, k + n), for j < rows and any number of tokens; w begins at column k,
// and n <= kChunk but where x is fixed. `left` rows follow these, which will be multiplied next as like as not.
template <typename T>
void dot_whole(const int8_t* w, int64_t ldw, int rows, int64_t left, const PreparedRows<T>& x, int64_t k, int64_t tokens,
               int64_t n, float* out, int64_t ldo) {
  if constexpr (kFixesInput<T>) {
    static_assert(kChunk<T> % kFixedColumns == 0);
    dot_group(rows, w, ldw, x.fixed + k / kFixedColumns, x.fixed_stride, tokens, n, out, ldo,
              left >= rows ? w + rows * ldw : nullptr);
  } else {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
    if constexpr (std::is_same_v<T, bf16>) {
      if (rows == kTileRows && tokens <= kRegisterTokens && n % kWholeBlock == 0) {
        static const WholeTables tables = make_whole_tables();
        const WholeTables here = tables;
        const int64_t passes = (tokens + kTileTokens - 1) / kTileTokens;
        for (int64_t start = 0, pass = 0; pass < passes; ++pass) {
          const int count = static_cast<int>((tokens - start + passes - pass - 1) / (passes - pass));
          const int ahead = pass == 0 ? static_cast<int>(std::min<int64_t>(left, rows)) : 0;
          dot_whole_tokens(count, w, ldw, x.data + start * x.stride + k, x.stride, n, out + start * ldo, ldo, ahead,
                           rows, here);
          start += count;
        }
        return;
      }
    }
#endif
    dot_whole_written<T>(w, ldw, rows, left, x.data + k, x.stride, tokens, n, out, ldo);
  }
}

}  // namespace adapterd
