"""A base of a real shape and adapters for it, random, made on the device in seconds and written nowhere.

Speed does not depend on what the weights say. For files that other servers can read, see bench/models.py.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from adapterd.adapter import Adapter
from adapterd.core import AdapterDigest, AdapterId, BaseSpec
from adapterd.deltas import LoraMatrices
from adapterd.model.attention import ATTENTION_NAME, register_attention
from adapterd.model.base import Base, base_of
from adapterd.model.checkpoint import QuantizationName
from adapterd.model.kernels import KernelName


def random_base(
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kernels: KernelName = "auto",
    quantization: QuantizationName = "none",
    seed: int = 0,
) -> Base:
    """A model of this configuration as the daemon would serve it; weights as the family draws them."""
    register_attention()
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    return base_of(
        model,
        device,
        name="random",
        root="random",
        directory=Path("random"),
        max_model_len=config.max_position_embeddings,
        kernels=kernels,
        quantization=quantization,
    )


def random_matrices(
    spec: BaseSpec, rank: int, device: torch.device, dtype: torch.dtype
) -> tuple[LoraMatrices, ...]:
    """Of one adapter over every linear, in host memory; drawn on the device, which is quicker."""
    return tuple(
        LoraMatrices(
            path,
            (torch.randn(rank, d_in, device=device, dtype=dtype) * d_in**-0.5).cpu(),
            (torch.randn(d_out, rank, device=device, dtype=dtype) * 0.1 * rank**-0.5).cpu(),
            2.0,
        )
        for path, (d_out, d_in) in spec.lora_targets.items()
    )


def adapter_of(name: str, modules: Sequence[LoraMatrices]) -> Adapter:
    """A version of its own. Several may have one set of matrices: to the device they are as good as others."""
    return Adapter(
        id=AdapterId(AdapterDigest(hashlib.sha256(name.encode()).hexdigest()), name),
        path=Path(name),
        modules=tuple(modules),
        max_rank=max(matrices.rank for matrices in modules),
        num_bytes=sum(matrices.a.nbytes + matrices.b.nbytes for matrices in modules),
        base_model_name=None,
        chat_template=None,
        eos_token_ids=None,
        generation_defaults={},
    )
