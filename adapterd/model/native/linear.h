// y = x W^T + bias for few tokens, at the speed at which W comes from memory.

#pragma once

#include "tiles.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

namespace adapterd {

// Below this many multiplications a product is done by one thread: waking another costs some microseconds.
constexpr int64_t kGrain = 1 << 16;

constexpr int64_t kFewTokens = 48;
constexpr int64_t kManyRows = 64;

inline int64_t grain(int64_t work_per_item) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_item)); }

// Rows of x as every tile reads them.
template <typename T>
struct PreparedRows {
  at::Tensor storage;
  const Prepared<T>* data;
  int64_t stride;
};

// x: [tokens, n], contiguous. It is used where it lies if nothing needs to be done to it.
template <typename T>
PreparedRows<T> prepare_rows(const T* x, int64_t tokens, int64_t n) {
  if constexpr (std::is_same_v<Prepared<T>, T>) {
    if (sizeof(T) == 2 && n % kBlock == 0) return {{}, x, n};
  }
  const int64_t stride = prepared_stride(n);
  at::Tensor storage = at::empty({tokens * stride * static_cast<int64_t>(sizeof(Prepared<T>))}, at::kByte);
  auto* out = reinterpret_cast<Prepared<T>*>(storage.mutable_data_ptr<uint8_t>());
  at::parallel_for(0, tokens, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) prepare_row(x + t * n, n, out + t * stride);
  });
  return {storage, out, stride};
}

template <typename T>
void linear_rows(const T* w, const T* bias, const PreparedRows<T>& x, int64_t tokens, int64_t d_in, int64_t d_out, T* y) {
  // Many tokens do not fit the second cache: more rows are kept there instead, so that x comes by less often.
  const bool many = tokens > kFewTokens && d_out >= 4 * at::get_num_threads() * kManyRows;
  const int64_t group_rows = many ? kManyRows : kGroupRows;
  const int64_t groups = (d_out + group_rows - 1) / group_rows;
  at::parallel_for(0, groups, grain(group_rows * d_in * tokens), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(tokens * group_rows);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = group * group_rows;
      const int rows = static_cast<int>(std::min(group_rows, d_out - row));
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t k = 0; k < d_in; k += kChunk<T>) {
        const T* here = w + row * d_in + k;
        const T* next = nullptr;
        if (k + kChunk<T> < d_in) {
          next = here + kChunk<T>;
        } else if (group + 1 < end && row + 2 * group_rows <= d_out) {
          next = w + (row + group_rows) * d_in;
        }
        dot_group(rows, here, d_in, x.data + k, x.stride, tokens, std::min(kChunk<T>, d_in - k), sums.data(),
                  group_rows, next);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        for (int j = 0; j < rows; ++j) {
          const float offset = bias ? static_cast<float>(bias[row + j]) : 0.0f;
          y[t * d_out + row + j] = static_cast<T>(sums[t * group_rows + j] + offset);
        }
      }
    }
  });
}

// x: [..., d_in]; weight: [d_out, d_in]; bias: [d_out] or none; all of one type, float32 or bfloat16.
inline at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "linear: weight must be a contiguous matrix");
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == weight.size(1), "linear: x has ", x.size(-1), " columns, weight ",
              weight.size(1));
  TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "linear: x and weight differ in type");
  TORCH_CHECK(!bias || (bias->scalar_type() == weight.scalar_type() && bias->is_contiguous()),
              "linear: bias must be contiguous and of weight's type");
  const at::Tensor rows = x.contiguous();
  const int64_t d_out = weight.size(0);
  const int64_t d_in = weight.size(1);
  const int64_t tokens = d_in ? rows.numel() / d_in : 0;
  auto shape = x.sizes().vec();
  shape.back() = d_out;
  at::Tensor y = at::empty(shape, x.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    linear_rows(weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr,
                prepare_rows(rows.const_data_ptr<T>(), tokens, d_in), tokens, d_in, d_out, y.mutable_data_ptr<T>());
  };
  if (x.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "linear: float32 or bfloat16, not ", x.scalar_type());
    run(bf16{});
  }
  return y;
}

}  // namespace adapterd
