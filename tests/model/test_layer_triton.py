"""Layers of the Llama kind run fused on a CUDA device, and compute what they computed before."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from adapterd.errors import BaseRefused
from adapterd.model.int8 import quantize_linears
from adapterd.model.kv import KVShape
from adapterd.model.layers import LayerParts, use_fused_layers
from adapterd.model.lora import LoraLinear, LoraProduct, Segment
from adapterd.model.seams import attach_seams, attend_once
from bench.random_models import random_base
from tests import layer_models
from tests.layer_models import logits, with_adapters
from tests.triton_kernels import DEVICE

from adapterd.model.kernels import TORCH_KERNELS, Kernels, choose_kernels  # isort: skip
from adapterd.model.attention_triton import triton_context  # isort: skip
from adapterd.model.layer_triton import TritonLayer  # isort: skip  (needs the interpreter's setting)
from triton.runtime.errors import OutOfResources  # isort: skip


def triton_kernels(dtype: torch.dtype = torch.float32) -> Kernels:
    return choose_kernels("triton", DEVICE, dtype)


def fused_layers(model: nn.Module) -> list[TritonLayer]:
    return [m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), TritonLayer)]


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return layer_models.model_of(family, DEVICE, dtype)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_every_layer_is_fused_and_adds_adapters_to_the_same_tokens(family: str) -> None:
    segments, expected = with_adapters(model_of(family))
    fused = model_of(family)
    fused_seams = attach_seams(fused, triton_kernels())
    assert len(fused_layers(fused)) == fused.config.num_hidden_layers
    found = logits(fused, triton_kernels(), fused_seams, segments)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 6e-2), (torch.float16, 8e-3)], ids=str)
def test_layers_of_16_bits_are_fused_too(
    dtype: torch.dtype, bound: float, caplog: pytest.LogCaptureFixture
) -> None:
    exact, fused = model_of("qwen3"), model_of("qwen3", dtype)
    exact.load_state_dict({name: tensor.float() for name, tensor in fused.state_dict().items()})
    exact_seams = attach_seams(exact, TORCH_KERNELS)
    with caplog.at_level(logging.INFO, "adapterd.model.layers"):
        fused_seams = attach_seams(fused, triton_kernels(dtype))
    assert "3 of 3 decoder layers run fused" in caplog.messages
    a, b_t = (
        {path: torch.randn(3, sizes[i]).to(DEVICE, dtype) / 8 for path, sizes in exact_seams.targets.items()}
        for i in (1, 0)
    )
    products, widened = (
        {path: (LoraProduct(a[path].to(kind), b_t[path].to(kind), 0.5),) for path in a}
        for kind in (dtype, torch.float32)
    )
    expected = logits(exact, TORCH_KERNELS, exact_seams, (Segment(4, 12, widened),))
    found = logits(fused, triton_kernels(dtype), fused_seams, (Segment(4, 12, products),))
    assert (found - expected).abs().max() < bound * expected.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("is_int8", [False, True])
def test_parameters_keep_their_names_values_and_memory(is_int8: bool) -> None:
    model = model_of("qwen2")
    if is_int8:
        quantize_linears(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach_seams(model, triton_kernels())
    assert len(fused_layers(model)) == model.config.num_hidden_layers
    after = {name.replace(".inner.", "."): tensor for name, tensor in model.state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    q, k = (model.get_submodule(f"model.layers.0.self_attn.{name}") for name in ("q_proj", "k_proj"))
    assert isinstance(q, LoraLinear)
    first, second = (m.inner.values if is_int8 else m.inner.weight for m in (q, k))
    assert second.data_ptr() == first.data_ptr() + first.nbytes


@pytest.mark.parametrize(
    ("family", "num_fused", "reason"),
    [
        ("gemma2", 0, "3 not: their MLP is not down(silu(gate) * up)"),
        ("olmo2", 0, "3 not: input_layernorm is no RMSNorm of one weight"),
        ("phi3", 0, "3 not: they have other linears than Llama's"),
        ("granite", 0, "3 not: they compute something else"),
        ("smollm3", 2, "1 not: they compute something else"),
    ],
)
def test_a_layer_that_is_not_of_the_kind_keeps_its_own_forward_and_the_log_says_why(
    family: str, num_fused: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(family)
    with caplog.at_level(logging.INFO, "adapterd.model.layers"):
        attach_seams(model, triton_kernels())
    assert len(fused_layers(model)) == num_fused
    assert f"{num_fused} of 3 decoder layers run fused; {reason}" in caplog.messages


class TooLarge(TritonLayer):
    """Its kernels find no room on the chip."""

    def compute(self, *_: Any) -> torch.Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")


def test_a_layer_that_finds_no_room_on_the_chip_keeps_its_own_forward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fuse(model: Any, step: Any, shapes: Mapping[int, KVShape], run: object) -> None:
        def make(parts: LayerParts, layer: nn.Module) -> TooLarge:
            linears = [linear.inner for linear in parts.linears]
            return TooLarge(parts, linears, layer.forward, step)

        use_fused_layers(model, shapes, triton_context, make)

    model = model_of("llama")
    with caplog.at_level(logging.INFO, "adapterd.model.layers"):
        attach_seams(model, replace(triton_kernels(), fuse=fuse))
    assert fused_layers(model) == []
    assert "0 of 3 decoder layers run fused; 3 not: out of resource: shared memory" in caplog.text


def heads_too_wide() -> transformers.LlamaConfig:
    """Of more numbers than Triton takes at a time."""
    return transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1 << 17,
        vocab_size=32,
        max_position_embeddings=64,
    )


def test_a_base_whose_attention_the_kernels_cannot_compute_gets_others_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(BaseRefused, match="the Triton kernels cannot compute this base's attention here"):
        random_base(heads_too_wide(), DEVICE, torch.float32, kernels="triton")
    base = random_base(heads_too_wide(), DEVICE, torch.float32, kernels="torch")
    attend = partial(attend_once, base.model)
    assert choose_kernels("auto", torch.device("cuda"), torch.float32, attend) is TORCH_KERNELS
    assert "run through torch's own operators: the Triton kernels cannot compute" in caplog.text


def test_torch_kernels_leave_layers_alone() -> None:
    model = model_of("llama")
    attach_seams(model, TORCH_KERNELS)
    assert fused_layers(model) == []
