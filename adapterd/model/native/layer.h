// Whole decoder layers of the Llama kind in one call: norm, q/k/v, rotary, attention, o, norm, gated MLP, residuals.
//
// It only strings together what stands in the other headers. What it saves is everything between them: some forty
// small operators and fifteen modules a layer, in which memory, the bottleneck of decoding, would stand idle.

#pragma once

#include "activation.h"
#include "attention.h"
#include "kv.h"
#include "linears.h"
#include "norm.h"

#include <torch/custom_class.h>

namespace adapterd {

// One token's heads, normalised if there is a weight, then rotated: the halves of a head are the two coordinates.
template <typename T>
void rotate_heads(T* x, int64_t heads, int64_t dim, const T* weight, float eps, float offset, const T* cos, const T* sin,
                  float* scratch) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += dim) {
    float squares = 0.0f;
    for (int64_t i = 0; i < dim; ++i) {
      scratch[i] = static_cast<float>(x[i]);
      squares += scratch[i] * scratch[i];
    }
    if (weight) {
      const float factor = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
      for (int64_t i = 0; i < dim; ++i) scratch[i] *= factor * (static_cast<float>(weight[i]) + offset);
    }
    for (int64_t i = 0; i < half; ++i) {
      const float a = scratch[i];
      const float b = scratch[i + half];
      x[i] = static_cast<T>(a * static_cast<float>(cos[i]) - b * static_cast<float>(sin[i]));
      x[i + half] = static_cast<T>(b * static_cast<float>(cos[i + half]) + a * static_cast<float>(sin[i + half]));
    }
  }
}

// x: [tokens, heads * dim], changed in place; cos, sin: [..., dim] of as many tokens; weight: [dim] or none.
inline void rotate(at::Tensor& x, int64_t dim, const std::optional<at::Tensor>& weight, double eps, double offset,
                   const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t tokens = cos.numel() / dim;
  const int64_t heads = x.numel() / std::max<int64_t>(1, tokens * dim);
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    share_ranges(tokens, 4 * heads * dim, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(dim);
      for (int64_t t = begin; t < end; ++t) {
        rotate_heads(x.mutable_data_ptr<T>() + t * heads * dim, heads, dim,
                     weight ? weight->const_data_ptr<T>() : nullptr, static_cast<float>(eps),
                     static_cast<float>(offset), cos.const_data_ptr<T>() + t * dim, sin.const_data_ptr<T>() + t * dim,
                     scratch.data());
      }
    });
  });
}

// x + y, rounded as torch rounds it. One shape and type, contiguous.
inline at::Tensor sum_of(const at::Tensor& x, const at::Tensor& y) {
  at::Tensor out = at::empty(x.sizes(), x.options());
  by_type(x, [&](auto zero) {
    using T = decltype(zero);
    const T* a = x.const_data_ptr<T>();
    const T* b = y.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t n = x.numel();
    const auto sum = [](Pair p, Pair q) -> Pair { return {p.a + q.a, p.b + q.b}; };
    int64_t k = 0;
    for (; k + kBlock <= n; k += kBlock) store_pair(to + k, sum(load_pair(a + k), load_pair(b + k)));
    if (k < n) store_pair(to + k, sum(load_pair(a + k, n - k), load_pair(b + k, n - k)), n - k);
  });
  return out;
}

// Linears of one input: numbers [first, first + weights.size()) of their layer's.
struct JointLinears {
  size_t first;
  std::vector<at::Tensor> weights;
  c10::List<std::optional<at::Tensor>> scales, biases;
};

// What does not change from step to step. norms: before attention, before the MLP, of each query head and of each key
// head (the last two or neither); each with its eps and offset in norm_numbers. scale and what follows: see
// paged_attention.
struct DecoderLayer {
  JointLinears qkv, o, gate_up, down;
  std::vector<at::Tensor> norms;
  std::vector<double> norm_numbers;
  double scale;
  int64_t window;
  double softcap;
  std::optional<at::Tensor> sinks;
};

// One step's batch. cos, sin: [tokens, head_dim]; table: as for linears(); the rest: see write_kv and paged_attention.
struct DecoderStep {
  at::Tensor cos, sin;
  const std::optional<at::Tensor>& table;
  const at::Tensor& slot_mapping;
  const at::Tensor& slots;
  const at::Tensor& sequences;
};

// hidden: [tokens, hidden size], float32 or bfloat16, as everything else; bounds as for linears(), of all seven; keys,
// values: see write_kv.
inline at::Tensor run_layer(const DecoderLayer& layer, const at::Tensor& hidden, const DecoderStep& step,
                            at::IntArrayRef bounds, at::Tensor& keys, at::Tensor& values) {
  const int64_t tokens = step.slot_mapping.numel();
  const int64_t dim = keys.size(2);
  TORCH_CHECK(step.cos.numel() == tokens * dim && step.sin.numel() == tokens * dim && dim % 2 == 0 &&
                  values.size(2) == dim && step.cos.scalar_type() == hidden.scalar_type() &&
                  step.sin.scalar_type() == hidden.scalar_type(),
              "decoder layer: cos and sin must be [tokens, head_dim], of x's type");
  const auto norm = [&](const at::Tensor& rows, size_t i) {
    return rms_norm(rows, layer.norms[i], layer.norm_numbers[2 * i], layer.norm_numbers[2 * i + 1]);
  };
  const auto multiply = [&](const at::Tensor& rows, const JointLinears& joint) {
    const at::IntArrayRef own = step.table ? bounds.slice(2 * joint.first, 2 * joint.weights.size()) : bounds;
    return linears(rows, joint.weights, joint.scales, joint.biases, step.table, own);
  };

  std::vector<at::Tensor> qkv = multiply(norm(hidden, 0), layer.qkv);
  for (size_t i = 0; i < 2; ++i) {
    std::optional<at::Tensor> weight;
    if (layer.norms.size() == 4) weight = layer.norms[2 + i];
    const bool has = weight.has_value();
    rotate(qkv[i], dim, weight, has ? layer.norm_numbers[4 + 2 * i] : 0, has ? layer.norm_numbers[5 + 2 * i] : 0,
           step.cos, step.sin);
  }
  const auto heads = [&](const at::Tensor& rows) { return rows.view({tokens, -1, dim}); };
  write_kv(keys, values, step.slot_mapping, heads(qkv[1]), heads(qkv[2]));
  const at::Tensor attended = paged_attention(heads(qkv[0]), keys, values, step.slots, step.sequences, layer.scale,
                                              layer.window, layer.softcap, layer.sinks);
  const at::Tensor middle = sum_of(hidden, multiply(attended.view({tokens, -1}), layer.o)[0]);
  const std::vector<at::Tensor> gated = multiply(norm(middle, 1), layer.gate_up);
  return sum_of(middle, multiply(silu_mul(gated[0], gated[1]), layer.down)[0]);
}

// A model's layers of this kind, numbered as they are added. Python builds it once, and then runs layers one after
// another in one call: to hand over a layer's tensors each time, and to come back between layers, took 8% of a
// step of one token.
class DecoderLayers : public torch::CustomClassHolder {
 public:
  // weights, scales and biases: of q, k, v, o, gate, up, down; the rest: see DecoderLayer. Returns the layer's number.
  int64_t add(const std::vector<at::Tensor>& weights, const c10::List<std::optional<at::Tensor>>& scales,
              const c10::List<std::optional<at::Tensor>>& biases, std::vector<at::Tensor> norms,
              std::vector<double> norm_numbers, double scale, int64_t window, double softcap,
              std::optional<at::Tensor> sinks) {
    TORCH_CHECK(weights.size() == 7 && scales.size() == 7 && biases.size() == 7 &&
                    (norms.size() == 2 || norms.size() == 4) && norm_numbers.size() == 2 * norms.size(),
                "decoder layer: seven linears, two norms or four");
    const auto joint = [&](size_t first, size_t count) {
      JointLinears found;
      found.first = first;
      for (size_t i = first; i < first + count; ++i) {
        found.weights.push_back(weights[i]);
        found.scales.push_back(scales.get(i));
        found.biases.push_back(biases.get(i));
      }
      return found;
    };
    layers_.push_back({joint(0, 3), joint(3, 1), joint(4, 2), joint(6, 1), std::move(norms), std::move(norm_numbers),
                       scale, window, softcap, std::move(sinks)});
    return static_cast<int64_t>(layers_.size()) - 1;
  }

  // The layers of these numbers one after another, the first given x [..., hidden size]; keys, values: of each; bounds:
  // of each, one after another, or empty without a table. Returns the last one's output, of x's shape.
  at::Tensor run(const std::vector<int64_t>& numbers, const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                 const std::optional<at::Tensor>& table, const std::vector<int64_t>& bounds,
                 std::vector<at::Tensor> keys, std::vector<at::Tensor> values, const at::Tensor& slot_mapping,
                 const at::Tensor& slots, const at::Tensor& sequences) const {
    const size_t count = numbers.size();
    constexpr size_t kBounds = 14;
    TORCH_CHECK(keys.size() == count && values.size() == count && (!table || bounds.size() == kBounds * count),
                "decoder layers: keys, values and ", kBounds, " bounds for each");
    const int64_t tokens = slot_mapping.numel();
    const DecoderStep step{cos.contiguous(), sin.contiguous(), table, slot_mapping, slots, sequences};
    at::Tensor hidden = x.contiguous().view({tokens, -1});
    for (size_t i = 0; i < count; ++i) {
      const at::IntArrayRef own = table ? at::IntArrayRef(bounds).slice(kBounds * i, kBounds) : at::IntArrayRef();
      hidden = run_layer(layers_.at(numbers[i]), hidden, step, own, keys[i], values[i]);
    }
    return hidden.view(x.sizes());
  }

 private:
  std::vector<DecoderLayer> layers_;
};

}  // namespace adapterd
