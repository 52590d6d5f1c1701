// Vectors of float32 on any instruction set, through the compiler's own vector type.
//
// Numbers are handled as pairs of vectors, one block of 2 * kLanes numbers at a time. In bfloat16 a block is one
// vector load of 32-bit words, and each word holds two neighbours: a shift gives the even ones as float32, a mask
// the odd ones. That is two cheap instructions for 2 * kLanes weights and no shuffle, and since both sides of every
// product are split alike, nothing ever needs to be put back in order.

#pragma once

#include <c10/util/BFloat16.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace adapterd {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

constexpr int kBlock = 2 * kLanes;

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using bf16 = c10::BFloat16;

struct Pair {
  Vec a;
  Vec b;
};

template <typename V, typename P>
inline V load_as(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename To, typename From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

inline Vec splat(float s) { return s - Vec{}; }  // s - 0, not 0 + s: keeps the sign of a zero

inline Vec load_first(const float* p) { return load_as<Vec>(p); }
inline Vec load_second(const float* p) { return load_as<Vec>(p + kLanes); }
inline Vec load_first(const bf16* p) { return bits<Vec>(load_as<Words>(p) << 16); }
inline Vec load_second(const bf16* p) { return bits<Vec>(load_as<Words>(p) & 0xffff0000u); }

// The even numbers of two vectors, and the odd ones.
template <std::size_t... I>
inline Pair every_other(Pair v, std::index_sequence<I...>) {
  return {__builtin_shufflevector(v.a, v.b, 2 * I...), __builtin_shufflevector(v.a, v.b, 2 * I + 1 ...)};
}

template <typename T>
inline Pair load_pair(const T* p) {
  return {load_first(p), load_second(p)};
}

inline void store_pair(float* p, Pair v) {
  std::memcpy(p, &v.a, sizeof v.a);
  std::memcpy(p + kLanes, &v.b, sizeof v.b);
}

// To the nearest bfloat16, ties to even; a NaN stays one.
inline Words rounded(Vec v) {
  const Words u = bits<Words>(v);
  const Words near = u + 0x7fffu + ((u >> 16) & 1u);
  return v == v ? near : u | 0x00400000u;
}

inline void store_pair(bf16* p, Pair v) {
  const Words raw = (rounded(v.a) >> 16) | (rounded(v.b) & 0xffff0000u);
  std::memcpy(p, &raw, sizeof raw);
}

// Numbers of float32, a block of them, in the order in which load_pair gives numbers of T.
template <typename T>
inline Pair load_as_pair_of(const float* p) {
  const Pair pair = load_pair(p);
  if constexpr (std::is_same_v<T, float>) {
    return pair;
  } else {
    return every_other(pair, std::make_index_sequence<kLanes>{});
  }
}

// The first `count` < kBlock numbers of a block; the others are zero.
template <typename T>
inline Pair load_pair(const T* p, int64_t count) {
  T padded[kBlock] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load_pair(padded);
}

template <typename T>
inline void store_pair(T* p, Pair v, int64_t count) {
  T padded[kBlock];
  store_pair(padded, v);
  std::memcpy(p, padded, count * sizeof(T));
}

// A float32 sum among others of a block, which are kept in the order of a pair, whole blocks only.
struct Split {
  float sum;
};

inline Pair load_pair(const Split* p, int64_t = kBlock) { return load_pair(&p->sum); }
inline void store_pair(Split* p, Pair v, int64_t = kBlock) { store_pair(&p->sum, v); }

template <int N>
struct Floats {
  typedef float type __attribute__((vector_size(4 * N)));
};

template <int N>
inline typename Floats<4>::type fold_to_four(typename Floats<N>::type v) {
  if constexpr (N == 4) {
    return v;
  } else {
    struct Halves {
      typename Floats<N / 2>::type low, high;
    };
    const auto halves = bits<Halves>(v);
    return fold_to_four<N / 2>(halves.low + halves.high);
  }
}

inline float sum_lanes(Vec v) {
  const auto four = fold_to_four<kLanes>(v);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The four vectors' sums, in order. Together they cost a third of four single sums: lanes of two vectors are
// interleaved while they are added (p q p q ...), then of two such pairs (p q r s p q r s ...), then folded.
template <std::size_t... I>
inline typename Floats<4>::type sum_lanes_of_four(Vec p, Vec q, Vec r, Vec s, std::index_sequence<I...>) {
  constexpr int n = kLanes;
  const Vec pq = __builtin_shufflevector(p, q, (I % 2 ? n + I - 1 : I)...) +
                 __builtin_shufflevector(p, q, (I % 2 ? n + I : I + 1)...);
  const Vec rs = __builtin_shufflevector(r, s, (I % 2 ? n + I - 1 : I)...) +
                 __builtin_shufflevector(r, s, (I % 2 ? n + I : I + 1)...);
  const Vec all = __builtin_shufflevector(pq, rs, (I % 4 < 2 ? I : n + I - 2)...) +
                  __builtin_shufflevector(pq, rs, (I % 4 < 2 ? I + 2 : n + I)...);
  return fold_to_four<n>(all);
}

inline typename Floats<4>::type sum_lanes_of_four(Vec p, Vec q, Vec r, Vec s) {
  return sum_lanes_of_four(p, q, r, s, std::make_index_sequence<kLanes>{});
}

// e^x for x <= 0 within 2 units in the last place; 0 below -87, where float32 ends.
inline Vec exp_negative(Vec x) {
  const Vec floor = splat(-87.0f);
  const Vec clamped = x > floor ? x : floor;
  // x = k ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, so that k ln 2 loses nothing.
  const Ints k = __builtin_convertvector(clamped * 1.44269504f - 0.5f, Ints);
  const Vec kf = __builtin_convertvector(k, Vec);
  const Vec r = clamped - kf * 0.693359375f + kf * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vec scaled = p * bits<Vec>((k + 127) << 23);
  return x > floor ? scaled : Vec{};
}

}  // namespace adapterd
