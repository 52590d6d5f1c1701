// Rows of x as the tiles read them.

#pragma once

#include "threads.h"
#include "tiles.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace adapterd {

#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kFixesInput = false;
#else
// Whether x becomes whole numbers for weights that are such. For float32 they are written out instead.
template <typename T>
constexpr bool kFixesInput = std::is_same_v<T, bf16>;
#endif

template <typename T>
struct PreparedRows {
  at::Tensor storage, fixed_storage;
  const Prepared<T>* data = nullptr;
  int64_t stride = 0;
  const FixedBlock* fixed = nullptr;  // for weights of whole numbers, if kFixesInput
  int64_t fixed_stride = 0;           // blocks
};

// x: [tokens, n], contiguous, for weights of T (`plain`), of whole numbers (`whole`), or both. It is used where it lies
// if nothing needs to be done to it.
template <typename T>
PreparedRows<T> prepare_rows(const T* x, int64_t tokens, int64_t n, bool plain, bool whole) {
  PreparedRows<T> rows;
  if constexpr (kFixesInput<T>) {
    if (whole) {
      rows.fixed_stride = fixed_stride(n);
      const int64_t blocks = tokens * rows.fixed_stride;
      rows.fixed_storage = at::empty({blocks * static_cast<int64_t>(sizeof(FixedBlock))}, at::kByte);
      auto* out = reinterpret_cast<FixedBlock*>(rows.fixed_storage.template mutable_data_ptr<uint8_t>());
      share_ranges(tokens, 4 * n, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) fix_row(x + t * n, n, out + t * rows.fixed_stride);
      });
      rows.fixed = out;
    }
    if (!plain) return rows;
  }
  if constexpr (std::is_same_v<Prepared<T>, T>) {
    if (sizeof(T) == 2 && n % kBlock == 0) {
      rows.data = x;
      rows.stride = n;
      return rows;
    }
  }
  rows.stride = prepared_stride(n);
  rows.storage = at::empty({tokens * rows.stride * static_cast<int64_t>(sizeof(Prepared<T>))}, at::kByte);
  auto* out = reinterpret_cast<Prepared<T>*>(rows.storage.template mutable_data_ptr<uint8_t>());
  share_ranges(tokens, n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) prepare_row(x + t * n, n, out + t * rows.stride);
  });
  rows.data = out;
  return rows;
}

}  // namespace adapterd
