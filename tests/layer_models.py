"""Models of a few layers of any family, and their logits with and without adapters: what fused layers are held to."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from adapterd.model.attention import ATTENTION_NAME, register_attention
from adapterd.model.kernels import TORCH_KERNELS, Kernels
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool
from adapterd.model.lora import LoraProduct, Segment
from adapterd.model.seams import Seams, attach_seams
from tests.exactness.families import FAMILIES


def model_of(family: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """With random weights, biases too; the same at every call."""
    register_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family](), dtype=dtype, attn_implementation=ATTENTION_NAME
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(device).eval().requires_grad_(False)


@torch.inference_mode()
def logits(model: Any, kernels: Kernels, seams: Seams, segments: tuple[Segment, ...]) -> torch.Tensor:
    lengths = [9, 1, 6]
    pool = KVPool(seams.kv_shapes, len(lengths), model.dtype, model.device)
    slots = [i * KV_BLOCK_SIZE + torch.arange(length) for i, length in enumerate(lengths)]
    seams.lora_step.begin(segments, sum(lengths))
    output = model(
        input_ids=torch.arange(3, 3 + sum(lengths), device=model.device)[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths]).to(model.device)[None],
        use_cache=False,
        paged=kernels.paged_context(pool, slots, lengths),
    )
    return output.logits[0].float().cpu()


def with_adapters(plain: Any) -> tuple[tuple[Segment, ...], torch.Tensor]:
    """An adapter for every linear on some of the tokens, and what it makes of the logits, by torch's kernels."""
    seams = attach_seams(plain, TORCH_KERNELS)
    products = {
        path: (
            LoraProduct(
                torch.randn(3, d_in).to(plain.device), torch.randn(3, d_out).to(plain.device) / 40, 0.5
            ),
        )
        for path, (d_out, d_in) in seams.targets.items()
    }
    segments = (Segment(4, 12, products),)
    expected = logits(plain, TORCH_KERNELS, seams, segments)
    assert not torch.allclose(expected, logits(plain, TORCH_KERNELS, seams, ()), atol=1e-3)
    return segments, expected
