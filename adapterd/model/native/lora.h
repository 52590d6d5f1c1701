// y += scale * (x A^T) B for one linear and every adapter of the batch, in one call.

#pragma once

#include "linear.h"

#include <vector>

namespace adapterd {

// One row of the table that lora_cpu.py makes: an extent of some adapter's matrices, and the tokens it applies to.
// Extents of one segment follow one another.
struct LoraEntry {
  int64_t start, end;  // tokens
  int64_t a, b;        // addresses of A [rank, d_in] and B transposed [rank, d_out]
  int64_t rank;
  double scale;
};
static_assert(sizeof(LoraEntry) == 6 * sizeof(int64_t));

inline bool same_tokens(const LoraEntry& p, const LoraEntry& q) { return p.start == q.start && p.end == q.end; }

constexpr int64_t kShrinkTokens = 24;
constexpr int64_t kExpandColumns = 4 * kBlock;

// A piece of x A^T that one thread computes: some rank rows for some tokens of one entry.
struct ShrinkUnit {
  const LoraEntry* entry;
  float* h;  // [tokens of the entry, rank]
  int64_t row, num_rows, token, num_tokens;
};

inline std::vector<ShrinkUnit> shrink_units(const LoraEntry* entries, int64_t count, float* h) {
  std::vector<ShrinkUnit> units;
  for (const LoraEntry* e = entries; e != entries + count; ++e) {
    const int64_t tokens = e->end - e->start;
    // Few tokens: small units, so that one adapter occupies many cores. Many: whole groups, so that x is read once.
    const int64_t row_step = tokens > kTileTokens ? kGroupRows : kTileRows;
    for (int64_t token = 0; token < tokens; token += kShrinkTokens) {
      for (int64_t row = 0; row < e->rank; row += row_step) {
        units.push_back({e, h, row, std::min(row_step, e->rank - row), token, std::min(kShrinkTokens, tokens - token)});
      }
    }
    h += tokens * e->rank;
  }
  return units;
}

template <typename T>
void shrink(const ShrinkUnit& unit, const PreparedRows<T>& x, int64_t d_in) {
  const LoraEntry& e = *unit.entry;
  float* h = unit.h + unit.token * e.rank + unit.row;
  for (int64_t t = 0; t < unit.num_tokens; ++t) std::fill_n(h + t * e.rank, unit.num_rows, 0.0f);
  const T* a = reinterpret_cast<const T*>(e.a) + unit.row * d_in;
  const Prepared<T>* rows = x.data + (e.start + unit.token) * x.stride;
  for (int64_t k = 0; k < d_in; k += kChunk<T>) {
    dot_group<T>(static_cast<int>(unit.num_rows), a + k, d_in, rows + k, x.stride, unit.num_tokens,
                 std::min(kChunk<T>, d_in - k), h, e.rank, nullptr);
  }
  const float scale = static_cast<float>(e.scale);
  for (int64_t t = 0; t < unit.num_tokens; ++t) {
    for (int64_t r = 0; r < unit.num_rows; ++r) h[t * e.rank + r] *= scale;
  }
}

template <typename T>
void add_lora_rows(T* y, const T* x, const LoraEntry* entries, int64_t count, int64_t tokens, int64_t d_in,
                   int64_t d_out) {
  int64_t num_h = 0;
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) {
    num_h += (entries[i].end - entries[i].start) * entries[i].rank;
    work += entries[i].rank * (entries[i].end - entries[i].start + 4);
  }
  const PreparedRows<T> prepared = prepare_rows(x, tokens, d_in);
  at::Tensor products = at::empty({num_h}, at::kFloat);
  float* h = products.mutable_data_ptr<float>();

  const std::vector<ShrinkUnit> units = shrink_units(entries, count, h);
  const int64_t num_units = static_cast<int64_t>(units.size());
  at::parallel_for(0, num_units, grain(work * d_in / std::max<int64_t>(1, num_units)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) shrink<T>(units[i], prepared, d_in);
  });

  const int64_t blocks = (d_out + kExpandColumns - 1) / kExpandColumns;
  at::parallel_for(0, blocks, grain(work * kExpandColumns), [&](int64_t begin, int64_t end) {
    std::vector<Run<T>> runs;
    std::vector<T*> rows;
    const float* segment_h = h;
    for (int64_t first = 0, last = 0; first < count; first = last) {
      const int64_t length = entries[first].end - entries[first].start;
      runs.clear();
      rows.clear();
      for (; last < count && same_tokens(entries[last], entries[first]); ++last) {
        // Tiles take a few columns of every row at a time, from memory the worst order there is.
        const int64_t columns = std::min(end * kExpandColumns, d_out) - begin * kExpandColumns;
        prefetch_rows(reinterpret_cast<const T*>(entries[last].b) + begin * kExpandColumns, d_out, entries[last].rank,
                      columns);
        runs.push_back({reinterpret_cast<const T*>(entries[last].b), segment_h, entries[last].rank, entries[last].rank});
        segment_h += length * entries[last].rank;
      }
      for (int64_t t = 0; t < length; ++t) rows.push_back(y + (entries[first].start + t) * d_out);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t column = block * kExpandColumns;
        axpy(rows.data(), length, true, runs.data(), static_cast<int64_t>(runs.size()), d_out, column,
             std::min(column + kExpandColumns, d_out));
      }
    }
  });
}

// y: [tokens, d_out], changed in place; x: [tokens, d_in]; one type, float32 or bfloat16.
// table: int64 [num_entries, 6] as LoraEntry; rows [first, last) of it are this linear's. The matrices at its
// addresses have the type of x and are kept alive by the caller.
inline void add_lora(at::Tensor& y, const at::Tensor& x, const at::Tensor& table, int64_t first, int64_t last) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0), "add_lora: x and y must have the same rows");
  TORCH_CHECK(x.is_contiguous() && y.is_contiguous(), "add_lora: x and y must be contiguous");
  TORCH_CHECK(x.scalar_type() == y.scalar_type(), "add_lora: x and y differ in type");
  TORCH_CHECK(table.scalar_type() == at::kLong && table.is_contiguous() && table.dim() == 2 && table.size(1) == 6,
              "add_lora: table must be int64 [num_entries, 6]");
  TORCH_CHECK(0 <= first && first <= last && last <= table.size(0), "add_lora: no rows ", first, " to ", last);
  const auto* entries = reinterpret_cast<const LoraEntry*>(table.const_data_ptr<int64_t>()) + first;
  for (int64_t i = 0; i < last - first; ++i) {
    TORCH_CHECK(0 <= entries[i].start && entries[i].start <= entries[i].end && entries[i].end <= x.size(0),
                "add_lora: tokens ", entries[i].start, " to ", entries[i].end, " of ", x.size(0));
  }
  if (x.scalar_type() == at::kFloat) {
    add_lora_rows(y.mutable_data_ptr<float>(), x.const_data_ptr<float>(), entries, last - first, x.size(0), x.size(1),
                  y.size(1));
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "add_lora: float32 or bfloat16, not ", x.scalar_type());
    add_lora_rows(y.mutable_data_ptr<bf16>(), x.const_data_ptr<bf16>(), entries, last - first, x.size(0), x.size(1),
                  y.size(1));
  }
}

}  // namespace adapterd
