// Keys and values of new tokens, put where the pool keeps them.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

namespace adapterd {

// new_rows [num_tokens, num_heads, dim] into rows slot_mapping int64 [num_tokens] of pool [num_slots, num_heads, dim].
inline void write_rows(at::Tensor& pool, const at::Tensor& slot_mapping, const at::Tensor& new_rows) {
  TORCH_CHECK(pool.dim() == 3 && pool.is_contiguous() && new_rows.dim() == 3 && pool.size(1) == new_rows.size(1) &&
                  pool.size(2) == new_rows.size(2) && pool.scalar_type() == new_rows.scalar_type(),
              "write_kv: the pool must be contiguous, of the new rows' type, heads and width");
  TORCH_CHECK(slot_mapping.scalar_type() == at::kLong && slot_mapping.is_contiguous() &&
                  slot_mapping.numel() == new_rows.size(0),
              "write_kv: slot_mapping must be int64, one for each token");
  const at::Tensor rows = new_rows.contiguous();
  const int64_t bytes = pool.size(1) * pool.size(2) * pool.element_size();
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  auto* to = static_cast<char*>(pool.mutable_data_ptr());
  for (int64_t t = 0; t < slot_mapping.numel(); ++t) {
    TORCH_CHECK(0 <= slots[t] && slots[t] < pool.size(0), "write_kv: slot ", slots[t], " of ", pool.size(0));
    std::memcpy(to + slots[t] * bytes, from + t * bytes, bytes);
  }
}

// Where tokens' keys and values are kept; see write_rows.
inline void write_kv(at::Tensor& keys, at::Tensor& values, const at::Tensor& slot_mapping, const at::Tensor& key,
                     const at::Tensor& value) {
  write_rows(keys, slot_mapping, key);
  write_rows(values, slot_mapping, value);
}

}  // namespace adapterd
