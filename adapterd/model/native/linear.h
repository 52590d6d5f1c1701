// y = x W^T + bias, for few tokens at the speed at which W comes from memory; cut into pieces for threads. See
// linears.h.

#pragma once

#include "whole.h"

#include <optional>
#include <vector>

namespace adapterd {

// What a thread takes of the weights at a time: some microseconds, so that at the end none waits long for the others.
constexpr int64_t kUnitBytes = 1 << 16;

constexpr int64_t kFewTokens = 48;
constexpr int64_t kManyRows = 64;

// Of tokens of one pass, where rows lie apart: the places that are read at once are a quarter of this long each, and
// whenever they begin anew the processor stops fetching ahead. Half as much takes 5% longer, a quarter 13.
constexpr int64_t kSpreadBytes = 1 << 18;

// Whether rows are so read. Not those that are written out or looked up first: what is made of them must fit a cache.
template <typename T>
bool reads_spread(bool whole, int64_t tokens) {
  return kSpreadRows && tokens <= kTileTokens && (!whole || kFixesInput<T>);
}

// y [tokens, d_out] = x w^T + bias, for one of several linears that read the same x. A weight of whole numbers has
// `whole` in place of w, and a scale for each row: its products are taken as they are, and their sums are scaled.
template <typename T>
struct Product {
  const T* w;
  const T* bias;
  T* y;
  int64_t d_out;
  const int8_t* whole = nullptr;
  const float* scales = nullptr;
};

// What rows [row, row + rows) of a product's weights gave: sums[token * group_rows + j].
template <typename T>
struct GroupSums {
  const Product<T>& product;
  const float* sums;
  int64_t group_rows, row, rows;

  GroupSums from_token(int64_t token) const { return {product, sums + token * group_rows, group_rows, row, rows}; }

  // As axpy's `before`: a block of y.
  Pair operator()(int64_t token, int64_t column, int64_t partial) const {
    const auto in_order = [partial](const float* p) {
      if (!partial) return load_as_pair_of<T>(p);
      float padded[kBlock] = {};
      std::copy_n(p, partial, padded);
      return load_as_pair_of<T>(padded);
    };
    Pair y = in_order(sums + token * group_rows + column - row);
    if (product.scales) {
      const Pair scale = in_order(product.scales + column);
      y = {y.a * scale.a, y.b * scale.b};
    }
    if (product.bias) {
      const T* from = product.bias + column;
      const Pair bias = partial ? load_pair(from, partial) : load_pair(from);
      y = {y.a + bias.a, y.b + bias.b};
    }
    return y;
  }
};

// Rows [begin, end) of one product's weights, `group_rows` at a time; finish(sums) for each. `after` is as many rows
// which the thread multiplies next, or null.
template <typename T, typename F>
void multiply_rows(const Product<T>& product, const PreparedRows<T>& x, int64_t tokens, int64_t d_in,
                   int64_t group_rows, int64_t begin, int64_t end, const T* after, const F& finish) {
  thread_local std::vector<float> sums;
  sums.resize(tokens * group_rows);
  const bool asks = !reads_spread<T>(product.whole, tokens);  // several places at once are fetched ahead as it is
  const int64_t columns = product.whole && !kFixesInput<T> ? kChunk<T> : chunk_columns<T>(tokens);
  for (int64_t row = begin; row < end; row += group_rows) {
    const int rows = static_cast<int>(std::min(group_rows, end - row));
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t k = 0; k < d_in; k += columns) {
      if (product.whole) {
        dot_whole(product.whole + row * d_in + k, d_in, rows, asks ? product.d_out - row - rows : 0, x, k, tokens,
                  std::min(columns, d_in - k), sums.data(), group_rows);
        continue;
      }
      const T* here = product.w + row * d_in + k;
      const T* next = after;
      if (!asks) {
        next = nullptr;
      } else if (k + columns < d_in) {
        next = here + columns;
      } else if (row + group_rows < end) {
        next = row + 2 * group_rows <= product.d_out ? product.w + (row + group_rows) * d_in : nullptr;
      }
      dot_group(rows, here, d_in, x.data + k, x.stride, tokens, std::min(columns, d_in - k), sums.data(),
                group_rows, next);
    }
    finish(GroupSums<T>{product, sums.data(), group_rows, row, rows});
  }
}

// y = sums, scaled, and the bias.
template <typename T>
void store_sums(const GroupSums<T>& from, int64_t tokens) {
  const Product<T>& product = from.product;
  for (int64_t t = 0; t < tokens; ++t) {
    T* y = product.y + t * product.d_out + from.row;
    for (int64_t j = 0; j < from.rows; ++j) {
      const float offset = product.bias ? static_cast<float>(product.bias[from.row + j]) : 0.0f;
      const float scale = product.scales ? product.scales[from.row + j] : 1.0f;
      y[j] = static_cast<T>(from.sums[t * from.group_rows + j] * scale + offset);
    }
  }
}

// A piece of the weights of some product that one thread multiplies.
struct ProductUnit {
  int64_t product, begin, end;
};

// All products cut into units. Many tokens do not fit the second cache: more rows are kept there instead, so that x
// comes by less often. `whole`: some are of whole numbers.
template <typename T>
std::vector<ProductUnit> product_units(const std::vector<Product<T>>& products, bool whole, int64_t tokens, int64_t d_in,
                                       int64_t* group_rows) {
  int64_t total = 0;
  for (const Product<T>& product : products) total += product.d_out;
  const int64_t threads = at::get_num_threads();
  const bool many = tokens > kFewTokens && total >= 4 * threads * kManyRows;
  const bool looked_up = whole && !kFixesInput<T>;
  const int64_t row_bytes = d_in * static_cast<int64_t>(whole ? sizeof(int8_t) : sizeof(T));
  *group_rows = many ? kManyRows : kSpreadRows ? 2 * kGroupRows : looked_up ? kTileRows : kGroupRows;
  if (reads_spread<T>(whole, tokens)) {
    // Not so long that a thread waits for another at the end.
    const int64_t bytes = std::min(kSpreadBytes, total * row_bytes / (8 * threads));
    *group_rows = std::max<int64_t>(2, bytes / (row_bytes * kGroupRows)) * kGroupRows;
  }
  const int64_t groups_at_once = std::max<int64_t>(1, kUnitBytes / (*group_rows * row_bytes));
  const int64_t step = *group_rows * groups_at_once;
  std::vector<ProductUnit> units;
  for (size_t i = 0; i < products.size(); ++i) {
    for (int64_t row = 0; row < products[i].d_out; row += step) {
      units.push_back({static_cast<int64_t>(i), row, std::min(row + step, products[i].d_out)});
    }
  }
  return units;
}

}  // namespace adapterd
