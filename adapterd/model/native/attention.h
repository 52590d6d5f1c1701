// Attention over paged keys and values, read where they lie: nothing is gathered, padded or repeated.

#pragma once

#include "linear.h"

#include <cmath>
#include <limits>
#include <vector>

namespace adapterd {

// Query rows that one thread handles at a time; they share each key and value that it reads.
constexpr int64_t kQueryRows = 24;

// Pieces of work for each thread, where there are so many: the more there are, the fewer heads lie side by side.
constexpr int64_t kItemsAThread = 2;

// Tokens of a sequence whose values are added at a time, where one head is alone; of several heads kGroupRows.
constexpr int64_t kRunAlone = 64;

struct AttentionParams {
  float scale;
  float softcap;  // 0: none
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

// At most `most` slots in a run.
inline void slot_runs(const int64_t* slots, int64_t begin, int64_t end, int64_t most, std::vector<SlotRun>& runs) {
  runs.clear();
  for (int64_t p = begin; p < end; ++p) {
    if (!runs.empty() && runs.back().slot + runs.back().length == slots[p] && runs.back().length < most) {
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
  std::vector<Prepared<T>> query;
  std::vector<float> scores;
  std::vector<Split> sums;
  std::vector<Split*> sum_rows;
};

struct AttentionShape {
  int64_t num_heads, num_kv_heads, key_dim, value_dim;
};

// Key heads [first, last).
struct HeadRange {
  int64_t first, last;
};

// One unit, some key heads and the query heads that share each: its query rows one head after another, and within a
// head one token after another.
struct QueryRows {
  AttentionUnit unit;
  HeadRange heads;
  AttentionShape shape;
  int64_t window;

  int64_t num_heads() const { return heads.last - heads.first; }
  int64_t group() const { return shape.num_heads / shape.num_kv_heads; }
  int64_t of_head() const { return unit.num_tokens * group(); }
  int64_t count() const { return num_heads() * of_head(); }
  // Positions [begin, end) are seen by any of them.
  int64_t end() const { return unit.position + unit.num_tokens; }
  int64_t begin() const { return first_seen(unit.position); }
  int64_t context() const { return end() - begin(); }
  int64_t first_seen(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
  int64_t position(int64_t row) const { return unit.position + token(row); }
  int64_t token(int64_t row) const { return row % of_head() / group(); }
  int64_t query_head(int64_t row) const { return (heads.first + row / of_head()) * group() + row % group(); }
  // Where the row stands in [tokens of the batch, query heads].
  int64_t place(int64_t row) const { return (unit.row + token(row)) * shape.num_heads + query_head(row); }
};

// scratch.scores[row * context + position - begin] = query . key. Heads lie side by side in memory, one token's after
// another's: so a few tokens meet all heads before the next are read.
template <typename T>
void score_keys(const QueryRows& rows, const T* query, const T* keys, AttentionScratch<T>& scratch) {
  const int64_t dim = rows.shape.key_dim;
  const int64_t context = rows.context();
  const int64_t of_head = rows.of_head();
  const int64_t width = prepared_stride(dim);
  scratch.query.resize(rows.count() * width);
  for (int64_t r = 0; r < rows.count(); ++r) {
    prepare_row(query + rows.place(r) * dim, dim, scratch.query.data() + r * width);
  }
  scratch.scores.assign(rows.count() * context, 0.0f);
  const int64_t stride = rows.shape.num_kv_heads * dim;
  const int64_t at_once = rows.num_heads() > 1 ? kTileRows : kGroupRows;
  const std::vector<SlotRun>& runs = scratch.slot_runs;
  for (size_t index = 0; index < runs.size(); ++index) {
    const SlotRun& run = runs[index];
    for (int64_t i = 0; i < run.length; i += at_once) {
      const int count = static_cast<int>(std::min(at_once, run.length - i));
      int64_t next = run.slot + i + count;
      if (i + count == run.length) next = index + 1 < runs.size() ? runs[index + 1].slot : run.slot;
      for (int64_t head = 0; head < rows.num_heads(); ++head) {
        const T* at = keys + (rows.heads.first + head) * dim;
        float* scores = scratch.scores.data() + head * of_head * context + run.position - rows.begin() + i;
        for (int64_t k = 0; k < dim; k += kChunk<T>) {
          dot_group(count, at + (run.slot + i) * stride + k, stride, scratch.query.data() + head * of_head * width + k,
                    width, of_head, std::min(kChunk<T>, dim - k), scores, context, at + next * stride + k);
        }
      }
    }
  }
}

// One head's part of a run's values lies in pieces a whole token apart, which the processor does not guess.
template <typename T>
void prefetch_values(const SlotRun& run, const T* values, int64_t head, const AttentionShape& shape) {
  const int64_t stride = shape.num_kv_heads * shape.value_dim;
  prefetch_rows(values + run.slot * stride + head * shape.value_dim, stride, run.length, shape.value_dim);
}

// scratch.scores become weights: none for what a row does not see.
template <typename T>
void weigh(const QueryRows& rows, const AttentionParams& params, const float* sinks, AttentionScratch<T>& scratch) {
  const int64_t context = rows.context();
  for (int64_t r = 0; r < rows.count(); ++r) {
    const int64_t first = rows.first_seen(rows.position(r)) - rows.begin();
    const int64_t last = rows.position(r) + 1 - rows.begin();
    float* scores = scratch.scores.data() + r * context;
    std::fill(scores, scores + first, 0.0f);
    softmax(scores + first, last - first, params, sinks ? sinks + rows.query_head(r) : nullptr);
    std::fill(scores + last, scores + context, 0.0f);
  }
}

// out = weights times values, in the order of score_keys. Sums stay in float32 from run to run.
template <typename T>
void add_values(const QueryRows& rows, const T* values, T* out, AttentionScratch<T>& scratch) {
  const AttentionShape& shape = rows.shape;
  const int64_t dim = shape.value_dim;
  const int64_t context = rows.context();
  const int64_t stride = shape.num_kv_heads * dim;
  const int64_t width = prepared_stride(dim);
  scratch.sums.resize(rows.count() * width);
  scratch.sum_rows.clear();
  for (int64_t r = 0; r < rows.count(); ++r) scratch.sum_rows.push_back(scratch.sums.data() + r * width);
  const std::vector<SlotRun>& runs = scratch.slot_runs;
  for (size_t index = 0; index < runs.size(); ++index) {
    const SlotRun& run = runs[index];
    for (int64_t head = 0; head < rows.num_heads(); ++head) {
      const int64_t kv_head = rows.heads.first + head;
      if (index + 1 < runs.size()) prefetch_values(runs[index + 1], values, kv_head, shape);
      const float* weights = scratch.scores.data() + head * rows.of_head() * context + run.position - rows.begin();
      const Run<T> here{values + run.slot * stride + kv_head * dim, weights, context, run.length};
      Split* const* to = scratch.sum_rows.data() + head * rows.of_head();
      if (index == 0) {
        axpy(to, rows.of_head(), FromZero{}, &here, 1, stride, 0, dim);
      } else {
        axpy(to, rows.of_head(), FromRows<Split>{to}, &here, 1, stride, 0, dim);
      }
    }
  }
  for (int64_t r = 0; r < rows.count(); ++r) {
    T* to = out + rows.place(r) * dim;
    const Split* from = scratch.sum_rows[r];
    int64_t c = 0;
    for (; c + kBlock <= dim; c += kBlock) store_pair(to + c, load_pair(from + c));
    if (c < dim) store_pair(to + c, load_pair(from + c), dim - c);
  }
}

template <typename T>
void attend(const QueryRows& rows, const AttentionParams& params, const T* query, const T* keys, const T* values,
            const float* sinks, T* out) {
  thread_local AttentionScratch<T> scratch;
  slot_runs(rows.unit.slots, rows.begin(), rows.end(), rows.num_heads() > 1 ? kGroupRows : kRunAlone, scratch.slot_runs);
  score_keys(rows, query, keys, scratch);
  for (int64_t head = rows.heads.first; head < rows.heads.last; ++head) {
    prefetch_values(scratch.slot_runs.front(), values, head, rows.shape);
  }
  weigh(rows, params, sinks, scratch);
  add_values(rows, values, out, scratch);
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
  const AttentionParams params{static_cast<float>(scale), static_cast<float>(softcap)};
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
  // As many heads at a time as leave every thread enough items.
  const int64_t num_units = static_cast<int64_t>(units.size());
  const int64_t items_wanted = kItemsAThread * at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>((items_wanted + num_units - 1) / std::max<int64_t>(1, num_units), 1,
                                            shape.num_kv_heads);
  const int64_t heads_at_once = (shape.num_kv_heads + parts - 1) / parts;
  const int64_t num_items = num_units * parts;
  const int64_t item_work = work * shape.num_heads * (shape.key_dim + shape.value_dim) / std::max<int64_t>(1, num_items);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    share_out(num_items, item_work, [&](int64_t item, int64_t) {
      const AttentionUnit& unit = units[item / parts];
      const int64_t first = item % parts * heads_at_once;
      const int64_t last = std::min(first + heads_at_once, shape.num_kv_heads);
      // The scores of many query rows for all heads would not fit a cache; and these rows use a key often enough.
      const int64_t step = unit.num_tokens == 1 ? std::max<int64_t>(1, last - first) : 1;
      for (int64_t head = first; head < last; head += step) {
        attend<T>({unit, {head, head + step}, shape, window}, params, rows.const_data_ptr<T>(), keys.const_data_ptr<T>(),
                  values.const_data_ptr<T>(), sinks ? sinks->const_data_ptr<float>() : nullptr,
                  out.mutable_data_ptr<T>());
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
