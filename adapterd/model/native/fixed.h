// x as whole numbers of 16 bits, to be multiplied by weights that are whole numbers of 8.
//
// Where no instruction multiplies bfloat16, whole numbers are cheaper than float32: one instruction multiplies pairs of
// 16 bits and adds each pair, and their sums are exact. So x becomes whole numbers times a power of two for every 1024
// columns, such that the largest takes all 15 bits. A bfloat16 has 8: what is within a 128th of the block's largest
// stays as it is, and smaller numbers are off by a 2^-15th of that at most. Where one number is a thousand times the
// others, a sum that does not see it is off by 0.9 to 1.8%, once or twice what the rounding of weights does; at a hundred
// times by a tenth of that.

#pragma once

#include "dot_tile.h"

#include <limits>

namespace adapterd {

constexpr int64_t kFixedColumns = 1024;

// numbers[k] * unit, for the columns of one block of one row; zeros after the last column.
struct alignas(kLineBytes) FixedBlock {
  int16_t numbers[kFixedColumns];
  float unit;
};

using Shorts = int16_t __attribute__((vector_size(4 * kLanes)));

constexpr float kRounding = 3 << 22;  // 1.5 * 2^23

inline int64_t fixed_stride(int64_t n) { return (n + kFixedColumns - 1) / kFixedColumns; }

// `n` <= kFixedColumns numbers. A block with a number that is not finite has NaN for its unit, and so has what it is
// multiplied by.
inline void fix_block(const bf16* x, int64_t n, FixedBlock& out) {
  const auto each = [&](const auto& use) __attribute__((always_inline)) {
    int64_t k = 0;
    for (; k + kBlock <= n; k += kBlock) use(k, load_pair(x + k));
    if (k < n) use(k, load_pair(x + k, n - k));
  };
  // Of positive numbers of float32, those with the larger bits are larger; what is not finite is above all others.
  Ints most{};
  each([&](int64_t, Pair v) {
    const Ints a = bits<Ints>(v.a) & 0x7fffffff;
    const Ints b = bits<Ints>(v.b) & 0x7fffffff;
    const Ints larger = a > b ? a : b;
    most = larger > most ? larger : most;
  });
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
  const auto power_of_two = [](int exponent) { return bits<float>((exponent + 127) << 23); };
  // largest < 2^exponent. A power of two that float32 does not have is not needed: what it would save is next to zero.
  const int exponent = (largest >> 23) - 126;
  const int shift = std::min(15 - exponent, 126);
  const float factor = power_of_two(shift);
  std::fill(out.numbers + n / kBlock * kBlock, out.numbers + kFixedColumns, int16_t{0});
  each([&](int64_t k, Pair v) {
    // Beside so large a number there are no digits after the point, and its last 16 bits are the rounded one's.
    const Words a = bits<Words>(v.a * factor + kRounding);
    const Words b = bits<Words>(v.b * factor + kRounding);
    const Words both = (a & 0xffffu) | (b << 16);
    std::memcpy(out.numbers + k, &both, sizeof both);
  });
  const bool finite = largest < bits<int32_t>(std::numeric_limits<float>::infinity());
  out.unit = finite ? power_of_two(-shift) : std::numeric_limits<float>::quiet_NaN();
}

// One row of x; out holds fixed_stride(n) blocks.
inline void fix_row(const bf16* x, int64_t n, FixedBlock* out) {
  for (int64_t k = 0; k < n; k += kFixedColumns) fix_block(x + k, std::min(kFixedColumns, n - k), *out++);
}

inline Shorts widened(const int8_t* p) {
#if defined(__AVX512BW__)
  return bits<Shorts>(_mm512_cvtepi8_epi16(load_as<__m256i>(p)));
#elif defined(__AVX2__)
  return bits<Shorts>(_mm256_cvtepi8_epi16(load_as<__m128i>(p)));  // which compilers make of halves otherwise
#else
  using Bytes = int8_t __attribute__((vector_size(kBlock)));
  return __builtin_convertvector(load_as<Bytes>(p), Shorts);
#endif
}

// sums[i] + p[2i] q[2i] + p[2i + 1] q[2i + 1]
inline Ints add_products(Ints sums, Shorts p, Shorts q) {
#if defined(__AVX512VNNI__)
  return bits<Ints>(_mm512_dpwssd_epi32(bits<__m512i>(sums), bits<__m512i>(p), bits<__m512i>(q)));
#elif defined(__AVX512BW__)
  return sums + bits<Ints>(_mm512_madd_epi16(bits<__m512i>(p), bits<__m512i>(q)));
#elif defined(__AVX2__)
  return sums + bits<Ints>(_mm256_madd_epi16(bits<__m256i>(p), bits<__m256i>(q)));
#else
  const Ints a = bits<Ints>(p);
  const Ints b = bits<Ints>(q);
  return sums + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// As the other dot_tile; x begins with a block, and ldx counts blocks.
template <int NW, int NX>
inline void dot_tile(const int8_t* w, int64_t ldw, int64_t gap, const FixedBlock* x, int64_t ldx, int64_t n, float* out,
                     int64_t ldo, Prefetch<int8_t> next) {
  const int64_t stride_w = ldw * gap;
  for (int64_t begin = 0; begin < n; begin += kFixedColumns, ++x) {
    const int8_t* block_w = w + begin;
    // At most 2^7 * 2^15 * 256, which 32 bits hold.
    static_assert(kFixedColumns / kLanes <= 256);
    Ints whole[NX][NW];
#pragma GCC unroll 8
    for (int i = 0; i < NX; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < NW; ++j) whole[i][j] = Ints{};
    }
    const auto add = [&](const int8_t* tile_w, int64_t stride, int64_t k) __attribute__((always_inline)) {
      Shorts weights[NW];
#pragma GCC unroll 8
      for (int j = 0; j < NW; ++j) weights[j] = widened(tile_w + j * stride);
#pragma GCC unroll 8
      for (int i = 0; i < NX; ++i) {
        Shorts token = load_as<Shorts>(x[i * ldx].numbers + k);
        keep_in_register(token);
#pragma GCC unroll 8
        for (int j = 0; j < NW; ++j) {
          whole[i][j] = add_products(whole[i][j], weights[j], token);
          keep_in_register(whole[i][j]);
        }
      }
    };
    const int64_t columns = std::min(kFixedColumns, n - begin);
    int64_t k = 0;
    for (; k + kLineBytes <= columns; k += kLineBytes) {
      for (int r = 0; r < next.count; ++r) __builtin_prefetch(next.rows + r * stride_w + begin + k, 0, 2);
#pragma GCC unroll 8
      for (int64_t part = k; part < k + kLineBytes; part += kBlock) add(block_w + part, stride_w, part);
    }
    for (; k + kBlock <= columns; k += kBlock) add(block_w + k, stride_w, k);
    if (k < columns) {
      int8_t rest[NW][kBlock] = {};
      for (int j = 0; j < NW; ++j) std::memcpy(rest[j], block_w + j * stride_w + k, columns - k);
      add(rest[0], kBlock, k);
    }
    Vec sums[NX][NW];
#pragma GCC unroll 8
    for (int i = 0; i < NX; ++i) {
      const Vec unit = splat(x[i * ldx].unit);
#pragma GCC unroll 8
      for (int j = 0; j < NW; ++j) sums[i][j] = __builtin_convertvector(whole[i][j], Vec) * unit;
    }
    add_sums(sums, out, ldo, gap);
  }
}

}  // namespace adapterd
