// y += scale * (x A^T) B for every adapter of a batch: the two halves, cut into pieces for threads. See linears.h.

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
constexpr int64_t kExpandAtOnce = 4 * kExpandColumns;

// A piece of x A^T that one thread computes: some rank rows for some tokens of one entry.
struct ShrinkUnit {
  const LoraEntry* entry;
  float* h;  // [tokens of the entry, rank]
  int64_t row, num_rows, token, num_tokens;
};

inline void cut_shrink(const LoraEntry* entries, int64_t count, float* h, std::vector<ShrinkUnit>& units) {
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
}

inline int64_t shrunk_size(const LoraEntry* entries, int64_t count) {
  int64_t size = 0;
  for (const LoraEntry* e = entries; e != entries + count; ++e) size += (e->end - e->start) * e->rank;
  return size;
}

template <typename T>
void shrink(const ShrinkUnit& unit, const PreparedRows<T>& x, int64_t d_in) {
  const LoraEntry& e = *unit.entry;
  float* h = unit.h + unit.token * e.rank + unit.row;
  for (int64_t t = 0; t < unit.num_tokens; ++t) std::fill_n(h + t * e.rank, unit.num_rows, 0.0f);
  const T* a = reinterpret_cast<const T*>(e.a) + unit.row * d_in;
  const Prepared<T>* rows = x.data + (e.start + unit.token) * x.stride;
  for (int64_t k = 0; k < d_in; k += kChunk<T>) {
    dot_group(static_cast<int>(unit.num_rows), a + k, d_in, rows + k, x.stride, unit.num_tokens,
              std::min(kChunk<T>, d_in - k), h, e.rank, nullptr);
  }
  const float scale = static_cast<float>(e.scale);
  for (int64_t t = 0; t < unit.num_tokens; ++t) {
    for (int64_t r = 0; r < unit.num_rows; ++r) h[t * e.rank + r] *= scale;
  }
}

template <typename T>
void prefetch_shrink(const ShrinkUnit& unit, int64_t d_in) {
  if (unit.token == 0) {
    prefetch_rows(reinterpret_cast<const T*>(unit.entry->a) + unit.row * d_in, d_in, unit.num_rows, d_in);
  }
}

// Columns [begin, end) of y [tokens, d_out], to which h B is added for every entry of one linear.
template <typename T>
struct ExpandUnit {
  const LoraEntry* entries;
  int64_t count;
  const float* h;
  T* y;
  int64_t d_out, begin, end;
};

// Entries from `first` on that apply to the same tokens; returns where they end.
inline int64_t same_segment(const LoraEntry* entries, int64_t first, int64_t count) {
  int64_t last = first + 1;
  while (last < count && same_tokens(entries[last], entries[first])) ++last;
  return last;
}

// Tiles take a few columns of every row of B at a time, from memory the worst order there is. So each segment's part is
// asked for while the one before is added.
template <typename T>
void prefetch_expand(const ExpandUnit<T>& unit, int64_t first) {
  for (int64_t i = first, last = same_segment(unit.entries, first, unit.count); i < last; ++i) {
    prefetch_rows(reinterpret_cast<const T*>(unit.entries[i].b) + unit.begin, unit.d_out, unit.entries[i].rank,
                  unit.end - unit.begin);
  }
}

// each(first, last, h) for every segment of the unit, in order: its entries, and where their part of h begins.
template <typename T, typename F>
void for_each_segment(const ExpandUnit<T>& unit, const F& each) {
  const float* h = unit.h;
  for (int64_t first = 0, last = 0; first < unit.count; first = last) {
    last = same_segment(unit.entries, first, unit.count);
    each(first, last, h);
    for (int64_t i = first; i < last; ++i) h += (unit.entries[i].end - unit.entries[i].start) * unit.entries[i].rank;
  }
}

// y of tokens [start, end) = before + the h B of entries [first, last), which are these tokens', or none.
template <typename T, typename Before>
void expand_tokens(const ExpandUnit<T>& unit, int64_t first, int64_t last, const float* h, int64_t start, int64_t end,
                   const Before& before) {
  thread_local std::vector<Run<T>> runs;
  thread_local std::vector<T*> rows;
  runs.clear();
  rows.clear();
  for (int64_t i = first; i < last; ++i) {
    const int64_t rank = unit.entries[i].rank;
    runs.push_back({reinterpret_cast<const T*>(unit.entries[i].b), h, rank, rank});
    h += (end - start) * rank;
  }
  for (int64_t t = start; t < end; ++t) rows.push_back(unit.y + t * unit.d_out);
  for (int64_t column = unit.begin; column < unit.end; column += kExpandColumns) {
    axpy(rows.data(), end - start, before(rows.data()), runs.data(), static_cast<int64_t>(runs.size()), unit.d_out,
         column, std::min(column + kExpandColumns, unit.end));
  }
}

// Onto what y has already. `next` is what the thread adds after this, if anything.
template <typename T>
void expand(const ExpandUnit<T>& unit, const ExpandUnit<T>* next) {
  for_each_segment(unit, [&](int64_t first, int64_t last, const float* h) {
    if (last < unit.count) {
      prefetch_expand(unit, last);
    } else if (next) {
      prefetch_expand(*next, 0);
    }
    const LoraEntry& e = unit.entries[first];
    expand_tokens(unit, first, last, h, e.start, e.end, [](T* const* rows) { return FromRows<T>{rows}; });
  });
}

// Onto what the weights gave, before it is rounded and leaves the cache: every token is written, with an adapter or
// without. Segments are in the order of their tokens.
template <typename T>
void expand_sums(const ExpandUnit<T>& unit, const GroupSums<T>& sums, int64_t tokens) {
  int64_t done = 0;
  const auto write = [&](int64_t first, int64_t last, const float* h, int64_t end) {
    expand_tokens(unit, first, last, h, done, end, [&](T* const*) { return sums.from_token(done); });
    done = end;
  };
  for_each_segment(unit, [&](int64_t first, int64_t last, const float* h) {
    write(0, 0, nullptr, unit.entries[first].start);
    write(first, last, h, unit.entries[first].end);
  });
  write(0, 0, nullptr, tokens);
}

}  // namespace adapterd
