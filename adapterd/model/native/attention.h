// Attention over paged keys and values, read where they lie: nothing is gathered, padded or repeated.

#pragma once

#include "linear.h"

#include <cmath>
#include <limits>
#include <vector>

namespace adapterd {

// Query rows that one thread handles at a time; they share each key and value that it reads.
constexpr int64_t kQueryRows = 24;

struct AttentionParams {
  float scale;
  int64_t window;  // 0: none
  float softcap;   // 0: none
};

// Some tokens of one sequence, which end `context` long: rows [row, row + num_tokens) of the batch at positions
// [position, position + num_tokens).
struct AttentionUnit {
  const int64_t* slots;
  int64_t row, num_tokens, position;
};

// Consecutive slots of the pool: positions [position, position + length).
struct SlotRun {
  int64_t position, slot, length;
};

inline void slot_runs(const int64_t* slots, int64_t begin, int64_t end, std::vector<SlotRun>& runs) {
  runs.clear();
  for (int64_t p = begin; p < end; ++p) {
    if (!runs.empty() && runs.back().slot + runs.back().length == slots[p]) {
      ++runs.back().length;
    } else {
      runs.push_back({p, slots[p], 1});
    }
  }
}

// scores[0:count] to weights in place: softmax with the sink, if there is one, among the scores but not the weights.
inline void softmax(float* scores, int64_t count, const AttentionParams& params, const float* sink) {
  const float scale = params.softcap > 0 ? params.scale / params.softcap : params.scale;
  float largest = sink ? *sink : -std::numeric_limits<float>::infinity();
  Vec most = splat(largest);
  int64_t i = 0;
  if (params.softcap > 0) {
    for (; i < count; ++i) scores[i] = params.softcap * std::tanh(scores[i] * scale);
    i = 0;
  } else {
    for (; i < count; ++i) scores[i] *= scale;
    i = 0;
  }
  for (; i + kLanes <= count; i += kLanes) {
    const Vec here = load_as<Vec>(scores + i);
    most = here > most ? here : most;
  }
  for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
  for (; i < count; ++i) largest = std::max(largest, scores[i]);
  Vec sums{};
  i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec weights = exp_negative(load_as<Vec>(scores + i) - largest);
    std::memcpy(scores + i, &weights, sizeof weights);
    sums += weights;
  }
  float sum = sum_lanes(sums);
  for (; i < count; ++i) {
    scores[i] = std::exp(scores[i] - largest);
    sum += scores[i];
  }
  if (sink) sum += std::exp(*sink - largest);
  for (i = 0; i < count; ++i) scores[i] /= sum;
}

// Kept from unit to unit by one thread, so that it allocates but a few times.
template <typename T>
struct AttentionScratch {
  std::vector<SlotRun> slot_runs;
  std::vector<Run<T>> value_runs;
  std::vector<Prepared<T>> query;
  std::vector<float> scores;
  std::vector<T*> out_rows;
};

struct AttentionShape {
  int64_t num_heads, num_kv_heads, key_dim, value_dim;
};

// One unit, one key head and the query heads that share it.
template <typename T>
void attend(const AttentionUnit& unit, int64_t kv_head, const AttentionShape& shape, const AttentionParams& params,
            const T* query, const T* keys, const T* values, const float* sinks, T* out, AttentionScratch<T>& scratch) {
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  const int64_t rows = unit.num_tokens * group;
  const int64_t end = unit.position + unit.num_tokens;
  const int64_t begin = params.window ? std::max<int64_t>(0, unit.position - params.window + 1) : 0;
  const int64_t context = end - begin;
  const int64_t width = prepared_stride(shape.key_dim);
  slot_runs(unit.slots, begin, end, scratch.slot_runs);
  scratch.query.resize(rows * width);
  scratch.scores.assign(rows * context, 0.0f);
  const auto head_of = [&](int64_t r) { return kv_head * group + r % group; };
  const auto row_of = [&](int64_t r) { return (unit.row + r / group) * shape.num_heads + head_of(r); };
  for (int64_t r = 0; r < rows; ++r) {
    prepare_row(query + row_of(r) * shape.key_dim, shape.key_dim, scratch.query.data() + r * width);
  }

  const int64_t key_stride = shape.num_kv_heads * shape.key_dim;
  const int64_t value_stride = shape.num_kv_heads * shape.value_dim;
  for (const SlotRun& run : scratch.slot_runs) {
    for (int64_t i = 0; i < run.length; i += kGroupRows) {
      const int count = static_cast<int>(std::min<int64_t>(kGroupRows, run.length - i));
      const T* here = keys + (run.slot + i) * key_stride + kv_head * shape.key_dim;
      // One head's rows lie a whole token apart, which the processor does not guess.
      prefetch_rows(values + (run.slot + i) * value_stride + kv_head * shape.value_dim, value_stride, count,
                    shape.value_dim);
      for (int64_t k = 0; k < shape.key_dim; k += kChunk<T>) {
        dot_group(count, here + k, key_stride, scratch.query.data() + k, width, rows,
                  std::min(kChunk<T>, shape.key_dim - k), scratch.scores.data() + run.position - begin + i, context,
                  here + kGroupRows * key_stride + k);
      }
    }
  }
  if (kv_head + 1 < shape.num_kv_heads && !scratch.slot_runs.empty()) {
    // While weights are made and values added, memory fetches what the next head begins with.
    const SlotRun& run = scratch.slot_runs.front();
    prefetch_rows(keys + run.slot * key_stride + (kv_head + 1) * shape.key_dim, key_stride,
                  std::min<int64_t>(kGroupRows, run.length), shape.key_dim);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = unit.position + r / group;
    const int64_t first = params.window ? std::max(begin, position - params.window + 1) - begin : 0;
    float* scores = scratch.scores.data() + r * context;
    std::fill(scores, scores + first, 0.0f);
    softmax(scores + first, position + 1 - begin - first, params, sinks ? sinks + head_of(r) : nullptr);
    std::fill(scores + position + 1 - begin, scores + context, 0.0f);
  }

  std::vector<Run<T>>& value_runs = scratch.value_runs;
  value_runs.clear();
  for (const SlotRun& run : scratch.slot_runs) {
    value_runs.push_back({values + run.slot * value_stride + kv_head * shape.value_dim,
                          scratch.scores.data() + run.position - begin, context, run.length});
  }
  std::vector<T*>& out_rows = scratch.out_rows;
  out_rows.clear();
  for (int64_t r = 0; r < rows; ++r) out_rows.push_back(out + row_of(r) * shape.value_dim);
  axpy(out_rows.data(), rows, false, value_runs.data(), static_cast<int64_t>(value_runs.size()), value_stride, 0,
       shape.value_dim);
}

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

// query: [num_tokens, num_heads, key_dim]; keys, values: [num_slots, num_kv_heads, dim]; one type, float32 or bfloat16.
// slots: int64, the contexts of all sequences one after another; sequences: int64 [num_sequences, 4], for each where
// its slots begin, its context, its first row, and how many rows it has, which are the last tokens of its context.
// sinks: float32 [num_heads] or none. Returns [num_tokens, num_heads, value_dim].
inline at::Tensor paged_attention(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                                  const at::Tensor& slots, const at::Tensor& sequences, double scale, int64_t window,
                                  double softcap, const std::optional<at::Tensor>& sinks) {
  TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && values.dim() == 3, "paged_attention: three dimensions each");
  TORCH_CHECK(keys.is_contiguous() && values.is_contiguous(), "paged_attention: the pool must be contiguous");
  TORCH_CHECK(query.scalar_type() == keys.scalar_type() && keys.scalar_type() == values.scalar_type(),
              "paged_attention: query, keys and values differ in type");
  TORCH_CHECK(slots.scalar_type() == at::kLong && sequences.scalar_type() == at::kLong && slots.is_contiguous() &&
                  sequences.is_contiguous() && sequences.dim() == 2 && sequences.size(1) == 4,
              "paged_attention: slots and sequences must be int64");
  const AttentionShape shape{query.size(1), keys.size(1), query.size(2), values.size(2)};
  TORCH_CHECK(keys.size(2) == shape.key_dim && values.size(1) == shape.num_kv_heads &&
                  shape.num_heads % shape.num_kv_heads == 0,
              "paged_attention: heads or widths do not match");
  TORCH_CHECK(!sinks || (sinks->scalar_type() == at::kFloat && sinks->is_contiguous() &&
                         sinks->numel() == shape.num_heads),
              "paged_attention: sinks must be float32, one a head");
  const AttentionParams params{static_cast<float>(scale), window, static_cast<float>(softcap)};
  const at::Tensor rows = query.contiguous();
  at::Tensor out = at::empty({query.size(0), shape.num_heads, shape.value_dim}, query.options());

  const int64_t tokens_at_once = std::max<int64_t>(1, kQueryRows * shape.num_kv_heads / shape.num_heads);
  std::vector<AttentionUnit> units;
  int64_t work = 0;
  const int64_t* table = sequences.const_data_ptr<int64_t>();
  for (const int64_t* s = table; s != table + sequences.numel(); s += 4) {
    TORCH_CHECK(s[0] >= 0 && s[0] + s[1] <= slots.numel() && s[3] <= s[1] && s[2] >= 0 && s[2] + s[3] <= query.size(0),
                "paged_attention: a sequence lies outside the batch");
    for (int64_t t = 0; t < s[3]; t += tokens_at_once) {
      const int64_t count = std::min(tokens_at_once, s[3] - t);
      units.push_back({slots.const_data_ptr<int64_t>() + s[0], s[2] + t, count, s[1] - s[3] + t});
      work += count * s[1];
    }
  }
  // A sequence's heads lie side by side, so a thread takes several of them at once: what the processor fetches beside
  // one is the next one's. As many as leave every thread enough items.
  const int64_t num_units = static_cast<int64_t>(units.size());
  const int64_t items_wanted = 4 * at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>((items_wanted + num_units - 1) / std::max<int64_t>(1, num_units), 1,
                                            shape.num_kv_heads);
  const int64_t heads_at_once = (shape.num_kv_heads + parts - 1) / parts;
  const int64_t num_items = num_units * parts;
  const int64_t item_work = work * shape.num_heads * (shape.key_dim + shape.value_dim) / std::max<int64_t>(1, num_items);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    share_out(num_items, item_work, [&](int64_t item, int64_t) {
      thread_local AttentionScratch<T> scratch;
      const AttentionUnit& unit = units[item / parts];
      const int64_t first = item % parts * heads_at_once;
      const int64_t last = std::min(first + heads_at_once, shape.num_kv_heads);
      for (int64_t head = first; head < last; ++head) {
        attend<T>(unit, head, shape, params, rows.const_data_ptr<T>(), keys.const_data_ptr<T>(),
                  values.const_data_ptr<T>(), sinks ? sinks->const_data_ptr<float>() : nullptr,
                  out.mutable_data_ptr<T>(), scratch);
      }
    });
  };
  if (query.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    TORCH_CHECK(query.scalar_type() == at::kBFloat16, "paged_attention: float32 or bfloat16");
    run(bf16{});
  }
  return out;
}

}  // namespace adapterd
