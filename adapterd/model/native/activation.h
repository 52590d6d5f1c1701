// silu(gate) * up: what stands between the two halves of most models' MLP.

#pragma once

#include "linear.h"

namespace adapterd {

inline Vec silu(Vec x) {
  const Vec zero{};
  const Vec e = exp_negative(x < zero ? x : -x);  // e^-|x|, which cannot overflow
  const Vec one = splat(1.0f);
  return x * (x < zero ? e : one) / (one + e);
}

// gate, up: [..., n], one shape and type, float32 or bfloat16. In float32, rounded once.
inline at::Tensor silu_mul(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type() && gate.is_contiguous() &&
                  up.is_contiguous(),
              "silu_mul: gate and up must be contiguous and of one shape and type");
  TORCH_CHECK(gate.scalar_type() == at::kFloat || gate.scalar_type() == at::kBFloat16,
              "silu_mul: float32 or bfloat16, not ", gate.scalar_type());
  at::Tensor out = at::empty(gate.sizes(), gate.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* g = gate.const_data_ptr<T>();
    const T* u = up.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    const auto product = [](Pair a, Pair b) -> Pair { return {silu(a.a) * b.a, silu(a.b) * b.b}; };
    const int64_t n = gate.numel();
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    share_ranges(blocks, 16 * kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * kBlock; k < std::min(end * kBlock, n); k += kBlock) {
        if (k + kBlock <= n) {
          store_pair(y + k, product(load_pair(g + k), load_pair(u + k)));
        } else {
          store_pair(y + k, product(load_pair(g + k, n - k), load_pair(u + k, n - k)), n - k);
        }
      }
    });
  };
  if (gate.scalar_type() == at::kFloat) {
    run(float{});
  } else {
    run(bf16{});
  }
  return out;
}

}  // namespace adapterd
