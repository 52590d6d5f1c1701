// The operators of torch.ops.adapterd. Python's side of each, and what it must equal: linear_cpu.py, lora_cpu.py,
// attention_cpu.py, pointwise_cpu.py and layer_cpu.py in the folder above.

#include "layer.h"

#include <torch/library.h>

TORCH_LIBRARY(adapterd, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scales=None) -> Tensor", adapterd::linear);
  m.def(
      "linears(Tensor x, Tensor[] weights, Tensor?[] scales, Tensor?[] biases, Tensor? table, int[] bounds) -> Tensor[]",
      adapterd::linears);
  m.def("add_lora(Tensor(a!) y, Tensor x, Tensor table, int first, int last) -> ()", adapterd::add_lora);
  m.def(
      "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor slots, Tensor sequences, float scale, "
      "int window, float softcap, Tensor? sinks) -> Tensor",
      adapterd::paged_attention);
  m.def("write_kv(Tensor(a!) keys, Tensor(b!) values, Tensor slot_mapping, Tensor key, Tensor value) -> ()",
        adapterd::write_kv);
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor", adapterd::silu_mul);
  m.class_<adapterd::DecoderLayers>("DecoderLayers")
      .def(torch::init<>())
      .def("add", &adapterd::DecoderLayers::add)
      .def("run", &adapterd::DecoderLayers::run);
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor", adapterd::rms_norm);
}
