// Linears that read the same x, and what adapters add to each, in one call.
//
// Two stages with one join between them. Few tokens: all rows of all weights and every x A^T, then every h B, since
// memory is the bottleneck and so is read in long pieces. Many: every x A^T, then all rows of all weights, each group
// with its h B while its sums are in the cache, since to read and write all of y once more would cost more than the
// adapters' arithmetic. A call without adapters multiplies weights alone, a call without weights (they were multiplied
// elsewhere) adds to what is there.

#pragma once

#include "lora.h"

#include <utility>

namespace adapterd {

// What adapters do to one product: `count` entries, their results' place in h.
struct Additions {
  const LoraEntry* entries;
  int64_t count;
  float* h;
};

inline Additions checked_additions(const at::Tensor& table, int64_t first, int64_t last, int64_t tokens) {
  TORCH_CHECK(table.scalar_type() == at::kLong && table.is_contiguous() && table.dim() == 2 && table.size(1) == 6,
              "adapters: table must be int64 [num_entries, 6]");
  TORCH_CHECK(0 <= first && first <= last && last <= table.size(0), "adapters: no rows ", first, " to ", last);
  const auto* entries = reinterpret_cast<const LoraEntry*>(table.const_data_ptr<int64_t>());
  const LoraEntry* before = nullptr;
  for (const LoraEntry* e = entries + first; e != entries + last; before = e++) {
    TORCH_CHECK(0 <= e->start && e->start <= e->end && e->end <= tokens, "adapters: tokens ", e->start, " to ", e->end,
                " of ", tokens);
    TORCH_CHECK(!before || same_tokens(*before, *e) || before->end <= e->start, "adapters: tokens from ", e->start,
                " on after those up to ", before->end);
  }
  return {entries + first, last - first, nullptr};
}

// One call, cut into pieces. With `multiply` every y is written, without it is added to.
template <typename T>
class LinearsCall {
 public:
  LinearsCall(std::vector<Product<T>> products, std::vector<Additions> additions, const T* x, int64_t tokens,
              int64_t d_in, bool multiply)
      : products_(std::move(products)), additions_(std::move(additions)), tokens_(tokens), d_in_(d_in) {
    cut_adapters();
    bool whole = false;
    bool plain = !shrinks_.empty();
    for (const Product<T>& product : products_) {
      whole |= product.whole != nullptr;
      plain |= product.w != nullptr;
    }
    x_ = prepare_rows(x, tokens, d_in, plain, whole);
    if (multiply) units_ = product_units(products_, whole, tokens, d_in, &group_rows_);
    for (const ProductUnit& unit : units_) product_work_ += (unit.end - unit.begin) * d_in * tokens;
  }

  void run() const {
    const bool many = tokens_ > kFewTokens && group_rows_ % kBlock == 0;
    if (units_.empty() || shrinks_.empty() || !many) return run_few();
    run_many();
  }

 private:
  void cut_adapters() {
    int64_t num_h = 0;
    for (const Additions& a : additions_) num_h += shrunk_size(a.entries, a.count);
    shrunk_ = at::empty({num_h}, at::kFloat);
    float* h = shrunk_.mutable_data_ptr<float>();
    for (Additions& a : additions_) {
      a.h = h;
      cut_shrink(a.entries, a.count, h, shrinks_);
      h += shrunk_size(a.entries, a.count);
      for (const LoraEntry* e = a.entries; e != a.entries + a.count; ++e) {
        rank_rows_ += e->rank * (e->end - e->start + 4);
      }
    }
  }

  int64_t num_units() const { return static_cast<int64_t>(units_.size()); }
  int64_t num_shrinks() const { return static_cast<int64_t>(shrinks_.size()); }

  // `next` is the unit that the thread multiplies next, if there is one.
  template <typename F>
  void multiply(int64_t item, int64_t next, const F& finish) const {
    const ProductUnit& unit = units_[item];
    const T* after = nullptr;
    if (next < num_units()) {
      const Product<T>& product = products_[units_[next].product];
      if (product.w && units_[next].begin + group_rows_ <= product.d_out) after = product.w + units_[next].begin * d_in_;
    }
    multiply_rows(products_[unit.product], x_, tokens_, d_in_, group_rows_, unit.begin, unit.end, after, finish);
  }

  ExpandUnit<T> expand_unit(int64_t i, int64_t begin, int64_t end) const {
    return {additions_[i].entries, additions_[i].count, additions_[i].h, products_[i].y, products_[i].d_out, begin, end};
  }

  void run_many() const {
    share_out(num_shrinks(), rank_rows_ * d_in_ / num_shrinks(),
              [&](int64_t item, int64_t) { shrink<T>(shrinks_[item], x_, d_in_); });
    share_out(num_units(), product_work_ / num_units(), [&](int64_t item, int64_t next) {
      multiply(item, next, [&](const GroupSums<T>& sums) {
        expand_sums(expand_unit(units_[item].product, sums.row, sums.row + sums.rows), sums, tokens_);
      });
    });
  }

  void run_few() const {
    const int64_t num_items = num_units() + num_shrinks();
    const int64_t work = rank_rows_ * d_in_ + product_work_;
    share_out(num_items, work / std::max<int64_t>(1, num_items), [&](int64_t item, int64_t next) {
      // The matrices of adapters are small: without this, each would begin by waiting for memory.
      if (next >= num_units() && next < num_items) prefetch_shrink<T>(shrinks_[next - num_units()], d_in_);
      if (item >= num_units()) return shrink<T>(shrinks_[item - num_units()], x_, d_in_);
      multiply(item, next, [&](const GroupSums<T>& sums) { store_sums(sums, tokens_); });
    });
    if (shrinks_.empty()) return;

    std::vector<ExpandUnit<T>> expands;
    for (size_t i = 0; i < products_.size(); ++i) {
      if (additions_[i].count == 0) continue;
      for (int64_t c = 0; c < products_[i].d_out; c += kExpandAtOnce) {
        expands.push_back(expand_unit(static_cast<int64_t>(i), c, std::min(c + kExpandAtOnce, products_[i].d_out)));
      }
    }
    const int64_t num_expands = static_cast<int64_t>(expands.size());
    share_out(num_expands, rank_rows_ * kExpandAtOnce, [&](int64_t item, int64_t next) {
      expand<T>(expands[item], next < num_expands ? &expands[next] : nullptr);
    });
  }

  std::vector<Product<T>> products_;
  std::vector<Additions> additions_;
  int64_t tokens_, d_in_;
  at::Tensor shrunk_;  // every x A^T
  std::vector<ShrinkUnit> shrinks_;
  int64_t rank_rows_ = 0;
  PreparedRows<T> x_;
  std::vector<ProductUnit> units_;
  int64_t group_rows_ = 0;
  int64_t product_work_ = 0;
};

inline void check_input(const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "linears: x must be contiguous");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "linears: float32 or bfloat16, not ",
              x.scalar_type());
}

template <typename F>
void by_type(const at::Tensor& x, const F& run) {
  if (x.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    run(bf16{});
  }
}

// x: [..., d_in]; weights: [d_out, d_in] each; biases: [d_out] or none, as many; all of one type, float32 or bfloat16,
// but for weights of int8: these have scales, float32 [d_out], and the others none.
// table: int64 [num_entries, 6] as LoraEntry, or none; rows [bounds[2i], bounds[2i + 1]) of it are weight i's; tokens
// are x's rows. The matrices at its addresses have the type of x and are kept alive by the caller. Returns [..., d_out]
// each.
inline std::vector<at::Tensor> linears(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                       const c10::List<std::optional<at::Tensor>>& scales,
                                       const c10::List<std::optional<at::Tensor>>& biases,
                                       const std::optional<at::Tensor>& table, at::IntArrayRef bounds) {
  check_input(x);
  TORCH_CHECK(scales.size() == weights.size() && biases.size() == weights.size() &&
                  (!table || bounds.size() == 2 * weights.size()),
              "linears: scales, a bias and two bounds for each weight");
  const int64_t d_in = x.size(-1);
  const int64_t tokens = d_in ? x.numel() / d_in : 0;
  std::vector<at::Tensor> found;
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Product<T>> products;
    std::vector<Additions> additions;
    for (size_t i = 0; i < weights.size(); ++i) {
      const at::Tensor& weight = weights[i];
      TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "linears: weight must be a contiguous matrix");
      TORCH_CHECK(weight.size(1) == d_in, "linears: x has ", d_in, " columns, weight ", weight.size(1));
      const std::optional<at::Tensor> scale = scales.get(i);
      TORCH_CHECK(weight.scalar_type() == (scale ? at::kChar : x.scalar_type()),
                  "linears: x and weight differ in type, and a weight of int8 needs scales");
      TORCH_CHECK(!scale || (scale->scalar_type() == at::kFloat && scale->is_contiguous() &&
                             scale->numel() == weight.size(0)),
                  "linears: scales must be contiguous float32, one for each row");
      const std::optional<at::Tensor> bias = biases.get(i);
      TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->is_contiguous() &&
                            bias->numel() == weight.size(0)),
                  "linears: bias must be contiguous, of weight's type and length");
      auto shape = x.sizes().vec();
      shape.back() = weight.size(0);
      found.push_back(at::empty(shape, x.options()));
      products.push_back({scale ? nullptr : weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr,
                          found.back().mutable_data_ptr<T>(), weight.size(0),
                          scale ? weight.const_data_ptr<int8_t>() : nullptr,
                          scale ? scale->const_data_ptr<float>() : nullptr});
      Additions adapters{nullptr, 0, nullptr};
      if (table) adapters = checked_additions(*table, bounds[2 * i], bounds[2 * i + 1], tokens);
      additions.push_back(adapters);
    }
    LinearsCall<T>(std::move(products), std::move(additions), x.const_data_ptr<T>(), tokens, d_in, true).run();
  });
  return found;
}

// One linear without adapters; x may have any strides.
inline at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& scales) {
  using Each = c10::List<std::optional<at::Tensor>>;
  return linears(x.contiguous(), {weight}, Each({scales}), Each({bias}), std::nullopt, {})[0];
}

// y: [tokens, d_out], changed in place; x: [tokens, d_in]; one type, float32 or bfloat16. table as in linears(); its
// rows [first, last) are this linear's.
inline void add_lora(at::Tensor& y, const at::Tensor& x, const at::Tensor& table, int64_t first, int64_t last) {
  check_input(x);
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0), "add_lora: x and y must have the same rows");
  TORCH_CHECK(y.is_contiguous(), "add_lora: y must be contiguous");
  TORCH_CHECK(x.scalar_type() == y.scalar_type(), "add_lora: x and y differ in type");
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Product<T> product{nullptr, nullptr, y.mutable_data_ptr<T>(), y.size(1)};
    const Additions adapters = checked_additions(table, first, last, x.size(0));
    LinearsCall<T>({product}, {adapters}, x.const_data_ptr<T>(), x.size(0), x.size(1), false).run();
  });
}

}  // namespace adapterd
