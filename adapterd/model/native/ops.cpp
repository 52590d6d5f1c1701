// The operators of torch.ops.adapterd. Python's side of each, and what it must equal: linear_cpu.py, lora_cpu.py,
// attention_cpu.py and norm_cpu.py in the folder above.

#include "attention.h"
#include "linear.h"
#include "lora.h"
#include "norm.h"

#include <torch/library.h>

TORCH_LIBRARY(adapterd, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", adapterd::linear);
  m.def("add_lora(Tensor(a!) y, Tensor x, Tensor table, int first, int last) -> ()", adapterd::add_lora);
  m.def(
      "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor sequences, float scale, "
      "int window, float softcap, Tensor? sinks) -> Tensor",
      adapterd::paged_attention);
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor", adapterd::rms_norm);
}
