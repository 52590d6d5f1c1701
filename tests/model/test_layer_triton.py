"""Layers of the Llama kind run fused on a CUDA device, and compute what they computed before."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adapterd.model.base import Base, load_base
from adapterd.model.int8 import quantize_linears
from adapterd.model.lora import LoraLinear, LoraProduct, Segment
from adapterd.model.seams import attach_seams
from tests.exactness.families import FAMILIES, save_model
from tests.triton_kernels import DEVICE

from adapterd.model.kernels import TORCH_KERNELS, Kernels, choose_kernels  # isort: skip
from adapterd.model.layer_triton import TritonLayer  # isort: skip  (needs the interpreter's setting)


def triton_kernels(dtype: torch.dtype = torch.float32) -> Kernels:
    return choose_kernels("triton", DEVICE, dtype)


def fused_layers(model: nn.Module) -> list[TritonLayer]:
    return [m.forward for m in model.modules() if isinstance(m.__dict__.get("forward"), TritonLayer)]


def base_of(directory: Path, kernels: str) -> Base:
    device = "cuda" if DEVICE.type == "cuda" else "cpu"
    return load_base(str(directory), device=device, kernels=kernels)  # type: ignore[arg-type]


@torch.inference_mode()
def logits(base: Base, segments: tuple[Segment, ...]) -> torch.Tensor:
    from adapterd.model.kv import KV_BLOCK_SIZE, KVPool

    lengths = [19, 1, 6]
    pool = KVPool(base.kv_shapes, 4 * len(lengths), base.dtype, base.device)
    slots = [4 * i * KV_BLOCK_SIZE + torch.arange(length) for i, length in enumerate(lengths)]
    base.lora_step.begin(segments, sum(lengths))
    output = base.model(
        input_ids=torch.arange(3, 3 + sum(lengths), device=base.device)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths]).to(base.device)[None],
        use_cache=False,
        paged=base.paged_context(pool, slots, lengths),
    )
    return output.logits[0].float().cpu()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_layer_is_fused_and_adds_adapters_to_the_same_tokens(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    plain, fused = base_of(tmp_path, "torch"), base_of(tmp_path, "triton")
    assert len(fused_layers(fused.model)) == plain.model.config.num_hidden_layers
    products = {
        path: (LoraProduct(torch.randn(3, d_in).to(DEVICE), torch.randn(3, d_out).to(DEVICE) / 40, 0.5),)
        for path, (d_out, d_in) in plain.spec.lora_targets.items()
    }
    segments = (Segment(4, 20, products),)
    expected = logits(plain, segments)
    found = logits(fused, segments)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)
    assert not torch.allclose(expected, logits(plain, ()), atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("is_int8", [False, True])
def test_parameters_keep_their_names_values_and_memory(is_int8: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES["qwen2"](), dtype=torch.float32, attn_implementation="adapterd_paged"
    )
    if is_int8:
        quantize_linears(model)
    model = model.to(DEVICE).eval().requires_grad_(False)
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


def test_a_layer_that_is_not_of_the_kind_keeps_its_own_forward(tmp_path: Path) -> None:
    save_model("gemma2", tmp_path)
    assert fused_layers(base_of(tmp_path, "triton").model) == []


def test_torch_kernels_leave_layers_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        FAMILIES["llama"](), dtype=torch.float32, attn_implementation="adapterd_paged"
    ).eval()
    attach_seams(model, TORCH_KERNELS)
    assert fused_layers(model) == []
